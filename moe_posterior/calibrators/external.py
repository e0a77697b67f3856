"""Calibrators of other libraries behind this one's interface: structured matrix scaling, Venn-Abers and multicalibration.

Each keeps the validation rows that it was fitted on, and fits its library's object from them when it is first called. So a state dict
holds numbers alone, a loaded calibrator gives the same map, and no foreign object is ever unpickled.

Dimensions: N rows, K classes, V validation rows.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_posterior.calibrators.base import Calibrator, Outputs
from moe_posterior.calibrators.probabilities import FLOOR, top_confidence, top_label, with_confidence
from moe_posterior.checks.declared import as_declared
from moe_posterior.errors import InvalidArgumentError, MissingDependencyError

Rows = Mapping[str, Tensor]


class _External(Calibrator):
    """Base: rows in buffers, the library's object made from them on demand."""

    probs: Tensor
    target: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("probs", torch.zeros(0, 0, dtype=torch.float64))  # (V, K)
        self.register_buffer("target", torch.zeros(0, dtype=torch.int64))  # (V,)
        self._made: Any = None

    def _fit(self, outputs: Outputs, target: Tensor) -> None:
        rows = self._rows_of(outputs, target)
        self._made = self._make(rows)  # first: if it raises, the earlier fit stays whole
        for name, value in rows.items():
            setattr(self, name, value)

    def _rows_of(self, outputs: Outputs, target: Tensor) -> Rows:
        """What is kept of the validation rows, by the name of its buffer."""
        return {"probs": outputs.probs.clone(), "target": target.clone()}

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._made = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_made": None}

    def _fitted_object(self) -> Any:
        if self._made is None:
            self._made = self._make(dict(self.named_buffers()))
        return self._made

    @abstractmethod
    def _make(self, rows: Rows) -> Any:
        """The library's object, fitted on these rows."""

    def extra_repr(self) -> str:
        return f"rows={len(self.target)}"


class StructuredMatrixScaling(_External):
    """A full matrix on the logits, its parts shrunk by how many rows there are to fit them: ``softmax((a I + diag(v) + M) z + b)``.

    May change the top label. Needs probmetrics (``pip install 'moe-posterior[calibrators]'``).

    Raises:
        MissingDependencyError: without probmetrics.
        InvalidArgumentError: when called with another number of classes than fitted.

    Source: Berta, Holzmüller, Jordan & Bach 2026, *Structured Matrix Scaling for Multi-Class Calibration*; its authors' code, defaults.
    """

    keeps_top_label: ClassVar = False

    @as_declared
    def __init__(self) -> None:
        super().__init__()

    def _make(self, rows: Rows) -> Any:
        try:
            from probmetrics.calibrators import SMSCalibrator
        except ImportError:
            raise MissingDependencyError("probmetrics", "calibrators") from None
        return SMSCalibrator().fit(_positive(rows["probs"]), rows["target"].cpu().numpy())

    def _calibrate(self, outputs: Outputs) -> Tensor:
        if outputs.probs.shape[1] != self.probs.shape[1]:
            raise InvalidArgumentError(
                f"outputs.probs must have {self.probs.shape[1]} classes as in fit; got {outputs.probs.shape[1]}"
            )
        found = self._fitted_object().predict_proba(_positive(outputs.probs))
        return torch.as_tensor(found).to(outputs.probs)


class VennAbers(_External):
    """Venn-Abers on the confidence of the top label: isotonic regression with each possible outcome added, and one number from both.

    The two probabilities p0 and p1 bracket a calibrated one, whatever the distribution; the confidence shown is the one with the least
    worst-case log loss, ``p1 / (1 − p0 + p1)``. The label shown never changes. Needs venn-abers
    (``pip install 'moe-posterior[calibrators]'``).

    Raises:
        MissingDependencyError: without venn-abers.

    Source: Vovk, Petej & Fedorova 2015, *Large-Scale Probabilistic Predictors With and Without Guarantees of Validity*, inductive form.
    """

    @as_declared
    def __init__(self) -> None:
        super().__init__()

    def _make(self, rows: Rows) -> Any:
        try:
            from venn_abers import VennAbers as Library
        except ImportError:
            raise MissingDependencyError("venn-abers", "calibrators") from None
        made = Library()
        made.fit(_two_columns(rows["probs"]), _right(rows).long().cpu().numpy())
        return made

    def _calibrate(self, outputs: Outputs) -> Tensor:
        found, _ = self._fitted_object().predict_proba(_two_columns(outputs.probs))
        return with_confidence(outputs.probs, torch.as_tensor(found[:, 1]).to(outputs.probs))


