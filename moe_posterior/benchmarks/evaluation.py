"""How long ``moe-posterior evaluate`` takes for files of many rows, and how much memory: the whole command, start to report.

python -m moe_posterior.benchmarks.evaluation --rows 1000000 10000000 --out results/evaluate
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_posterior.errors import MissingDependencyError
from moe_posterior.files.atomic import replacing, write_text
from moe_posterior.results.tables import Cell, Table, to_markdown

CLASSES = 10
PIECE = 1_000_000  # rows to make at a time


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, and write scale.md and scale.json."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000], metavar="N")
    made.add_argument("--out", type=Path, metavar="DIR")
    options = made.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = [measured(Path(folder), n) for n in options.rows]
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    command = f"python -m moe_posterior.benchmarks.evaluation --rows {' '.join(map(str, options.rows))}"
    text = to_markdown(table_of(found, f"{CLASSES} classes, one column each. {machine}. {command}"))
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_text(options.out / "scale.md", text)
        record = {"command": command, "machine": machine, "classes": CLASSES, "records": found}
        write_text(options.out / "scale.json", json.dumps(record, indent=1) + "\n")
    return 0


def table_of(records: Sequence[Mapping[str, Any]], note: str) -> Table:
    """A line per run; the load average says how many processes wanted a core meanwhile."""
    columns = ["rows", "file (MB)", "wall (s)", "CPU (s)", "peak memory (MB)", "load average"]
    rows = [[Cell(f"{x:.1f}", x) if isinstance(x, float) else x for x in one.values()] for one in records]
    return Table(columns, rows, note=note)


def measured(folder: Path, rows: int) -> dict[str, Any]:
    """One run of the command in a process of its own."""
    path = folder / "predictions.parquet"
    write_predictions(path, rows)
    words = [
        sys.executable,
        "-m",
        "moe_posterior.cli",
        "evaluate",
        "--predictions",
        str(path),
        "--out",
        str(folder / "out"),
    ]
    load, start = os.getloadavg()[0], time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return {
        "rows": rows,
        "file": round(path.stat().st_size / 1e6),
        "wall": round(time.perf_counter() - start, 1),
        "cpu": round(used.ru_utime + used.ru_stime, 1),
        "memory": round(used.ru_maxrss / 1024),
        "load": round((load + os.getloadavg()[0]) / 2, 1),
    }


def write_predictions(path: Path, rows: int) -> None:
    """Overconfident predictions of random labels, as Parquet."""
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "evaluate") from error
    draw = np.random.default_rng(0)
    schema = pa.schema([*((f"prob_{k}", pa.float32()) for k in range(CLASSES)), ("label", pa.int64())])
    with replacing(path) as raw, ParquetWriter(raw, schema) as file:
        for start in range(0, rows, PIECE):
            n = min(PIECE, rows - start)
            label = draw.integers(0, CLASSES, n)
            odds = draw.standard_normal((n, CLASSES), dtype=np.float32)
            odds[np.arange(n), label] += 2
            odds = np.exp(1.5 * odds)
            probs = odds / odds.sum(axis=1, keepdims=True)
            file.write(pa.table([*probs.T, label], schema=schema))


if __name__ == "__main__":
    sys.exit(main())
