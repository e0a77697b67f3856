"""Two processes that each see half of the data hold one belief, that of a single process that saw all of it."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from huggingface.models import batch, mixtral
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe_posterior import record, swap_gates
from moe_posterior.huggingface import swapped_gates

RANKS = 2


def observed(batches: list[dict[str, torch.Tensor]], centroids: list[torch.Tensor] | None, wrap: bool) -> nn.Module:
    model = mixtral()
    report = swap_gates(model, num_clusters=3, half_life=None, amnesty=None)
    if centroids is None:
        report.fit(batches)
    else:
        for (_, gate), own in zip(swapped_gates(model), centroids, strict=True):
            gate.clusterer.set_centroids(own)
    report.warm_start(batches)
    called = DistributedDataParallel(model) if wrap else model
    for each in batches:
        with record(model) as trace:
            loss = called(**each, labels=each["input_ids"]).loss
        loss.backward()
        trace.observe_gradients()
    return model


def state(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    return [gate.state_dict() for _, gate in swapped_gates(model)]


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    batches = [batch(seed=seed, padded=3) for seed in range(4)]
    model = observed(batches[rank::RANKS], None, wrap=True)
    torch.save(state(model), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_evidence_and_reference_are_summed_over_ranks(tmp_path: Path) -> None:
    mp.spawn(one_of_two, args=(str(tmp_path),), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    alone = state(
        observed([batch(seed=s, padded=3) for s in range(4)], [each["clusterer.centroids"] for each in first], False)
    )
    for one, other, single in zip(first, second, alone, strict=True):
        for name in one:
            assert torch.equal(one[name], other[name]), name
        assert float(one["posterior.successes"].sum()) > 0
        for name in ("successes", "failures", "prior_alpha", "prior_beta"):
            torch.testing.assert_close(one[f"posterior.{name}"], single[f"posterior.{name}"])
