"""A run on disk: a folder with one sub-folder for each arm, which one process at a time writes to.

``runs/NAME/experiment.yaml`` is the configuration. ``runs/NAME/ARM/`` holds ``config.yaml`` (the input of LightningCLI),
``checkpoints/last.ckpt``, the logs and, once the arm is trained, ``finished.json``. ``runs/NAME/report/`` holds the evaluation.
"""

import copy
import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from moe_posterior.errors import InvalidArgumentError, MissingDataError
from moe_posterior.files.atomic import open_lock, write_text
from moe_posterior.files.reading import read_mapping, read_text

__all__ = ["Arm", "Experiment", "Run", "merge", "read_experiment", "require_folder_name"]

EXPERIMENT, MARKER, REPORT = "experiment.yaml", ".moe-posterior-run", "report"
RESERVED = {EXPERIMENT, REPORT}


@dataclass(frozen=True)
class Experiment:
    """An experiment file: a LightningCLI configuration, and the arms that are trained from it one after the other."""

    name: str
    arms: dict[str, dict[str, Any]]  # what each arm sets differently
    base: dict[str, Any]  # the LightningCLI configuration they share
    branches: dict[str, str] = field(default_factory=dict)  # arm -> the arm whose warm-up it continues

    def config(self, arm: str) -> dict[str, Any]:
        """The LightningCLI configuration of one arm."""
        return merge(self.base, self.arms[arm])

    def override(self, settings: dict[str, Any]) -> "Experiment":
        """The same experiment with some settings changed in every arm."""
        if not settings:
            return self
        return replace(self, arms={name: merge(self.config(name), settings) for name in self.arms}, base={})

    def chosen(self, wanted: Sequence[str] | None) -> list[str]:
        """The wanted arms in the experiment's order, all if None.

        Raises:
            InvalidArgumentError: an arm that the experiment does not have.
        """
        arms = list(self.arms)
        if unknown := [name for name in wanted or [] if name not in arms]:
            raise InvalidArgumentError(f"arms must be among {arms}; got {unknown}")
        return [name for name in arms if wanted is None or name in wanted]


def read_experiment(path: str | Path) -> Experiment:
    """Read an experiment file.

    Besides what LightningCLI understands (``model``, ``data``, ``trainer``, ``seed_everything``, ``competence``, ``belief``) it has
    two keys: ``name`` (default: the file's name) and ``arms``, a mapping from arm names to what they set differently. Without ``arms``
    the configuration itself is the only arm, called "model". An arm with ``branch_from: OTHER`` continues from an earlier arm's
    state at the end of the ERM warm-up, which the two share.

    Raises:
        MissingDataError: there is no such file. DamagedFileError: it is not a regular file.
        InvalidArgumentError: it is not a YAML mapping, or a name cannot be a folder.
    """
    path = Path(path)
    content = read_mapping(path, "the shipped experiment files are in configs/", InvalidArgumentError)
    name = content.pop("name", path.stem)
    arms = content.pop("arms", None) or {"model": {}}
    if not isinstance(arms, dict) or not all(isinstance(overlay, dict) for overlay in arms.values()):
        raise InvalidArgumentError(f"arms must map names to settings; got {arms!r} in {path}")
    for word in (name, *arms):
        require_folder_name(word, str(path))
    branches = {arm: overlay.pop("branch_from") for arm, overlay in arms.items() if "branch_from" in overlay}
    for arm, origin in branches.items():
        if origin not in list(arms)[: list(arms).index(arm)]:
            raise InvalidArgumentError(f"branch_from must name an arm before {arm!r}; got {origin!r} in {path}")
        branches[arm] = branches.get(origin, origin)  # a branch of a branch has the same warm-up
    return Experiment(name, arms, content, branches)


def require_folder_name(word: Any, where: str) -> None:
    """Raise InvalidArgumentError unless ``word`` can be the name of a run or an arm."""
    plain = isinstance(word, str) and word and not word.startswith(".") and not set(word) & set("/\\|")
    if not plain or word in RESERVED:
        raise InvalidArgumentError(f"name and arms become folders and must be plain words; got {word!r} in {where}")


def merge(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """The base with the overlay's leaves on top.

    Classes are mappings with ``class_path`` and ``init_args``. An overlay that names a ``class_path`` replaces the base's class and
    arguments; one that does not sets arguments of the base's class, under ``init_args`` or directly.

    >>> base = {"gate": {"class_path": "A", "init_args": {"k": 2, "c": 3}}}
    >>> merge(base, {"gate": {"class_path": "B"}})
    {'gate': {'class_path': 'B'}}
    >>> merge(base, {"gate": {"k": 5}})
    {'gate': {'class_path': 'A', 'init_args': {'k': 5, 'c': 3}}}
    >>> merge({"gate": "A"}, {"gate": {"k": 5}})
    {'gate': {'class_path': 'A', 'init_args': {'k': 5}}}
    """
    if "class_path" in base and "class_path" not in overlay and "init_args" not in overlay:
        overlay = {"init_args": overlay}
    merged = dict(base)
    for key, value in overlay.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, str):  # a class by its name alone
            old = {"class_path": old}
        if isinstance(value, dict) and isinstance(old, dict) and "class_path" not in value:
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


