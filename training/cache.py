"""``moe-posterior cache``: run a backbone once over a data module and store its features."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from moe_posterior.commands.cache import EXAMPLES, HELP, add_options
from moe_posterior.errors import InvalidArgumentError, MissingDataError
from moe_posterior.escape import terminal
from moe_posterior.files.reading import decoding, one_line
from moe_posterior.training.data import manifest
from moe_posterior.training.data.base import ClassificationData, Split
from moe_posterior.training.own import folders_on_path, require_class_file
from moe_posterior.training.runs import Run

__all__ = ["cache"]


def cache(arguments: list[str]) -> int:
    """Run ``moe-posterior cache`` with the given command-line arguments."""
    with folders_on_path(["."]):
        return _cache(arguments)


def _cache(arguments: list[str]) -> int:
    for option in ("--data", "--backbone"):
        for path in _files_given(arguments, option):
            require_class_file(path)
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except (argparse.ArgumentError, TypeError, ValueError, ImportError, AttributeError, LookupError) as error:
        raise InvalidArgumentError(f"the options cannot be used: {one_line(error)}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)  # layers draw their first weights from the global generator
        chosen = parser.instantiate_classes(options)
    data, backbone = chosen.data, chosen.backbone.eval().requires_grad_(False)
    if options.weights is not None:
        load_weights(backbone, Path(options.weights), options.prefix)
    shifts = tuple(options.shifts or ())
    data.evaluation_sets(shifts, options.severities)  # refuses an unknown shift before hours of work
    folder = Path(options.out)
    console = Console()
    with Run(folder).locked():
        stored = open_cache(folder, data, backbone, _settings(options), overwrite=options.overwrite)
        fill(folder, stored, data, backbone.to(options.device), (shifts, options.severities), console)
    rows = ", ".join(f"{len(data.split(part))} {part}" for part in manifest.SPLITS)
    console.print(
        terminal(f"Cached: {folder} ({rows} rows, {stored['features']} features). Read it with CachedFeatures."),
        markup=False,
    )
    return 0


def _files_given(arguments: list[str], option: str) -> Iterator[Path]:
    """The values of an option that are paths and not names of classes."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        path = Path(value if equals else following)
        if name == option and (path.suffix in (".yaml", ".yml", ".json") or path.exists()):
            yield path


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="moe-posterior cache",
        description=HELP,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    parser.add_subclass_arguments(ClassificationData, "data", help="data module", required=True)
    parser.add_subclass_arguments(nn.Module, "backbone", help="network from inputs to (N, F)", required=True)
    add_options(parser)
    return parser


def _settings(options: Namespace) -> dict[str, Any]:
    """The backbone's options, which may not be visible in its weights or structure."""
    return {"options": options.backbone.as_dict().get("init_args", {})}


