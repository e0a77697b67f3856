"""Two processes (gloo, on the CPU) hold the same belief, metrics and adversaries as one, train under DDP, and shard under FSDP2.

Lightning's ``FSDPStrategy`` refuses a CPU, so sharding is tried with its ``ModelParallelStrategy``, which runs torch's ``fully_shard``.
"""

import copy
import os
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from points import Plane, Points
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moe_posterior import LearnedPrior, MixtureOfExperts, PosteriorGate
from moe_posterior.gates import Routing
from moe_posterior.metrics import ClasswiseCalibrationError, GroupedCalibrationError
from moe_posterior.prediction import Prediction
from moe_posterior.training import methods
from moe_posterior.training.callbacks import CompetenceUpdates
from moe_posterior.training.module import MoEClassifier

RANKS, CLUSTERS, EXPERTS, CLASSES, EPOCHS = 2, 4, 3, 3, 3
CUT = 100  # ranks of unequal size
ROWS = 333


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def own(rank: int | None) -> slice:
    """The rows that a rank sees; None is one process that sees all."""
    return {None: slice(None), 0: slice(0, CUT), 1: slice(CUT, None)}[rank]


def gate() -> PosteriorGate:
    gate = PosteriorGate(2, EXPERTS, CLUSTERS, 2)
    gate.clusterer.set_centroids(torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]))
    return gate


def evidence(rank: int | None) -> dict[str, Tensor]:
    """Counts after two batches, where not every outcome was observed."""
    observer = gate()
    for seed in (0, 1):
        hidden = torch.randn(ROWS, 2, generator=generator(seed))
        outcome = (torch.rand(ROWS, EXPERTS, generator=generator(10 + seed)) < 0.6).double()
        outcome[torch.rand(ROWS, EXPERTS, generator=generator(20 + seed)) < 0.1] = torch.nan
        rows = own(rank)
        observer.observe(observer(hidden[rows]), outcome[rows], dense=True)
    return {name: getattr(observer.posterior, name) for name in ("successes", "failures")}


def metrics(rank: int | None) -> dict[str, Tensor]:
    probs = torch.randn(ROWS, CLASSES, generator=generator(0)).softmax(dim=1)
    target = torch.randint(CLASSES, (ROWS,), generator=generator(1))
    groups = torch.randint(4, (ROWS,), generator=generator(2))
    rows = own(rank)
    grouped, classwise = GroupedCalibrationError(4), ClasswiseCalibrationError(CLASSES)
    grouped.update(probs[rows], target[rows], groups[rows])
    classwise.update(probs[rows], target[rows])
    return {**grouped.compute(), "classwise": classwise.compute()}


def adversaries(rank: int | None) -> dict[str, Tensor]:
    """The methods' states after batches in which one rank sees other groups and configurations than the other."""
    router, state = gate(), {}
    dro, configuration = methods.GroupDRO(step=0.5), methods.RobustConfiguration(step=2.0)
    for method in (dro, configuration):
        method.bind(router, 3)
        for seed in range(8):
            rows = own(rank)
            probs = torch.randn(ROWS, CLASSES, generator=generator(seed)).mul(2).softmax(dim=1)
            hidden = torch.randn(ROWS, 2, generator=generator(50 + seed)).sort(dim=0).values
            groups = (torch.arange(ROWS) * 3 // ROWS)[rows]
            routing: Routing = router(hidden[rows])
            target = torch.randint(CLASSES, (ROWS,), generator=generator(100 + seed))[rows]
            prediction = Prediction(probs[rows].requires_grad_(), probs[rows][:, None], routing)
            terms = method.terms(prediction, target, router, groups, 0)
            terms.loss.backward()
        state |= {f"{type(method).__name__} {name}": value.clone() for name, value in method.named_buffers()}
    return state


class Witness(lightning.Callback):
    """The model as it was when the last evidence was counted, and the method's state after every step."""

    counted: dict[str, Tensor]

    def __init__(self) -> None:
        self.steps: dict[str, Tensor] = {}

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.counted = copy.deepcopy(pl_module.state_dict())

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *arguments: Any) -> None:
        for name, value in pl_module.method.named_buffers():
            self.steps[f"{name} after {trainer.global_step}"] = value.clone()


def classifier(method: methods.Method, kind: type[MoEClassifier] = MoEClassifier) -> MoEClassifier:
    lightning.seed_everything(0, verbose=False)
    factory = lambda size, experts: PosteriorGate(size, experts, CLUSTERS, 2)  # noqa: E731
    return kind(Plane(), CLASSES, EXPERTS, factory, lr=1e-2, method=method, num_groups=2)


