"""How often intervals of the calibration error cover the truth, and how often a comparison declares a winner.

The models have a known calibration error: confidences are sharp (beta(30, 1)), mild (beta(6, 1.5)) or spread (uniform on [.3, 1]), and
accuracy lies below confidence by a constant, chosen to give the wanted binned l1 error in the population. Everything goes through
:func:`~moe_posterior.metrics.calibration_interval` and :func:`~moe_posterior.metrics.calibration_difference`.

    python -m moe_posterior.benchmarks.coverage                                      both tables in under two minutes on one idle core
    python -m moe_posterior.benchmarks.coverage --runs 200 --out results/statistics  and coverage.json, coverage.md there
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_posterior.benchmarks.cells import text_table
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.files.atomic import write_text
from moe_posterior.metrics import calibration_difference, calibration_interval
from moe_posterior.results.tables import Table, to_markdown

SPREADS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "sharp": lambda rng, n: rng.beta(30, 1, n),
    "mild": lambda rng, n: rng.beta(6, 1.5, n),
    "spread": lambda rng, n: rng.uniform(0.3, 1, n),
}
ROWS = (100, 300, 3_000, 30_000)
ERRORS = (0.0, 0.01, 0.02, 0.05, 0.15)
PAIRS = (  # spread and true error of A, then of B
    ("mild", 0.0, "mild", 0.0),
    ("sharp", 0.0, "spread", 0.0),
    ("sharp", 0.05, "spread", 0.05),
    ("sharp", 0.02, "spread", 0.0),
    ("mild", 0.03, "mild", 0.0),
    ("mild", 0.05, "mild", 0.0),
    ("spread", 0.05, "sharp", 0.0),
)
PAIR_ROWS = (300, 3_000)
POPULATION = 400_000


def shift_of(spread: str, error: float) -> float:
    """The constant gap between confidence and accuracy that gives this binned error in the population."""
    confidence = SPREADS[spread](np.random.default_rng(0), POPULATION)
    bins = np.minimum((confidence * 15).astype(int), 14)
    low, high = 0.0, 1.0
    for _ in range(25 if error else 0):
        middle = (low + high) / 2
        gap = np.bincount(bins, confidence - (confidence - middle).clip(0)) / POPULATION
        low, high = (middle, high) if np.abs(gap).sum() < error else (low, middle)
    return high if error else 0.0


def drawn(rng: np.random.Generator, rows: int, spread: str, shift: float, luck: np.ndarray) -> tuple[Tensor, Tensor]:
    """Confidences and correctness; two models given the same ``luck`` err on the same rows."""
    confidence = SPREADS[spread](rng, rows)
    return torch.from_numpy(confidence), torch.from_numpy(luck < confidence - shift)


def coverage(runs: int) -> Iterator[dict[str, Any]]:
    """One record per spread, number of rows and true error."""
    for spread in SPREADS:
        for error in ERRORS:
            shift = shift_of(spread, error)
            for rows in ROWS:
                rng = np.random.default_rng([rows, int(1000 * error), len(spread)])
                found = [calibration_interval(*drawn(rng, rows, spread, shift, rng.random(rows))) for _ in range(runs)]
                yield {
                    "spread": spread,
                    "rows": rows,
                    "error": error,
                    "runs": runs,
                    "covered": sum(one.low <= error <= one.high for one in found) / runs,
                    "below": sum(one.high < error for one in found) / runs,
                    "above": sum(one.low > error for one in found) / runs,
                    **{
                        name: float(np.mean([getattr(one, name) for one in found]))
                        for name in ("plain", "value", "floor", "low", "high")
                    },
                }


def comparisons(runs: int) -> Iterator[dict[str, Any]]:
    """One record per pair of models and number of rows; in every second run both models err on the same rows."""
    for first, first_error, second, second_error in PAIRS:
        shifts = shift_of(first, first_error), shift_of(second, second_error)
        for rows in PAIR_ROWS:
            rng = np.random.default_rng([rows, PAIRS.index((first, first_error, second, second_error))])
            found = []
            for run in range(runs):
                luck = rng.random(rows)
                other = luck if run % 2 else rng.random(rows)
                found.append(
                    calibration_difference(
                        drawn(rng, rows, first, shifts[0], luck), drawn(rng, rows, second, shifts[1], other)
                    )
                )
            yield {
                "first": first,
                "first_error": first_error,
                "second": second,
                "second_error": second_error,
                "rows": rows,
                "runs": runs,
                "first_worse": sum(one.low > 0 for one in found) / runs,
                "second_worse": sum(one.high < 0 for one in found) / runs,
                "covered": sum(one.low <= first_error - second_error <= one.high for one in found) / runs,
            }


def tables(covered: list[dict[str, Any]], compared: list[dict[str, Any]]) -> list[Table]:
    """The tables of coverage and of comparisons."""
    by_error = []
    for rows in ROWS:
        for error in ERRORS:
            own = [one for one in covered if (one["rows"], one["error"]) == (rows, error)]
            if own:
                means = [f"{np.mean([one[name] for one in own]):.3f}" for name in ("floor", "plain", "value")]
                by_spread = [f"{one['covered']:.3f}" for one in own]
                by_error.append(
                    (f"{rows:,}", f"{error:.2f}", *by_spread, f"{np.mean([one['covered'] for one in own]):.3f}", *means)
                )
    runs = covered[0]["runs"] if covered else 0
    pairs = tuple(
        (
            f"{one['first']}, {one['first_error']:.2f}",
            f"{one['second']}, {one['second_error']:.2f}",
            f"{one['rows']:,}",
            f"{one['first_worse']:.3f}",
            f"{one['second_worse']:.3f}",
            f"{one['covered']:.3f}",
        )
        for one in compared
    )
    return [
        text_table(
            "Coverage of the 95 % interval of ECE",
            ("rows", "true ECE", *SPREADS, "all", "noise floor", "plain", "debiased"),
            tuple(by_error),
            f"Share of {runs:,} runs a cell whose interval holds the true binned error; floor and estimates are means.",
        ),
        text_table(
            "How often a comparison of two models declares one worse",
            ("A", "B", "rows", "A worse", "B worse", "difference covered"),
            pairs,
            "Spread and true ECE of each model. Where both errors are equal every declaration is false; nominal: at most 0.025 a side.",
        ),
    ]


def main(arguments: list[str]) -> int:
    """Run and print both tables."""
    parser = argparse.ArgumentParser(
        "moe_posterior.benchmarks.coverage", description="Coverage of ECE intervals and level of comparisons."
    )
    parser.add_argument("--runs", type=int, default=40, help="a cell (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write coverage.json and coverage.md there")
    asked = parser.parse_args(arguments)
    if asked.runs < 1:
        raise InvalidArgumentError(f"--runs must be at least 1; got {asked.runs}")
    covered, compared = list(coverage(asked.runs)), list(comparisons(asked.runs))
    text = to_markdown(*tables(covered, compared))
    sys.stdout.write(text)
    if asked.out:
        command = f"python -m moe_posterior.benchmarks.coverage --runs {asked.runs} --out {asked.out}"
        about = {
            "command": command,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "machine": platform.machine(),
        }
        asked.out.mkdir(parents=True, exist_ok=True)
        found = {"about": about, "coverage": covered, "comparisons": compared}
        write_text(asked.out / "coverage.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
        write_text(asked.out / "coverage.md", f"{text}\n`{command}`\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
