"""What the package, the documentation and the examples import comes with the install that is documented."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Distributions whose modules bear another name.
MODULES = {
    "pillow": "PIL",
    "scikit-learn": "sklearn",
    "pyyaml": "yaml",
    "myst-parser": "myst_parser",
    "einops": "einops",
}
# Imported by way of what is declared: they are its own dependencies, and part of what it is for.
BROUGHT = {
    "yaml": "jsonargparse",
    "pandas": "datasets",
    "huggingface_hub": "transformers",
    "tokenizers": "transformers",
}
NOT_OURS = {"vllm", "sglang"}  # the engines that exported routing is for
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)


def declared() -> set[str]:
    """Top-level modules that the core and the extras for users bring; what only developers get does not count."""
    extras = {name: needs for name, needs in PROJECT["optional-dependencies"].items() if name != "dev"}
    names = {
        re.split(r"[\[>=<;! ]", need)[0] for needs in [PROJECT["dependencies"], *extras.values()] for need in needs
    }
    modules = {MODULES.get(name.lower(), name.replace("-", "_")) for name in names}
    return modules | {module for module, owner in BROUGHT.items() if owner in modules}


def imported(source: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


def pages() -> list[Path]:
    skipped = {".venv", "build", "runs", ".git"}
    return sorted(path for path in ROOT.rglob("*.md") if not skipped & set(path.relative_to(ROOT).parts))


def snippets() -> list[tuple[str, str]]:
    return [
        (f"{page.relative_to(ROOT)}-{i}", text)
        for page in pages()
        for i, text in enumerate(SNIPPET.findall(page.read_text()))
    ]


def test_there_are_snippets_to_read() -> None:
    assert len(snippets()) > 5


@pytest.mark.parametrize(("place", "text"), snippets(), ids=lambda value: value if len(value) < 60 else "")
def test_every_snippet_imports_what_an_extra_brings(place: str, text: str) -> None:
    try:
        names = imported(re.sub(r"^(\s*)\.\.\.\s*$", r"\1pass", text, flags=re.MULTILINE))
    except SyntaxError:
        names = {name.split(".")[0] for name in re.findall(r"^\s*(?:from|import) ([\w.]+)", text, re.MULTILINE)}
        names -= set(sys.stdlib_module_names)
    mine = {name for name in names if (ROOT / "examples" / f"{name}.py").exists() or name.startswith("my_")}
    assert names - mine <= declared() | {"moe_posterior"}, place


@pytest.mark.parametrize("folder", ["moe_posterior", "kernels", "training", "examples"])
def test_every_module_imports_what_an_extra_brings(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        unknown = imported(path.read_text()) - declared() - NOT_OURS - {"moe_posterior", path.stem}
        assert not unknown, f"{path.relative_to(ROOT)}: {unknown}"


def test_duckdb_hands_out_times_after_the_documented_install() -> None:
    duckdb = pytest.importorskip("duckdb")
    assert "duckdb" in declared()
    assert "pytz" in declared(), "DuckDB makes Python times with a zone by way of pytz and does not declare it"
    found = duckdb.sql("SELECT TIMESTAMPTZ '2026-01-02 03:04:05+00' AS time").fetchall()
    assert found[0][0].utcoffset() is not None
