"""An expert breaks after training: how soon does each arm's gate leave it, and what does the model lose meanwhile?

Dimensions: n rows, S streams, B batches of a stream, E experts, K classes.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_posterior.checks import validation
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import Gate
from moe_posterior.results.figures import STYLES, band, canvas, save
from moe_posterior.training.data import Batch
from moe_posterior.training.data.base import generator_for
from moe_posterior.training.module import MoEClassifier

__all__ = ["Recovery", "damage_expert", "recovery_figure", "recovery_of", "recovery_records", "recovery_table"]

BATCH = 16  # rows that are answered before their outcomes come
STREAMS = 10
WINDOWS = (0, 80, 160, 320, 640)  # outcomes at which a column of the table ends


@dataclass(frozen=True, eq=False)
class Recovery:
    """What one arm did after its most used expert broke, in S streams of B batches."""

    arm: str
    expert: int
    healthy: float  # accuracy on the same rows before the damage
    used: float  # share of rows that the expert was chosen for before the damage
    outcomes: Tensor  # (B,) outcomes observed before each batch
    accuracy: Tensor  # (S, B)
    share: Tensor  # (S, B) of rows that the broken expert is chosen for


@torch.no_grad()
def damage_expert(expert: nn.Module, generator: torch.Generator) -> None:
    """Put noise of the same size in the place of every parameter: the expert answers as surely as before, and at random.

    The size is the root mean square. The standard deviation is 0 for weights that are all alike, such as those of a fresh norm, and
    would silence the expert instead. Parameters that are all 0 stay so.

    >>> layer = nn.Linear(3, 2)
    >>> before = layer.weight.clone()
    >>> damage_expert(layer, torch.Generator().manual_seed(0))
    >>> bool((layer.weight != before).all())
    True
    """
    for parameter in expert.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.copy_(noise * parameter.square().mean().sqrt())


@torch.no_grad()
def recovery_of(
    model: MoEClassifier, batches: Iterable[Batch], arm: str = "model", *, seed: int = 0, streams: int = STREAMS
) -> Recovery:
    """Damage the most used expert of a copy of the model, and let outcomes come in.

    Every stream takes the rows in an order of its own, in batches of 16, from the damaged model as it was trained. A batch is answered;
    then the gate observes whether each *chosen* expert was right, and nothing of the others.

    Args:
        model: trained; it is left as it is.
        batches: rows with labels, which neither training nor the prior has seen.
        arm: its name.
        seed: of the damage and of the orders.
        streams: S, at least 1; with 1 the table has no standard errors.

    Raises:
        InvalidArgumentError: fewer rows than two batches, or no stream.
    """
    streams = validation.count("streams", streams)
    model = copy.deepcopy(model).eval()
    gate = model.moe.gate
    parts = [(model.features(batch["input"].to(model.device)), batch["target"].to(model.device)) for batch in batches]
    rows = sum(len(target) for _, target in parts)
    if rows < 2 * BATCH:
        raise InvalidArgumentError(f"batches must hold at least {2 * BATCH} rows to see a recovery; got {rows}")
    hidden, target = (torch.cat(part) for part in zip(*parts, strict=True))
    before = model.predict_from(hidden)
    assert before.routing is not None
    chosen, weights = before.routing.expert_indices, before.routing.routing_weights
    load = torch.zeros(gate.num_experts).index_add_(0, chosen.flatten().cpu(), weights.flatten().float().cpu())
    expert = int(load.argmax())
    experts = model.moe.experts
    assert isinstance(experts, nn.ModuleList)  # as the classifier makes them
    damage_expert(experts[expert], generator_for("damage", seed, arm))
    probs = model.moe.expert_outputs(hidden)
    found = [_stream(copy.deepcopy(gate), hidden, probs, target, expert, (seed, stream)) for stream in range(streams)]
    accuracy, share = (torch.stack(rows) for rows in zip(*found, strict=True))
    return Recovery(
        arm,
        expert,
        float((before.probs.argmax(dim=-1) == target).double().mean()),
        float((chosen == expert).any(dim=1).double().mean()),
        torch.arange(accuracy.shape[1]) * BATCH * gate.top_k,
        accuracy,
        share,
    )


def _stream(
    gate: Gate,
    hidden: Tensor,  # (n, F)
    probs: Tensor,  # (n, E, K)
    target: Tensor,  # (n,)
    expert: int,
    seed: tuple[int, int],
) -> tuple[Tensor, Tensor]:  # 2 x (B,)
    """Accuracy and use of the broken expert, batch by batch; the gate learns."""
    order = torch.randperm(len(hidden), generator=generator_for("stream", *seed))
    accuracy, share = [], []
    for rows in order[: len(order) // BATCH * BATCH].to(hidden.device).split(BATCH):
        routing = gate(hidden[rows])
        chosen = probs[rows].gather(1, routing.expert_indices[..., None].expand(-1, -1, probs.shape[2]))
        mixed = (routing.routing_weights[..., None].to(chosen.dtype) * chosen).sum(dim=1)
        accuracy.append((mixed.argmax(dim=-1) == target[rows]).double().mean().cpu())
        share.append((routing.expert_indices == expert).any(dim=1).double().mean().cpu())
        right = (chosen.argmax(dim=-1) == target[rows, None]).double()
        gate.observe(routing, right, dense=False)
    return torch.stack(accuracy), torch.stack(share)


def _windows(recovery: Recovery) -> list[tuple[str, Tensor]]:
    """The batches of each column of the table, by the outcomes seen before them."""
    seen, ends = recovery.outcomes, [*WINDOWS[1:], int(recovery.outcomes[-1]) + 1]
    found = []
    for start, end in zip(WINDOWS, ends, strict=True):
        inside = (seen >= start) & (seen < end)
        if bool(inside.any()):
            found.append((f"{start}–{end}" if end != ends[-1] else f"{start} on", inside))
    return found


def recovery_records(recoveries: Sequence[Recovery]) -> list[dict[str, Any]]:
    """Every figure of the table as plain values: arm, window of outcomes, accuracy and share, each with two standard errors.

    A single stream has no standard error: None.
    """
    records: list[dict[str, Any]] = []
    for one in recoveries:
        beginning = {"arm": one.arm, "expert": one.expert, "outcomes": "before the damage"}
        records.append({**beginning, "accuracy": one.healthy, "share": one.used, "streams": len(one.accuracy)})
        for label, inside in _windows(one):
            values: dict[str, Any] = {"arm": one.arm, "expert": one.expert, "outcomes": label}
            for name, table in (("accuracy", one.accuracy), ("share", one.share)):
                by_stream = table[:, inside].mean(dim=1)
                values[name] = float(by_stream.mean())
                values[f"{name}_error"] = _two_errors(by_stream)
            records.append({**values, "streams": len(one.accuracy)})
    return records


def _two_errors(by_stream: Tensor) -> float | None:  # (S,)
    """Two standard errors of the mean over streams."""
    if len(by_stream) == 1:
        return None
    return 2 * float(by_stream.std(correction=0)) / (len(by_stream) - 1) ** 0.5


def recovery_table(recoveries: Sequence[Recovery]) -> str:
    """Accuracy, and the share of rows that the broken expert is chosen for, before the damage and as outcomes come in; Markdown."""
    records = recovery_records(recoveries)
    columns = list(dict.fromkeys(record["outcomes"] for record in records))
    streams = records[0]["streams"]
    averaged = (
        f"Mean of {streams} orders of the test rows ± 2 standard errors"
        if streams > 1
        else "One order of the test rows"
    )
    lines = [
        "The most used expert of each arm breaks after training: accuracy / share of rows it is chosen for, by the outcomes observed",
        f"since (of the chosen experts alone). {averaged}.",
        "",
        "| arm | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for one in recoveries:
        cells = {record["outcomes"]: _cell(record) for record in records if record["arm"] == one.arm}
        lines.append(f"| {one.arm} | " + " | ".join(cells.get(column, "") for column in columns) + " |")
    return "\n".join(lines) + "\n"


def _cell(record: Mapping[str, Any]) -> str:
    error = record.get("accuracy_error")
    spread = "" if error is None else f" ± {error:.3f}".replace("0.", ".")
    return f"{record['accuracy']:.3f}{spread} / {record['share']:.2f}".replace("0.", ".")


def recovery_figure(recoveries: Sequence[Recovery], path: Path) -> Path:
    """Accuracy and use of the broken expert over outcomes, a line an arm with two standard errors to either side."""
    figure = canvas(9.0, 3.6)
    left, right = figure.subplots(1, 2, sharex=True)
    for place, one in enumerate(recoveries):
        style = STYLES[place % len(STYLES)]
        seen = [float(value) for value in one.outcomes]
        for axes, table, level in ((left, one.accuracy, one.healthy), (right, one.share, one.used)):
            band(axes, seen, table.T.tolist(), one.arm, style)
            axes.plot([-0.04 * seen[-1]], [level], marker="o", color=style["color"], linestyle="none")
    left.set(xlabel="outcomes observed since the damage", ylabel="accuracy", ylim=(0, 1.02))
    right.set(
        xlabel="outcomes observed since the damage", ylabel="share of rows on the broken expert", ylim=(-0.02, 1.02)
    )
    right.legend(frameon=False)
    left.set_title("dots: before the damage", fontsize=9, loc="left")
    return save(figure, path)
