"""The calibration report of a model, from the model itself and loaders of its data.

Dimensions: n rows of a batch, K classes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_posterior.checks.validation import described
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.evaluation.arrays import MODEL_FIELDS, numbers
from moe_posterior.evaluation.measure import evaluate
from moe_posterior.evaluation.result import CalibrationReport

__all__ = ["evaluate_model"]

LABELS = ("labels", "label", "target")


def evaluate_model(
    model: Callable[..., Any],
    loaders: Mapping[str, Iterable[Any]] | Iterable[Any],
    *,
    logits: bool = False,
    calibration: Iterable[Any] | None = None,
    **settings: Any,
) -> CalibrationReport:
    """Run a model over data and report the calibration of what it predicts.

    Args:
        model: a module or any callable; it returns the (n, K) probabilities, an object with ``logits`` as transformers' models do, or
            a mapping with ``probs`` or ``logits`` and, where there are some, ``routing_weights`` and ``expert_probs``. A
            text-classification pipeline of transformers is one too, given its texts; its labels are names.
        loaders: an iterable of batches for the main set, or several by name, the main set first and then one per shift. A batch is a
            pair (inputs, labels), or a mapping with ``labels``, whose other values are the model's keyword arguments.
        logits: whether a plain tensor that the model returns holds logits.
        calibration: batches on which calibrators are fitted and the action threshold is chosen; by default a part of the main set.
        settings: as for :func:`~moe_posterior.evaluation.evaluate`: ``class_names``, ``name``, ``max_risk``, ``seed``, …

    The model is in evaluation mode meanwhile, and no gradients are kept. Its inputs are moved to its device.

    Raises:
        InvalidArgumentError: a loader without batches, or outputs that do not fit.

    >>> loader = [(torch.randn(64, 4), torch.randint(3, (64,))) for _ in range(4)]
    >>> evaluate_model(nn.Linear(4, 3), loader, logits=True, resamples=100).to_dict()["arms"]
    ['model']
    """
    named = loaders if isinstance(loaders, Mapping) else {"": loaders}
    if not named:
        raise InvalidArgumentError("loaders must hold at least one loader; got none")
    names = _names(model)
    settings = {"class_names": names, **settings} if names else settings
    with _evaluating(model), torch.no_grad():
        main, *further = [_predicted(model, loader, name, logits, names) for name, loader in named.items()]
        held = None if calibration is None else _predicted(model, calibration, "calibration", logits, names)
    shifts = dict(zip(list(named)[1:], further, strict=True))
    return evaluate(**main, shifts=shifts or None, calibration=held, **settings)


def _predicted(
    model: Callable[..., Any], loader: Iterable[Any], name: str, logits: bool, names: list[str] | None
) -> dict[str, Any]:
    parts: list[dict[str, np.ndarray]] = []
    for batch in loader:
        inputs, keywords, labels = _read(batch)
        device = next((one.device for one in model.parameters()), None) if isinstance(model, nn.Module) else None
        output = model(
            *(_moved(one, device) for one in inputs), **{key: _moved(one, device) for key, one in keywords.items()}
        )
        found = _fields(output, logits) if names is None else {"probs": _of_pipeline(output, names)}
        parts.append({**found, "target": np.asarray(labels.detach().cpu() if torch.is_tensor(labels) else labels)})
    if not parts:
        raise InvalidArgumentError(f"loaders must hold at least one batch each; got none of {name or 'the main set'!r}")
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _read(batch: Any) -> tuple[tuple, dict[str, Any], Any]:
    """Positional inputs, keyword inputs and labels of a batch."""
    if isinstance(batch, Mapping):
        key = next((key for key in LABELS if key in batch), None)
        if key is not None:
            return (), {name: value for name, value in batch.items() if name != key}, batch[key]
    elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return tuple(batch[:-1]), {}, batch[-1]
    raise InvalidArgumentError(
        f"a batch must be (inputs, labels) or a mapping with one of {LABELS}; got {described(batch)}"
    )


def _fields(output: Any, logits: bool) -> dict[str, np.ndarray]:
    """The parts of a model's output that the report reads, as probabilities."""
    if isinstance(output, Mapping) and "probs" in output:
        return {key: numbers(key, output[key]) for key in MODEL_FIELDS if output.get(key) is not None}
    said = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if said is None and torch.is_tensor(output):
        said, logits = (output, True) if logits else (None, False)
        if said is None:
            return {"probs": numbers("the model's output", output)}
    if said is None:
        raise InvalidArgumentError(
            f"model must return a tensor, or something with probs or logits; got {described(output)}"
        )
    more = ("routing_weights", "configurations")
    extra = {key: output[key] for key in more if isinstance(output, Mapping) and output.get(key) is not None}
    probs = torch.softmax(torch.from_numpy(numbers("the model's logits", said)).float(), dim=1).numpy()
    return {"probs": probs, **{key: numbers(key, value) for key, value in extra.items()}}


def _names(model: Any) -> list[str] | None:
    """The classes of a text-classification pipeline; None for any other model."""
    if "TextClassificationPipeline" not in {kind.__name__ for kind in type(model).__mro__}:
        return None
    labels = model.model.config.id2label
    return [labels[index] for index in sorted(labels)]


def _of_pipeline(output: Any, names: list[str]) -> np.ndarray:  # (n, K)
    scores = [{one["label"]: one["score"] for one in row} if isinstance(row, list) else {} for row in output]
    if not all(set(row) == set(names) for row in scores):
        raise InvalidArgumentError("a pipeline must give the score of every class: make it with top_k=None")
    return np.array([[row[name] for name in names] for row in scores])


def _moved(value: Any, device: torch.device | None) -> Any:
    return value.to(device) if torch.is_tensor(value) and device is not None else value


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    module = model if isinstance(model, nn.Module) else None
    modes = {} if module is None else {one: one.training for one in module.modules()}
    if module is not None:
        module.eval()
    try:
        yield
    finally:
        for one, training in modes.items():
            one.training = training
