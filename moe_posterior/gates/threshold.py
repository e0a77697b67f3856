"""Expert-threshold routing: every expert keeps its own bar, and moves it with the traffic.

Dimensions: N tokens, D hidden size, E experts, k experts per token, W rows of a window.
"""

from typing import Any

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates.base import Routing
from moe_posterior.gates.baselines import SoftmaxGate
from moe_posterior.kernels import reference
from moe_posterior.precision import FixedPrecision


class ExpertThresholdGate(SoftmaxGate, FixedPrecision):
    """Route by how far an expert's router probability stands above that expert's threshold.

    The threshold of an expert is an exponential moving average of the score that would let through its fair share of the
    traffic, k/E of the rows: an expert whose probability is high everywhere has a high bar. It learns from gate activations
    alone, never from outcomes, so that an expert which is asked as often but answers worse is not noticed; that is the point of
    comparing with it.

    ``forward`` reads the thresholds, :meth:`adapt` moves them: call it on every batch of the stream, after routing it.
    ``observe`` checks its arguments and learns nothing. Until the first :meth:`fit` or full window all thresholds are 0 and the
    gate chooses as its softmax would.

    Two departures from the source. There a token goes to every expert whose score exceeds its threshold, to none or to many;
    a gate here chooses exactly k, so it takes the k with the largest margin ``score - threshold``. And the source takes the
    quantile of large training batches, whereas a stream may bring one row at a time, whose quantile would be the row itself:
    rows are gathered into windows of W, and each full window moves the average once. How the stream is cut into batches
    therefore changes nothing. Thresholds belong to the process; they are not synchronised between ranks.

    Args:
        hidden_size, num_experts, top_k, router_width: as :class:`SoftmaxGate`.
        decay: weight in [0, 1) that the old threshold keeps at each full window.
        window: W ≥ 1, rows to a step of the average.

    Source: Sun, Liu, Wu & Sun 2026, *Expert Threshold Routing for Autoregressive Language Modeling with Dynamic Computation
    Allocation and Load Balancing*, arXiv 2603.11535.

    >>> gate = ExpertThresholdGate(hidden_size=2, num_experts=2, top_k=1)
    >>> _ = gate.router.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    >>> hidden = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]])  # expert 0 always scores higher
    >>> gate(hidden).expert_indices.flatten().tolist()
    [0, 0, 0, 0]
    >>> gate.fit(hidden)
    >>> gate(hidden).expert_indices.flatten().tolist()
    [1, 1, 0, 0]
    """

    thresholds: Tensor  # (E,) float64
    pending: Tensor  # (W, E) float64, the rows of the window that fills; those past pending_rows are 0
    pending_rows: Tensor  # () int64

    @as_declared
    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        router_width: int | None = None,
        decay: float = 0.9,
        window: int = 64,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, router_width=router_width)
        if not 0.0 <= decay < 1.0:
            raise InvalidArgumentError(f"decay must lie in [0, 1); got {decay}")
        if window < 1:
            raise InvalidArgumentError(f"window must be at least 1; got {window}")
        self.decay, self.window = float(decay), window
        self.register_buffer("thresholds", torch.zeros(num_experts, dtype=torch.float64))
        self.register_buffer("pending", torch.zeros(window, num_experts, dtype=torch.float64))
        self.register_buffer("pending_rows", torch.zeros((), dtype=torch.int64))

    def forward(self, hidden: Tensor) -> Routing:  # (N, D)
        """Choose by the largest margins; ``scores`` are the margins, weights the renormalised router probabilities."""
        self.validate_hidden(hidden)
        logits = self.router(hidden)
        cluster_ids = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        margins = logits.double().softmax(dim=-1) - self.thresholds
        selection = reference.select(margins, cluster_ids, self.top_k)
        # Of the logits, not by dividing probabilities: an expert with a low bar can be chosen at a probability that rounds to 0.
        weights = logits.gather(1, selection.expert_indices).softmax(dim=-1)
        distance = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        return Routing(selection.expert_indices, weights, cluster_ids, selection.scores.float(), distance)

    def expected_outcome(self, routing: Routing) -> Tensor:  # -> (N, k)
        """The router probabilities of the chosen: margin plus threshold, hence to be asked before :meth:`adapt` moves it."""
        return (routing.scores + self.thresholds[routing.expert_indices]).clamp(0.0, 1.0).to(routing.scores.dtype)

    @torch.no_grad()
    def fit(self, hidden: Tensor, *, generator: torch.Generator | None = None) -> None:  # (..., D)
        """Set each threshold to let k/E of these rows through, and start an empty window; rows with NaN or inf are left out."""
        probabilities = self._finite_probabilities(hidden.reshape(-1, hidden.shape[-1]))
        if not len(probabilities):
            raise InvalidArgumentError(f"hidden must hold at least one finite row; got shape {tuple(hidden.shape)}")
        self.thresholds.copy_(fair_share(probabilities, self.top_k))
        self.pending.zero_()
        self.pending_rows.zero_()

    @torch.no_grad()
    def adapt(self, hidden: Tensor) -> None:  # (N, D)
        """Let the thresholds follow the traffic; needs no outcomes, leaves out rows that hold NaN or inf."""
        rows = self._finite_probabilities(hidden)
        while len(rows):
            filled = int(self.pending_rows)
            taken, rows = rows[: self.window - filled], rows[self.window - filled :]
            self.pending[filled : filled + len(taken)] = taken
            self.pending_rows += len(taken)
            if filled + len(taken) == self.window:
                self.thresholds.lerp_(fair_share(self.pending, self.top_k), 1 - self.decay)
                self.pending.zero_()
                self.pending_rows.zero_()

    def warm_start(self, hidden: Tensor, outcome: Tensor, **options: Any) -> float:  # (N, D), (N, E)
        """Train the router as :meth:`SoftmaxGate.warm_start`, then :meth:`fit` the thresholds on the same rows."""
        loss = super().warm_start(hidden, outcome, **options)
        self.fit(hidden)
        return loss

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, decay={self.decay:g}, window={self.window}"

    def _finite_probabilities(self, hidden: Tensor) -> Tensor:  # (N, D) -> (M, E) float64
        self.validate_hidden(hidden)
        probabilities = self.router(hidden).double().softmax(dim=-1)
        return probabilities[torch.isfinite(probabilities).all(dim=1)]


def fair_share(scores: Tensor, top_k: int) -> Tensor:  # (W, E) -> (E,)
    """The score that, of W rows, k/E (rounded, at least one) exceed in every column, if no two are equal: the next largest.

    >>> fair_share(torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]]), top_k=1)
    tensor([0.2000, 0.7000])
    """
    rows, num_experts = scores.shape
    share = max(1, round(rows * top_k / num_experts))
    ordered = scores.sort(dim=0, descending=True).values
    return ordered[min(share, rows - 1)]
