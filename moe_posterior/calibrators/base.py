"""What every calibrator shares: the outputs it reads, its checks, and how its state is kept.

Dimensions: N rows, K classes, E experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from moe_posterior.calibrators.probabilities import keep_top, top_label
from moe_posterior.checks.validation import described, is_empty_list, tensor
from moe_posterior.errors import InvalidArgumentError, NotFittedError
from moe_posterior.precision import FixedPrecision, outlasting


class Outputs(NamedTuple):
    """What a routed model says about N rows; a calibrator asks for the fields it needs.

    >>> outputs = Outputs(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), configuration=torch.tensor([4, 7]))
    >>> outputs.rows(torch.tensor([1])).configuration
    tensor([7])
    """

    probs: Tensor  # (N, K) of the aggregate
    expert_probs: Tensor | None = None  # (N, E, K)
    routing_weights: Tensor | None = None  # (N, E), 0 for experts that were not chosen
    configuration: Tensor | None = None  # (N,) int64, id of (cluster, chosen experts)
    novelty: Tensor | None = None  # (N,) distance / cluster radius, 1 on the edge
    disagreement: Tensor | None = None  # (N,)
    domain: Tensor | None = None  # (N,) int64

    def rows(self, index: Tensor) -> "Outputs":  # (M,) int64 or (N,) bool
        """The same fields of some rows."""
        rest = {
            name: None if field is None else field[index]
            for name, field in zip(self._fields[1:], self[1:], strict=True)
        }
        return Outputs(self.probs[index], **rest)


class Calibrator(FixedPrecision, ABC):
    """Base of all calibrators: checks, the ``fitted`` flag, and buffers that take the shape of the state they load.

    The state is float64 and survives every cast of a model that holds the calibrator: its output stays the same bit for bit.
    A child registers its state as buffers and writes ``_fit`` and ``_calibrate``, both in float64 and without gradients.
    """

    fit_needs: ClassVar[tuple[str, ...]] = ()  # fields of Outputs that fit requires
    call_needs: ClassVar[tuple[str, ...]] = ()  # and those that a call requires
    keeps_top_label: ClassVar[bool] = True

    fitted: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    __call__: Callable[..., Tensor]

    @torch.inference_mode(False)  # some fits use gradients
    @torch.no_grad()
    def fit(
        self,
        outputs: Outputs,
        target: Tensor,  # (N,) classes
    ) -> Self:
        """Learn the map from validation rows, forgetting any earlier fit; the same rows give the same map.

        Raises:
            InvalidArgumentError: no rows, a field that is missing, or shapes and values that do not fit.
        """
        outputs = read_outputs(outputs, self.fit_needs)
        target = read_target(outputs.probs, target)
        outputs = Outputs._make(None if field is None else outlasting(field) for field in outputs)
        target = outlasting(target)
        self._fit(outputs._replace(probs=outputs.probs.double()), target)
        self.fitted.fill_(True)
        return self

    @torch.no_grad()
    def forward(self, outputs: Outputs) -> Tensor:  # -> (N, K)
        """Calibrated probabilities in the dtype of ``outputs.probs``, at least float32.

        Raises:
            NotFittedError: before ``fit``.
            InvalidArgumentError: a field that is missing, or shapes and values that do not fit.
        """
        self.require_fitted()
        outputs = read_outputs(outputs, self.call_needs)
        calibrated = self._calibrate(outputs._replace(probs=outputs.probs.double()))
        calibrated = calibrated.to(torch.promote_types(outputs.probs.dtype, torch.float32))
        return keep_top(calibrated, top_label(outputs.probs)) if self.keeps_top_label else calibrated

    def require_fitted(self) -> None:
        """Raise NotFittedError unless ``fit`` was called or a fitted state was loaded."""
        self.require_precision()
        if not self.fitted:
            raise NotFittedError(f"{type(self).__name__} must be fitted on validation rows before it is called")

    @abstractmethod
    def _fit(self, outputs: Outputs, target: Tensor) -> None: ...

    @abstractmethod
    def _calibrate(self, outputs: Outputs) -> Tensor: ...

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # The number of configurations, bins or domains comes from the saved state; a fresh instance does not know it.
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if buffer is not None and saved is not None and saved.shape != buffer.shape:
                self._buffers[name] = buffer.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def read_outputs(outputs: Outputs, needs: tuple[str, ...]) -> Outputs:
    """Outputs whose fields are tensors or arrays of any type, ids as int64.

    Raises:
        InvalidArgumentError: values that are not probabilities, fields of different lengths, or a missing field.
    """
    if not isinstance(outputs, Outputs):
        raise InvalidArgumentError(f"outputs must be Outputs(probs, ...); got {described(outputs)}")
    fields = {name: tensor(f"outputs.{name}", field) for name, field in outputs._asdict().items() if field is not None}
    if "probs" not in fields:
        raise InvalidArgumentError("outputs.probs must be given; got None")
    for name in ("configuration", "domain"):
        if name in fields and not fields[name].is_floating_point() and fields[name].dtype != torch.bool:
            fields[name] = fields[name].to(torch.int64)
    for name, field in fields.items():
        if field.is_floating_point() and field.dtype.itemsize == 1:  # float8, which torch does not compare
            fields[name] = field.float()
    outputs = Outputs(**fields)
    _validate(outputs, needs)
    return outputs


def _validate(outputs: Outputs, needs: tuple[str, ...]) -> None:
    probs = outputs.probs
    if not probs.is_floating_point() or probs.ndim != 2 or probs.shape[1] < 1:
        raise InvalidArgumentError(
            f"outputs.probs must be floating point of shape (N, K); got {probs.dtype} of shape {tuple(probs.shape)}"
        )
    for name in needs:
        if getattr(outputs, name) is None:
            raise InvalidArgumentError(f"outputs.{name} must be given to this calibrator; got None")
    for name, field in zip(outputs._fields, outputs, strict=True):
        if field is not None and (field.ndim == 0 or len(field) != len(probs)):
            raise InvalidArgumentError(f"outputs.{name} must have {len(probs)} rows; got shape {tuple(field.shape)}")
    _validate_fields(outputs)
    inside = (probs >= -1e-5) & (probs <= 1 + 1e-2)  # False for NaN; half precision rounds that coarsely
    total = probs.double().sum(1)
    if not inside.all() or ((total - 1).abs() > 1e-2).any():
        row = int((~inside.all(1) | ((total - 1).abs() > 1e-2)).nonzero()[0])
        raise InvalidArgumentError(
            f"outputs.probs must be probabilities that sum to 1; got {probs[row].tolist()} in row {row}"
        )


def _validate_fields(outputs: Outputs) -> None:
    for name in ("configuration", "domain"):
        field = getattr(outputs, name)
        if field is not None and (field.ndim != 1 or field.dtype != torch.int64):
            raise InvalidArgumentError(
                f"outputs.{name} must be int64 of shape (N,); got {field.dtype} of shape {tuple(field.shape)}"
            )
    for name in ("novelty", "disagreement"):
        field = getattr(outputs, name)
        if field is not None and (field.ndim != 1 or field.isnan().any() or (field < 0).any()):
            wrong = field[~(field >= 0)][:1].tolist()
            raise InvalidArgumentError(
                f"outputs.{name} must be at least 0 and of shape (N,); got shape {tuple(field.shape)}, values {wrong}"
            )
    experts, weights = outputs.expert_probs, outputs.routing_weights
    if experts is not None and (experts.ndim != 3 or experts.shape[2] != outputs.probs.shape[1]):
        raise InvalidArgumentError(
            f"outputs.expert_probs must have shape (N, E, {outputs.probs.shape[1]}); got {tuple(experts.shape)}"
        )
    if experts is not None and not ((experts >= -1e-3) & (experts <= 1 + 1e-3)).all():
        raise InvalidArgumentError("outputs.expert_probs must be probabilities in [0, 1]; got values outside, or NaN")
    if weights is not None and (
        weights.ndim != 2 or not ((weights >= 0) & (weights < torch.inf)).all() or not (weights.sum(1) > 0).all()
    ):
        raise InvalidArgumentError(
            "outputs.routing_weights must have shape (N, E), be at least 0, finite and not all 0 in a row; "
            f"got shape {tuple(weights.shape)}, {weights.tolist()[:1]} ..."
        )
    if experts is not None and weights is not None and weights.shape != experts.shape[:2]:
        raise InvalidArgumentError(
            f"outputs.routing_weights must have shape {tuple(experts.shape[:2])}; got {tuple(weights.shape)}"
        )


def read_target(
    probs: Tensor,  # (N, K)
    target: Tensor,  # (N,)
) -> Tensor:  # (N,) int64
    """One class per row, from integers of any type.

    Raises:
        InvalidArgumentError: no rows, or anything but one class index for each row.
    """
    found = tensor("target", target)
    if is_empty_list(target):
        found = found.to(torch.int64)
    if found.shape != probs.shape[:1] or found.is_floating_point():
        raise InvalidArgumentError(f"target must be integer of shape ({len(probs)},); got {described(target)}")
    if not len(found):
        raise InvalidArgumentError("target must hold at least one row to fit on; got none")
    labels = found.to(torch.int64)
    least, most = (int(end) for end in labels.aminmax())
    if least < 0 or most >= probs.shape[1]:
        raise InvalidArgumentError(f"target must lie in [0, {probs.shape[1] - 1}]; got [{least}, {most}]")
    return labels
