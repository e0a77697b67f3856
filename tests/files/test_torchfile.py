"""Saved files from somebody who wishes us ill: refused, in no more memory than a good file takes."""

import io
import os
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_posterior import PosteriorRouter
from moe_posterior.errors import DamagedFileError, MissingDataError, MoEPosteriorError
from moe_posterior.files.tensorfile import load_tensors
from moe_posterior.files.torchfile import read_plain_file

HUGE = 10**9
ROOM = 256 << 20  # bytes that a child may take on beside what it has: a quarter of the smallest bomb


def state(**options: object) -> dict:
    router = PosteriorRouter(4, 3, 2)
    router.fit(np.random.default_rng(0).normal(size=(20, 3)))
    router.route(np.zeros(3))
    found = router.state()
    return {**found, "options": {**found["options"], **options}}


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def with_tensor(place: str, tensor: torch.Tensor) -> bytes:
    made = state()
    part, _, name = place.partition(" ")
    made[part] = {**made[part], name: tensor} if name else tensor
    return saved(made)


def compressed(data: bytes, zeros: int = 0) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry) + bytes(zeros * ("/data/" in entry.filename)))
    return file.getvalue()


BOMBS: dict[str, Callable[[], bytes]] = {
    "stride 0 in the gate": lambda: with_tensor("gate posterior.successes", torch.zeros(1, 1).expand(HUGE, 4)),
    "stride 0 in the pending": lambda: with_tensor("pending id", torch.zeros(1, dtype=torch.int64).expand(HUGE)),
    "stride 0 in the tenure": lambda: with_tensor("tenure", torch.zeros(1, dtype=torch.int32).expand(HUGE)),
    "many views of one storage": lambda: saved(dict(enumerate(torch.zeros(1 << 20).expand(2000, -1)))),
    "compressed": lambda: compressed(saved(state())),
    "compressed zeros": lambda: compressed(saved(state()), 1 << 26),
    "num_experts": lambda: saved(state(num_experts=HUGE)),
    "num_clusters": lambda: saved(state(num_clusters=HUGE)),
    "hidden_size": lambda: saved(state(hidden_size=HUGE)),
    "top_k": lambda: saved(state(top_k=HUGE)),
    "sparse": lambda: with_tensor("tenure", torch.zeros(4).to_sparse()),
    "not a zip": lambda: b"\x80\x02" + saved(state()),
    "empty": lambda: b"",
    "another content": lambda: saved([1, 2, 3]),
    "nothing of a router": lambda: saved({"options": {}}),
}
LOAD = """
import resource, sys
from moe_posterior import PosteriorRouter
from moe_posterior.errors import MoEPosteriorError
from moe_posterior.files.tensorfile import load_tensors
PosteriorRouter(2, 2, 2)
room, load = int(sys.argv[1]), {"router": PosteriorRouter.load, "tensors": lambda path: load_tensors(path, "x")}
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + room, resource.RLIM_INFINITY))
for path in sys.argv[2:]:
    for name in load:
        try:
            load[name](path)
            print(path, name, "was loaded")
        except MoEPosteriorError as error:
            assert "allocate" not in str(error) and "memory" not in str(error), (path, name, str(error))
"""


def test_hostile_files_are_refused_within_a_budget_by_every_loader(tmp_path: Path) -> None:
    paths = []
    for name, bomb in BOMBS.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(bomb())
    command = [sys.executable, "-c", LOAD, str(ROOM), *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == ""


def test_a_good_file_is_still_read(tmp_path: Path) -> None:
    (tmp_path / "router").write_bytes(saved(state()))
    router = PosteriorRouter.load(tmp_path / "router")
    assert router.state()["pending"]["id"].tolist() == [0]


@pytest.mark.parametrize("load", [PosteriorRouter.load, lambda path: load_tensors(path, "x"), read_plain_file])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "absent"])
def test_what_is_no_plain_file_is_refused_without_waiting(kind: str, load: Callable, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/zero")
    with pytest.raises(MissingDataError if kind == "absent" else DamagedFileError):
        load(path)


def test_a_router_that_may_wait_for_very_many_outcomes_takes_memory_as_they_come() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    router = PosteriorRouter(4, 3, 2, max_pending=3 * 10**8)
    router.fit(np.random.default_rng(0).normal(size=(20, 3)))
    for _ in range(40):
        ids = router.route_batch(np.zeros((5000, 3))).ids
    router.resolve_batch(ids[::7], np.ones(len(ids[::7])))
    with pytest.raises(MoEPosteriorError, match="is resolved already"):
        router.resolve(int(ids[0]), 1.0)
    with pytest.raises(MoEPosteriorError, match="was never given"):
        router.resolve(3 * 10**8 - 1, 1.0)
    assert len(PosteriorRouter.from_state(router.state()).state()["pending"]["id"]) == 200_000 - len(ids[::7])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # kB
