"""Tables of the experiment's records; the figures use the same numbers."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from moe_posterior.benchmarks.cells import decimal, percent, text_table
from moe_posterior.benchmarks.lm.experiment import AMNESTY, BASE, GRADIENT, HEALTHY, KNOB_METHODS, METHODS, SCRATCH
from moe_posterior.benchmarks.lm.scratch import ARMS, DEAD
from moe_posterior.benchmarks.lm.shares import CHECKPOINTS, RECOVERABLE, at, recovered_share
from moe_posterior.benchmarks.records import Record
from moe_posterior.results.tables import DASH, Table

SHOWN = tuple(tokens for tokens in CHECKPOINTS if tokens)
POOLED = (5120, 20_480)
MASKINGS = ("masked", "masked first alone", "masked second alone")
PER_SEED = "± half of the 95 % t interval over seeds"


class Measured:
    """Records by environment, gate, metric and seed, and quantities derived from them."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.values: dict[tuple[str, str, str], dict[int, Any]] = defaultdict(dict)
        for record in records:
            self.values[record.environment, record.gate, record.metric][record.seed] = record.value

    @property
    def damages(self) -> list[str]:
        """Names of the damages, in order of appearance."""
        return list(dict.fromkeys(environment for environment, gate, _ in self.values if gate == BASE))

    def get(self, environment: str, gate: str, metric: str) -> dict[int, Any]:
        """seed -> value."""
        return self.values.get((environment, gate, metric), {})

    def bounds(self, damage: str) -> dict[int, tuple[float, float]]:
        """seed -> loss of the frozen gate, and of the best masking: of two swapped experts both, or the better one alone."""
        masked = [self.get(damage, BASE, f"{name}_loss") for name in MASKINGS]
        frozen = self.get(damage, BASE, "frozen_loss")
        return {seed: (frozen[seed], min(found[seed] for found in masked if seed in found)) for seed in frozen}

    def recoverable(self, damage: str) -> dict[int, float]:
        """seed -> nats that the best masking recovers."""
        return {seed: frozen - masked for seed, (frozen, masked) in self.bounds(damage).items()}

    def shares(self, damage: str, method: str, tokens: int) -> dict[int, float]:
        """seed -> share of the recoverable loss recovered so far, for seeds with enough to recover."""
        bounds = self.bounds(damage)
        return {
            seed: recovered_share(*bounds[seed], at(tokens, curve))
            for seed, curve in self.get(damage, method, "curve_loss").items()
            if bounds[seed][0] - bounds[seed][1] >= RECOVERABLE and len(curve) > CHECKPOINTS.index(tokens)
        }

    def mean_shares(self, method: str, tokens: int, damages: Sequence[str] | None = None) -> dict[int, float]:
        """seed -> mean over damages with something to recover; a share above 1 counts as 1."""
        found: dict[int, list[float]] = defaultdict(list)
        for damage in self.damages if damages is None else damages:
            for seed, share in self.shares(damage, method, tokens).items():
                found[seed].append(min(share, 1.0))
        return {seed: sum(shares) / len(shares) for seed, shares in found.items()}

    def pooled_shares(self, method: str, tokens: int) -> dict[int, float]:
        """seed -> nats recovered over nats recoverable, summed over the same damages, so small ones weigh little."""
        won: dict[int, float] = defaultdict(float)
        worth: dict[int, float] = defaultdict(float)
        for damage in self.damages:
            recoverable = self.recoverable(damage)
            for seed, share in self.shares(damage, method, tokens).items():
                won[seed] += share * recoverable[seed]
                worth[seed] += recoverable[seed]
        return {seed: won[seed] / worth[seed] for seed in won}

    def healthy_change(self, method: str) -> dict[int, float]:
        """seed -> relative change of the loss due to evidence from healthy experts."""
        before, after = (self.get(HEALTHY, method, f"{name}_loss") for name in ("before", "after"))
        return {seed: after[seed] / before[seed] - 1 for seed in after}

    def traffic(self, method: str, tokens: int) -> dict[int, float]:
        """seed -> repaired experts' traffic relative to before the damage, mean over damages."""
        found: dict[int, list[float]] = defaultdict(list)
        for damage in self.damages:
            for seed, curve in self.get(damage, method, "curve_repaired_traffic").items():
                if len(curve) > CHECKPOINTS.index(tokens):
                    found[seed].append(at(tokens, curve))
        return {seed: sum(parts) / len(parts) for seed, parts in found.items()}