def load_weights(backbone: nn.Module, path: Path, prefix: str = "") -> None:
    """Load the network's weights from a file, without running code from it.

    Args:
        backbone: changed in place.
        path: a state_dict, or a checkpoint that holds one as "state_dict".
        prefix: of the entries to read; it is removed from their names.

    Raises:
        MissingDataError: there is no such file.
        InvalidArgumentError: its entries do not fit the network.
    """
    if not path.is_file():
        raise MissingDataError(f"there are no weights at {path}; --weights must name a state_dict or a checkpoint")
    with decoding(path, "a file of weights", "--weights must name a state_dict or a checkpoint"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        entries = content.get("state_dict", content)
        fitting = {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
        if not all(isinstance(value, Tensor) for value in fitting.values()):
            raise TypeError("it holds other things than tensors")
    try:
        backbone.load_state_dict(fitting)
    except RuntimeError as error:
        raise InvalidArgumentError(
            f"weights of {path} with prefix {prefix!r} must fit the backbone; got {one_line(error)}"
        ) from error


def open_cache(
    folder: Path, data: ClassificationData, backbone: nn.Module, settings: dict[str, Any], *, overwrite: bool
) -> manifest.Manifest:
    """The manifest of a new cache, or of the one in the folder if it belongs to the same data and backbone.

    Raises:
        InvalidArgumentError: the folder holds the features of other data or another backbone, and overwrite is False.
    """
    wanted: manifest.Manifest = {
        "format": manifest.FORMAT,
        "data": manifest.describe_data(data),
        "backbone": manifest.describe_backbone(backbone),
        "settings": settings,
        "sources": manifest.describe_sources(data),
        "features": None,
        "parts": {},
    }
    if (folder / manifest.FILE).is_file() and not overwrite:
        stored = manifest.read(folder)
        found = manifest.differences(stored["settings"], settings, "backbone")
        for what in ("data", "backbone"):
            found += manifest.differences(stored[what], wanted[what], what)
        if found:
            raise InvalidArgumentError(
                f"{folder} must be a cache of the same data and backbone; got one that differs in: {'; '.join(found)}. "
                "--overwrite replaces it"
            )
        # The rows are the same, whatever happened to the files they were read from.
        stored["sources"] = wanted["sources"]
        manifest.write(folder, stored)
        return stored
    if (folder / manifest.FILE).is_file():
        for entry in manifest.read(folder)["parts"].values():  # and nothing that was put beside them
            (folder / entry["file"]).unlink(missing_ok=True)
    manifest.write(folder, wanted)
    return wanted


def fill(
    folder: Path,
    stored: manifest.Manifest,
    data: ClassificationData,
    backbone: nn.Module,
    shifts: tuple[tuple[str, ...], list[int]],
    console: Console,
) -> None:
    """Compute and store the parts that are missing in the cache; finished ones are left as they are."""
    names, severities = shifts
    wanted = [*manifest.SPLITS, *(manifest.shift_part(name, severity) for name in names for severity in severities)]
    missing = [part for part in wanted if not manifest.is_stored(folder, stored, part)]
    columns = (TextColumn("{task.description:<28}", markup=False), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("caching", total=_batches(data, missing))
        for part in missing:
            progress.update(task, description=terminal(part))
            if not console.is_terminal:  # a log file shows no bar
                console.print(terminal(f"caching {part}"), markup=False)
            batches = []
            for rows in _forward(data, part, backbone):
                batches.append(rows)
                progress.advance(task)
            features = torch.cat(batches)
            _require_finite(features, part)
            stored["features"] = features.shape[1]
            manifest.save_part(folder, stored, part, {"features": features, **_labels(data, part)})
    if not manifest.is_stored(folder, stored, manifest.SUBSETS):
        manifest.save_part(folder, stored, manifest.SUBSETS, data.subsets())


def _batches(data: ClassificationData, parts: list[str]) -> int:
    return sum(-(-len(data.split(part.split("-", 1)[0])) // data.batch_size) for part in parts)


def _rows(data: ClassificationData, part: str) -> Split:
    if part in manifest.SPLITS:
        return data.split(part)
    shift, severity = part.removeprefix("test-").rsplit("-", 1)
    return data.shifted(data.split("test"), shift, int(severity))


@torch.no_grad()
def _forward(data: ClassificationData, part: str, backbone: nn.Module) -> Iterator[Tensor]:
    device = next((weight.device for weight in backbone.parameters()), torch.device("cpu"))
    rows = _rows(data, part)
    if not len(rows):
        raise InvalidArgumentError(f"every part of the data must have rows; got none in {part}")
    for batch in data.loader(rows):
        features = backbone(batch["input"].to(device))
        if features.ndim != 2 or len(features) != len(batch["target"]):
            raise InvalidArgumentError(
                f"backbone must return one feature vector per row, ({len(batch['target'])}, F); got {tuple(features.shape)}"
            )
        yield features.half().cpu()


def _require_finite(features: Tensor, part: str) -> None:
    if not features.isfinite().all():
        row = int((~features.isfinite().all(dim=1)).nonzero()[0])
        raise InvalidArgumentError(
            f"features must be finite in half precision (below 65504); got others in row {row} of {part}"
        )


def _labels(data: ClassificationData, part: str) -> dict[str, Tensor]:
    base = part if part in manifest.SPLITS else "test"
    split = data.split(base)
    labels = {"target": split.targets}
    if split.groups is not None:
        labels["group"] = split.groups
    if getattr(data, "membership_names", ()):
        labels["membership"] = data.groups(base)  # who has names has groups
    return labels