@dataclass(frozen=True)
class Arm:
    """One trained variant within a run."""

    name: str
    folder: Path

    @property
    def config(self) -> Path:
        """The complete LightningCLI configuration this arm is trained with."""
        return self.folder / "config.yaml"

    @property
    def checkpoint(self) -> Path:
        """The state after the last epoch."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def warmup(self) -> Path:
        """The state at the end of the ERM warm-up, where the method has one."""
        return self.folder / "checkpoints" / "warmup.ckpt"

    @property
    def figures(self) -> Path:
        """The folder of ``metrics.csv``."""
        return self.folder / "csv"

    @property
    def finished(self) -> bool:
        """Whether training is complete."""
        return (self.folder / "finished.json").is_file()

    def finish(self, facts: dict[str, Any]) -> None:
        """Mark the arm as fully trained."""
        write_text(self.folder / "finished.json", json.dumps(facts, indent=2) + "\n")


class Run:
    """A run's folder.

    Args:
        folder: ``runs/NAME``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def prepare(self, experiment: Experiment, *, overwrite: bool = False, arms: Sequence[str] | None = None) -> None:
        """Lay out the folder, or check that it was made by the same experiment, so that the run can be resumed.

        Raises:
            InvalidArgumentError: the folder holds a run with other settings, or something else.
        """
        file = self.folder / EXPERIMENT
        overlays = {
            name: {**overlay, **({"branch_from": experiment.branches[name]} if name in experiment.branches else {})}
            for name, overlay in experiment.arms.items()
        }
        content = yaml.safe_dump({"name": experiment.name, "arms": overlays, **experiment.base}, sort_keys=False)
        others = list(self.folder.glob("[!.]*")) if self.folder.is_dir() else []
        if others and not (self.folder / MARKER).is_file():
            raise InvalidArgumentError(
                f"{self.folder} holds something other than a run; choose another --name or --run-dir"
            )
        made = self.experiment().arms if file.is_file() else {}
        trained = any(self.arm(name).checkpoint.is_file() for name in made)
        if overwrite:
            for name in (*(made if arms is None else arms), REPORT):  # what the run made, not what was put beside it
                shutil.rmtree(self.folder / name, ignore_errors=True)
        if (not overwrite or arms is not None) and trained and read_text(file) != content:
            raise InvalidArgumentError(
                f"{self.folder} was made with other settings (see {file}); --overwrite replaces it, --name makes another run"
            )
        write_text(self.folder / MARKER, "")
        write_text(file, content)
        for name in experiment.arms:
            arm = self.arm(name)
            arm.folder.mkdir(exist_ok=True)
            write_text(arm.config, yaml.safe_dump(experiment.config(name), sort_keys=False))

    def experiment(self) -> Experiment:
        """The experiment this run was made by.

        Raises:
            MissingDataError: the folder holds no run.
        """
        file = self.folder / EXPERIMENT
        if not file.is_file():
            raise MissingDataError(f"there is no run in {self.folder}: moe-posterior fit --config FILE makes one")
        return read_experiment(file)

    def arm(self, name: str) -> Arm:
        """One arm of the run."""
        return Arm(name, self.folder / name)

    def origin(self, experiment: Experiment, arm: str) -> Arm | None:
        """The arm whose warm-up this one continues, if any.

        Raises:
            InvalidArgumentError: the two differ in more than the method, or warm up for different numbers of epochs.
        """
        if arm not in experiment.branches:
            return None
        configs = [experiment.config(name) for name in (experiment.branches[arm], arm)]
        methods = [config.get("model", {}).pop("method", {}) for config in map(copy.deepcopy, configs)]
        warmups = [method.get("init_args", {}).get("warmup_epochs", 0) for method in methods]
        rest = [merge(config, {"model": {"method": None}}) for config in configs]
        if warmups[0] != warmups[1] or rest[0] != rest[1]:
            raise InvalidArgumentError(
                f"arms {experiment.branches[arm]!r} and {arm!r} must differ in model.method alone and warm up equally long to share a "
                f"warm-up; they warm up for {warmups[0]} and {warmups[1]} epochs"
            )
        return self.arm(experiment.branches[arm])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing to this run; the lock is released when the process ends, however it ends.

        Raises:
            InvalidArgumentError: another process holds the lock.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open_lock(self.folder / ".lock") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InvalidArgumentError(
                    f"another process is writing to {self.folder}; wait, or choose another --name"
                ) from None
            yield
