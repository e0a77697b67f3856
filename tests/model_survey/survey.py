"""Which mixture-of-experts model types of the installed transformers can be swapped: each is built tiny, swapped and examined.

    make swap-table

A type counts as swapped only if every check that applies to it passes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from torch import nn

from model_survey.checks import CHECKS
from model_survey.tiny import model_class, moe_model_types, tiny_model
from moe_posterior.errors import MissingDependencyError
from moe_posterior.escape import lines, markdown
from moe_posterior.files.atomic import write_text
from moe_posterior.huggingface.find import find_routers
from moe_posterior.huggingface.host import SwappedRouter
from moe_posterior.huggingface.swap import restore_gates


def survey(model_types: list[str]) -> list[dict[str, Any]]:
    """One row a model type; types that hold no mixture at all are left out."""
    rows = [examine(model_type) for model_type in model_types]
    return [row for row in rows if row["routers"]]


def examine(model_type: str) -> dict[str, Any]:
    """Swap a tiny model of this type and check what the swap promises.

    Returns:
        ``model_type``; ``model``, its class; ``routers``, their classes; ``status``, one of "swapped", "special", "refused" and
        "failed"; ``reason``; ``checks`` by name, True, False, or None where one does not apply.
    """
    kind = model_class(model_type)
    row: dict[str, Any] = {
        "model_type": model_type,
        "model": kind.__name__ if kind else "",
        "routers": [],
        "checks": {},
    }
    try:
        model = tiny_model(model_type)
    except Exception as error:
        return {**row, "routers": ["?"], "status": "failed", "reason": f"no tiny model: {_short(error)}"}
    found = find_routers(model)
    row["routers"] = sorted({type(entry.module).__name__ for entry in found})
    row["status"], row["reason"] = "refused", "; ".join(sorted({entry.reason for entry in found if entry.reason}))
    kinds = {entry.adapter.kind for entry in found if entry.adapter}
    if not kinds:
        return row
    if type(model).forward is nn.Module.forward:  # a composite whose parts are called one by one
        part, model = next((name, child) for name, child in model.named_children() if find_routers(child))
        row["reason"] += f"has no forward of its own; examined through its {part} "
    for name, check in CHECKS.items():
        try:
            row["checks"][name] = check(model)
        except Exception as error:
            row["checks"][name] = False
            row["reason"] += f"{name}: {_short(error)} "
        if any(isinstance(module, SwappedRouter) for module in model.modules()):
            restore_gates(model)
    passed = all(outcome is not False for outcome in row["checks"].values())
    row["status"] = max(kinds) if passed and kinds == {"swapped"} else "special" if passed else "failed"
    return row


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def as_markdown(rows: list[dict[str, Any]], version: str) -> str:
    """The table, and what it counts."""
    counts = {
        status: sum(row["status"] == status for row in rows) for status in ("swapped", "special", "refused", "failed")
    }
    lines = [
        f"transformers {version}: {len(rows)} mixture-of-experts model types, "
        + ", ".join(f"{n} {status}" for status, n in counts.items()),
        "",
        "| model type | routers | status | " + " | ".join(CHECKS) + " | remark |",
        "|---" * (4 + len(CHECKS)) + "|",
    ]
    marks = {True: "yes", False: "**no**", None: "–"}
    for row in rows:
        checks = [marks[row["checks"].get(name)] for name in CHECKS]
        lines.append(
            f"| {markdown(row['model_type'])} | {markdown(', '.join(row['routers']))} | {row['status']} | "
            f"{' | '.join(checks)} | {markdown(row['reason'])} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Examine the given model types (default: all) and write the table; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError("transformers", "hf") from error
    rows = survey(options.model_types or moe_model_types())
    table = as_markdown(rows, transformers.__version__)
    print(lines(table))
    if options.markdown:
        write_text(options.markdown, table)
    if options.json:
        write_text(options.json, json.dumps({"transformers": transformers.__version__, "types": rows}, indent=1) + "\n")
    return int(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