def tables_of(records: Iterable[Record]) -> list[Table]:
    """All tables that the records have data for."""
    measured = Measured(records)
    makers: Sequence[Callable[[Measured], Table]] = (
        healthy_table,
        damage_table,
        recovery_table,
        by_damage_table,
        repair_table,
        knob_table,
        scratch_table,
    )
    return [table for table in (make(measured) for make in makers) if table.rows]


def healthy_table(measured: Measured) -> Table:
    """What swapping and healthy evidence change: nothing, and next to nothing."""
    rows = []
    for method in METHODS:
        values = [measured.get(HEALTHY, method.name, f"{phase}_loss") for phase in ("before", "swapped", "after")]
        if values[0]:
            eces = [measured.get(HEALTHY, method.name, f"{phase}_ece") for phase in ("before", "after")]
            same = all(values[0][seed] == values[1][seed] for seed in values[0])
            change = percent_fine(measured.healthy_change(method.name).values())
            cells = [*map(_decimal, values[:2]), "yes" if same else "no", _decimal(values[2]), change]
            rows.append([method.name, *cells, *map(_decimal, eces)])
    header = ["evidence", "loss", "swapped", "equal", "after evidence", "change %", "ECE", "ECE after"]
    return text_table(
        "Healthy experts", header, rows, f"Loss in nats a byte on held-out text, token-level ECE. {PER_SEED}."
    )


def damage_table(measured: Measured) -> Table:
    """What the damages cost and what masking would recover."""
    rows = []
    for damage in measured.damages:
        losses = [measured.get(damage, BASE, f"{name}_loss") for name in ("frozen", *MASKINGS)]
        ece = measured.get(damage, BASE, "frozen_ece")
        rows.append([damage, *map(_decimal, losses), _decimal(measured.recoverable(damage)), _decimal(ece)])
    header = ["damage", "frozen gate", "masked", "first alone", "second alone", "recoverable", "ECE frozen"]
    note = (
        "Loss in nats a byte. masked: no token goes to the touched experts (the most used of the layer; of two exchanged, "
        f"both); first, second alone: only the one or the other of two exchanged; recoverable: by the best of these. {PER_SEED}."
    )
    return text_table("What a damage costs", header, rows, note)


def recovery_table(measured: Measured) -> Table:
    """Shares over the stream, by what was observed."""
    rows = []
    for method in METHODS:
        cells = [_decimal(measured.mean_shares(method.name, tokens)) for tokens in SHOWN]
        if any(cell != DASH for cell in cells):
            pooled = [_decimal(measured.pooled_shares(method.name, tokens)) for tokens in POOLED]
            rows.append([method.name, *cells, *pooled])
    header = ["evidence", *map(_tokens, SHOWN), *(f"of the sum, {_tokens(tokens)}" for tokens in POOLED)]
    note = (
        "0: the frozen damaged gate; 1: the best masking of the touched experts. Mean over the damages of a seed that masking wins at "
        f"least {RECOVERABLE} nats on; a share above 1 counts as 1. of the sum: nats won back over nats recoverable, summed. "
        f"{PER_SEED}."
    )
    return text_table("Share of the recoverable loss, by tokens since the damage", header, rows, note)


