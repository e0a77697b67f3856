"""Whatever the package writes is whole: every writer, under a full disk and under every failing call, leaves the old file."""

import ast
import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import calls_of, error_of, full_disk, interposed, names_beside
from report_example import full_report

from moe_posterior import MixtureOfExperts, MoEPosteriorError, PosteriorGate, PosteriorRouter
from moe_posterior.files.tensorfile import save_plain, save_tensors
from moe_posterior.replay.record import record
from moe_posterior.serving import export_routing, save_routing

ROOT = Path(__file__).resolve().parent.parent
D, E, C = 4, 3, 2
HIDDEN = torch.randn(40, D, generator=torch.Generator().manual_seed(0))

# Each writes version 0 or 1 of a file or folder, and nothing beside it.
WRITERS: dict[str, Callable[[Path, int], object]] = {}


def writer(write: Callable[[Path, int], object]) -> Callable[[Path, int], object]:
    WRITERS[write.__name__.replace("_", " ")] = write
    return write


def model() -> MixtureOfExperts:
    torch.manual_seed(0)
    gate = PosteriorGate(D, E, C, 1)
    gate.fit(HIDDEN)
    return MixtureOfExperts(torch.nn.ModuleList(torch.nn.Linear(D, D) for _ in range(E)), gate)


def figure_report(version: int) -> dict[str, Any]:
    report = json.loads(json.dumps(full_report()).replace("NaN", "null"))
    report["reliability"][0]["bins"]["accuracy"][1] -= 0.1 * version
    return report


@writer
def router(path: Path, version: int) -> None:
    made = PosteriorRouter(E, D, C, exploration=0.1 * version)
    made.fit(HIDDEN.numpy())
    made.save(path)


@writer
def tensors(path: Path, version: int) -> None:
    save_tensors(path, {"x": torch.full((1000,), version)}, {"kind": "test"})


@writer
def plain_content(path: Path, version: int) -> None:
    save_plain(path, {"x": torch.full((1000,), version)})


@writer
def trace(path: Path, version: int) -> None:
    moe = model()
    with record(moe) as trace, torch.no_grad():
        moe(HIDDEN[: 10 + version])
    trace.save(path)


@writer
def routing_functions(path: Path, version: int) -> None:
    moe = model()
    moe.gate.posterior.observe(torch.zeros(9, dtype=torch.long), torch.tensor([[0.0, 1, 1]] * 9) * version)
    save_routing(export_routing(moe), path)


@writer
def belief_of_a_swapped_model(path: Path, version: int) -> None:
    from huggingface.models import condemn, fit_on_noise, mixtral

    from moe_posterior import swap_gates
    from moe_posterior.huggingface import save_belief, swapped_gates

    swapped = mixtral()
    swap_gates(swapped, num_clusters=4)
    gates = dict(swapped_gates(swapped))
    fit_on_noise(gates)
    if version:
        condemn(next(iter(gates.values())), 1)
    save_belief(swapped, path)


@writer
def benchmark_records(path: Path, version: int) -> None:
    from moe_posterior.benchmarks.records import Record, Results, write

    write(Results([Record("b", "e", "g", {}, 0, "m", version)] * 20), path)


@writer
def tuned_knobs(path: Path, version: int) -> None:
    from moe_posterior.benchmarks.routing.tune import write_knobs

    write_knobs({"knobs": {"g": version}, "objective": {"g": 0.5}, "count": 1, "seeds": [0] * 99}, path)


@writer
def benchmark_figure(path: Path, version: int) -> None:
    from moe_posterior.results.figures import canvas, save

    figure = canvas(2, 2)
    figure.subplots().plot([0, 1], [version, 1])
    save(figure, path.with_suffix(".png"))


@writer
def report_json(path: Path, version: int) -> None:
    from moe_posterior.report import write_json

    write_json({"value": version, "more": [0] * 99}, path)


@writer
def reliability_figure(path: Path, version: int) -> None:
    from moe_posterior.report import reliability_diagram

    reliability_diagram(figure_report(version), path.with_suffix(".png"))


@writer
def competence_figure(path: Path, version: int) -> None:
    from moe_posterior.report import posterior_heatmap

    posterior_heatmap(torch.full((C, E), 0.2 + version / 2), torch.ones(C, E), path.with_suffix(".png"))


@writer
def report_folder(path: Path, version: int) -> None:
    from moe_posterior.training.evaluate import _write

    _write(path, figure_report(version), {}, {}, [])


@writer
def audit_page(path: Path, version: int) -> None:
    from moe_posterior.audit.views.page import write_page

    write_page(LOGS[version], path)


@writer
def audit_tables_as_parquet(path: Path, version: int) -> None:
    audit_tables(path, version, "parquet")


