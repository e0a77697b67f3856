"""The house's rules: imports run one way, the base import stays light, the two top-level folders stay inside the package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moe_posterior"
# Rooms in the order in which they may use each other: each only those before it.
ORDER = [
    ["bins", "errors", "soundness", "precision", "validation"],
    ["drafts"],
    ["atomic"],
    ["torchfile", "forking", "pending"],
    ["reading", "tensorfile"],
    ["beta", "evidence"],
    ["kernels"],
    ["churn", "posterior", "clustering"],
    ["memberships"],
    ["gates"],
    ["dispatch", "experts"],
    ["layer", "router"],
    ["replay"],
    ["audit", "huggingface", "serving"],
    ["benchmarks"],
    ["training"],
    ["cli"],
]
LEAVES = {
    "losses",
    "metrics",
    "calibrators",
    "page",
    "escape",
}  # may use the first row alone, and be used by any room after the gates
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
# Run and imported by each other alone: they time whole layers.
SCRIPTS = {PACKAGE / "kernels" / name for name in ("bench.py", "bench_common.py", "bench_layers.py")}
LIGHT = {"torch", "einops", "moe_posterior"}


def python_files() -> list[Path]:
    # rglob does not follow the symlinks to kernels/ and training/
    folders = [PACKAGE, PACKAGE / "kernels", PACKAGE / "training"]
    return sorted({path for folder in folders for path in folder.rglob("*.py")})


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    # `from moe_posterior import beta` imports the room beta
    names |= {
        f"moe_posterior.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module == "moe_posterior"
        for alias in node.names
    }
    return names


def test_there_are_files_to_check() -> None:
    assert {"kernels", "training", "gates"} <= {room_of(path) for path in python_files()}


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(path)
    if room == "__init__" or path in SCRIPTS:
        return
    for name in imported_modules(path):
        if not name.startswith("moe_posterior."):
            continue
        used = name.split(".")[1]
        if used == room or (used not in RANK and used not in LEAVES):
            continue  # its own room, or a name re-exported by the package
        if room in LEAVES:
            assert used in {*ORDER[0], *LEAVES}, f"{room} is a leaf and imports {used}"
        elif used not in LEAVES:
            assert RANK[used] <= RANK[room], f"{room} imports {used}, which comes after it"


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_kernels_and_training_are_never_imported_by_their_bare_names(path: Path) -> None:
    assert not {name for name in imported_modules(path) if name.split(".")[0] in {"kernels", "training"}}


def test_the_two_folders_have_no_init_file() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "training" / "__init__.py").exists()


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_importing_the_package_loads_no_extra() -> None:
    extras = "lightning torchmetrics transformers datasets pyarrow matplotlib triton sklearn scipy rich"
    loaded = run_python(f"import sys, moe_posterior; print([m for m in '{extras}'.split() if m in sys.modules])")
    assert loaded == "[]"


def test_transformers_imports_from_the_repository_root() -> None:
    pytest.importorskip("transformers")
    code = "import moe_posterior, transformers, sys; transformers.AutoModel; print('kernels' in sys.modules)"
    assert run_python(code) in {"True", "False"}
    code = "import sys, moe_posterior; print({'kernels', 'training'} & set(sys.modules))"
    assert run_python(code) == "set()"
