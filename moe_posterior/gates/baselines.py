"""The standard learned gate, and how it is trained on warm-start data.

Dimensions: N tokens, D hidden size, E experts, k experts per token.

The other baselines are beside it: ``threshold``, ``bandits``, ``neighbours``, ``fixed``. What can be learned from
labelled rows before the first decision goes through one method on all of them, ``warm_start(hidden, outcome)``; what a gate
expects of the experts it chose is ``expected_outcome(routing)``, since some rank by something else than an estimate.
"""

import math

import torch
from torch import Tensor, nn

from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import count, outcomes
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates.base import Gate, Routing

MOST_WIDTH = 1 << 20  # units of a router's hidden layer

UNKNOWN = 0.5  # the estimate for an expert nobody has observed: the mean of a uniform prior


class SoftmaxGate(Gate):
    """The standard learned gate: softmax over a linear map, or a small MLP, of the hidden state; the top k renormalised.

    Args:
        hidden_size, num_experts, top_k: D, E, k. ``top_k = num_experts`` is the fully soft mixture.
        router_width: None (default) is one linear map, as in Mixtral; a number is a hidden layer of that many ReLU units, as
            in *Toward Calibrated MoE Under Distribution Shift* (128 there).

    >>> gate = SoftmaxGate(hidden_size=8, num_experts=4, top_k=2)
    >>> routing = gate(torch.ones(3, 8))
    >>> routing.expert_indices.shape, bool(torch.allclose(routing.routing_weights.sum(-1), torch.ones(3)))
    (torch.Size([3, 2]), True)
    """

    @as_declared
    def __init__(self, hidden_size: int, num_experts: int, top_k: int = 2, *, router_width: int | None = None) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        self.router: nn.Module
        with torch.inference_mode(False):  # trainable weights must be created outside inference mode
            if router_width is None:
                self.router = nn.Linear(hidden_size, num_experts, bias=False)
            else:
                router_width = count("router_width", router_width, most=MOST_WIDTH)
                self.router = nn.Sequential(
                    nn.Linear(hidden_size, router_width), nn.ReLU(), nn.Linear(router_width, num_experts)
                )

    def forward(self, hidden: Tensor) -> Routing:  # (N, D)
        """Choose by the largest router probabilities; a row that holds NaN or inf has NaN weights, as in any softmax router."""
        self.validate_hidden(hidden)
        probabilities = torch.softmax(self.router(hidden).float(), dim=-1)
        scores, expert_indices = probabilities.topk(self.top_k, dim=-1)
        cluster_ids = expert_indices.new_zeros(hidden.shape[0])
        distance = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        return Routing(expert_indices, scores / scores.sum(dim=-1, keepdim=True), cluster_ids, scores, distance)

    @property
    def reweighs(self) -> bool:
        return True

    def reweigh(self, hidden: Tensor, routing: Routing, expert_indices: Tensor) -> Routing:  # (N, D), _, (N, k)
        chosen = torch.softmax(self.router(hidden).float(), dim=-1).gather(1, expert_indices)
        weights = chosen / chosen.sum(dim=-1, keepdim=True)
        return routing._replace(expert_indices=expert_indices, routing_weights=weights, scores=chosen)

    def expected_outcome(self, routing: Routing) -> Tensor:  # -> (N, k)
        """The router probabilities of the chosen: its nearest thing to a probability of success."""
        return routing.scores

    def warm_start(
        self,
        hidden: Tensor,  # (N, D)
        outcome: Tensor,  # (N, E)
        *,
        weight_decay: float = 1e-2,
        epochs: int = 100,
        lr: float = 1e-2,
        batch_size: int = 256,
        generator: torch.Generator | None = None,
    ) -> float:
        """Train the router on labelled rows with soft targets: each row's outcomes, normalised over the experts seen on it.

        The loss of a row is the cross-entropy between its target and the softmax over the *observed* experts: what was not
        observed is neither rewarded nor punished. A row on which no observed expert succeeded prefers nobody and is left out.
        The router starts afresh from ``generator``, so that rows, options and generator alone decide the result.

        Args:
            hidden: finite rows.
            outcome: competence signals in [0, 1], column e for expert e; NaN where not observed.
            weight_decay, lr: of AdamW.
            epochs, batch_size: passes over the rows, in batches shuffled by ``generator``.
            generator: a CPU generator; None starts from seed 0.

        Returns:
            The mean loss over the rows after the last step.

        Raises:
            InvalidArgumentError: a wrong shape, a value out of range, or no row with a success; nothing has changed.

        >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> gate = SoftmaxGate(hidden_size=2, num_experts=2, top_k=1)
        >>> loss = gate.warm_start(hidden, torch.eye(2))  # expert 0 knows the first kind, expert 1 the second
        >>> gate(hidden).expert_indices.flatten().tolist()
        [0, 1]
        """
        hidden, outcome = read_labelled(self, hidden, outcome)
        for name, value in (("weight_decay", weight_decay), ("lr", lr)):
            if not 0.0 <= value < math.inf:
                raise InvalidArgumentError(f"{name} must be at least 0 and finite; got {value}")
        for name, size in (("epochs", epochs), ("batch_size", batch_size)):
            if size < 1:
                raise InvalidArgumentError(f"{name} must be at least 1; got {size}")
        parameter = next(self.router.parameters())
        hidden, outcome = hidden.detach().to(parameter), outcome.detach().to(parameter)
        useful = outcome.nan_to_num(0.0).sum(dim=1) > 0
        if not useful.any():
            raise InvalidArgumentError(f"outcome must hold a row with a success; got {len(outcome)} rows without one")
        hidden, outcome = hidden[useful], outcome[useful]
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        _initialise(self.router, generator)
        optimiser = torch.optim.AdamW(self.router.parameters(), lr=lr, weight_decay=weight_decay)
        with torch.enable_grad():
            for _ in range(epochs):
                for rows in torch.randperm(len(hidden), generator=generator).to(hidden.device).split(batch_size):
                    optimiser.zero_grad()
                    soft_target_loss(self.router(hidden[rows]), outcome[rows]).backward()
                    optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            return float(soft_target_loss(self.router(hidden), outcome))


