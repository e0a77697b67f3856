"""The house's rules: imports run one way, the base import stays light, the two top-level folders stay inside the package."""

import ast
import inspect
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from moe_posterior.gates import Gate
from moe_posterior.huggingface.gates import HostedPosteriorGate

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moe_posterior"
# Rooms in the order in which they may use each other: each only those before it.
ORDER = [
    ["bins", "checks", "errors", "precision", "threads"],
    ["files", "forking", "pending"],
    ["beta", "forgetting", "evidence"],
    ["kernels"],
    ["posterior", "kmeans", "clustering"],
    ["memberships"],
    ["gates"],
    ["prediction"],
    ["report"],
    ["dispatch", "experts"],
    ["layer", "router"],
    ["replay"],
    ["audit", "huggingface", "serving"],
    ["evaluation"],
    ["benchmarks"],
    ["training"],
    ["cli"],
]
# The same inside the audit log's room: each only those strictly before it, and its own.
AUDIT_ORDER = [
    ["storage"],
    ["sink", "limits", "belief"],
    ["entries"],
    ["recorder", "read"],
    ["attach", "rebuild", "recompute"],
    ["verify"],
    ["log"],
    ["views"],
]
LEAVES = {
    "losses",
    "metrics",
    "calibrators",
    "guarantees",
    "monitoring",
    "results",
    "escape",
}  # may use the first row and files, and be used by any room after the gates
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
# Run and imported by each other alone: they time whole layers.
SCRIPTS = {PACKAGE / "kernels" / "instruments" / name for name in ("bench.py", "bench_common.py", "bench_layers.py")}
LIGHT = {"torch", "einops", "moe_posterior"}
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}  # public: the underscore keeps them apart from fields
# What torch has no public name for, and why it is needed.
OF_TORCH = {
    "_C": "the current autograd graph and its default hooks",
    "_apply": "what .to(), .half() and their like call on every child",
    "_autograd": "as _C",
    "_cdata": "the identity of a storage",
    "_check": "a promise to torch.compile",
    "_compiled_call_impl": "whether a module was compiled in place",
    "_current_graph_task_id": "whether a backward pass is under way",
    "_dynamo": "whether torch.compile is tracing",
    "_forward_hooks": "whether anybody listens to a module, and who",
    "_forward_pre_hooks": "as _forward_hooks",
    "_sample_dirichlet": "Beta draws from a generator of one's own",
    "_top_saved_tensors_default_hooks": "whether activation checkpointing is recording",
    "_version": "whether a tensor was written to in place",
}


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
            assert used in {*ORDER[0], "files", *LEAVES}, f"{room} is a leaf and imports {used}"
        elif used not in LEAVES:
            assert RANK[used] <= RANK[room], f"{room} imports {used}, which comes after it"


def test_inside_the_audit_log_imports_run_one_way() -> None:
    rank = {part: rank for rank, parts in enumerate(AUDIT_ORDER) for part in parts}
    audit = [path for path in python_files() if room_of(path) == "audit" and path != PACKAGE / "audit" / "__init__.py"]
    assert {path.relative_to(PACKAGE).parts[1].removesuffix(".py") for path in audit} == set(rank)
    for path in audit:
        part = path.relative_to(PACKAGE).parts[1].removesuffix(".py")
        for name in imported_modules(path):
            if name == "moe_posterior.audit" or name.startswith("moe_posterior.audit."):
                used = name.split(".")[2] if name.count(".") > 1 else "log"  # what the room itself hands out
                assert used == part or rank[used] < rank[part], f"audit/{part} imports {used}, which is not before it"


def test_no_modules_import_each_other_in_a_circle() -> None:
    named = {module_name(path): path for path in python_files() if path.name != "__init__.py"}
    uses = {name: {used for used in imports_and_names(path) if used in named} for name, path in named.items()}
    assert len(list(TopologicalSorter(uses).static_order())) == len(named)  # a circle raises CycleError, which names it


