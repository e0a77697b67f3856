"""``moe-posterior benchmark lm``: run the experiment, resume it, or render what an earlier run wrote."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moe_posterior.benchmarks import records
from moe_posterior.benchmarks.lm.experiment import Experiment, run
from moe_posterior.benchmarks.lm.figures import draw
from moe_posterior.benchmarks.lm.models import Recipe
from moe_posterior.benchmarks.lm.scratch import ARMS
from moe_posterior.benchmarks.lm.stream import Plan
from moe_posterior.benchmarks.lm.tables import tables_of
from moe_posterior.benchmarks.records import Results
from moe_posterior.benchmarks.show import show
from moe_posterior.commands.lm import parser
from moe_posterior.errors import InvalidArgumentError


def lm(arguments: Sequence[str], about: dict[str, object]) -> int:
    """Run ``moe-posterior benchmark lm`` with these arguments; 0 on success.

    Args:
        arguments: those after ``lm``.
        about: versions and the like, for the records.

    Raises:
        MoEPosteriorError: a wrong argument, missing data or a missing package; the message says what to do.
    """
    asked = parser().parse_args(list(arguments))
    if asked.source is not None:
        return _show(asked, records.read(asked.source))
    for name in ("seeds", "layers", "steps", "scratch_steps", "healthy"):
        if getattr(asked, name) < 1:
            raise InvalidArgumentError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(asked, name)}")
    if not asked.text:
        raise InvalidArgumentError("--text must name at least one file of plain text, or --from a file of records")
    about = {**about, "command": shlex.join(["moe-posterior", "benchmark", "lm", *arguments])}
    kept = records.Resumed(asked.out, about)
    experiment = Experiment(
        asked.text,
        Path(asked.runs),
        range(asked.first_seed, asked.first_seed + asked.seeds),
        asked.parts,
        replace(Recipe(), layers=asked.layers, steps=asked.steps),
        asked.scratch_steps,
        replace(Plan(), healthy=asked.healthy),
        asked.tuning,
        asked.arms or ARMS,
        kept.add,
        (lambda line: None) if asked.quiet else (lambda line: print(line, file=sys.stderr, flush=True)),
    )
    run(experiment, kept.done)
    return _show(asked, Results(kept.records, about))


def _show(asked: argparse.Namespace, results: Results) -> int:
    found = [record for record in results.records if record.benchmark == "lm"]
    if not found:
        raise InvalidArgumentError(f"{asked.source or asked.out} must hold records of benchmark 'lm'; it has none")
    return show(asked, Results(found, results.about), tables_of(found), draw, signed=True)
