"""One swapped model in service: evidence while it is healthy, after a damage, and after the repair.

Dimensions: B windows, T bytes a window, C clusters, E experts, k experts per token.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from moe_posterior.benchmarks.lm.damage import Damage, damaged, masked, usage_of, victims
from moe_posterior.benchmarks.lm.data import WINDOW, Corpus, batches
from moe_posterior.benchmarks.lm.models import Evaluation, evaluate, next_byte_loss
from moe_posterior.benchmarks.lm.shares import CHECKPOINTS, regained_traffic
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.huggingface import swap_gates, token_outcomes
from moe_posterior.huggingface.gates import HostedGate
from moe_posterior.posterior import BetaPosterior
from moe_posterior.replay.record import Trace, record

Signal = Literal["gradient", "top1", "probability"]
_FIT_BATCH = 16
_ORDER = 7919  # different seeds shuffle the stream differently


@dataclass(frozen=True)
class Method:
    """What is observed, the options of ``swap_gates``, and whether the repair is played after the damage."""

    name: str
    signal: Signal = "gradient"
    knobs: Mapping[str, Any] = field(default_factory=dict)
    repairs: bool = False

    def __post_init__(self) -> None:
        if self.signal not in get_args(Signal):
            raise InvalidArgumentError(f"signal must be one of {list(get_args(Signal))}; got {self.signal!r}")


@dataclass(frozen=True)
class Plan:
    """Upper limits on the tokens of each phase: short texts have fewer for the first two, and their stream starts over.

    A token is a byte. The belief is updated after every batch of the stream.
    """

    fit: int = 32_768
    warm: int = 98_304
    healthy: int = 102_400
    broken: int = CHECKPOINTS[-1]
    repaired: int = CHECKPOINTS[-1]
    batch: int = 256
    evaluated: int = 16_384
    counted: int = 4096  # of them, for an expert's traffic


class Moment(NamedTuple):
    """State of a swapped model within its stream."""

    belief: dict[str, dict[str, Tensor]]
    position: int


class Service:
    """A model with swapped gates, its stream of text, and the text it is measured on.

    Args:
        model: an unswapped Mixtral, changed in place; its parameters require no gradients afterwards.
        method, plan: what is observed, with which options and for how long.
        corpus: the text.
        seed: order of the stream, the clusters' start, the noise of a damage.
        tuning: whether to read the tuning parts of the text rather than those that are reported on.
    """

    def __init__(
        self, model: nn.Module, method: Method, plan: Plan, corpus: Corpus, seed: int, *, tuning: bool = False
    ) -> None:
        self.model, self.method, self.plan, self.seed = model.requires_grad_(False), method, plan, seed
        self.measured = measured_windows(corpus, plan, tuning=tuning)
        self.text = corpus.windows("tune stream" if tuning else "stream", _generator(seed))
        self.position = 0  # windows of the text that were served
        self.counted = self.measured[: plan.counted // WINDOW]
        self.usage, self.counted_usage = usage_of(model, self.measured), usage_of(model, self.counted)
        self.before = evaluate(model, self.measured)
        healthy = corpus.windows("warm", _generator(seed))[: plan.warm // WINDOW]
        self.report = swap_gates(model, mode="prior", **method.knobs)
        self.gates = {name: gate for name, gate in model.named_modules() if isinstance(gate, HostedGate)}
        self.report.fit(_as_dicts(healthy), max_tokens=plan.fit)
        self._measure_reference(healthy)
        self.swapped = evaluate(model, self.measured)

    def observe(self, tokens: Tensor) -> None:  # (B, T)
        """Let the gates learn from one batch."""
        if self.method.signal == "gradient":
            with record(self.model) as trace:
                loss = next_byte_loss(self.model(input_ids=tokens).logits, tokens)
            loss.backward()
            trace.observe_gradients()
        else:
            trace, outcome = self._shared(tokens)
            trace.observe(outcome)

    def serve(self, num_tokens: int) -> None:
        """Observe the next tokens of the stream, batch by batch."""
        size = self.plan.batch // WINDOW
        for _ in range(num_tokens // self.plan.batch):
            rows = torch.arange(self.position, self.position + size) % len(self.text)
            self.observe(self.text[rows])
            self.position += size

    def evaluate(self) -> Evaluation:
        """Loss and calibration on the held-out text with the current belief."""
        return evaluate(self.model, self.measured)

    def moment(self) -> Moment:
        """A copy of the gates' state and the position in the stream."""
        belief = {
            name: {key: value.clone() for key, value in gate.state_dict().items()} for name, gate in self.gates.items()
        }
        return Moment(belief, self.position)

    def go_back(self, moment: Moment) -> None:
        """Restore such a copy."""
        for name, gate in self.gates.items():
            gate.load_state_dict(moment.belief[name])
        self.position = moment.position

    def _shared(self, tokens: Tensor) -> tuple[Trace, Tensor]:  # (B, T) -> (B, T)
        with torch.no_grad(), record(self.model) as trace:
            logits = self.model(input_ids=tokens).logits
        return trace, token_outcomes(logits, tokens, kind=cast(Literal["top1", "probability"], self.method.signal))

    def _measure_reference(self, windows: Tensor) -> None:  # (n, T)
        """Warm-start with the signal observed later: shared outcomes and gradient signs have different means."""
        if self.method.signal == "gradient":
            self.report.warm_start(_as_dicts(windows))
            return
        counts = {name: BetaPosterior(gate.num_clusters, gate.num_experts) for name, gate in self.gates.items()}
        for tokens in batches(windows, _FIT_BATCH):
            trace, outcome = self._shared(tokens)
            for name, routing in trace.routings:
                slots = outcome.reshape(-1, 1).expand(routing.expert_indices.shape)
                counts[name].observe(routing.cluster_ids, slots, routing.expert_indices, sync=False)
            trace.close()
        for name, gate in self.gates.items():
            gate.set_reference(counts[name].successes, counts[name].failures)