class Multicalibration(_External):
    """Gradient boosting on the top label's confidence until no group it can find has a calibration gap.

    Groups are routing configurations and domains, where the outputs have them, and ranges of novelty and disagreement. The label never
    changes. Needs mcgrad (``pip install 'moe-posterior[multicalibration]'``).

    Args:
        seed: of the library's cross-validation.

    Raises:
        MissingDependencyError: without mcgrad.

    Source: *MCGrad: Multicalibration at Web Scale*, 2025; its authors' code, defaults.
    """

    GROUPS: ClassVar = ("configuration", "domain")
    MEASURES: ClassVar = ("novelty", "disagreement")

    groups: Tensor
    measures: Tensor

    @as_declared
    def __init__(self, seed: int = 42) -> None:
        super().__init__()
        self.seed = seed
        self.register_buffer("groups", torch.zeros(0, 2, dtype=torch.int64))  # (V, 2), -1 where not given
        self.register_buffer("measures", torch.zeros(0, 2, dtype=torch.float64))  # (V, 2), 0 where not given

    def _rows_of(self, outputs: Outputs, target: Tensor) -> Rows:
        groups, measures = self._features(outputs)
        return {**super()._rows_of(outputs, target), "groups": groups, "measures": measures}

    def _features(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        count, device = len(outputs.probs), outputs.probs.device
        groups = [getattr(outputs, name) for name in self.GROUPS]
        measures = [getattr(outputs, name) for name in self.MEASURES]
        no_group = torch.full((count,), -1, dtype=torch.int64, device=device)
        no_measure = torch.zeros(count, dtype=torch.float64, device=device)
        return (
            torch.stack([no_group if field is None else field.long() for field in groups], dim=1),
            torch.stack([no_measure if field is None else field.double() for field in measures], dim=1),
        )

    def _frame(self, probs: Tensor, groups: Tensor, measures: Tensor) -> Any:
        import pandas

        columns: dict[str, Any] = {"confidence": top_confidence(probs).clamp(FLOOR, 1 - FLOOR).cpu().numpy()}
        for number, name in enumerate(self.GROUPS):
            columns[name] = groups[:, number].cpu().numpy().astype(str)
        for number, name in enumerate(self.MEASURES):
            columns[name] = measures[:, number].cpu().numpy()
        return pandas.DataFrame(columns)

    def _make(self, rows: Rows) -> Any:
        try:
            from mcgrad.methods import MCGrad
        except ImportError:
            raise MissingDependencyError("mcgrad", "multicalibration") from None
        frame = self._frame(rows["probs"], rows["groups"], rows["measures"])
        frame["correct"] = _right(rows).cpu().numpy()
        return MCGrad(random_state=self.seed).fit(
            frame,
            "confidence",
            "correct",
            categorical_feature_column_names=list(self.GROUPS),
            numerical_feature_column_names=list(self.MEASURES),
        )

    def _calibrate(self, outputs: Outputs) -> Tensor:
        found = self._fitted_object().predict(
            self._frame(outputs.probs, *self._features(outputs)),
            "confidence",
            categorical_feature_column_names=list(self.GROUPS),
            numerical_feature_column_names=list(self.MEASURES),
        )
        return with_confidence(outputs.probs, torch.as_tensor(found).to(outputs.probs))


def _positive(probs: Tensor) -> Any:  # (N, K) numpy
    """Probabilities without a zero, rows that sum to 1 to the last digit."""
    probs = probs.double().clamp(min=FLOOR)
    return (probs / probs.sum(1, keepdim=True)).cpu().numpy()


def _right(rows: Rows) -> Tensor:  # (V,) bool
    """Whether the top label is right."""
    return top_label(rows["probs"]).eq(rows["target"])


def _two_columns(probs: Tensor) -> Any:  # (N, 2) numpy
    """Probability that the top label is wrong, and right."""
    confidence = top_confidence(probs)
    return torch.stack([1 - confidence, confidence], dim=1).cpu().numpy()
