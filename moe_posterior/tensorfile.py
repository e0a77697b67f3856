"""Named tensors and a header in one file, written whole or not at all, and read back bit for bit or refused.

The file is safetensors where that package is installed and else what ``torch.save`` writes, readable with ``weights_only=True``;
either is recognised when read. A checksum over header and tensors stands in it: neither format has one of its own.
"""

import ctypes
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_posterior.errors import DamagedFileError, MissingDataError, MissingDependencyError

_HEADER, _DIGEST = "moe_posterior", "sha256"
_ZIP = b"PK"  # how a file of torch.save begins; safetensors begins with 8 bytes of length, then JSON


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header of JSON values; a file of that name is replaced only once all is on the disk.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tensors(f"{folder}/example", {"ids": torch.arange(3)}, {"kind": "example"})
    ...     load_tensors(f"{folder}/example", "example")
    ({'ids': tensor([0, 1, 2])}, {'kind': 'example'})
    """
    target = Path(path)
    # Cloned: tensors that share memory, as views of one table do, are refused by safetensors.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    text = json.dumps(header, sort_keys=True)
    marks = {_HEADER: text, _DIGEST: digest(plain, text)}
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        _write(temporary, plain, marks)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the header of a file whose header says that it is of this kind.

    Raises:
        MissingDataError: there is no such file. DamagedFileError: it is torn or altered, of another kind, or no file of ours.
        MissingDependencyError: it is a safetensors file and that package is not installed.
    """
    source = Path(path)
    if not source.is_file():
        raise MissingDataError(f"there is no file {source}")
    tensors, marks = _read(source)
    text = marks.get(_HEADER)
    if not isinstance(text, str) or marks.get(_DIGEST) != digest(tensors, text):
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


def _write(path: Path, tensors: dict[str, Tensor], marks: dict[str, str]) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError:
        torch.save({"tensors": tensors, "marks": marks}, path)
    else:
        save_file(tensors, path, metadata=marks)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        return _read_safetensors(path)
    if not start.startswith(_ZIP):
        raise DamagedFileError(f"{path} is no file of this library")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return dict(content["tensors"]), dict(content["marks"])
    except Exception as error:  # a damaged pickle fails in any way there is
        raise DamagedFileError(f"{path} cannot be read: {error}") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingDependencyError("safetensors", "hf") from error
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118, no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFileError(f"{path} cannot be read: {error}") from error