def measured_windows(corpus: Corpus, plan: Plan, *, tuning: bool = False) -> Tensor:  # -> (n, T)
    """The held-out text that losses are measured on: the same windows for every seed."""
    return corpus.windows("tune evaluate" if tuning else "evaluate", _generator(0))[: plan.evaluated // WINDOW]


def bounds(
    model: nn.Module, damage: Damage, usage: Sequence[Tensor], windows: Tensor, seed: int
) -> dict[str, Evaluation]:
    """The unswapped model under a damage: with its frozen gate, with the touched experts masked, and with each of two alone."""
    touched = victims(damage, usage)
    with damaged(model, damage, touched, seed):
        found = {"frozen": evaluate(model, windows)}
        closing = {"masked": touched}
        if damage.kind == "exchanged":
            for place, which in enumerate(("first", "second")):
                closing[f"masked {which} alone"] = {layer: [experts[place]] for layer, experts in touched.items()}
        for name, experts in closing.items():
            with masked(model, experts):
                found[name] = evaluate(model, windows)
    return found


def after_damage(service: Service, damage: Damage) -> dict[str, list[float]]:
    """Loss and calibration along the stream after the damage and, if the method asks for it, traffic after the repair."""
    touched = victims(damage, service.usage)
    curves: dict[str, list[float]] = {"curve_loss": [], "curve_ece": []}
    with damaged(service.model, damage, touched, service.seed):
        for _ in _along(service, service.plan.broken):
            found = service.evaluate()
            curves["curve_loss"].append(found.loss)
            curves["curve_ece"].append(found.ece)
    if not service.method.repairs:
        return curves
    healthy, curves["curve_repaired_traffic"] = _traffic(service.counted_usage, touched), []
    for _ in _along(service, service.plan.repaired):
        now = _traffic(usage_of(service.model, service.counted), touched)
        curves["curve_repaired_traffic"].append(regained_traffic(healthy, now))
    curves["repaired_loss"] = [service.evaluate().loss]
    return curves


def _along(service: Service, num_tokens: int) -> Iterator[int]:
    """Serve from checkpoint to checkpoint, up to that many tokens."""
    served = 0
    for checkpoint in (tokens for tokens in CHECKPOINTS if tokens <= num_tokens):
        service.serve(checkpoint - served)
        served = checkpoint
        yield checkpoint


def _traffic(usage: Sequence[Tensor], touched: Mapping[int, Sequence[int]]) -> list[float]:
    return [float(usage[layer][expert]) for layer, experts in touched.items() for expert in experts]


def _as_dicts(windows: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": tokens, "labels": tokens} for tokens in batches(windows, min(_FIT_BATCH, len(windows)))]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(_ORDER * (seed + 1))
