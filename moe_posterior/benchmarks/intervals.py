"""How often each interval that a report prints holds the truth, by simulation with models whose every figure is known.

Two models answer the same rows; their confidences and true errors are those of :mod:`moe_posterior.benchmarks.coverage`. Intervals
come from the functions that fill a report.

Dimensions: n rows of a draw, K classes, G configurations.
"""

import argparse
import functools
import math
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_posterior.benchmarks import records
from moe_posterior.benchmarks.cells import text_table
from moe_posterior.benchmarks.coverage import SPREADS, shift_of
from moe_posterior.benchmarks.records import Record, case_key, select
from moe_posterior.benchmarks.show import show
from moe_posterior.checks.validation import count
from moe_posterior.guarantees import GuaranteedThreshold
from moe_posterior.metrics import brier_score, negative_log_likelihood, wilson_interval
from moe_posterior.prediction import Prediction
from moe_posterior.report.evaluation import Evaluation, reduced
from moe_posterior.report.panels import configurations
from moe_posterior.report.promise import Scored, promise_rows
from moe_posterior.report.records import records_of
from moe_posterior.report.schema import OVERALL, Key
from moe_posterior.results.tables import DASH, Table

BENCHMARK = "intervals"
CLASSES = 4
SHARES = (0.5, 0.3, 0.15, 0.05)  # of the configurations
THRESHOLD = 0.85
ROWS = (300, 3_000)
PAIRS = (  # spread and true ECE of the model, then of the baseline
    ("mild", 0.0, "sharp", 0.0),
    ("mild", 0.05, "mild", 0.0),
    ("spread", 0.05, "sharp", 0.05),
    ("sharp", 0.15, "spread", 0.02),
)
BLOCK = 50  # draws whose results are stored together
METRICS = ("accuracy", "nll", "brier", "ece")
DIFFERENCE, RISK, GAPS = ", difference", "risk at a threshold", "gaps of all configurations"
FIGURES = (*METRICS, *(f"{name}{DIFFERENCE}" for name in METRICS), RISK, GAPS)
BAND = (0.93, 0.97)


class Model(NamedTuple):
    """Confidences of this spread, true error of this size."""

    spread: str
    error: float

    @property
    def shift(self) -> float:
        """Confidence less accuracy, on every row."""
        return _shift(self.spread, self.error)


_shift = functools.cache(shift_of)


class Drawn(NamedTuple):
    """Answers of one model; the label is always class 0."""

    probs: Tensor  # (n, K)
    accuracy: Tensor  # (n,) chance to be right


def drawn(rng: np.random.Generator, model: Model, luck: np.ndarray) -> Drawn:
    """Probabilities with the confidence on class 0 where the luck is good enough, else on class 1, and the rest shared out evenly.

    >>> found = drawn(np.random.default_rng(0), Model("mild", 0.05), np.array([0.0, 0.999]))
    >>> found.probs.argmax(1).tolist()
    [0, 1]
    """
    confidence = SPREADS[model.spread](rng, len(luck)).clip(1 / CLASSES + 1e-3, 1)
    accuracy = (confidence - model.shift).clip(0, 1)
    top = (luck >= accuracy).astype(int)
    probs = np.repeat((1 - confidence)[:, None] / (CLASSES - 1), CLASSES, axis=1)
    probs[np.arange(len(luck)), top] = confidence
    return Drawn(torch.from_numpy(probs), torch.from_numpy(accuracy))


@functools.cache
def truth(model: Model) -> Mapping[str, float]:
    """Every figure of the model in the population: the mean over both outcomes of each of half a million rows."""
    rows = 500_000
    right, wrong = (drawn(np.random.default_rng(0), model, np.full(rows, luck)) for luck in (-1.0, 2.0))
    confidence, accuracy, label = right.probs[:, 0], right.accuracy, torch.zeros(rows, dtype=torch.int64)
    acted, gap = confidence >= THRESHOLD, confidence - accuracy

    def mean(score: Callable[..., Tensor]) -> float:
        of_right, of_wrong = (score(one.probs, label, "none") for one in (right, wrong))
        return float((accuracy * of_right + (1 - accuracy) * of_wrong).mean())

    place = (confidence.numpy() * 15).astype(int).clip(max=14)
    return {
        "accuracy": float(accuracy.mean()),
        "nll": mean(negative_log_likelihood),
        "brier": mean(brier_score),
        "ece": float(np.abs(np.bincount(place, gap.numpy(), 15)).sum() / rows),
        RISK: float((1 - accuracy)[acted].mean()),
        "gap": float(gap.mean()),
    }