def by_damage_table(measured: Measured) -> Table:
    """The gradient signal, damage by damage."""
    rows = []
    for damage in measured.damages:
        shares = [_decimal(measured.shares(damage, GRADIENT.name, tokens)) for tokens in SHOWN]
        last = {s: curve[-1] for s, curve in measured.get(damage, GRADIENT.name, "curve_ece").items()}
        if last:
            seeds = sum(gain >= RECOVERABLE for gain in measured.recoverable(damage).values())
            rows.append(
                [damage, str(seeds), *shares, _decimal(measured.get(damage, BASE, "frozen_ece")), _decimal(last)]
            )
    header = ["damage", "seeds", *map(_tokens, SHOWN), "ECE frozen", "ECE at the end"]
    note = (
        f"seeds: how many have at least {RECOVERABLE} nats to recover; the others have no share. Above 1 where down-weighting by "
        f"cluster does better than masking. {PER_SEED}."
    )
    return text_table("Share of the recoverable loss by damage, gradient signal", header, rows, note)


def repair_table(measured: Measured) -> Table:
    """Traffic of repaired experts."""
    rows = []
    for method in METHODS:
        cells = [_decimal(measured.traffic(method.name, tokens)) for tokens in CHECKPOINTS]
        if any(cell != DASH for cell in cells):
            rows.append([method.name, *cells])
    note = f"1: as much as before the damage. Mean over all damages of a seed. {PER_SEED}."
    header = ["evidence", *("at the repair" if not tokens else _tokens(tokens) for tokens in CHECKPOINTS)]
    return text_table("Traffic of repaired experts, by tokens since the repair", header, rows, note)


def knob_table(measured: Measured) -> Table:
    """One knob at a time, damages in all layers alone."""
    if not any(measured.get(HEALTHY, method.name, "after_loss") for method in KNOB_METHODS):
        return text_table("", [], [])
    damages = [name for name in measured.damages if "layers" in name]
    rows = []
    for method in (GRADIENT, *KNOB_METHODS):
        change = measured.healthy_change(method.name)
        if change:
            shares = [_decimal(measured.mean_shares(method.name, tokens, damages)) for tokens in (1024, 5120, 20_480)]
            back = [
                at(20_480, curve)
                for damage in damages
                for curve in measured.get(damage, method.name, "curve_repaired_traffic").values()
            ]
            name = method.name.removeprefix("gradient, ")
            back_mean = f"{sum(back) / len(back):.3f}" if back else DASH
            rows.append(
                [
                    name,
                    percent_fine(change.values()),
                    *shares,
                    back_mean,
                ]
            )
    header = ["knob", "healthy change %", "1,024", "5,120", "20,480", "traffic back"]
    note = (
        f"gradient: amnesty {AMNESTY:,.0f}, else PriorGate's defaults. Shares after so many tokens, damages in all layers at once. "
        f"{PER_SEED}."
    )
    return text_table("One knob at a time", header, rows, note)


def scratch_table(measured: Measured) -> Table:
    """Arms trained from scratch."""
    rows = []
    reference = measured.get(SCRATCH, ARMS[0], "loss")
    for arm in ARMS:
        losses = measured.get(SCRATCH, arm, "loss")
        if losses:
            relative = [losses[seed] / reference[seed] - 1 for seed in losses if seed in reference]
            dead = list(measured.get(SCRATCH, arm, "dead_experts").values())
            smallest = measured.get(SCRATCH, arm, "smallest_share")
            parameters = next(iter(measured.get(SCRATCH, arm, "parameters").values()))
            cells = [_decimal(losses), percent(relative, signed=True), _decimal(measured.get(SCRATCH, arm, "ece"))]
            rows.append([arm, *cells, " ".join(map(str, dead)), _decimal(smallest), f"{parameters:,}"])
    header = ["gate", "loss", f"against {ARMS[0]} %", "ECE", "dead experts by seed", "smallest share", "parameters"]
    note = (
        f"Loss in nats a byte on held-out text. dead: below {DEAD:.0%} of the fair share of the traffic; smallest share: of "
        f"any expert, in parts of the fair one. {PER_SEED}."
    )
    return text_table("Trained from scratch", header, rows, note)


def percent_fine(values: Iterable[float]) -> str:
    """Signed, in percent with three decimals: changes are far below one percent."""
    listed = [100 * value for value in values]
    return ("+" if sum(listed) >= 0 else "") + decimal(listed)


def _decimal(by_seed: dict[int, float]) -> str:
    return decimal(list(by_seed.values()))


def _tokens(count: int) -> str:
    return f"{count:,}"