def module_name(path: Path) -> str:
    return ".".join(["moe_posterior", *path.relative_to(PACKAGE).with_suffix("").parts])


def imports_and_names(path: Path) -> set[str]:
    """Imported modules, also those that are imported as a name of their package."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.module]
    return imported_modules(path) | {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}


def private_touches(source: str) -> set[str]:
    """Expressions like ``other._private``, apart from those on self, cls and super() and on objects of the module's own classes."""
    nodes = list(ast.walk(ast.parse(source)))
    own = {name for node in nodes if isinstance(node, ast.ClassDef) for name in names_in_class(node)}
    allowed = own | OF_NAMED_TUPLES | set(OF_TORCH)
    touched = [node for node in nodes if isinstance(node, ast.Attribute) and is_private(node.attr)]
    found = {ast.unparse(node) for node in touched if not is_self(node.value) and node.attr not in allowed}
    ours = [
        node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moe_posterior")
    ]
    return found | {f"{node.module}.{alias.name}" for node in ours for alias in node.names if is_private(alias.name)}


def names_in_class(found: ast.ClassDef) -> set[str]:
    """What a class defines: its methods and fields, and what its methods set on self."""
    stored = [node for node in ast.walk(found) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    fields = [node for part in found.body if isinstance(part, ast.Assign | ast.AnnAssign) for node in ast.walk(part)]
    methods = [node for node in found.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {
        *(node.attr for node in stored if is_self(node.value)),
        *(node.id for node in fields if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)),
        *(node.name for node in methods),
    }


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_self(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_no_module_touches_what_is_private_to_another() -> None:
    found = {
        (str(path.relative_to(PACKAGE)), touch)
        for path in python_files()
        for touch in private_touches(path.read_text())
    }
    assert not found


def test_touching_what_is_private_is_seen() -> None:
    source = """
from moe_posterior.other import _hidden
class Ours:
    def __init__(self):
        self._mine = 1
    def join(self, other):
        super()._set_up()
        return self._inherited + other._mine + routing._replace(x=1) + self.router._theirs
"""
    assert private_touches(source) == {"moe_posterior.other._hidden", "self.router._theirs"}


def concrete_gates(base: type = Gate) -> set[str]:
    """Names of the package's gates that can be made: what the rest of it must not ask for."""
    own = {base.__name__} if base.__module__.startswith("moe_posterior.") and not inspect.isabstract(base) else set()
    return own.union(*(concrete_gates(derived) for derived in base.__subclasses__()))


def classes_asked_for(source: str) -> set[str]:
    """The last names of the classes in ``isinstance(..., classes)`` and ``issubclass(..., classes)``."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and len(node.args) == 2]
    asked = [node.args[1] for node in calls if ast.unparse(node.func) in ("isinstance", "issubclass")]
    parts = [part for classes in asked for part in ast.walk(classes)]
    return {
        part.attr if isinstance(part, ast.Attribute) else part.id
        for part in parts
        if isinstance(part, ast.Attribute | ast.Name)
    }


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_outside_the_gates_none_is_told_from_another_by_its_class(path: Path) -> None:
    if room_of(path) != "gates":
        assert not classes_asked_for(path.read_text()) & concrete_gates()


def test_asking_for_the_class_of_a_gate_is_seen() -> None:
    source = "isinstance(gate, gates.PosteriorGate), issubclass(kind, (BeliefGate, PriorGate | int)), isinstance"
    assert classes_asked_for(source) & concrete_gates() == {"PosteriorGate", "PriorGate"}
    assert {"SoftmaxGate", HostedPosteriorGate.__name__} <= concrete_gates()


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_kernels_and_training_are_never_imported_by_their_bare_names(path: Path) -> None:
    assert not {name for name in imported_modules(path) if name.split(".")[0] in {"kernels", "training"}}


def test_the_two_folders_have_no_init_file() -> None:
    # None below kernels/ either: with one, pytest would import kernels/triton under the name of Triton itself.
    assert not list((ROOT / "kernels").rglob("__init__.py"))
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
