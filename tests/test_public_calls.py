"""Every public function, called with one argument at a time replaced by something it cannot be: it works or says what is wrong."""

import re
from collections.abc import Callable, Iterator

import pytest
from public_calls import (
    Call,
    loss_calls,
    metric_calls,
    wrong_values,
)

from moe_posterior.errors import MoEPosteriorError

PARTS = [metric_calls, loss_calls]


def _mistake(call: Call, name: str, wrong: object) -> str | None:
    """What is wrong with how this call takes a wrong value of this argument; None if it works or refuses it well."""
    try:
        call.function(**{**call.arguments, name: wrong})
    except MoEPosteriorError as error:
        # Two arguments that do not fit together may be refused by the name of either.
        named = any(re.search(rf"\b{argument}\b", str(error)) for argument in call.arguments)
        return None if named else f"names no argument: {error}"
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error)[:80]}"
    return None


@pytest.mark.parametrize("calls", PARTS, ids=lambda calls: calls.__name__)
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_argument_is_refused_by_name_and_by_no_error_of_others(calls: Callable[[], Iterator[Call]]) -> None:
    mistakes = []
    for call in calls():
        call.function(**call.arguments)  # else the rest would prove nothing
        for name, valid in call.arguments.items():
            for kind, wrong in wrong_values(valid).items():
                mistake = _mistake(call, name, wrong)
                mistakes += [f"{call.name}({name}={kind}) {mistake}"] if mistake else []
    assert not mistakes, "\n".join(mistakes)
