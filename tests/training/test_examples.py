"""The examples that the command line trains, a few batches of each; ``make examples`` trains them to the end."""

from pathlib import Path

import pytest
import torch

import moe_posterior
from moe_posterior.cli import main

EXAMPLES = Path(moe_posterior.__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize(("folder", "file", "gates"), [("own_data", "plain", 1), ("language_model", "experiment", 2)])
def test_an_example_of_a_module_of_ones_own_trains_and_gathers_evidence(
    folder: str, file: str, gates: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES / folder)
    few = [
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=8",
        "--trainer.limit_val_batches=2",
        "--belief.warmup=4",
    ]
    assert main(["fit", "--config", f"{file}.yaml", "--run-dir", str(tmp_path), *few]) == 0
    [path] = tmp_path.glob("*/model/checkpoints/last.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    counts = [value for name, value in state.items() if name.endswith("posterior.successes")]
    assert len(counts) == gates
    assert all(float(count.sum()) > 0 for count in counts)
