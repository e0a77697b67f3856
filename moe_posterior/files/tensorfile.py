"""Named tensors and a header in one file, written whole or not at all, and read back bit for bit or refused.

The file is safetensors where that package is installed and else what ``torch.save`` writes, readable with ``weights_only=True``;
either is recognised when read. A checksum over header and tensors stands in it: neither format has one of its own.
"""

import ctypes
import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_posterior.errors import DamagedFileError, MissingDependencyError
from moe_posterior.files.atomic import checked, write_bytes
from moe_posterior.files.torchfile import load_plain, read_plain_file

_HEADER = "moe_posterior"


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header of JSON values; a file of that name is replaced only once all is on the disk.

    Raises:
        UnwritableFileError: the file system refuses; the old file is as it was.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tensors(f"{folder}/example", {"ids": torch.arange(3)}, {"kind": "example"})
    ...     load_tensors(f"{folder}/example", "example")
    ({'ids': tensor([0, 1, 2])}, {'kind': 'example'})
    """
    target = checked(path)
    # Cloned: tensors that share memory, as views of one table do, are refused by safetensors.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    text = json.dumps(header, sort_keys=True)
    # One entry: safetensors writes several in any order, and the same content should be the same file.
    marks = {_HEADER: json.dumps({"header": text, "sha256": digest(plain, text)})}
    write_bytes(target, _written(plain, marks))


def save_plain(path: str | os.PathLike[str], content: object) -> None:
    """Write what ``torch.save`` writes; a file of that name is replaced only once all is on the disk.

    Raises:
        UnwritableFileError: the file system refuses; the old file is as it was.
    """
    write_bytes(checked(path), _pickled(content))


def load_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the header of a file whose header says that it is of this kind.

    Raises:
        MissingDataError: there is no such file. DamagedFileError: it is torn or altered, of another kind, or no file of ours.
        MissingDependencyError: it is a safetensors file and that package is not installed.
    """
    source = Path(path)
    tensors, marks = _read(source)
    text, checksum = _marks_in(marks.get(_HEADER))
    if checksum != digest(tensors, text):
        raise DamagedFileError(f"{source} was altered since it was written, or was not written by this library")
    header = json.loads(text)
    if header.get("kind") != kind:
        raise DamagedFileError(f"{source} must be a file of kind {kind!r}; got {header.get('kind')!r}")
    return tensors, header


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """A checksum over names, dtypes, shapes and bits.

    >>> zero, negative = torch.zeros(1), -torch.zeros(1)
    >>> digest({"a": zero}) == digest({"a": zero.clone()}), digest({"a": zero}) == digest({"a": negative})
    (True, False)
    """
    state = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"|{name} {tensor.dtype} {tuple(tensor.shape)}|".encode())
        if tensor.numel():
            state.update((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))  # no copy, and no numpy
    return state.hexdigest()


def _marks_in(entry: object) -> tuple[str, str]:
    """The header's text and the checksum; empty, and so no checksum of anything, where the entry is none of ours."""
    try:
        marks = json.loads(entry) if isinstance(entry, str) else {}
        return str(marks["header"]), str(marks["sha256"])
    except (ValueError, KeyError, TypeError):
        return "", ""


def _written(tensors: dict[str, Tensor], marks: dict[str, str]) -> bytes | memoryview:
    try:
        from safetensors.torch import save
    except ImportError:
        return _pickled({"tensors": tensors, "marks": marks})
    return save(tensors, metadata=marks)


def _pickled(content: object) -> memoryview:
    """What torch.save writes, in memory: its own errors of a disk that is full are no OSErrors."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getbuffer()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    data = read_plain_file(
        path
    )  # at once: safetensors and torch open a path again for each part, by when it may be another file
    if data[8:9] == b"{":
        return _read_safetensors(path, data)
    content = load_plain(data, path)
    try:
        return dict(content["tensors"]), dict(content["marks"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DamagedFileError(f"{path} is no file of this library") from error


def _read_safetensors(path: Path, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError as error:
        raise MissingDependencyError("safetensors", "hf") from error
    try:
        length = int.from_bytes(data[:8], "little")  # of the header, which follows
        return load(data), json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise DamagedFileError(f"{path} cannot be read: {error}") from error
