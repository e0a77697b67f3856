"""The manifest of a feature cache, and whether it still holds: ``manifest.json`` beside one file per part.

A part is a split ("train", "val", "test"), the test rows under a shift ("test-contrast-3"), or the masks of "subsets".
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_posterior.errors import InvalidArgumentError, MissingDataError
from moe_posterior.files.atomic import replacing, write_text
from moe_posterior.files.reading import decoding, read_json
from moe_posterior.training.data.base import ClassificationData

__all__ = ["describe_backbone", "describe_data", "differences", "read", "require_current", "save_part", "write"]

FILE = "manifest.json"
FORMAT = 1
SPLITS = ("train", "val", "test")
SUBSETS = "subsets"

Manifest = dict[str, Any]


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, types, shapes and bytes.

    >>> one, two = torch.zeros(2, 3), torch.zeros(3, 2)
    >>> digest_tensors({"a": one}) == digest_tensors({"a": one.clone()}), digest_tensors({"a": one}) == digest_tensors({"a": two})
    (True, False)
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_file(path: Path) -> str:
    """A hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def class_path(thing: object) -> str:
    """Where the class of an object is defined."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def describe_backbone(backbone: nn.Module) -> dict[str, str]:
    """A network's class, its structure as it prints itself, and a hash of its weights.

    Buffers that a state_dict leaves out, such as the constants of a standardisation, count among the weights.
    """
    weights = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    structure = hashlib.blake2b(repr(backbone).encode(), digest_size=16).hexdigest()
    return {"class": class_path(backbone), "structure": structure, "weights": digest_tensors(weights)}


def describe_data(data: ClassificationData) -> dict[str, Any]:
    """A data module's class and names, and a hash of the rows, labels and groups of each split."""
    described: dict[str, Any] = {
        "class": class_path(data),
        "name": data.name,
        "class_names": list(data.class_names),
        "group_names": list(data.group_names),
        "membership_names": list(data.membership_names),
        "test_shift": data.test_shift,
    }
    for part in SPLITS:
        split = data.split(part)
        tensors = {"inputs": split.inputs, "targets": split.targets, "scale": torch.tensor(split.scale or 1.0)}
        if split.groups is not None:
            tensors["groups"] = split.groups
        if data.membership_names:
            tensors["memberships"] = data.groups(part)
        described[f"{part} rows"] = digest_tensors(tensors)
    described["subsets"] = digest_tensors(data.subsets())
    described["seed"] = data.seed  # of the shifts
    return described


def describe_sources(data: ClassificationData) -> list[dict[str, Any]]:
    """Size, time and hash of the files that the data module says it reads (``source_files``, optional)."""
    paths = [Path(path).resolve() for path in getattr(data, "source_files", list)()]
    return [
        {"path": str(path), "size": path.stat().st_size, "mtime": path.stat().st_mtime_ns, "hash": digest_file(path)}
        for path in paths
    ]


def changed_sources(manifest: Manifest) -> list[str]:
    """The source files that have changed; a missing one does not make the features invalid.

    A file with unchanged size and time is not read.
    """
    changed = []
    for source in manifest["sources"]:
        path = Path(source["path"])
        if not path.is_file():
            continue
        status = path.stat()
        same = status.st_size == source["size"]
        if not same or (status.st_mtime_ns != source["mtime"] and digest_file(path) != source["hash"]):
            changed.append(str(path))
    return changed


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> list[str]:
    """The differences of two descriptions, in words.

    >>> differences({"class": "A", "weights": "1f"}, {"class": "A", "weights": "2e"}, "backbone")
    ["backbone weights ('1f' in the cache, '2e' here)"]
    """
    keys = [*stored, *(key for key in wanted if key not in stored)]
    return [
        f"{what} {key} ({stored.get(key)!r} in the cache, {wanted.get(key)!r} here)"
        for key in keys
        if stored.get(key) != wanted.get(key)
    ]


