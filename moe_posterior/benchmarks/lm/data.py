"""Text as bytes, cut into parts that never overlap.

Dimensions: n windows, T bytes a window, B windows a batch.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError, MissingDataError

VOCABULARY = 256
WINDOW = 128
PARTS = {  # share of every file, in this order: each part holds text of every file, and no byte is in two parts
    "train": 0.74,
    "warm": 0.06,  # clusters and reference competence
    "stream": 0.09,  # healthy evidence, damage, repair
    "evaluate": 0.02,
    "tune stream": 0.07,  # the same two for tuning, never reported
    "tune evaluate": 0.02,
}


class Corpus:
    """The bytes of some files, by part.

    Args:
        files: text files; every file contributes its share to every part, so their order does not affect the split.

    Raises:
        MissingDataError: a file is missing. InvalidArgumentError: no file, or text too short for a window in every part.
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        if not files:
            raise InvalidArgumentError("--text must name at least one file; got none")
        contents = [_read(Path(file)) for file in files]
        self.digest = hashlib.sha256(b"\0".join(contents)).hexdigest()[:16]
        self.parts = {name: b"".join(_share(content, name) for content in contents) for name in PARTS}
        for name, content in self.parts.items():
            if len(content) < WINDOW:
                raise InvalidArgumentError(
                    f"--text must hold at least {WINDOW} bytes in every part; got {len(content)} in {name!r}"
                )

    def windows(self, part: str, generator: torch.Generator | None = None) -> Tensor:  # -> (n, T) int64
        """The part in non-overlapping windows, in order or shuffled by a generator."""
        flat = self._flat(part)
        count = len(flat) // WINDOW
        cut = flat[: count * WINDOW].view(count, WINDOW)
        return cut if generator is None else cut[torch.randperm(count, generator=generator)]

    def sample(self, part: str, count: int, generator: torch.Generator) -> Tensor:  # -> (B, T) int64
        """Windows with random starts, for training."""
        flat = self._flat(part)
        starts = torch.randint(len(flat) - WINDOW + 1, (count, 1), generator=generator)
        return flat[starts + torch.arange(WINDOW)]

    def _flat(self, part: str) -> Tensor:
        return torch.frombuffer(bytearray(self.parts[part]), dtype=torch.uint8).long()


def batches(windows: Tensor, size: int) -> Iterator[Tensor]:  # (n, T) -> (B, T)
    """Full batches in order; an incomplete last one is dropped.

    >>> [tuple(batch.shape) for batch in batches(torch.zeros(5, 8), 2)]
    [(2, 8), (2, 8)]
    """
    for start in range(0, len(windows) - size + 1, size):
        yield windows[start : start + size]


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise MissingDataError(f"there is no {path}; --text must name plain text files")
    return path.read_bytes()


def _share(content: bytes, part: str) -> bytes:
    names = list(PARTS)
    before = sum(PARTS[name] for name in names[: names.index(part)])
    return content[round(before * len(content)) : round((before + PARTS[part]) * len(content))]
