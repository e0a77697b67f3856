"""Classes of modules that are not installed: where they may be imported from, and which ones a configuration names.

A configuration names classes by ``class_path``. Resolving one imports its module, and so runs its code, before its type can be
checked. Modules are therefore imported only from where the user allowed it: ``fit`` and ``cache`` get their classes from the command
line and may use the current folder; ``evaluate`` gets a run, which may come from someone else, and uses only folders named by
``--import-from``. These folders come last on the module path, so that nothing in them hides an installed package.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_posterior.errors import InvalidArgumentError, MissingDataError
from moe_posterior.files.reading import read_mapping

__all__ = [
    "class_names",
    "folders_on_path",
    "own_classes",
    "require_class_file",
    "require_importable",
    "without_folder",
]

MOST_VALUES = 10_000  # of a class's arguments in a file
CLASSES = (
    "model",
    "data",
    "backbone",
    "gate",
    "method",
    "callbacks",
    "logger",
    "strategy",
    "plugins",
    "profiler",
    "optimizer",
    "lr_scheduler",
)  # may be plain names


@contextmanager
def folders_on_path(folders: Sequence[str | Path]) -> Iterator[None]:
    """Also look for modules in these folders, after all others.

    Raises:
        MissingDataError: one of them is not a folder.
    """
    wanted = []
    for place in map(Path, folders):
        if not place.is_dir():
            raise MissingDataError(f"there is no folder {place} to import classes from")
        wanted.append(str(place.resolve()))
    added = [folder for folder in dict.fromkeys(wanted) if folder not in sys.path]
    sys.path += added
    try:
        yield
    finally:
        for folder in added:
            if folder in sys.path:
                sys.path.remove(folder)


@contextmanager
def without_folder(folder: str | Path) -> Iterator[None]:
    """Do not look for modules in this folder."""
    before, unwanted = list(sys.path), str(Path(folder).resolve())
    sys.path[:] = [place for place in before if str(Path(place).resolve()) != unwanted]
    try:
        yield
    finally:
        sys.path[:] = before


def class_names(config: Any, key: str = "") -> Iterator[str]:
    """Every class that a configuration names with its module, in order.

    >>> list(class_names({"data": {"class_path": "a.B", "init_args": {"backbone": "c.D", "file": "x.csv"}}, "name": "e.F"}))
    ['a.B', 'c.D']
    """
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from class_names(value, str(name))
    elif isinstance(config, list | tuple):
        for value in config:
            yield from class_names(value, key)
    elif isinstance(config, str) and "." in config and (key == "class_path" or key in CLASSES):
        yield config


def own_classes(config: Any) -> list[str]:
    """The classes of a configuration whose modules Python cannot find; nothing is imported to find out."""
    return [name for name in dict.fromkeys(class_names(config)) if not _is_installed(name.partition(".")[0])]


def require_importable(config: Any, where: str | Path) -> None:
    """Refuse a configuration, before anything is imported, if it names a class that must not or cannot be imported.

    Raises:
        InvalidArgumentError: a class of Python's standard library, which no run needs, or of a module that is neither
            installed nor in a folder of ``--import-from``.
    """
    for name in dict.fromkeys(class_names(config)):
        root = name.partition(".")[0]
        if root in sys.stdlib_module_names:
            raise InvalidArgumentError(
                f"class_path must name a class of the library or of your own; got {name!r} in {where}"
            )
        if not _is_installed(root):
            raise InvalidArgumentError(
                f"{where} names {name!r}, whose module is not installed, and nothing was imported; if it is yours, say where it "
                "is: --import-from FOLDER"
            )


def require_class_file(path: Path) -> None:
    """Refuse a YAML file that does not name one class and its arguments, before another library tries to make sense of it.

    Raises:
        MissingDataError: there is no such file. DamagedFileError: it is not a regular file.
        InvalidArgumentError: it is not YAML, or holds something other than ``class_path`` and ``init_args``, or too much.
    """
    advice = "it must hold class_path, and init_args with the arguments"
    content = read_mapping(path, advice, InvalidArgumentError)
    init_args = content.get("init_args", {})
    if set(content) - {"class_path", "init_args"} or not isinstance(content.get("class_path"), str):
        raise InvalidArgumentError(f"{path} must name a class by class_path; got the keys {list(content)}; {advice}")
    if not isinstance(init_args, dict) or not all(isinstance(name, str) for name in init_args):
        raise InvalidArgumentError(f"init_args in {path} must map names to values; got {type(init_args).__name__}")
    seen, waiting = 0, [init_args]
    while waiting:  # YAML's aliases let a few lines stand for billions of values, or contain themselves
        value = waiting.pop()
        seen += 1
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if seen + len(waiting) > MOST_VALUES:
            raise InvalidArgumentError(f"init_args in {path} must hold at most {MOST_VALUES:,} values; got more")


def _is_installed(root: str) -> bool:
    """Whether there is such a module. A loaded one is looked for too, since another run may have loaded it."""
    if root == __name__.partition(".")[0]:
        return True
    finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
    return root.isidentifier() and any(find is not None and find(root, None) is not None for find in finders)
