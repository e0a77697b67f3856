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
from moe_posterior.benchmarks.lm.stream import Plan
from moe_posterior.benchmarks.lm.tables import tables_of
from moe_posterior.benchmarks.records import Record, Results
from moe_posterior.commands.lm import parser
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.escape import code, markdown, terminal
from moe_posterior.files.atomic import write_text
from moe_posterior.results.tables import print_tables, to_markdown


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
    kept = records.read(asked.out).records if asked.out and Path(asked.out).is_file() else []
    found = list(kept)
    about = {**about, "command": shlex.join(["moe-posterior", "benchmark", "lm", *arguments])}

    def report(new: list[Record]) -> None:
        found.extend(new)
        if asked.out:
            records.write(Results(found, about), asked.out)

    report([])  # fail on an unwritable file before the work, not after it
    experiment = Experiment(
        asked.text,
        Path(asked.runs),
        range(asked.first_seed, asked.first_seed + asked.seeds),
        asked.parts,
        replace(Recipe(), layers=asked.layers, steps=asked.steps),
        asked.scratch_steps,
        replace(Plan(), healthy=asked.healthy),
        asked.tuning,
        report,
        (lambda line: None) if asked.quiet else (lambda line: print(line, file=sys.stderr, flush=True)),
    )
    run(experiment, {record.case for record in found})
    return _show(asked, Results(found, about))


def _show(asked: argparse.Namespace, results: Results) -> int:
    found = [record for record in results.records if record.benchmark == "lm"]
    if not found:
        raise InvalidArgumentError(f"{asked.source or asked.out} must hold records of benchmark 'lm'; it has none")
    tables = tables_of(found)
    print_tables(tables)
    about = results.about
    versions = f"torch {about.get('torch')}, Python {about.get('python')}, {about.get('processors')} processors"
    if asked.markdown:
        again = f"\n{code(about.get('command'))}\n\n{markdown(versions)}\n"
        write_text(asked.markdown, to_markdown(*tables) + again)
        print(f"tables: {terminal(asked.markdown)}")
    if asked.figures:
        for path in draw(found, asked.figures):
            print(f"figure: {terminal(path)}")
    print(terminal(versions))
    print(f"again:  {terminal(about.get('command'))}")
    return 0