def fit(model: MoEClassifier, strategy: Strategy) -> Witness:
    """Train on two processes."""
    witness = Witness()
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=RANKS,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[CompetenceUpdates(), witness],
    )
    trainer.fit(model, datamodule=Points(batch_size=24, seed=1))
    assert trainer.current_epoch == EPOCHS
    return witness


def ddp(name: str) -> dict[str, Any]:
    model = classifier(getattr(methods, name)(warmup_epochs=1))
    seen = fit(model, DDPStrategy(cluster_environment=LightningEnvironment(), process_group_backend="gloo"))
    return {"counted": seen.counted, "steps": seen.steps, "final": model.state_dict()}


class ShardedClassifier(MoEClassifier):
    """Backbone and experts are split over the ranks; the belief, which is no parameter, is not."""

    def configure_model(self) -> None:
        if not isinstance(next(self.parameters()), DTensor):
            for part in (self.backbone, *self.moe.experts):
                fully_shard(part, mesh=self.device_mesh["data_parallel"], reshard_after_forward=True)


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: part.full_tensor() if isinstance(part, DTensor) else part for name, part in state.items()}


def sharded_training() -> dict[str, Any]:
    model = classifier(methods.RobustConfiguration(warmup_epochs=1), ShardedClassifier)
    strategy = ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1, process_group_backend="gloo")
    strategy.cluster_environment = LightningEnvironment()
    seen = fit(model, strategy)
    local = {name: p.to_local().numel() for name, p in model.named_parameters() if isinstance(p, DTensor)}
    return {
        "counted": whole(seen.counted),
        "steps": seen.steps,
        "final": whole(model.state_dict()),
        "local": local,
    }


def sharded_layer(rank: int | None) -> dict[str, Any]:
    """A mixture's output, gradient and belief, its experts whole (None) or split over the ranks."""
    torch.manual_seed(0)
    moe = MixtureOfExperts(nn.ModuleList(nn.Linear(2, 5) for _ in range(EXPERTS)), gate())
    if rank is not None:
        for expert in moe.experts:
            fully_shard(expert)
        fully_shard(moe)
    hidden = torch.randn(ROWS, 2, generator=generator(0))
    with torch.no_grad():
        output = moe(hidden)  # every rank all rows: what is gathered must be what was split
    routing = moe.route(hidden[own(rank)])
    outcome = (torch.rand(ROWS, 2, generator=generator(1)) < 0.6).double()[own(rank)]
    moe.observe(routing, outcome)
    split = sum(isinstance(parameter, DTensor) for parameter in moe.parameters())
    return {"output": output, "split": split, "belief": dict(moe.gate.posterior.named_buffers())}


