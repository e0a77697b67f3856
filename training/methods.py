"""Training objectives, chosen in YAML by ``class_path``: the quantity to minimise, given the classifier's prediction for a batch.

Dimensions: N inputs of a batch, K classes, E experts, G groups or configurations.

Every method trains by plain ERM for its first ``warmup_epochs`` epochs, so that methods which share seed, gate and data can branch
from one warm-up checkpoint: the result is bit for bit that of training each from the start.
"""

import math
from abc import ABC, abstractmethod
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from moe_posterior import losses
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import Gate
from moe_posterior.prediction import Prediction, dense_weights
from moe_posterior.training.lowpass import lowpass

__all__ = [
    "FGR",
    "MMCE",
    "GroupDRO",
    "Method",
    "Robust",
    "RobustConfiguration",
    "RobustFiltered",
    "SoftECE",
    "Terms",
    "Vanilla",
]


class Terms(NamedTuple):
    """The objective's value on a batch."""

    loss: Tensor  # ()
    logs: dict[str, Tensor]  # further values to log
    constraint: Tensor | None = None  # (), the loss's gradient must not conflict with this one's


class Method(nn.Module, ABC):
    """An objective; a child implements :meth:`objective`.

    Args:
        warmup_epochs: epochs of plain ERM before the objective takes over. 0 (default) is none; the paper takes 20 of 50.

    Raises:
        InvalidArgumentError: ``warmup_epochs`` below 0.
    """

    def __init__(self, warmup_epochs: int = 0) -> None:
        super().__init__()
        if warmup_epochs < 0:
            raise InvalidArgumentError(f"warmup_epochs must be at least 0; got {warmup_epochs}")
        self.warmup_epochs = warmup_epochs

    def bind(self, gate: Gate, num_groups: int) -> None:
        """Learn the sizes of the model and the data before training; called once by the classifier."""

    def extend(self, inputs: Tensor, generator: torch.Generator) -> Tensor:  # (N, ...) -> (N + M, ...)
        """The batch with extra rows for which the objective needs predictions; none by default."""
        return inputs

    def terms(
        self, prediction: Prediction, target: Tensor, gate: Gate, groups: Tensor | None, epoch: int
    ) -> Terms:  # target (N,), groups (N,) int64
        """The objective, or plain ERM during the warm-up."""
        if epoch < self.warmup_epochs:
            return Terms(losses.nll(prediction.probs, target), {})
        return self.objective(prediction, target, gate, groups)

    @abstractmethod
    def objective(self, prediction: Prediction, target: Tensor, gate: Gate, groups: Tensor | None) -> Terms:
        """The quantity to minimise after the warm-up."""


def _require(name: str, value: object, fits: bool, wanted: str) -> None:
    if not fits:
        raise InvalidArgumentError(f"{name} must be {wanted}; got {value}")


class Vanilla(Method):
    """ERM: the mean negative log of the aggregate probability. With per-expert temperatures afterwards, this is MoCaE; with one
    expert, *single*.

    Args:
        warmup_epochs: see :class:`Method`.
        expert_weight: ≥ 0, of every expert's own mean negative log-likelihood on every row, beside the aggregate's. 0 (default) is ERM;
            0.03 keeps experts competent that the gate rarely chooses.

    Raises:
        InvalidArgumentError: a negative weight.
    """

    def __init__(self, warmup_epochs: int = 0, expert_weight: float = 0.0) -> None:
        super().__init__(warmup_epochs)
        _require("expert_weight", expert_weight, expert_weight >= 0, "at least 0")
        self.expert_weight = expert_weight

    def objective(self, prediction: Prediction, target: Tensor, gate: Gate, groups: Tensor | None) -> Terms:
        loss = losses.nll(prediction.probs, target)
        if not self.expert_weight:
            return Terms(loss, {})
        own = [losses.nll(probs, target) for probs in prediction.need("expert_probs").unbind(1)]
        return Terms(loss + self.expert_weight * torch.stack(own).mean(), {})


class Robust(Method):
    """Weights softmax(η L) over the batch.

    Args:
        warmup_epochs: see :class:`Method`.
        eta: η ≥ 0.
        detach_weights: no gradient through the weights, as in the KL-ball objective that motivates the loss; the published one lets it
            through (default).

    Source: *Toward Calibrated Mixture-of-Experts Under Distribution Shift*, arXiv 2606.20544, Robust MoE.
    """

    def __init__(self, warmup_epochs: int = 0, eta: float = 2.0, detach_weights: bool = False) -> None:
        super().__init__(warmup_epochs)
        _require("eta", eta, eta >= 0, "at least 0")
        self.eta, self.detach_weights = eta, detach_weights

    def objective(self, prediction: Prediction, target: Tensor, gate: Gate, groups: Tensor | None) -> Terms:
        loss = losses.robust(prediction.probs, target, eta=self.eta, detach_weights=self.detach_weights)
        return Terms(loss, {})