def read(folder: Path) -> Manifest:
    """The manifest of a cache.

    Raises:
        MissingDataError: there is none.
        InvalidArgumentError: it is damaged or of another version of the format.
    """
    path = folder / FILE
    if not path.is_file():
        raise MissingDataError(
            f"there is no cache of features at {path}; make one with: moe-posterior cache --data CLASS --backbone CLASS "
            f"--out {folder}"
        )
    advice = "delete the folder and cache again"
    manifest = read_json(path, advice, InvalidArgumentError)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        got = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise InvalidArgumentError(f"{path} must have format {FORMAT}; got {got}; {advice}")
    with decoding(path, "the manifest of a cache", advice, InvalidArgumentError):
        _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    """Raise an error unless the manifest has everything that is read from it."""
    for name in ("data", "backbone", "settings", "parts"):
        if not isinstance(manifest[name], dict):
            raise TypeError(f"{name} must be a mapping")
    for name in ("class_names", "group_names", "membership_names"):
        tuple(manifest["data"][name])
    str(manifest["data"]["name"]), manifest["features"]
    for source in manifest["sources"]:
        source["path"], source["size"], source["mtime"], source["hash"]
    for part, entry in manifest["parts"].items():
        entry["hash"]
        if Path(entry["file"]).name != f"{part}.npz":
            raise ValueError(f"part {part!r} must lie in {part}.npz")
    shifts(manifest)


def write(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest in one step."""
    write_text(folder / FILE, json.dumps(manifest, indent=2) + "\n")


def save_part(folder: Path, manifest: Manifest, part: str, arrays: Mapping[str, Tensor]) -> None:
    """Store the arrays of a part and note it as finished; until its name is in the manifest a part does not exist."""
    path = folder / f"{part}.npz"
    with replacing(path) as file:
        np.savez(file, **{name: array.numpy() for name, array in arrays.items()})  # type: ignore[arg-type]
    manifest["parts"][part] = {"file": path.name, "hash": digest_file(path)}
    write(folder, manifest)


def is_stored(folder: Path, manifest: Manifest, part: str) -> bool:
    """Whether a part is finished and its file undamaged."""
    entry = manifest["parts"].get(part)
    path = folder / f"{part}.npz"
    return entry is not None and path.is_file() and digest_file(path) == entry["hash"]


def load_part(folder: Path, manifest: Manifest, part: str) -> dict[str, Tensor]:
    """The arrays of a part.

    Raises:
        MissingDataError: the cache is unfinished. InvalidArgumentError: the file is damaged.
    """
    path = folder / f"{part}.npz"
    if part not in manifest["parts"] or not path.is_file():
        raise MissingDataError(
            f"the cache {folder} is unfinished: {path.name} is missing; run the same cache command again"
        )
    if not is_stored(folder, manifest, part):
        raise InvalidArgumentError(
            f"{path} must be the file that {FILE} describes; got other bytes; run the same cache command again"
        )
    with (
        decoding(path, "a part of a cache", "run the same cache command again"),
        np.load(path, allow_pickle=False) as stored,
    ):
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


def shift_part(shift: str, severity: int) -> str:
    """The part that holds the test rows under a shift."""
    return f"test-{shift}-{severity}"


def shifts(manifest: Manifest) -> list[tuple[str, int]]:
    """The shifts and severities that a cache holds, in the order they were asked for."""
    cached = (part.removeprefix("test-").rsplit("-", 1) for part in manifest["parts"] if part.startswith("test-"))
    return [(shift, int(severity)) for shift, severity in cached]


def require_current(
    folder: Path, manifest: Manifest, data: ClassificationData | None, backbone: nn.Module | None
) -> None:
    """Refuse a cache that belongs to something else, or whose sources have changed.

    Raises:
        InvalidArgumentError: names everything that differs.
    """
    found = [f"source file {path}" for path in changed_sources(manifest)]
    if data is not None:
        found += differences(manifest["data"], describe_data(data), "data")
    if backbone is not None:
        found += differences(manifest["backbone"], describe_backbone(backbone), "backbone")
    if found:
        raise InvalidArgumentError(
            f"the cache {folder} must belong to the data and the backbone in use; got a stale one, which differs in: "
            f"{'; '.join(found)}. Cache again with --overwrite, or into another folder"
        )
