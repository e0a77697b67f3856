"""Build a wheel of the checkout, install it in a fresh environment elsewhere, and use it there: what a user of pip gets.

python tests/wheel_check.py          # two minutes, most of them pip's
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

USE = """
import sys
import torch
from torch import nn
import moe_posterior
assert "site-packages" in moe_posterior.__file__, moe_posterior.__file__
extras = {"lightning", "torchmetrics", "transformers", "pyarrow", "matplotlib", "sklearn", "pandas"}
assert not extras & set(sys.modules), extras & set(sys.modules)
from moe_posterior import MissingDependencyError, PosteriorMoE, PosteriorRouter, record
hidden = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
moe = PosteriorMoE(nn.ModuleList([nn.Linear(16, 16) for _ in range(4)]), hidden_size=16, num_clusters=4, top_k=2)
moe.gate.fit(hidden)
with record(moe) as trace:
    loss = moe(hidden).square().mean()
loss.backward()
trace.observe_gradients()
assert float((moe.gate.posterior.successes + moe.gate.posterior.failures).sum()) == 512
router = PosteriorRouter(num_experts=4, hidden_size=16)
router.fit(hidden.numpy())
router.resolve(router.route(hidden[0].numpy()).id, 1.0)
from moe_posterior.losses import robust
robust(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([0, 1]))
import moe_posterior.kernels.reference
try:
    import moe_posterior.metrics
except MissingDependencyError as error:
    assert "moe-posterior[evaluate]" in str(error)
print("used from", moe_posterior.__file__)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", ROOT, cwd=folder)
        (wheel,) = (folder / "dist").glob("*.whl")
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel, cwd=folder)
        run(python, "-I", "-c", USE, cwd=folder)
        run(folder / "env" / "bin" / "moe-posterior", "--version", cwd=folder)
        missing = subprocess.run(
            [folder / "env" / "bin" / "moe-posterior", "fit"], cwd=folder, capture_output=True, text=True
        )
        assert missing.returncode == 2, missing
        assert "moe-posterior[train]" in missing.stderr, missing.stderr
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, installed and used in a fresh environment")


def run(*command: object, cwd: Path) -> None:
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


if __name__ == "__main__":
    main()