def learned_prior(rank: int | None) -> dict[str, Tensor]:
    """What a prior is found to be worth, and then what it expected of the outcomes observed."""
    torch.manual_seed(0)
    gate = PosteriorGate(2, EXPERTS, CLUSTERS, 2, prior=LearnedPrior(8))
    gate.clusterer.set_centroids(torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]))
    for seed, learn in ((0, gate.learn_prior), (1, lambda h, o: gate.observe(gate(h), o, dense=True))):
        hidden = torch.randn(ROWS, 2, generator=generator(seed))
        outcome = (torch.rand(ROWS, EXPERTS, generator=generator(10 + seed)) < 0.6).double()
        learn(hidden[own(rank)], outcome[own(rank)])
    return {name: getattr(gate.posterior, name) for name in ("prior_alpha", "successes", "foreseen", "odds")}


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}  # as a launcher tells Lightning
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)
    results: dict[str, Any] = {
        "evidence": evidence(rank),
        "metrics": metrics(rank),
        "learned prior": learned_prior(rank),
        "adversaries": adversaries(rank),
        "RobustConfiguration": ddp("RobustConfiguration"),
        "GroupDRO": ddp("GroupDRO"),
        "sharded layer": sharded_layer(rank),
        "sharded training": sharded_training(),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What either process says; started once, for starting takes most of the time."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(one_of_two, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def assert_identical(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name].nan_to_num(-1.0), right[name].nan_to_num(-1.0)), name


def test_evidence_summed_over_ranks_is_that_of_one_process_exactly(ranks: list[dict[str, Any]]) -> None:
    alone = evidence(None)
    assert alone["successes"].sum() > ROWS
    for rank in ranks:
        assert_identical(rank["evidence"], alone)


def test_a_learned_prior_is_worth_and_foresees_on_all_ranks_what_it_does_on_one(ranks: list[dict[str, Any]]) -> None:
    alone = learned_prior(None)
    assert alone["foreseen"].sum() > ROWS
    assert_identical(ranks[0]["learned prior"], ranks[1]["learned prior"])
    torch.testing.assert_close(ranks[0]["learned prior"], alone, rtol=1e-9, atol=1e-9)


def test_metrics_over_ranks_are_those_of_one_process(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank["metrics"], metrics(None), rtol=0, atol=1e-12, equal_nan=True)


def test_adversaries_agree_on_all_ranks_and_with_one_process_on_all_rows(ranks: list[dict[str, Any]]) -> None:
    assert_identical(ranks[0]["adversaries"], ranks[1]["adversaries"])
    alone = adversaries(None)
    assert all(len(value.unique()) > 1 for value in alone.values())
    torch.testing.assert_close(ranks[0]["adversaries"], alone, rtol=0, atol=1e-6)  # losses are float32


RUNS = ("RobustConfiguration", "GroupDRO", "sharded training")


@pytest.mark.parametrize("run", RUNS)
def test_ranks_train_with_the_same_adversary_at_every_step_and_end_alike(ranks: list[dict[str, Any]], run: str) -> None:
    for what in ("steps", "final"):
        assert_identical(ranks[0][run][what], ranks[1][run][what])
    assert len(ranks[0][run]["steps"]) >= 5 * EPOCHS
    state = ranks[0][run]["final"]
    assert all(value.isfinite().all() for key, value in state.items() if key.startswith(("moe.experts", "method")))
    assert len(state["method.weights"].unique()) > 1


def counted_alone(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The evidence that one process counts for a trained model, row by row."""
    model = classifier(methods.RobustConfiguration())
    kept = {name: value for name, value in state.items() if not name.startswith("method.")}
    model.load_state_dict(kept, strict=False)
    train = Points().split("train")
    clusters = model.moe.route(model.features(train.inputs)).cluster_ids
    labels = model.moe.expert_outputs(model.features(train.inputs)).argmax(dim=-1)
    successes = torch.zeros(CLUSTERS, EXPERTS, dtype=torch.float64)
    failures = torch.zeros(CLUSTERS, EXPERTS, dtype=torch.float64)
    for cluster, said, target in zip(clusters.tolist(), labels.tolist(), train.targets.tolist(), strict=True):
        for expert, label in enumerate(said):
            (successes if label == target else failures)[cluster, expert] += 1
    return successes, failures


@pytest.mark.parametrize("run", RUNS)
def test_training_counts_every_row_once_whichever_process_saw_it(ranks: list[dict[str, Any]], run: str) -> None:
    successes, failures = counted_alone(ranks[0][run]["counted"])
    for rank in ranks:
        counted = rank[run]["counted"]
        assert torch.equal(counted["moe.gate.posterior.successes"], successes)
        assert torch.equal(counted["moe.gate.posterior.failures"], failures)


def test_a_sharded_layer_answers_as_the_whole_one_and_keeps_its_belief_whole(ranks: list[dict[str, Any]]) -> None:
    alone = sharded_layer(None)
    for rank in ranks:
        layer = rank["sharded layer"]
        assert layer["split"] == 2 * EXPERTS
        assert alone["split"] == 0
        torch.testing.assert_close(layer["output"], alone["output"], rtol=0, atol=0)
        assert layer["belief"]["successes"].dtype == torch.float64
        assert_identical(layer["belief"], alone["belief"])


def test_sharded_training_ends_where_ddp_does(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        torch.testing.assert_close(
            rank["sharded training"]["final"], rank["RobustConfiguration"]["final"], rtol=1e-4, atol=1e-5
        )
    held = [sum(rank["sharded training"]["local"].values()) for rank in ranks]
    model = classifier(methods.RobustConfiguration())
    assert sum(held) == sum(parameter.numel() for parameter in model.parameters())
    assert max(held) < sum(held)


def test_lightnings_fsdp_strategy_says_that_it_wants_a_gpu() -> None:
    with pytest.raises(ValueError, match="requires a GPU accelerator"):
        lightning.Trainer(accelerator="cpu", devices=RANKS, strategy=FSDPStrategy(), logger=False)