@writer
def audit_tables_as_csv(path: Path, version: int) -> None:
    audit_tables(path, version, "csv")


@writer
def manifest_of_a_cache(path: Path, version: int) -> None:
    from moe_posterior.training.data import manifest

    path.mkdir(exist_ok=True)
    manifest.write(path, {"format": version, "more": [0] * 99})  # type: ignore[typeddict-item,typeddict-unknown-key]


@writer
def outputs_of_a_study(path: Path, version: int) -> None:
    from moe_posterior.calibrators import Outputs
    from moe_posterior.training.study.train import save_outputs

    rows = torch.full((50,), version)
    save_outputs(path.with_suffix(".npz"), {"val": (Outputs(*[rows] * len(Outputs._fields)), rows)})


@writer
def end_of_an_arm(path: Path, version: int) -> None:
    from moe_posterior.training.runs import Arm

    path.mkdir(exist_ok=True)
    Arm("softmax", path).finish({"epochs": version, "more": [0] * 99})


@writer
def training_checkpoint(path: Path, version: int) -> None:
    from moe_posterior.training.callbacks import WholeCheckpoints

    WholeCheckpoints().save_checkpoint({"x": torch.full((1000,), version)}, path)


@writer
def language_model_checkpoint(path: Path, version: int) -> None:
    from moe_posterior.benchmarks.lm.models import _keep

    torch.manual_seed(version)
    layer = torch.nn.Linear(9, 9)
    _keep(path, {}, version, layer, torch.optim.SGD(layer.parameters()), [])


LOGS: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def logs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two audit logs, for what is made of them."""
    from moe_posterior.audit import AuditLog

    for calls in (1, 2):
        folder = tmp_path_factory.mktemp(f"log{calls}")
        with AuditLog(folder) as log:
            made = PosteriorRouter(E, D, C, audit=log)
            made.fit(HIDDEN.numpy())
            for _ in range(calls):
                made.resolve_batch(made.route_batch(HIDDEN.numpy()).ids, np.ones(len(HIDDEN)))
        LOGS.append(folder)
    yield
    LOGS.clear()


def audit_tables(path: Path, version: int, form: Any) -> None:
    from moe_posterior.audit.read import Reader
    from moe_posterior.audit.views.export import export

    export(Reader(LOGS[version], None), path, form)


def content(folder: Path) -> dict[str, bytes]:
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return {name: data for name, data in found.items() if ".moe-" not in name}


@pytest.fixture(params=WRITERS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Callable[[Path, int], object]]:
    pytest.importorskip("lightning")
    return tmp_path / "it", WRITERS[request.param]


def test_the_old_file_outlives_a_full_disk_in_every_writer(case: tuple[Path, Callable[[Path, int], object]]) -> None:
    path, write = case
    write(path, 0)
    old = content(path.parent)
    largest = max(map(len, old.values()))
    for size in (1, largest // 2):
        with full_disk(size), pytest.raises(MoEPosteriorError) as raised:
            write(path, 1)
        assert isinstance(raised.value, OSError)
        assert raised.value.errno == errno.EFBIG
        assert mixed(content(path.parent), old), size
        assert not [name for name in names_beside(path) if ".moe-" in name]
    write(path, 1)
    assert content(path.parent) != old
    assert content(path.parent).keys() == old.keys()


def test_at_every_call_of_every_writer_the_old_or_the_new_file_is_whole(
    case: tuple[Path, Callable[[Path, int], object]],
) -> None:
    """A kill leaves what is there at that moment; an error, what is there in the end."""
    path, write = case
    write(path, 0)
    calls, old = calls_of(lambda: write(path, 0)), content(path.parent)
    assert {"fsync", "replace"} <= set(calls) or {"fsync", "mkdir"} <= set(calls)
    seen: list[tuple[str, dict[str, bytes]]] = []
    with interposed(lambda name, number: seen.append((name, content(path.parent)))):
        write(path, 1)
    new = content(path.parent)
    assert new != old
    for name, moment in seen:
        assert mixed(moment, old, new), name
    for wanted in sorted(set(calls) & {"write", "fsync", "replace"}):
        write(path, 0)
        old = content(path.parent)

        def fail(name: str, number: int, wanted: str = wanted) -> None:
            if name == wanted:
                raise OSError(errno.EIO, f"no {name}")

        error = error_of(lambda: write(path, 1), fail)
        assert isinstance(error, MoEPosteriorError), wanted
        assert content(path.parent) == old, wanted
        assert not [name for name in names_beside(path) if ".moe-" in name], wanted


def mixed(found: dict[str, bytes], *whole: dict[str, bytes]) -> bool:
    """Whether every file is one of the whole ones."""
    return found.keys() == whole[0].keys() and all(found[name] in [one[name] for one in whole] for name in found)


# Calls that write in place, or bring a file to its place some other way than moe_posterior.files.atomic.
BARE = {
    "write_text",
    "write_bytes",
    "touch",
    "rename",
    "renames",
    "rmtree",
    "copy2",
    "copyfile",
    "copyfileobj",
    "move",
    "mkstemp",
    "NamedTemporaryFile",
    "savefig",
    "save_file",
    "savez",
    "savez_compressed",
    "to_csv",
    "to_parquet",
    "write_table",
    "write_csv",
    "truncate",
    "symlink_to",
    "hardlink_to",
}
QUALIFIED = {"os.replace", "os.link", "os.symlink", "torch.save", "json.dump", "np.save", "yaml.dump"}
STORAGE = {
    "files/atomic.py": "is the one place",
    "files/drafts.py": "is its other half",
    "audit/storage/files.py": "the log's own files, which grow",
    "audit/storage/compact.py": "through the log's own files",
    "audit/storage/upkeep.py": "through the log's own files",
    "audit/storage/segments.py": "through the log's own files",
    "audit/storage/resume.py": "through the log's own files",
    "kernels/instruments/aot.py": "hands a compiled kernel to the disassembler",
    "training/runs.py": "removes what --overwrite is asked to",
}


def python_files() -> list[Path]:
    package = ROOT / "moe_posterior"  # rglob does not follow the links to kernels/ and training/
    return sorted({f for part in (package, package / "kernels", package / "training") for f in part.rglob("*.py")})


@pytest.mark.parametrize("file", python_files(), ids=lambda file: str(file.relative_to(ROOT / "moe_posterior")))
def test_no_file_is_written_but_through_the_one_module(file: Path) -> None:
    name = str(file.relative_to(ROOT / "moe_posterior"))
    found = bare_writes(ast.parse(file.read_text()))
    if name not in STORAGE:
        assert not found, f"{name}: {found}; use moe_posterior.files.atomic"


def test_a_write_in_place_is_noticed() -> None:
    code = """