def hits(first: Model, second: Model, rows: int, seed: int, resamples: int = 1000) -> dict[str, bool]:
    """Whether each interval of one draw holds what it should; the second model is the baseline.

    In every second draw both models err on the same rows as far as their accuracies allow.
    """
    rng = np.random.default_rng([rows, seed])
    luck = rng.random(rows)
    both = [drawn(rng, first, luck), drawn(rng, second, luck if seed % 2 else rng.random(rows))]
    cluster, label = torch.from_numpy(rng.choice(len(SHARES), rows, p=SHARES)), torch.zeros(rows, dtype=torch.int64)
    items = [
        Prediction(one.probs, target=label, cluster_ids=cluster, arm=name)
        for one, name in zip(both, ("model", "baseline"), strict=True)
    ]
    evaluations: dict[Key, Evaluation] = {(item.arm, "clean", 0): reduced(item, 15) for item in items}
    own, paired = records_of(evaluations, OVERALL, None, "baseline", 15, resamples, seed)
    real, others = truth(first), truth(second)
    found = {
        one["metric"]: _inside(one["low"], one["high"], real[one["metric"]]) for one in own if one["arm"] == "model"
    }
    for pair in paired:
        name = pair["metric"]
        found[f"{name}{DIFFERENCE}"] = _inside(pair["low"], pair["high"], real[name] - others[name])
    gaps = configurations("model", "clean", [evaluations["model", "clean", 0]])
    found[GAPS] = all(_inside(row["interval"][0], row["interval"][1], real["gap"]) for row in gaps)
    confidence, top = both[0].probs.max(1)
    chosen = GuaranteedThreshold(THRESHOLD, 0.1, 0.1, rows=0, acted=0, errors=0.0, assumptions=())
    [row] = promise_rows("model", chosen, [Scored("clean", 0, confidence, (top == 0).double())])
    low, high = row["interval"] or (None, None)
    found[RISK] = _inside(low, high, real[RISK])
    return found


def _inside(low: float | None, high: float | None, value: float) -> bool:
    return low is not None and high is not None and low - 1e-12 <= value <= high + 1e-12


def blocks(seeds: Iterable[int], done: Collection[str]) -> Iterator[list[Record]]:
    """Records of one block of draws at a time, every case in turn: how many intervals of each figure held the truth."""
    for seed in seeds:
        for rows in ROWS:
            for first, first_error, second, second_error in PAIRS:
                pair = Model(first, first_error), Model(second, second_error)
                options = {"rows": rows, "draws": BLOCK}
                name = f"{first} {first_error:.2f} against {second} {second_error:.2f}"
                if case_key(BENCHMARK, name, "", options, seed) in done:
                    continue
                found = [hits(*pair, rows, seed * BLOCK + draw) for draw in range(BLOCK)]
                held = {figure: sum(one[figure] for one in found) for figure in FIGURES}
                yield [Record(BENCHMARK, name, "", options, seed, figure, value) for figure, value in held.items()]


def tables_of(found: Iterable[Record]) -> list[Table]:
    """One table per number of rows: the share of intervals that hold the truth, and what lies outside the band."""
    found = list(found)
    return [_table([one for one in found if one.options["rows"] == rows], rows) for rows in ROWS]


def _table(found: list[Record], rows: int) -> Table:
    names = list(dict.fromkeys(one.environment for one in found))
    lines, least = [], math.inf
    for figure in FIGURES:
        cells = []
        for name in names:
            own = select(found, metric=figure, environment=name)
            total = sum(one.options["draws"] for one in own)
            held = sum(int(one.value) for one in own if isinstance(one.value, int | float))
            least = min(least, total)
            cells.append(_cell(held, total, 1.0 if figure == GAPS else BAND[1]))
        lines.append((figure, *cells))
    note = (
        f"Share of 95 % intervals that hold the truth, of {least:,.0f} draws or more a cell. * outside 93 to 97 %, beyond what that "
        "many draws leave open (99 %). Spread and true ECE of the model, against the baseline's. The gaps of all configurations shall "
        "hold together, so 95 % or more is what was asked for."
    )
    return text_table(f"Coverage with {rows:,} rows", ("interval", *names), lines, note)


def _cell(held: int, total: int, most: float) -> str:
    if not total:
        return DASH
    low, high = wilson_interval(torch.tensor(float(held)), torch.tensor(float(total)), level=0.99)
    outside = float(high) < BAND[0] or float(low) > most
    return f"{held / total:.3f}{' *' if outside else ''}"


def intervals(arguments: Sequence[str], about: dict[str, Any]) -> int:
    """Run ``moe-posterior benchmark intervals`` with these arguments; 0 on success.

    Raises:
        MoEPosteriorError: a wrong argument, or a file that is none of records.
    """
    asked = _parser().parse_args(list(arguments))
    if asked.source is not None:
        results = records.read(asked.source)
        return show(asked, results, tables_of(select(results.records, benchmark=BENCHMARK)), None, signed=True)
    count("--draws", asked.draws, least=BLOCK)
    command = shlex.join(["moe-posterior", "benchmark", "intervals", *arguments])
    kept = records.Resumed(asked.out, {**about, "command": command})
    for new in blocks(range(asked.draws // BLOCK), {_key(one) for one in kept.records}):
        kept.add(new)
    results = kept.results(BENCHMARK)
    return show(asked, results, tables_of(results.records), None, signed=True)


def _key(one: Record) -> str:
    return case_key(one.benchmark, one.environment, "", one.options, one.seed)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="moe-posterior benchmark intervals",
        description="How often each interval of a report holds the truth, on models whose every figure is known.",
    )
    made.add_argument(
        "--draws",
        type=int,
        default=1000,
        metavar="N",
        help=f"a case, in blocks of {BLOCK} (default 1000: about half an hour)",
    )
    made.add_argument(
        "--out", metavar="FILE", help="write the records (.json or .parquet); finished blocks are skipped"
    )
    made.add_argument("--from", dest="source", metavar="FILE", help="render these records without running anything")
    made.add_argument("--markdown", metavar="FILE.md", help="also write the tables as Markdown")
    made.set_defaults(figures=None)
    return made
