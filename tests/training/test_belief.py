"""The belief callback on modules that are not ours, in a plain Trainer."""

import copy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from strangers import CLUSTERS, EXPERTS, Clouds, Dense, Judging, Layers
from torch import Tensor, nn
from torch.nn import functional

from moe_posterior import InvalidArgumentError, MixtureOfExperts, PosteriorGate, PriorGate, SoftmaxGate, record
from moe_posterior.training.belief import BeliefCallback, Reservoir
from moe_posterior.training.belief.reservoir import row_keys

ROWS, BATCHES = 240, 10  # an epoch
GATES = ("alone.gate", "learned.gate")


def fit(
    module: lightning.LightningModule,
    callback: lightning.Callback | list[lightning.Callback],
    epochs: int = 2,
    path: Path | None = None,
    **options: Any,
) -> lightning.Trainer:
    callbacks = callback if isinstance(callback, list) else [callback]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = any(isinstance(each, ModelCheckpoint) for each in callbacks)
    options = {"accelerator": "cpu", "max_epochs": epochs, "enable_checkpointing": checkpoints, **quiet, **options}
    trainer = lightning.Trainer(callbacks=callbacks, **options)
    trainer.fit(module, datamodule=Clouds(), ckpt_path=path)
    return trainer


def layers(kind: type[Layers] = Layers) -> Layers:
    lightning.seed_everything(0, verbose=False)
    return kind()


def observations(gate: Any) -> float:
    return float((gate.posterior.successes + gate.posterior.failures).sum())


def test_every_gate_of_a_foreign_module_is_fitted_and_learns_from_gradients() -> None:
    module = layers()
    fit(module, BeliefCallback(warmup=4))
    for name in GATES:
        gate = module.get_submodule(name)
        assert gate.clusterer.fitted
        assert observations(gate) > 0
    assert not torch.equal(module.learned.gate.reference, torch.full((CLUSTERS, EXPERTS), 0.5, dtype=torch.float64))


class Witness(lightning.Callback):
    """What the gates are given in every batch, seen by other means than the callback's."""

    def __init__(self) -> None:
        self.hidden: dict[str, list[Tensor]] = {name: [] for name in GATES}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        self.handles = [
            pl_module.get_submodule(name).register_forward_pre_hook(
                lambda gate, args, name=name: self.hidden[name].append(args[0].detach().clone())
            )
            for name in GATES
        ]

    def on_train_batch_end(self, *arguments: Any) -> None:
        for handle in self.handles:
            handle.remove()


def test_clusters_are_those_of_all_tokens_of_the_warm_up_when_they_fit_the_sample() -> None:
    module, witness = layers(), Witness()
    fit(module, [BeliefCallback(warmup=4, observe=False), witness], epochs=1)
    seen = torch.cat(witness.hidden["learned.gate"][:4])
    radius, centroids = module.learned.gate.clusterer.radius, module.learned.gate.clusterer.centroids
    assigned = torch.cdist(seen.double(), centroids.double()).argmin(dim=1)
    for cluster in range(CLUSTERS):  # k-means has converged: every centroid is the mean of its own tokens
        members = seen[assigned == cluster]
        torch.testing.assert_close(centroids[cluster], members.mean(dim=0), rtol=0.05, atol=0.05)
    assert radius.isfinite().all()


def test_the_sample_is_uniform_bounded_and_independent_of_how_the_stream_is_cut() -> None:
    keys, hidden = row_keys(1000, ("stream",)), torch.arange(1000.0)[:, None]
    outcome = torch.full((1000, 2), torch.nan)
    whole, pieces = Reservoir(50), Reservoir(50)
    whole.add(keys, hidden, outcome)
    for rows in torch.arange(1000).split(7):
        rows = rows[pieces.admitted(keys[rows])]
        pieces.add(keys[rows], hidden[rows], outcome[rows])
    assert len(pieces) == 50
    device = torch.device("cpu")
    assert torch.equal(whole.merged(device, (1, 2)).hidden, pieces.merged(device, (1, 2)).hidden)
    assert torch.equal(whole.merged(device, (1, 2)).hidden[:, 0].long(), keys.argsort()[:50])
    drawn = torch.stack(
        [row_keys(1000, ("stream", number)).argsort()[:50].bincount(minlength=1000) for number in range(400)]
    )
    counts = drawn.sum(dim=0).double()  # each row is in a sample with probability 1/20
    assert abs(float(counts.mean()) - 20) < 1e-9
    assert abs(float(counts.var()) - 19) < 3.5