from moe_posterior.files.atomic import replacing, write_text, copy
write_text(path, "fine")
file = io.BytesIO()
torch.save(x, file)
open(path), open(path, "rb"), text.replace("a", "b"), os.open(path, os.O_RDONLY | os.O_NONBLOCK)
with replacing(path) as inner:
    figure.savefig(inner, format="png")
"""
    assert bare_writes(ast.parse(code)) == []
    for line in (
        'open(path, "w")',
        'path.open("ab")',
        'open(path, mode="r+b")',
        "open(path, mode)",
        "path.write_text(x)",
        "torch.save(x, path)",
        "figure.savefig(path)",
        "os.replace(a, b)",
        "os.open(a, os.O_WRONLY)",
        "a.replace(b)",
        "a.rename(b)",
        "with other(path) as inner: np.savez(inner)",
    ):
        assert bare_writes(ast.parse(line)), line


def bare_writes(tree: ast.Module) -> list[str]:
    """Calls that write a file by its name; what writes into the file of a ``with replacing(…)`` or into memory is fine."""
    fine = {
        item.optional_vars.id
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        for item in node.items
        if isinstance(item.optional_vars, ast.Name)
        and isinstance(item.context_expr, ast.Call)
        and ast.unparse(item.context_expr.func) == "replacing"
    }
    fine |= {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.value) == "io.BytesIO()"
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and writes(node) and not names_in(node) & fine
    ]


def writes(call: ast.Call) -> bool:
    whole = ast.unparse(call.func)
    last = whole.rsplit(".", 1)[-1]
    if last == "open" and whole != "os.open":
        mode = next((k.value for k in call.keywords if k.arg == "mode"), None)
        place = 1 if whole in ("open", "io.open") else 0
        if whole in ("Image.open", "webbrowser.open", "gzip.open"):
            return False
        mode = mode or (call.args[place] if len(call.args) > place else None)
        return mode is not None and not (isinstance(mode, ast.Constant) and mode.value in ("r", "rb", "rt"))
    if last == "replace":  # of a path: a text's takes two arguments; of a dataclass, names
        return whole == "os.replace" or (
            isinstance(call.func, ast.Attribute) and len(call.args) == 1 and not call.keywords
        )
    if whole == "os.open":
        flags = ast.unparse(call.args[1]) if len(call.args) > 1 else ""
        return "O_RDONLY" not in flags or "O_CREAT" in flags
    if isinstance(call.func, ast.Attribute) and last in BARE:
        return True
    return whole in QUALIFIED


def names_in(call: ast.Call) -> set[str]:
    return {argument.id for argument in call.args if isinstance(argument, ast.Name)}
