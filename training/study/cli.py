"""``moe-posterior study``: train every cell, measure, tabulate; resumable."""

import argparse
import hashlib
import json
import os
import shlex
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_posterior.commands.study import parser
from moe_posterior.errors import InvalidArgumentError, MissingDataError
from moe_posterior.escape import lines
from moe_posterior.files.atomic import write_text
from moe_posterior.files.reading import decoding, read_json, read_text
from moe_posterior.files.rows import read_rows, write_rows
from moe_posterior.threads import one_thread
from moe_posterior.training.outputs import outputs_of
from moe_posterior.training.runs import Run
from moe_posterior.training.study import measure
from moe_posterior.training.study.figures import online_figure
from moe_posterior.training.study.measure import figures_of_cell, figures_of_simulation
from moe_posterior.training.study.plan import STUDIES, Cell, Study, cells_of, settings_of, simulations_of
from moe_posterior.training.study.sources import CORRUPTED_SPLIT, SIMULATED_SPLIT
from moe_posterior.training.study.summary import summary_of
from moe_posterior.training.study.tables import tables_of, to_markdown
from moe_posterior.training.study.train import load_outputs, save_outputs, train_cell

__all__ = ["study"]

JUDGED_SPLITS = ("val", "test", CORRUPTED_SPLIT, SIMULATED_SPLIT)


def study(arguments: list[str]) -> int:
    """Run ``moe-posterior study`` with the given command-line arguments.

    Raises:
        MoEPosteriorError: a mistake in what was asked, or absent data.
    """
    asked = parser().parse_args(arguments)
    console = Console()
    command = shlex.join(["moe-posterior", "study", *arguments])
    if asked.study == "summary":
        return _summary(asked, command, console)
    if asked.source:
        if len(asked.source) > 1:
            raise InvalidArgumentError(f"--from must name one file, unless for summary; got {asked.source}")
        content = _read(asked.source[0], command.replace("--from", "--out"))
    else:
        if asked.seeds is not None and asked.seeds < 1:
            raise InvalidArgumentError(f"--seeds must be at least 1; got {asked.seeds}")
        content = _run(STUDIES[asked.study], asked, command, console)
    if asked.train_only:
        return 0
    tables = tables_of(content["records"])
    text = to_markdown(tables, content["about"])
    _show(text, asked.markdown, console)
    if asked.figure:
        online_figure(content["records"], asked.figure)
    return 0


def _summary(asked: argparse.Namespace, command: str, console: Console) -> int:
    if not asked.source:
        raise InvalidArgumentError("--from must name the file of records of every data set to sum up")
    studies = [_read(file, "moe-posterior study NAME --out FILE")["records"] for file in asked.source]
    if empty := [file for file, records in zip(asked.source, studies, strict=True) if not records]:
        raise InvalidArgumentError(f"--from must name files with records; {empty[0]} has none")
    _show(to_markdown(summary_of(studies), {"command": command}), asked.markdown, console)
    return 0


def _read(file: str, how: str) -> dict[str, Any]:
    """A file of records, one for each seed.

    Raises:
        MissingDataError: there is none. DamagedFileError: it is not one.
    """
    if not Path(file).is_file():
        raise MissingDataError(f"there is no {file}; make it with: {how}")
    content = read_rows(file)
    with decoding(file, "a file of study records", "make it with --out"):
        content["records"] = one_by_one(content["records"])
        to_markdown(tables_of(content["records"]), content["about"])
    return content


def _show(text: str, file: str | None, console: Console) -> None:
    console.print(lines(text), markup=False, highlight=False)
    if file:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)


