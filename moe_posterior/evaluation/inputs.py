"""The files of an evaluation: which file holds which model's predictions on which shift, and which set is the stored test rows."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_posterior.errors import InvalidArgumentError, MissingDataError
from moe_posterior.evaluation.decode import Origin
from moe_posterior.evaluation.measure import BASE
from moe_posterior.evaluation.scan import SUFFIXES, is_data_set
from moe_posterior.evaluation.survey import Key
from moe_posterior.report.places import ALL_SHIFTS

__all__ = ["Input", "inputs_of", "keys_of"]

MODEL = "model"
OBVIOUS = ("clean", "base", "test", "iid", "id", "in-distribution", "original", "none")  # names of the stored test rows
SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class Input:
    """A file, or a data set's folder."""

    path: Path
    model: str | None  # None: in a column, or the only one
    shift: str | None  # None: in a column, or the only one


def inputs_of(words: Sequence[str]) -> tuple[list[Input], bool]:
    """The files that ``FILE``, ``FOLDER``, ``NAME=FILE`` and ``NAME=FOLDER`` stand for, and whether the user put them in order.

    Several files are several shifts by their names, without an ending such as ``-00000-of-00002``; ``NAME=`` says whose
    predictions a file or folder holds.

    Raises:
        MissingDataError: a file that is not there, or a folder without files of predictions.
        InvalidArgumentError: names for some of the files only, two files of one model and name, or one file twice.
    """
    named = [_named(word) for word in words]
    if len({model is None for model, _ in named}) > 1:
        raise InvalidArgumentError(
            f"--predictions must name the model of every file (NAME=FILE) or of none; got {[*words]}"
        )
    found = [one for model, path in named for one in _files(path, model)]
    single = len({(one.model, one.shift) for one in found}) == len({one.model for one in found})  # one set a model
    listed = [Input(one.path, one.model, None) if single else one for one in found]
    seen: dict[tuple[str | None, str | None], list[Path]] = {}
    for one in listed:
        earlier = seen.setdefault((one.model, one.shift), [])
        if one.path.resolve() in [path.resolve() for path in earlier]:
            raise InvalidArgumentError(f"{one.path} must be given once; got it twice, and its rows would count twice")
        if earlier and not (SHARD.search(_stem(one.path)) and earlier[0].parent == one.path.parent):
            raise InvalidArgumentError(
                f"{one.path} and {earlier[0]} would be one shift of one model; give other names, or NAME=FILE for several models"
            )
        earlier.append(one.path)
    return listed, not any(path.is_dir() and not is_data_set(path) for _, path in named)


def keys_of(origins: Iterable[Origin], base: str | None, ordered: bool) -> Mapping[Origin, Key]:
    """The set that each origin is: one of severity 0, the stored test rows, and shifts of severity 1 unless a column says otherwise.

    Args:
        origins: models, shifts and severities as found, in order.
        base: the stored test rows' name, if the user gave it.
        ordered: whether the first shift is the first that the user named, so that it is meant.

    Raises:
        InvalidArgumentError: no set is obviously the stored test rows.
    """
    found = list(origins)
    shifts = list(dict.fromkeys(shift for _, shift, _ in found))
    stored = list(dict.fromkeys(shift for _, shift, severity in found if severity == 0))
    if base is not None and base not in shifts:
        wanted = "left out where there is one set" if shifts == [""] else f"one of {shifts}"
        raise InvalidArgumentError(f"--base must be {wanted}; got {base!r}")
    if base is None:
        obvious = [shift for shift in shifts if shift.lower() in OBVIOUS]
        known = stored or (
            shifts if len(shifts) == 1 else obvious if len(obvious) == 1 else shifts[:1] if ordered else []
        )
        if len(known) != 1:
            raise InvalidArgumentError(f"one of {shifts} must be the unshifted test rows: say which with --base NAME")
        base = known[0]
    if ALL_SHIFTS in shifts or (base != "clean" and "clean" in shifts):
        raise InvalidArgumentError(
            f"shifts must not be called {ALL_SHIFTS!r}, and 'clean' is the unshifted rows; got {shifts}"
        )
    return {
        origin: (
            origin[0] or MODEL,
            origin[1] or BASE,
            (0 if origin[1] == base else 1) if origin[2] is None else origin[2],
        )
        for origin in found
    }


def _named(word: str) -> tuple[str | None, Path]:
    if not Path(word).exists() and "=" in word:
        model, _, rest = word.partition("=")
        if not model or not rest:
            raise InvalidArgumentError(f"--predictions must be FILE, FOLDER or NAME=FILE; got {word!r}")
        return model, Path(rest)
    return None, Path(word)


def _files(path: Path, model: str | None) -> list[Input]:
    if not path.exists():
        raise MissingDataError(f"{path} is not there")
    if path.is_file() or is_data_set(path):
        return [Input(path, model, SHARD.sub("", _stem(path)))]
    inside = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    files = [one for one in inside if (one.is_dir() and is_data_set(one)) or one.name.lower().endswith(SUFFIXES)]
    if not files:
        raise MissingDataError(f"{path} holds no files of predictions ({', '.join(SUFFIXES)}) and no saved data set")
    return [Input(one, model, SHARD.sub("", _stem(one))) for one in files]


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(path.suffix if path.suffix != ".gz" else "").rsplit(".", 1)[0]