@pytest.mark.parametrize("capacity", [20, 50, 90])
def test_a_sample_resumed_with_another_capacity_is_that_of_the_smallest_keys(capacity: int) -> None:
    keys, hidden = row_keys(1000, ("stream",)), torch.arange(1000.0)[:, None]
    outcome = torch.full((1000, 2), torch.nan)
    before = Reservoir(50)
    before.add(keys[:500], hidden[:500], outcome[:500])
    after = Reservoir(capacity)
    after.load_state_dict(before.state_dict())
    rows = 500 + after.admitted(keys[500:])
    after.add(keys[rows], hidden[rows], outcome[rows])
    dropped = keys[:500].sort().values[49]  # above this key the first half is incomplete
    known = keys[keys <= dropped].sort().values
    assert 90 < len(known) < 1000
    assert after.keys.sort().values.tolist() == known[:capacity].tolist()
    again = Reservoir(capacity)
    again.load_state_dict(after.state_dict())
    assert (again.bound, again.keys.tolist()) == (after.bound, after.keys.tolist())


def test_rows_that_are_not_finite_are_not_sampled() -> None:
    sample = Reservoir(4)
    hidden = torch.tensor([[1.0], [torch.nan], [torch.inf], [2.0]])
    sample.add(row_keys(4, ("s",)), hidden, torch.zeros(4, 2))
    assert sorted(sample.hidden.flatten().tolist()) == [1.0, 2.0]


def test_measured_evidence_counts_each_sampled_slot_once_and_batches_add_to_it() -> None:
    module = layers(Judging)
    fit(module, BeliefCallback(warmup=BATCHES, observe=False), epochs=2)
    gate = module.alone.gate
    gate.posterior.half_life = None
    assert observations(gate) <= 2 * ROWS
    module = layers(Judging)
    module.alone.gate = PosteriorGate(8, EXPERTS, CLUSTERS, 2)
    fit(module, BeliefCallback(warmup=BATCHES, observe=False), epochs=2)
    assert observations(module.alone.gate) == 2 * ROWS
    module = layers(Judging)
    module.alone.gate = PosteriorGate(8, EXPERTS, CLUSTERS, 2)
    fit(module, BeliefCallback(warmup=BATCHES), epochs=2)
    assert observations(module.alone.gate) == 4 * ROWS
    module = layers(Judging)
    module.alone.gate = PosteriorGate(8, EXPERTS, CLUSTERS, 2)
    fit(module, BeliefCallback(warmup=BATCHES, sample_size=50), epochs=2)
    assert observations(module.alone.gate) == 2 * 50 + 2 * ROWS


def test_a_refit_starts_the_evidence_anew_from_the_last_batches() -> None:
    module = layers(Judging)
    module.alone.gate = PosteriorGate(8, EXPERTS, CLUSTERS, 2)
    fit(module, BeliefCallback(warmup=5, refit_every=BATCHES), epochs=2)
    # Fits after batches 5 and 15: five batches measured, five observed since.
    assert observations(module.alone.gate) == 2 * (5 + 5) * ROWS / BATCHES


def test_outcomes_by_name_and_expert_are_counted_as_they_are() -> None:
    module = layers(Dense)
    module.alone.gate = PosteriorGate(8, EXPERTS, CLUSTERS, 2)
    fit(module, BeliefCallback(warmup=BATCHES), epochs=2)
    target = torch.cat([batch[1] for batch in Clouds().train_dataloader()])
    wanted = 2 * torch.stack([(target >= expert).sum() for expert in range(EXPERTS)]).double()
    assert torch.equal(module.alone.gate.posterior.successes.sum(dim=0), wanted)
    assert observations(module.learned.gate) == 0


WRONG = {
    "shape": (torch.zeros(7), "must hold 24 values"),
    "name": ({"nobody": torch.zeros(24)}, "nobody"),
    "range": (torch.full((24,), 2.0), "must lie in"),
}


