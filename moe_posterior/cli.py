"""The console script ``moe-posterior``: runs a subcommand and imports only what it needs."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    sys.path.pop(
        0
    )  # `python -m` puts the working folder first; as with the console script, nothing there may shadow a package

import importlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import NamedTuple

from moe_posterior.errors import MissingDependencyError, MoEPosteriorError
from moe_posterior.escape import lines


class _Command(NamedTuple):
    module: str
    function: str
    extra: str  # what must be installed
    summary: str


COMMANDS = {
    "fit": _Command("moe_posterior.training.cli", "fit", "train", "train the arms of an experiment"),
    "cache": _Command(
        "moe_posterior.training.cache", "cache", "train", "run a backbone once over a data set and keep its features"
    ),
    "benchmark": _Command(
        "moe_posterior.benchmarks.cli",
        "benchmark",
        "train",
        "measure routing gates on streams of queries, and their latency",
    ),
    "audit": _Command(
        "moe_posterior.audit.views.cli", "audit", "audit", "read, verify and replay the log of what a router decided"
    ),
    "study": _Command(
        "moe_posterior.training.study.cli", "study", "train", "compare all training methods and calibrators over seeds"
    ),
    "evaluate": _Command(
        "moe_posterior.evaluation.command",
        "evaluate",
        "evaluate",
        "measure the accuracy and calibration of predictions, or of a run, also under shift",
    ),
}

OF_RUN = _Command("moe_posterior.training.evaluate", "evaluate", "train", "")  # `evaluate --run`


def usage() -> str:
    """The help text."""
    lines = [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: moe-posterior COMMAND [options] | --version",
            "",
            "Train, evaluate and audit mixtures of experts that route by proven competence.",
            "",
            "commands:",
            *lines,
            "",
            "moe-posterior COMMAND --help says more. A first run: moe-posterior fit --config configs/demo.yaml",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console script; the exit status is 0 on success, 1 when interrupted, 2 when the request was wrong."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(version("moe-posterior"))
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"moe-posterior: there is no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    of_run = name == "evaluate" and any(word == "--run" or word.startswith("--run=") for word in rest)
    command = OF_RUN if of_run else COMMANDS[name]
    try:
        if {"-h", "--help"} & set(rest):
            _help(name, rest)
        return getattr(_load(command), command.function)(rest)
    except (MoEPosteriorError, OSError) as error:
        print(f"moe-posterior {name}: {lines(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"moe-posterior {name}: interrupted; run the same command again to resume", file=sys.stderr)
        return 1


def _help(name: str, rest: Sequence[str]) -> None:
    """Print the help and exit if the arguments ask for it."""
    if (name, *rest[:1]) == ("benchmark", "lm"):
        name, rest = "lm", rest[1:]
    importlib.import_module(f"moe_posterior.commands.{name}").parser().parse_known_args(rest)


def _load(command: _Command) -> object:
    try:
        return importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("moe_posterior"):
            raise
        raise MissingDependencyError(error.name.split(".")[0], command.extra) from error


if __name__ == "__main__":
    sys.exit(main())