class RobustFiltered(Method):
    """The mean loss plus the robust loss over rows with high mixture regret or high expert disagreement.

    Args:
        warmup_epochs, eta, detach_weights: as in :class:`Robust`.
        regret_threshold, disagreement_threshold: absolute, as published. Nearly every row passes the first: see ``filtered`` in
            the log.
        quantile: in [0, 1), replaces both thresholds: rows above this quantile of the batch. None (default) is as published.

    Source: arXiv 2606.20544, Robust Filtered.
    """

    def __init__(
        self,
        warmup_epochs: int = 0,
        eta: float = 2.0,
        regret_threshold: float = 1e-6,
        disagreement_threshold: float = 0.01,
        quantile: float | None = None,
        detach_weights: bool = False,
    ) -> None:
        super().__init__(warmup_epochs)
        _require("eta", eta, eta >= 0, "at least 0")
        _require("quantile", quantile, quantile is None or 0 <= quantile < 1, "in [0, 1), or None")
        self.eta, self.detach_weights, self.quantile = eta, detach_weights, quantile
        self.regret_threshold, self.disagreement_threshold = regret_threshold, disagreement_threshold

    def objective(self, prediction: Prediction, target: Tensor, gate: Gate, groups: Tensor | None) -> Terms:
        weights = dense_weights(prediction)
        which: dict[str, Any] = {
            "regret_threshold": self.regret_threshold,
            "disagreement_threshold": self.disagreement_threshold,
            "quantile": self.quantile,
        }
        arguments = (prediction.probs, prediction.need("expert_probs"), weights, target)
        loss = losses.robust_filtered(*arguments, eta=self.eta, detach_weights=self.detach_weights, **which)
        return Terms(loss, {"filtered": losses.filter_mask(*arguments, **which).float().mean()})


class GroupDRO(Method):
    """An adversary over the data's known groups.

    Under distributed training its weights are updated with the rows of all ranks, so that they agree; each rank's loss uses the
    groups' means over its own rows.

    Args:
        warmup_epochs: see :class:`Method`.
        step: of the adversary's multiplicative weights.

    Raises:
        InvalidArgumentError: while training, if the data have no groups.

    Source: Sagawa et al. 2020, *Distributionally Robust Neural Networks for Group Shifts*.
    """

    weights: Tensor  # (G,) float64

    def __init__(self, warmup_epochs: int = 0, step: float = 0.01) -> None:
        super().__init__(warmup_epochs)
        self.step = step
        self.register_buffer("weights", torch.zeros(0, dtype=torch.float64))

    def bind(self, gate: Gate, num_groups: int) -> None:
        self.weights = torch.full((num_groups,), 1 / max(1, num_groups), dtype=torch.float64)

    def objective(self, prediction: Prediction, target: Tensor, gate: Gate, groups: Tensor | None) -> Terms:
        if groups is None:
            raise InvalidArgumentError("GroupDRO needs data with groups: a Split with groups=, see the data module")
        rows = losses.nll_per_row(prediction.probs, target)
        if _several_ranks():
            _, weights = losses.group_dro(
                _of_all_ranks(rows.detach()), _of_all_ranks(groups), self.weights, step=self.step
            )
            loss, _ = losses.group_dro(rows, groups, weights, step=0.0)
        else:
            loss, weights = losses.group_dro(rows, groups, self.weights, step=self.step)
        self.weights.copy_(weights)
        return Terms(loss, {"largest_weight": weights.max()})


class MMCE(Method):
    """ERM with the kernel calibration penalty.

    Args:
        warmup_epochs: see :class:`Method`.
        weight: of the penalty.

    Source: Kumar, Sarawagi & Jain 2018, *Trainable Calibration Measures For Neural Networks From Kernel Mean Embeddings*.
    """

    def __init__(self, warmup_epochs: int = 0, weight: float = 1.0) -> None:
        super().__init__(warmup_epochs)
        self.weight = weight

    def objective(self, prediction: Prediction, target: Tensor, gate: Gate, groups: Tensor | None) -> Terms:
        penalty = losses.mmce(prediction.probs, target)
        return Terms(losses.nll(prediction.probs, target) + self.weight * penalty, {"penalty": penalty.detach()})


class SoftECE(Method):
    """ERM with the soft-binned calibration error as a penalty.

    Args:
        warmup_epochs: see :class:`Method`.
        weight: of the penalty.

    Source: Karandikar et al. 2021, *Soft Calibration Objectives for Neural Networks*.
    """

    def __init__(self, warmup_epochs: int = 0, weight: float = 1.0) -> None:
        super().__init__(warmup_epochs)
        self.weight = weight

    def objective(self, prediction: Prediction, target: Tensor, gate: Gate, groups: Tensor | None) -> Terms:
        penalty = losses.soft_ece(prediction.probs, target)
        return Terms(losses.nll(prediction.probs, target) + self.weight * penalty, {"penalty": penalty.detach()})


