"""Every public function, called with one argument at a time replaced by something it cannot be: it works or says what is wrong."""

import re
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path

import pytest
from public_calls import (
    Call,
    belief_calls,
    calibrator_calls,
    evaluation_calls,
    gate_calls,
    guarantee_calls,
    loss_calls,
    metric_calls,
    model_calls,
    monitor_calls,
    router_calls,
    wrong_values,
)

from moe_posterior.errors import MoEPosteriorError

# What the message may call an argument in place of its name.
WORDS = {
    "folder": "audit log",
    "embeddings": "hidden",
    "embedding": "hidden",
    "outcomes": "outcome",
    "outcome": "outcomes",
    "decision_id": "decision",
}
# Not held to it: the arithmetic of moe_posterior.beta and moe_posterior.evidence, which takes tensors alone and runs inside every
# routing, where a look at each argument would cost more than the sum; moe_posterior.serving.choose, which an engine compiles; and
# the plain records (named tuples, frozen dataclasses), which hold whatever they are given and are checked by what takes them.
PARTS = [
    metric_calls,
    loss_calls,
    calibrator_calls,
    evaluation_calls,
    monitor_calls,
    gate_calls,
    guarantee_calls,
    belief_calls,
    router_calls,
    model_calls,
]


MODULES = [
    import_module(f"moe_posterior{part}")
    for part in (
        "",
        ".gates",
        ".metrics",
        ".losses",
        ".calibrators",
        ".guarantees",
        ".monitoring",
        ".serving",
        ".audit",
        ".replay",
    )
]
NOT_WALKED = {
    *("BeliefGate", "Calibrator", "CustomRouting", "Gate"),  # abstract: walked in what derives from them
    *("CalibrationReport", "Reader", "Replay"),  # made by functions that are walked, not by users
    *("Weights", "choose"),  # a type alias; see above
    *("restore_gates", "swap_gates"),  # they need a model of transformers: tests/huggingface
    *("fit_gates", "warm_start_gates"),  # what is wrong with a batch or a loss is the model's to say: tests/huggingface
}


def _is_record(found: object) -> bool:
    return isinstance(found, type) and (issubclass(found, tuple) or is_dataclass(found))


def _mistake(call: Call, name: str, wrong: object) -> str | None:
    """What is wrong with how this call takes a wrong value of this argument; None if it works or refuses it well."""
    try:
        call.function(**{**call.arguments, name: wrong})
    except MoEPosteriorError as error:
        # Two arguments that do not fit together may be refused by the name of either.
        words = [*call.arguments, *(WORDS[argument] for argument in call.arguments if argument in WORDS)]
        named = any(re.search(rf"\b{word}\b", str(error)) for word in words)
        return None if named else f"names no argument: {error}"
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error)[:80]}"
    return None


@pytest.mark.parametrize("calls", PARTS, ids=lambda calls: calls.__name__)
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_argument_is_refused_by_name_and_by_no_error_of_others(
    calls: Callable[[], Iterator[Call]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # "x" is a fine path
    mistakes = []
    for call in calls():
        call.function(**call.arguments)  # else the rest would prove nothing
        for name, valid in call.arguments.items():
            for kind, wrong in wrong_values(valid).items():
                mistake = _mistake(call, name, wrong)
                mistakes += [f"{call.name}({name}={kind}) {mistake}"] if mistake else []
    assert not mistakes, "\n".join(mistakes)


def test_every_public_function_and_class_is_walked_or_said_not_to_be() -> None:
    public = {name: getattr(part, name) for part in MODULES for name in part.__all__}
    walked = {call.name.split(".")[0] for calls in PARTS for call in calls()}
    errors = {name for name, found in public.items() if isinstance(found, type) and issubclass(found, Exception)}
    records = {name for name, found in public.items() if _is_record(found)}
    assert set(public) - walked - errors - records == NOT_WALKED
