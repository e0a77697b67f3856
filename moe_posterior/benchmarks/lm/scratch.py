"""The same small transformer trained from scratch behind different gates.

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from moe_posterior.benchmarks.lm.damage import decoder_layers
from moe_posterior.benchmarks.lm.data import Corpus, batches
from moe_posterior.benchmarks.lm.models import Recipe, build, evaluate, next_byte_loss, train
from moe_posterior.clustering import Clusterer
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.experts import ExpertsFFN
from moe_posterior.gates import BeliefGate, Gate, LearnedPrior, PosteriorGate, PriorGate, SoftmaxGate
from moe_posterior.layer import MixtureOfExperts
from moe_posterior.replay.record import record

ARMS = ("softmax", "softmax, balanced", "prior, balanced", "replace", "learned, balanced")
NUM_CLUSTERS = 64
HALF_LIFE = 300.0  # in observations per cell: the experts change while they learn
MOVE_EVERY = 10  # steps between updates of the centroids
DEAD = 0.01  # an expert is dead below this fraction of its fair share 1 / E of the traffic
_WATCHED = 128  # windows for the loss along the training
_MEASURED = 256
_FINISHED = 128  # windows for the clusters of a learned prior, and as many to learn what it is worth


def make_gate(arm: str, recipe: Recipe) -> Gate:
    """The gate of an arm.

    Raises:
        InvalidArgumentError: an unknown arm.
    """
    sizes = (recipe.hidden_size, recipe.experts)
    if arm.startswith("softmax"):
        return SoftmaxGate(*sizes, top_k=recipe.top_k)
    if arm == "prior, balanced":
        return PriorGate(*sizes, NUM_CLUSTERS, recipe.top_k, half_life=HALF_LIFE, amnesty=None)
    if arm == "replace":
        return PosteriorGate(*sizes, NUM_CLUSTERS, recipe.top_k, half_life=HALF_LIFE)
    if arm == "learned, balanced":
        # End to end alone, and weights not flattened: on the tuning text (one seed) the log score cost 2 to 3 % and flattening 0.7 %.
        return PosteriorGate(*sizes, NUM_CLUSTERS, recipe.top_k, prior=LearnedPrior(width=None, weight=0.0, floor=1.0))
    raise InvalidArgumentError(f"arm must be one of {list(ARMS)}; got {arm!r}")


def build_arm(arm: str, recipe: Recipe, seed: int) -> nn.Module:
    """A Mixtral with our mixtures: the arm's gate in front of :class:`ExpertsFFN`.

    All arms of a seed start from the same weights. ``replace`` has no router, hence E · D fewer parameters per layer.
    """
    model = build(recipe, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # nn.Linear draws its initial weights from the global generator
        for layer, decoder in enumerate(decoder_layers(model)):
            generator = torch.Generator().manual_seed(1000 * (seed + 1) + layer)
            experts = ExpertsFFN(recipe.experts, recipe.hidden_size, recipe.intermediate_size, generator=generator)
            decoder.mlp = MixtureOfExperts(experts, make_gate(arm, recipe))
    return model.eval()


def train_arm(
    arm: str, corpus: Corpus, recipe: Recipe, seed: int, path: Path, *, measured: str = "evaluate"
) -> dict[str, Any]:
    """Train one arm, resuming from its checkpoint, and measure it.

    Returns:
        ``loss``, ``ece``, ``accuracy``; ``shares`` (one list per layer), ``dead_experts``, ``smallest_share`` relative to the fair
        share; ``curve_step`` and ``curve_loss`` during training; ``parameters``.
    """
    model = build_arm(arm, recipe, seed)
    windows = corpus.windows(measured, torch.Generator().manual_seed(0))
    progress = train(
        model,
        corpus,
        recipe,
        seed,
        path,
        backward=_Backward(model, recipe, balanced=arm.endswith("balanced")),
        watch=lambda step: {"loss": evaluate(model, windows[:_WATCHED]).loss},
        variant=arm,
    )
    finish(model, corpus, seed)
    shares = traffic(model, windows[:_WATCHED])
    parts = [share * recipe.experts for layer in shares for share in layer]
    return {
        **asdict(evaluate(model, windows[:_MEASURED])),
        "shares": shares,
        "dead_experts": sum(part < DEAD for part in parts),
        "smallest_share": min(parts),
        "curve_step": [entry["step"] for entry in progress],
        "curve_loss": [entry["loss"] for entry in progress],
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }


def balance_loss(logits: Tensor, expert_indices: Tensor) -> Tensor:  # (N, E), (N, k) -> ()
    """``E · Σ f_e P_e``: share of the traffic times mean probability; 1 where both are even.

    Source: Fedus et al. 2022, *Switch Transformers*, equation 4.

    >>> round(float(balance_loss(torch.zeros(2, 4), torch.tensor([[0, 1], [2, 3]]))), 6)
    1.0
    """
    num_experts = logits.shape[1]
    share = torch.bincount(expert_indices.flatten(), minlength=num_experts) / expert_indices.numel()
    return num_experts * (share * torch.softmax(logits.float(), dim=1).mean(dim=0)).sum()


@torch.no_grad()
def move_centroids(clusterer: Clusterer, hidden: Tensor) -> None:  # (N, D)
    """Move each centroid halfway to the mean of its nearest tokens, so a cluster keeps its identity while states drift.

    A cluster without tokens does not move.
    """
    ids = clusterer(hidden).cluster_ids
    counts = torch.bincount(ids, minlength=clusterer.num_clusters)[:, None]
    sums = torch.zeros_like(clusterer.centroids).index_add_(0, ids, hidden.float())
    means = torch.where(counts > 0, sums / counts.clamp(min=1), clusterer.centroids)
    clusterer.set_centroids((clusterer.centroids + means) / 2)


def traffic(model: nn.Module, windows: Tensor) -> list[list[float]]:  # (n, T)
    """Each layer's share of (token, slot) pairs by expert."""
    counts: dict[str, Tensor] = {}
    for tokens in batches(windows, min(32, len(windows))):
        with torch.no_grad(), record(model) as trace:
            model(input_ids=tokens)
        for name, routing in trace.routings:
            found = torch.bincount(routing.expert_indices.flatten(), minlength=trace.gates[name].num_experts)
            counts[name] = counts.get(name, torch.zeros_like(found)) + found
        trace.close()
    return [(count / count.sum()).tolist() for count in counts.values()]