Base = Literal["nll", "robust"]


class FGR(Method):
    """A loss on a partly low-pass filtered batch, with its gradient projected so as not to conflict with a soft ECE's on the clean one.

    Inputs that are not images are not filtered; the gradient is still projected.

    Args:
        warmup_epochs: see :class:`Method`.
        share: ρ of the rows that are filtered.
        base: ``"nll"`` is FGR; ``"robust"`` is FGR + Robust.
        eta: of the robust base.

    Raises:
        InvalidArgumentError: a share outside [0, 1] or another base.

    Source: arXiv 2606.20544, FGR as described there: 8 × 8 block DCT, JPEG tables, quality from {15, 18, 25}.
    """

    def __init__(self, warmup_epochs: int = 0, share: float = 0.05, base: Base = "nll", eta: float = 2.0) -> None:
        super().__init__(warmup_epochs)
        if not 0 <= share <= 1 or base not in get_args(Base):
            raise InvalidArgumentError(
                f"share must lie in [0, 1] and base be one of {list(get_args(Base))}; got {share}, {base!r}"
            )
        self.share, self.base, self.eta = share, base, eta

    def extend(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        if inputs.ndim != 4:
            return inputs
        count = math.ceil(self.share * len(inputs))  # the batch is shuffled: its first rows are a random choice
        return torch.cat([inputs, lowpass(inputs[:count], generator)])

    def objective(self, prediction: Prediction, target: Tensor, gate: Gate, groups: Tensor | None) -> Terms:
        rows = len(target)
        extra = len(prediction.probs) - rows
        probs = torch.cat(
            [prediction.probs[rows:], prediction.probs[extra:rows]]
        )  # filtered rows in their originals' places
        loss = losses.nll(probs, target) if self.base == "nll" else losses.robust(probs, target, eta=self.eta)
        return Terms(loss, {}, constraint=losses.soft_ece(prediction.probs[:rows], target))


class RobustConfiguration(Method):
    """Ours: an adversary over routing configurations, of which a cluster gate has finitely many.

    The loss is ERM plus ``weight`` times the calibration gaps of the configurations, weighted by an adversary that looks for the worst.
    In theory the aggregate then stays calibrated under a shift that only changes how often configurations occur. Under distributed
    training every rank updates with the rows of all ranks, as if they were one batch.

    Args:
        warmup_epochs: see :class:`Method`.
        weight: of the gaps.
        step: of the adversary's multiplicative weights.
        robust: use the robust loss with η = 2 instead of ERM.

    Source: ours; the theory is in arXiv 2606.20544, group DRO in Sagawa et al. 2020.
    """

    weights: Tensor  # (G,) float64
    gaps: Tensor  # (G,) float64
    counts: Tensor  # (G,) float64

    def __init__(self, warmup_epochs: int = 0, weight: float = 1.0, step: float = 0.1, robust: bool = False) -> None:
        super().__init__(warmup_epochs)
        self.weight, self.step, self.robust = weight, step, robust
        for name in losses.ConfigurationState._fields:
            self.register_buffer(name, torch.zeros(0))

    def bind(self, gate: Gate, num_groups: int) -> None:
        start = losses.ConfigurationState.start(gate.num_configurations)
        for name in start._fields:
            setattr(self, name, getattr(start, name).clone())

    def objective(self, prediction: Prediction, target: Tensor, gate: Gate, groups: Tensor | None) -> Terms:
        if prediction.routing is None:
            return Terms(losses.nll(prediction.probs, target), {})
        state = losses.ConfigurationState(*(getattr(self, name) for name in losses.ConfigurationState._fields))
        ids = gate.configurations(prediction.routing)
        penalised = partial(losses.robust_config, state=state, weight=self.weight, step=self.step)
        loss, after = penalised(prediction.probs, target, ids)
        if _several_ranks():
            _, after = penalised(*(_of_all_ranks(rows) for rows in (prediction.probs.detach(), target, ids)))
        if self.robust:
            base = losses.robust(prediction.probs, target)
            loss = loss - losses.nll(prediction.probs, target) + base
        for name in after._fields:
            getattr(self, name).copy_(getattr(after, name))
        return Terms(loss, {"largest_weight": after.weights.max()})


def _several_ranks() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _of_all_ranks(rows: Tensor) -> Tensor:  # (N, ...) -> (sum of N over ranks, ...), the same on every rank
    """The batch's rows of all ranks, in rank order; a collective call."""
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(counts, own)
    # Ranks may hold batches of different sizes, and all_gather needs equal ones.
    padded = rows.new_zeros(max(int(count) for count in counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])