def over_seeds(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records that differ in the seed alone as one, ``values`` from seed to value: a fifth of the file.

    >>> over_seeds([{"metric": "ece", "seed": 42, "value": 0.1}, {"metric": "ece", "seed": 43, "value": 0.2}])
    [{'metric': 'ece', 'values': {'42': 0.1, '43': 0.2}}]
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        rest = {name: value for name, value in record.items() if name not in ("seed", "value")}
        one = found.setdefault(tuple(rest.values()), {**rest, "values": {}})
        one["values"][str(record["seed"])] = record["value"]
    return list(found.values())


def one_by_one(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What :func:`over_seeds` joined.

    >>> one_by_one([{"metric": "ece", "values": {"42": 0.1}}])
    [{'metric': 'ece', 'seed': 42, 'value': 0.1}]
    """
    return [
        {**{name: value for name, value in record.items() if name != "values"}, "seed": int(seed), "value": value}
        for record in records
        for seed, value in record["values"].items()
    ]


def _run(plan: Study, asked: argparse.Namespace, command: str, console: Console) -> dict[str, Any]:
    with one_thread(), Run(Path(asked.run_dir) / f"study-{plan.name}").locked():  # the heads are small
        return _locked_run(plan, asked, command, console)


def _locked_run(plan: Study, asked: argparse.Namespace, command: str, console: Console) -> dict[str, Any]:
    folder = Path(asked.run_dir) / f"study-{plan.name}"
    seeds = range(asked.first_seed, asked.first_seed + (asked.seeds or plan.seeds))
    _require_same_settings(plan, folder)
    cells, simulations = list(cells_of(plan, seeds, asked.skip)), list(simulations_of(plan, seeds, asked.skip))
    _train(plan, [*cells, *simulations], folder, console)
    about = {
        "command": command,
        "torch": torch.__version__,
        "seeds": list(seeds),
        "processors": os.cpu_count(),
        "settings": settings_of(plan),
    }
    if asked.train_only:
        return {"about": about, "records": []}
    records = _measure(cells, simulations, folder, console)
    content = {"about": about, "records": records}
    if asked.out:
        out = Path(asked.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_rows(out, {"about": about}, over_seeds(records))
    return content


def _require_same_settings(plan: Study, folder: Path) -> None:
    """What lies in the folder was trained with these settings, or is refused: old and new cells must not be mixed.

    Raises:
        InvalidArgumentError: other settings.
    """
    file, wanted = folder / "settings.json", settings_of(plan)
    if file.is_file() and read_json(file, "move the folder away or choose another --run-dir") != wanted:
        raise InvalidArgumentError(
            f"{folder} was made with other settings ({read_text(file).strip()}); move it away or choose another --run-dir"
        )
    write_text(file, json.dumps(wanted) + "\n")


def _train(plan: Study, cells: list[Cell], folder: Path, console: Console) -> None:
    missing = [cell for cell in cells if not _file(folder, cell).is_file()]
    if not missing:
        return
    started = time.monotonic()
    with _progress(console) as bar:
        task = bar.add_task("training", total=len(missing))
        for number, cell in enumerate(missing):
            bar.update(task, description=f"{cell.setting} {cell.gate}, {cell.method}, seed {cell.seed}")
            model, data = train_cell(cell, plan, folder)
            parts = [part for part in JUDGED_SPLITS if part in data.splits and (part != "test" or cell.inner is None)]
            said = {part: outputs_of(model, data.loader(data.split(part))) for part in parts}
            save_outputs(_file(folder, cell), said)
            bar.advance(task)
            if number == 4 or (not console.is_terminal and number % 50 == 49):
                each = (time.monotonic() - started) / (number + 1)
                console.print(
                    f"{number + 1} of {len(missing)} cells, {each:.1f} s each: {each * (len(missing) - number) / 60:.0f} min to go"
                )


def _measure(cells: list[Cell], simulations: list[Cell], folder: Path, console: Console) -> list[dict[str, Any]]:
    inner: dict[tuple[str, str, str, int], list[Path]] = {}
    for cell in simulations:
        inner.setdefault(_arm(cell), []).append(_file(folder, cell))
    records: list[dict[str, Any]] = []
    with _progress(console) as bar:
        for cell in bar.track(cells, description="measuring"):
            cached = _file(folder, cell).with_suffix(".json")
            made_from = _digest([_file(folder, cell), *inner.get(_arm(cell), ())])
            content = read_json(cached, "delete it") if cached.is_file() else {}
            if not isinstance(content, dict) or content.get("made_from") != made_from:
                said = load_outputs(_file(folder, cell))
                simulated = [load_outputs(path) for path in inner.get(_arm(cell), ())]
                found = [*figures_of_cell(cell, said), *figures_of_simulation(cell, said, simulated)]
                content = {"made_from": made_from, "records": found}
                write_text(cached, json.dumps(content))
            records += content["records"]
    return records


def _arm(cell: Cell) -> tuple[str, str, str, int]:
    return cell.setting, cell.gate, cell.method, cell.seed


def _digest(files: Iterable[Path]) -> str:
    """What a cell's figures are made from: the outputs, and the code that measures them."""
    digest = hashlib.sha256(Path(measure.__file__).read_bytes())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _file(folder: Path, cell: Cell) -> Path:
    return folder / "outputs" / f"{cell.key}.npz"


def _progress(console: Console) -> Progress:
    columns: Iterable[Any] = (
        TextColumn("{task.description:<48}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)
