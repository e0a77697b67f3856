"""Stored predictions, as ``moe-posterior study`` writes them: one .npz file a model, with several parts of rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_posterior.checks.validation import integers
from moe_posterior.errors import InvalidArgumentError, MissingDataError
from moe_posterior.files.reading import decoding


class Part(NamedTuple):
    """Some rows with what the model said of them."""

    probs: Tensor  # (n, K) float64, rows sum to 1
    target: Tensor  # (n,) int64
    configuration: Tensor | None = None  # (n,) int64

    @property
    def confidence(self) -> Tensor:
        """(n,) of the top class."""
        return self.probs.amax(dim=1)

    @property
    def correct(self) -> Tensor:
        """(n,) bool."""
        return self.probs.argmax(dim=1) == self.target

    def rows(self, index: Tensor) -> "Part":
        """Some of the rows."""
        return Part(*(None if column is None else column[index] for column in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Predictions:
    """One model's predictions."""

    name: str  # of the data and setting
    gate: str
    parts: dict[str, Part]


def find(folder: str | Path, patterns: Sequence[str]) -> list[Path]:
    """The files below a folder whose name fits a pattern, in order.

    Raises:
        MissingDataError: there is no such folder, or no such file.
    """
    if not Path(folder).is_dir():
        raise MissingDataError(f"--predictions must name a folder; there is no {folder}")
    found = sorted({path for pattern in patterns for path in Path(folder).rglob(pattern) if path.suffix == ".npz"})
    if not found:
        raise MissingDataError(
            f"there is no .npz file like {' or '.join(patterns)} in {folder}; see moe-posterior study"
        )
    return found


def read(path: Path) -> Predictions:
    """One file.

    Raises:
        DamagedFileError: it is no file of predictions. InvalidArgumentError: probabilities and labels that do not fit together.
    """
    with decoding(path, "a file of predictions, arrays named PART/probs and PART/target"), np.load(path) as held:
        names = sorted({name.split("/")[0] for name in held.files if name.endswith("/probs")})
        columns = {name: {kind: held[f"{name}/{kind}"] for kind in _kinds(held.files, name)} for name in names}
    parts = {name: _part(f"{path}: {name}", arrays) for name, arrays in columns.items()}
    return Predictions(*_named(path), parts)


def _kinds(files: Sequence[str], part: str) -> list[str]:
    return ["probs", "target"] + ["configuration"] * (f"{part}/configuration" in files)


def _part(name: str, arrays: dict[str, np.ndarray]) -> Part:
    probs = torch.from_numpy(arrays["probs"]).double()
    if (
        probs.ndim != 2
        or not torch.isfinite(probs).all()
        or bool((probs < 0).any())
        or not bool((probs.sum(1) > 0).all())
    ):
        raise InvalidArgumentError(
            f"{name}/probs must be probabilities of shape (n, K); got shape {tuple(probs.shape)}"
        )
    target = integers(f"{name}/target", arrays["target"], (len(probs),), low=0, high=probs.shape[1] - 1)
    configuration = arrays.get("configuration")
    ids = None if configuration is None else integers(f"{name}/configuration", configuration, (len(probs),))
    return Part(probs / probs.sum(dim=1, keepdim=True), target, ids)


def _named(path: Path) -> tuple[str, str]:
    """Data and setting, and the gate, from a name as the study gives them; else the name itself."""
    words = path.stem.split("--")
    study = path.parts[-3].removeprefix("study-") if len(path.parts) > 2 and path.parent.name == "outputs" else ""
    if len(words) != 5:
        return path.stem, ""
    setting, inner, gate, _, _ = words
    without = f", {inner} left out" if inner else ""
    return f"{study} {setting}{without}".strip().replace("_", " "), gate
