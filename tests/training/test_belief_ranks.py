"""The belief callback in two processes (gloo, on the CPU), under DDP and FSDP2: the sample and the belief of one process."""

import copy
import os
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from strangers import EXPERTS, Clouds, Dense, Judging, Layers
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moe_posterior import PosteriorGate
from moe_posterior.training.belief import BeliefCallback

PARTS = ("successes", "failures")
RANKS, WARMUP, SAMPLE, EPOCHS = 2, 14, 60, 3  # epochs of ten batches


class Sharded(Judging):
    """Every layer is split over the ranks; an expert alone must not be, since a rank may have no token for it."""

    def configure_model(self) -> None:
        if not isinstance(next(self.parameters()), DTensor):
            for part in (self.first, self.alone, self.learned, self.head):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


class Learning(Layers):
    """Its first gate has a learned prior, which is finished on the validation rows."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.alone.gate = PosteriorGate(8, EXPERTS, 5, 2, prior="learned")


class ShardedLearning(Learning):
    """The same, split over the ranks."""

    configure_model = Sharded.configure_model


class Keep(lightning.Callback):
    """The samples as they are in a checkpoint in the middle of the warm-up."""

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step == 10:
            belief = next(each for each in trainer.callbacks if isinstance(each, BeliefCallback))
            self.state = copy.deepcopy(belief.state_dict())


def train(
    kind: type[Layers],
    lr: float,
    strategy: Strategy | None,
    folder: Path | None = None,
    stop: int = -1,
    resume: bool = False,
) -> dict[str, Any]:
    lightning.seed_everything(7 if resume else 0, verbose=False)
    module, keep = kind(lr), Keep()
    if not isinstance(module, Learning):
        module.alone.gate = PosteriorGate(8, 4, 5, 2)  # counts whole numbers, so that sums over ranks are exact
    callbacks = [BeliefCallback(warmup=WARMUP, sample_size=SAMPLE), keep]
    callbacks += [] if folder is None else [ModelCheckpoint(folder, save_last=True)]
    trainer = lightning.Trainer(
        max_epochs=EPOCHS if stop < 0 else stop,
        accelerator="cpu",
        devices=1 if strategy is None else RANKS,
        strategy="auto" if strategy is None else strategy,
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    path = folder / "last.ckpt" if resume and folder is not None else None
    trainer.fit(module, datamodule=Clouds(), ckpt_path=path)
    state = {
        name: part.full_tensor() if isinstance(part, DTensor) else part for name, part in module.state_dict().items()
    }
    return {"state": state, "sample": getattr(keep, "state", None)}


def ddp() -> Strategy:
    return DDPStrategy(cluster_environment=LightningEnvironment(), process_group_backend="gloo")


def sharded() -> Strategy:
    strategy = ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1, process_group_backend="gloo")
    strategy.cluster_environment = LightningEnvironment()
    return strategy


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}  # as a launcher tells Lightning
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    checkpoints = Path(folder) / "checkpoints"
    results: dict[str, Any] = {
        "still": train(Dense, 0.0, ddp()),
        "ddp": train(Layers, 1e-2, ddp()),
        "stopped": train(Layers, 1e-2, ddp(), checkpoints, stop=1),
        "resumed": train(Layers, 1e-2, ddp(), checkpoints, resume=True),
        "sharded": train(Sharded, 1e-2, sharded()),
        "not sharded": train(Judging, 1e-2, ddp()),
        "finished": train(Learning, 1e-2, ddp()),
        "finished sharded": train(ShardedLearning, 1e-2, sharded()),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What either process says; started once, for starting takes most of the time."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(one_of_two, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def belief_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if ".posterior." in name or ".clusterer." in name}


@pytest.mark.parametrize("run", ["still", "ddp", "resumed", "sharded"])
def test_ranks_hold_the_same_sample_and_the_same_belief(ranks: list[dict[str, Any]], run: str) -> None:
    one, other = ({"state": rank[run]["state"], "sample": (rank[run]["sample"] or {}).get("samples")} for rank in ranks)
    assert (one["sample"] is None) == (run == "resumed")  # which began after the moment at which it is looked at
    if run == "resumed":
        del one["sample"], other["sample"]
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert sum(float(value.sum()) for name, value in ranks[0][run]["state"].items() if "successes" in name) > 0


def test_the_sample_and_the_evidence_are_those_of_one_process_that_sees_all_rows(ranks: list[dict[str, Any]]) -> None:
    alone, two = train(Dense, 0.0, None), ranks[0]["still"]
    own, others = (run["sample"]["samples"]["alone.gate"] for run in (alone, two))
    assert len(own["keys"]) == SAMPLE
    assert torch.equal(own["keys"], others["keys"])
    torch.testing.assert_close(
        own["hidden"], others["hidden"], rtol=1e-6, atol=1e-6
    )  # other batch sizes round otherwise
    assert torch.equal(own["outcome"], others["outcome"])
    one, both = ({part: run["state"][f"alone.gate.posterior.{part}"] for part in PARTS} for run in (alone, two))
    torch.testing.assert_close(both, one, rtol=0, atol=0)
    assert float(sum(part.sum() for part in one.values())) == EXPERTS * (SAMPLE + (10 * EPOCHS - WARMUP) * 24)


def test_a_run_that_stopped_within_the_warm_up_resumes_bit_for_bit_on_two_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["stopped"]["sample"]["batches"] == 10 < WARMUP
        torch.testing.assert_close(rank["resumed"]["state"], rank["ddp"]["state"], rtol=0, atol=0, equal_nan=True)


def test_sharded_training_samples_and_counts_as_ddp_does(ranks: list[dict[str, Any]]) -> None:
    one, other = ranks[0]["sharded"], ranks[0]["not sharded"]
    assert torch.equal(one["sample"]["samples"]["alone.gate"]["keys"], other["sample"]["samples"]["alone.gate"]["keys"])
    torch.testing.assert_close(belief_of(one["state"]), belief_of(other["state"]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("run", ["finished", "finished sharded"])
def test_ranks_finish_a_learned_prior_alike_and_as_one_process_does(ranks: list[dict[str, Any]], run: str) -> None:
    one, other = (belief_of(rank[run]["state"]) for rank in ranks)
    mine = {name: value for name, value in one.items() if name.startswith("alone.")}
    assert float(mine["alone.gate.posterior.prior_alpha"].std()) > 0
    assert all(torch.equal(value, other[name]) for name, value in mine.items())
    alone = belief_of(train(Learning, 1e-2, None)["state"])
    for name, value in mine.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-4)