@pytest.mark.parametrize("what", WRONG)
def test_outcomes_that_do_not_fit_are_named(what: str) -> None:
    said, message = WRONG[what]

    class Wrong(Layers):
        def outcomes(self, batch: Any, outputs: Any) -> Any:
            return said

    with pytest.raises(InvalidArgumentError, match=message):
        fit(layers(Wrong), BeliefCallback(warmup=1))


def test_a_step_without_outcomes_or_backward_is_no_evidence() -> None:
    class Skipping(Layers):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    class Silent(Layers):
        def outcomes(self, batch: Any, outputs: Any) -> None:
            return None

    for kind in (Skipping, Silent):
        module = layers(kind)
        fit(module, BeliefCallback(warmup=4))
        assert module.alone.gate.fitted
        assert (observations(module.alone.gate) > 0) == (kind is Skipping)


def test_a_learned_prior_is_trained_with_the_module_and_gets_no_evidence_from_training_rows() -> None:
    module, told = layers(), []
    gate = module.alone.gate = PosteriorGate(8, EXPERTS, CLUSTERS, 2, prior="learned")
    begin = gate.begin_step
    gate.begin_step = lambda step, epoch: (told.append((step, epoch)), begin(step, epoch))[1]
    before = copy.deepcopy(gate.prior.state_dict())
    fit(module, BeliefCallback(warmup=4, finish=False))
    assert told == [(step, step // BATCHES) for step in range(2 * BATCHES)]
    assert any(not torch.equal(value, before[name]) for name, value in gate.prior.state_dict().items())
    assert not gate.clusterer.fitted
    assert observations(gate) == 0
    assert observations(module.learned.gate) > 0


def with_prior(kind: type[Layers]) -> Layers:
    module = layers(kind)
    module.alone.gate = PosteriorGate(8, EXPERTS, CLUSTERS, 2, prior="learned")
    return module


class Logs(lightning.Callback):
    """What the training has logged, at its end."""

    def on_train_end(self, trainer: lightning.Trainer, *arguments: Any) -> None:
        self.values = dict(trainer.logged_metrics)


class Logging(Layers):
    """It draws and logs in every step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        found = super().training_step([functional.dropout(batch[0], 0.2, self.training), batch[1]], batch_idx)
        self.log("train/mean", batch[0].mean(), on_step=False, on_epoch=True)
        return found


@pytest.mark.parametrize("kind", [Logging, Judging])
def test_a_learned_prior_is_finished_on_validation_rows_and_nothing_else_changes(kind: type[Layers]) -> None:
    states, logs = [], []
    for finish in (False, True):
        module, logged = with_prior(kind), Logs()
        fit(module, [BeliefCallback(warmup=4, finish=finish), logged])
        states.append(copy.deepcopy(module.state_dict()))
        logs.append(logged.values)
        assert module.training
        assert "log" not in vars(module)
    assert module.alone.gate.clusterer.fitted
    assert observations(module.alone.gate) == 0
    assert float(module.alone.gate.posterior.prior_alpha.std()) > 0
    changed = {name for name, value in states[1].items() if not torch.equal(value, states[0][name])}
    assert {name.split(".")[0] for name in changed} == {"alone"}
    assert not [name for name in changed if ".experts" in name or ".map." in name]
    assert logs[0].get("train/mean") == logs[1].get("train/mean")


def test_what_a_prior_is_worth_is_learned_from_every_validation_row() -> None:
    module = with_prior(Dense)
    fit(module, BeliefCallback(warmup=4))
    gate, data = module.alone.gate, Clouds()
    points, target = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    hidden = module.first(points).relu().detach()
    twin = copy.deepcopy(gate)
    twin.learn_prior(hidden, (torch.arange(EXPERTS) <= target[:, None]).double())
    torch.testing.assert_close(gate.posterior.prior_alpha, twin.posterior.prior_alpha)
    torch.testing.assert_close(gate.prior.usual, twin.prior.usual)
    distance = torch.cdist(hidden, gate.clusterer.centroids).amin(dim=1)
    assert float(distance.mean()) < float(torch.cdist(hidden, hidden.mean(dim=0)[None]).mean())


def test_a_finished_prior_is_in_the_last_checkpoint_and_is_learned_on_when_training_goes_on(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    module = with_prior(Layers)
    fit(module, [BeliefCallback(warmup=4), checkpoint], epochs=1)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(stored["alone.gate.posterior.prior_alpha"], module.alone.gate.posterior.prior_alpha)
    again, seen = with_prior(Layers), []

    class Look(lightning.Callback):
        def on_train_batch_start(self, *arguments: Any) -> None:
            seen.append(again.alone.gate.clusterer.fitted)

    fit(
        again,
        [BeliefCallback(warmup=4), ModelCheckpoint(tmp_path / "more"), Look()],
        epochs=2,
        path=tmp_path / "last.ckpt",
    )
    assert seen == [False] * BATCHES
    assert again.alone.gate.clusterer.fitted


def test_a_prior_that_cannot_be_finished_is_named_with_what_is_left_to_do() -> None:
    module = with_prior(Layers)
    with pytest.warns(
        UserWarning, match=r"priors of gates \['alone.gate'\] were not finished, which needs a validation loader"
    ) as said:
        fit(module, BeliefCallback(warmup=4), epochs=1, limit_val_batches=0)
    assert len([each for each in said if "not finished" in str(each.message)]) == 1
    assert not module.alone.gate.clusterer.fitted
    fit(module, BeliefCallback(warmup=1), fast_dev_run=2)
    assert not module.alone.gate.clusterer.fitted


def test_training_that_stops_early_finishes_its_priors_at_its_end() -> None:
    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, *arguments: Any) -> None:
            trainer.should_stop = trainer.global_step == 4

    module = with_prior(Judging)
    trainer = fit(module, [BeliefCallback(warmup=4), Stop()])
    assert trainer.global_step < 2 * BATCHES
    assert module.alone.gate.clusterer.fitted
    assert float(module.alone.gate.posterior.prior_alpha.std()) > 0


def test_a_gate_that_is_fitted_already_keeps_its_clusters_and_evidence() -> None:
    module = layers(Judging)
    gate = module.alone.gate = PosteriorGate(8, EXPERTS, CLUSTERS, 2)
    gate.fit(torch.randn(100, 8, generator=torch.Generator().manual_seed(0)))
    centroids = gate.clusterer.centroids.clone()
    gate.observe(gate(torch.zeros(10, 8)), torch.ones(10, 2))
    fit(module, BeliefCallback(warmup=4), epochs=1)
    assert torch.equal(gate.clusterer.centroids, centroids)
    assert observations(gate) == 2 * (10 + ROWS)


def test_until_the_fit_provisional_clusters_use_every_expert() -> None:
    module, used = layers(), set()

    class Usage(lightning.Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            with torch.no_grad(), record(module) as trace:
                module(next(iter(Clouds().train_dataloader()))[0])
            used.update(trace.routings[0][1].expert_indices.flatten().tolist())
            trace.close()

    with pytest.warns(UserWarning, match="before the warm-up"):
        fit(module, [BeliefCallback(warmup=99), Usage()], epochs=1)
    assert used == set(range(EXPERTS))
    assert observations(module.alone.gate) == 0


def test_gradient_outcomes_are_those_of_the_trace() -> None:
    """Replayed by hand, batch by batch, from the state after the fit."""
    module, kept = layers(), {}
    for gate in (module.alone.gate, module.learned.gate):
        gate.posterior.half_life = None

    class Keep(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 4:  # after the fit, which a callback before this one has made
                kept["start"], kept["batch"] = copy.deepcopy(pl_module.state_dict()), batch

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
            if trainer.global_step == 5:
                kept["end"] = copy.deepcopy(pl_module.state_dict())

    fit(module, [BeliefCallback(warmup=4), Keep()], epochs=1)
    again = layers()
    for gate in (again.alone.gate, again.learned.gate):
        gate.posterior.half_life = None
    again.load_state_dict(kept["start"])
    with record(again) as trace:
        loss = again.training_step(kept["batch"], 0)["loss"]
    loss.backward()
    trace.observe_gradients()
    for name in GATES:
        for counts in ("successes", "failures"):
            key = f"{name}.posterior.{counts}"
            assert torch.equal(again.state_dict()[key], kept["end"][key])


def test_modules_without_belief_are_left_alone() -> None:
    module = layers()
    module.alone = MixtureOfExperts(module.alone.experts, SoftmaxGate(8, EXPERTS, 2))
    module.learned = nn.Identity()
    fit(module, BeliefCallback(warmup=1), epochs=1)
    module.alone = nn.Identity()
    fit(module, BeliefCallback(warmup=1), epochs=1)


@pytest.mark.parametrize("wrong", [{"warmup": 0}, {"refit_every": 0}, {"sample_size": 0}])
def test_wrong_options_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
        BeliefCallback(**wrong)


def test_fewer_tokens_than_clusters_are_one_sentence() -> None:
    with pytest.raises(InvalidArgumentError, match=r"gate 'alone.gate' cannot be fitted .* raise warmup"):
        fit(layers(), BeliefCallback(warmup=1, sample_size=3))


def test_hooks_are_gone_after_training_however_it_ends() -> None:
    class Broken(Layers):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 3:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    for kind in (Layers, Broken):
        module = layers(kind)
        try:
            fit(module, BeliefCallback(warmup=2), epochs=1)
        except RuntimeError:
            assert kind is Broken
        for name in GATES:
            gate = module.get_submodule(name)
            assert not gate._forward_hooks
            assert not gate._forward_pre_hooks


def test_a_gate_that_no_token_reaches_is_named_and_the_others_are_fitted() -> None:
    class Idle(Layers):
        def forward(self, points: Tensor) -> Tensor:
            hidden = self.first(points).relu()
            return self.head(hidden + self.learned(hidden))

    module = layers(Idle)
    with pytest.warns(UserWarning, match="no token has reached gate 'alone.gate' in 4 batches") as warned:
        fit(module, BeliefCallback(warmup=4), epochs=1)
    assert not any("before the warm-up" in str(each.message) for each in warned)
    assert not module.alone.gate.clusterer.fitted
    assert observations(module.learned.gate) > 0


class Killed(Exception):
    pass


class KillAt(lightning.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: lightning.Trainer, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


def run(folder: Path, kind: type[Layers], warmup: int, kill: int | None = None, resume: bool = False) -> dict[str, Any]:
    lightning.seed_everything(99 if resume else 0, verbose=False)
    module = kind()
    callbacks = [
        BeliefCallback(warmup=warmup, refit_every=13, sample_size=100),
        ModelCheckpoint(folder, save_last=True),
    ]
    callbacks += [] if kill is None else [KillAt(kill)]
    trainer = fit(module, callbacks, epochs=4, path=folder / "last.ckpt" if resume else None)
    return copy.deepcopy({"model": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict()})


@pytest.mark.parametrize("kind", [Layers, Judging])
@pytest.mark.parametrize("warmup", [12, 25])  # the checkpoints after batches 10 and 20 fall inside and outside of it
@pytest.mark.parametrize("kill", [15, 27])
def test_a_killed_run_resumes_bit_for_bit_within_the_warm_up_and_after(
    kind: type[Layers], warmup: int, kill: int, tmp_path: Path
) -> None:
    whole = run(tmp_path / "whole", kind, warmup)
    with pytest.raises(Killed):
        run(tmp_path / "killed", kind, warmup, kill)
    resumed = run(tmp_path / "killed", kind, warmup, resume=True)
    assert observations_in(whole["model"]) > 0
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0, equal_nan=True)


def observations_in(state: dict[str, Tensor]) -> float:
    return float(sum(value.sum() for name, value in state.items() if name.endswith("successes")))


def test_a_checkpoint_with_a_sample_opens_without_running_code(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, Layers, 25, kill=15)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    state = content["callbacks"]["BeliefCallback"]
    assert state["batches"] == BATCHES
    assert len(state["samples"]["alone.gate"]["keys"]) == 100


def test_a_gate_that_decides_by_logits_before_the_fit_is_given_no_clusters_for_the_time_being() -> None:
    module = layers()
    seen = []

    class Look(lightning.Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            seen.append((module.alone.gate.clusterer.fitted, module.learned.gate.clusterer.fitted))

    fit(module, [BeliefCallback(warmup=3), Look()], epochs=1)  # fitted at the end of the third batch
    assert isinstance(module.learned.gate, PriorGate)
    assert seen[:4] == [(True, False)] * 2 + [(True, True)] * 2