class _Backward:
    """Forward, backward and evidence of one batch; moves the gates' clusters to what they saw."""

    def __init__(self, model: nn.Module, recipe: Recipe, *, balanced: bool) -> None:
        self.weight = recipe.balance if balanced else 0.0
        self.gates = [cast(Gate, decoder.mlp.gate) for decoder in decoder_layers(model)]
        self.seen: dict[Gate, Tensor] = {}
        self.losses: list[Tensor] = []
        for gate in self.gates:
            if _counts(gate):
                gate.register_forward_pre_hook(self._keep)
            if balanced:
                gate.register_forward_hook(self._balance)

    def __call__(self, model: nn.Module, tokens: Tensor, step: int) -> float:  # (B, T)
        self.losses = []
        learning = bool([gate for gate in self.gates if _counts(gate)])
        if learning:
            with record(model) as trace:
                logits = cast(Any, model)(input_ids=tokens).logits
        else:
            logits = cast(Any, model)(input_ids=tokens).logits
        loss = next_byte_loss(logits, tokens)
        balance = torch.stack(self.losses).mean() if self.losses else 0.0
        (loss + self.weight * balance).backward()
        if learning:
            trace.observe_gradients()
        if step % MOVE_EVERY == 0:
            for gate, hidden in self.seen.items():
                move_centroids(cast(Any, gate).clusterer, hidden)
        return loss.item()

    def _keep(self, gate: nn.Module, inputs: Sequence[Tensor]) -> None:
        """Fit the clusters on the first batch."""
        if not gate.training:
            return
        clustered = cast(Any, gate)
        self.seen[clustered] = inputs[0].detach()
        if not clustered.clusterer.fitted:
            clustered.fit(inputs[0].detach())

    def _balance(self, gate: nn.Module, inputs: Sequence[Tensor], routing: Any) -> None:
        if gate.training:
            prior = getattr(gate, "prior", None)
            router = cast(Any, gate).router if prior is None else prior.logits
            self.losses.append(balance_loss(router(inputs[0]), routing.expert_indices))


def _counts(gate: Gate) -> bool:
    """Whether the gate learns from outcomes while the model is trained."""
    return isinstance(gate, BeliefGate) and gate.counts_training_rows


def finish(model: nn.Module, corpus: Corpus, seed: int) -> None:
    """Give learned priors clusters of training text, and start their belief by outcomes on text that was not trained on."""
    gates = [decoder.mlp.gate for decoder in decoder_layers(model)]
    learners = [gate for gate in gates if isinstance(gate, BeliefGate) and not gate.counts_training_rows]
    if not learners:
        return
    generator = torch.Generator().manual_seed(seed)
    clustered = _seen_by(model, corpus.sample("train", _FINISHED, generator))
    held_out = _seen_by(model, corpus.sample("warm", _FINISHED, generator))
    for gate in learners:
        gate.fit(clustered[gate][0], generator=generator)
        gate.measure(*held_out[gate])


def _seen_by(model: nn.Module, windows: Tensor) -> dict[Gate, tuple[Tensor, Tensor]]:  # (n, T) -> (N, D), (N, E)
    """The hidden states that reach each gate, and the outcomes of the experts chosen for them by the gradients' signs."""
    hidden: dict[nn.Module, list[Tensor]] = {}
    outcome: dict[nn.Module, list[Tensor]] = {}

    def keep(gate: nn.Module, inputs: Sequence[Tensor]) -> None:
        hidden.setdefault(gate, []).append(inputs[0].detach())

    hooks = [decoder.mlp.gate.register_forward_pre_hook(keep) for decoder in decoder_layers(model)]
    for tokens in batches(windows, min(32, len(windows))):
        with record(model) as trace:
            logits = cast(Any, model)(input_ids=tokens).logits
        next_byte_loss(logits, tokens).backward()
        for name, routing, sign in trace.gradient_outcomes():
            of_all = sign.new_full((len(sign), trace.gates[name].num_experts), torch.nan)
            outcome.setdefault(trace.gates[name], []).append(of_all.scatter(1, routing.expert_indices, sign))
        trace.close()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return {cast(Gate, gate): (torch.cat(hidden[gate]), torch.cat(outcome[gate])) for gate in outcome}
