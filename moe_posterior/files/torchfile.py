"""Reading what ``torch.save`` wrote, from a file that may be hostile: no more memory than the file has bytes, and no code run.

``torch.load(weights_only=True)`` runs no code, but a file of a few hundred bytes can still hold a compressed entry that unpacks to
gigabytes, or a tensor of stride 0 that becomes as large when it is copied. We write neither.
"""

import io
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_posterior.errors import DamagedFileError, MissingDataError

ZIP = b"PK"  # how a file of torch.save begins


def read_plain_file(path: str | os.PathLike[str]) -> bytes:
    """All of a plain file; a pipe, a device or a folder is refused instead of waited for.

    Raises:
        MissingDataError: there is none. DamagedFileError: it is something else, or cannot be read.
    """
    source = Path(path)
    try:
        with open(os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DamagedFileError(f"{source} is not a plain file")
            return file.read()
    except FileNotFoundError as error:
        raise MissingDataError(f"there is no file {source}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, DamagedFileError):
            raise
        raise DamagedFileError(f"{source} cannot be read: {error}") from error


def load_plain(data: bytes, source: object) -> Any:
    """What ``torch.save`` made of plain values and tensors, on the CPU.

    Raises:
        DamagedFileError: it is no such file, is compressed, or holds tensors that are larger than it.

    >>> file = io.BytesIO()
    >>> torch.save({"ids": torch.arange(3)}, file)
    >>> load_plain(file.getvalue(), "example")
    {'ids': tensor([0, 1, 2])}
    >>> file = io.BytesIO()
    >>> torch.save({"ids": torch.zeros(1).expand(10**9)}, file)
    >>> load_plain(file.getvalue(), "example")
    Traceback (most recent call last):
    moe_posterior.errors.DamagedFileError: example holds tensors that are larger than it
    """
    if not data.startswith(ZIP):
        raise DamagedFileError(f"{source} is no file of this library")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise DamagedFileError(f"{source} is compressed, as no file of this library is")
        if sum(entry.file_size for entry in entries) > len(data):
            raise DamagedFileError(f"{source} says that it holds more than it has bytes")
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        _require_real(content, len(data), source)
    except DamagedFileError:
        raise
    except Exception as error:  # torch.load has no error of its own: what a damaged file raises is any
        raise DamagedFileError(f"{source} cannot be read: {error}") from error
    return content


def _require_real(content: Any, size: int, source: object) -> None:
    """Raise DamagedFileError unless every tensor is dense and all of them together take no more than the file."""
    waiting, seen = [content], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise DamagedFileError(f"{source} holds a tensor that is not dense")
            size -= value.nbytes
            if size < 0 or value.untyped_storage().nbytes() < value.nbytes:
                raise DamagedFileError(f"{source} holds tensors that are larger than it")
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
