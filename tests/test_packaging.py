"""A wheel built from the checkout works in a fresh environment outside it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROUTE_A_BATCH = """
import torch, moe_posterior
from moe_posterior import PosteriorMoE
from moe_posterior.kernels import reference
hidden = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
moe = PosteriorMoE(torch.nn.ModuleList([torch.nn.Linear(8, 3) for _ in range(4)]), hidden_size=8, num_clusters=4)
moe.gate.fit(hidden)
moe.observe(moe.route(hidden), torch.ones(64, 2))
print(moe_posterior.__file__, tuple(moe(hidden).shape))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files behind, which the next wheel could pick up
    shutil.copytree(
        ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "runs", "results", "build", "*.egg-info")
    )
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    target = next((folder / "venv" / "lib").glob("python*/site-packages"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    # torch and the extras come from this environment; its own editable install of the package is not followed from here.
    (target / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv"


def run_outside(environment: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    python = environment / "bin" / "python"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([str(python), *arguments], cwd=environment, capture_output=True, text=True, env=clean)


def test_the_wheel_routes_a_batch_outside_the_checkout(environment: Path) -> None:
    result = run_outside(environment, "-c", ROUTE_A_BATCH)
    assert result.returncode == 0, result.stderr
    where, shape = result.stdout.strip().split(" ", 1)
    assert Path(where).is_relative_to(environment)
    assert shape == "(64, 3)"


def test_the_wheel_holds_both_symlinked_folders_and_the_type_marker(environment: Path) -> None:
    package = next(environment.glob("lib/python*/site-packages/moe_posterior"))
    for file in (
        "py.typed",
        "kernels/reference.py",
        "kernels/triton/launch.py",
        "kernels/instruments/aot.py",
        "training/cli.py",
        "training/data/digits.py",
    ):
        assert (package / file).is_file(), file
    assert not list(environment.glob("lib/python*/site-packages/kernels"))


def test_the_console_script_teaches(environment: Path) -> None:
    result = run_outside(
        environment, "-c", "import sys; from moe_posterior.cli import main; sys.exit(main(['fit', '--help']))"
    )
    assert result.returncode == 0, result.stderr
    assert "experiment file" in result.stdout