def soft_target_loss(logits: Tensor, outcome: Tensor) -> Tensor:  # (N, E), (N, E) -> ()
    """Mean cross-entropy between each row's normalised outcomes and the softmax over the experts observed on it.

    Every row holds at least one success.

    >>> round(float(soft_target_loss(torch.zeros(1, 3), torch.tensor([[1.0, 1.0, torch.nan]]))), 4)  # ln 2
    0.6931
    """
    observed = ~outcome.isnan()
    success = torch.where(observed, outcome, 0.0)
    target = success / success.sum(dim=1, keepdim=True)
    log_probability = logits.masked_fill(~observed, -torch.inf).log_softmax(dim=1)
    return -(target * log_probability.masked_fill(~observed, 0.0)).sum(dim=1).mean()


def read_labelled(gate: Gate, hidden: Tensor, outcome: Tensor) -> tuple[Tensor, Tensor]:  # (N, D), (N, E)
    """Finite rows with one outcome for every expert, in [0, 1] or NaN; outcomes of any type come out floating.

    Raises:
        InvalidArgumentError: a wrong shape or type, or a value out of range.
    """
    gate.validate_hidden(hidden)
    broken = int((~torch.isfinite(hidden).all(dim=1)).sum())
    if broken:
        raise InvalidArgumentError(f"hidden must be finite; {broken} of {len(hidden)} rows hold NaN or inf")
    return hidden, outcomes("outcome", outcome, (len(hidden), gate.num_experts)).to(hidden.device)


@torch.no_grad()
def _initialise(router: nn.Module, generator: torch.Generator) -> None:
    """Uniform in ±1/sqrt(fan in), torch's own rule for linear maps, but from the given generator."""
    for layer in router.modules():
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            for parameter in layer.parameters():
                # On the CPU, where the generator lives.
                draws = torch.rand(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_((2 * draws - 1) * bound)
