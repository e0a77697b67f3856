"""A Lightning callback that gives the gates of any LightningModule their clusters and their evidence."""

import warnings
from collections.abc import Mapping
from typing import Any

import lightning
import torch
from torch import Tensor

from moe_posterior.checks import validation
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import BeliefGate, Gate
from moe_posterior.replay import find_gates
from moe_posterior.replay.find import hosting_router, outer_name
from moe_posterior.training.belief import credits as crediting
from moe_posterior.training.belief.credits import Credit
from moe_posterior.training.belief.finish import first_of, held_out_loader, sample_of, train_loader, whole
from moe_posterior.training.belief.provisional import fit_provisionally
from moe_posterior.training.belief.reservoir import Reservoir
from moe_posterior.training.belief.step import WatchedStep
from moe_posterior.training.data.base import generator_for

__all__ = ["BeliefCallback"]


class BeliefCallback(lightning.Callback):
    """Find every :class:`~moe_posterior.gates.BeliefGate` of a module, fit its clusters after a warm-up, and observe its experts.

    The module needs no change: ``Trainer(callbacks=[BeliefCallback()])``. It may hold any number of gates, in
    :class:`~moe_posterior.PosteriorMoE` layers or in routers that :func:`~moe_posterior.swap_gates` has swapped.

    **Warm-up.** The hidden states that reach each gate in the first ``warmup`` training batches are sampled. Until the fit, a gate that
    cannot route without clusters uses provisional ones, found in the first batch it sees; without evidence they spread the tokens
    over the experts. A :class:`~moe_posterior.PriorGate` and a swapped router choose by their own rule. A gate that has clusters when
    training starts keeps them and its evidence.

    **Fit.** After these batches the clusters are fitted to the sample, and the outcomes of the sampled tokens are measured:
    they become evidence, or the reference of a gate in prior mode. The sample is uniform over all tokens of all ranks
    and the same on every rank. With ``refit_every`` this is repeated with the tokens of the last ``warmup`` batches, because the
    hidden states move while the model learns; evidence belongs to clusters and starts anew.

    **Outcomes.** If the module has a method ``outcomes(batch, outputs)``, it says how the experts did in the batch. It is called after
    the backward pass with what Lightning gives ``on_train_batch_end``: the dictionary that ``training_step`` returned. It returns None
    (nothing to observe), one tensor for every gate, or a mapping from gates' names in the module (of a swapped router: the
    router's name) to tensors. With T the tokens that a gate has routed in the step, all its calls in order, a tensor holds values in
    [0, 1], NaN where nothing was observed, in one of three shapes:

    - T values in any shape, such as (batch, sequence): one a token, credited to all experts that were chosen for it;
    - (T, E) or (..., E): one for each expert, chosen or not;
    - (T, k) or (..., k): one for each chosen expert, in the order of ``routing.expert_indices``. Where k = E the columns are experts.

    Without such a method, the outcomes come from the gradients: 1 where an expert's share lowered its token's loss, see
    :meth:`~moe_posterior.replay.Trace.gradient_outcomes`.

    A module must call its gates from the start. :class:`~moe_posterior.training.module.MoEClassifier` does not, and has a callback of
    its own, :class:`~moe_posterior.training.callbacks.CompetenceUpdates`, which counts every training row.

    **A learned prior** (a gate whose ``counts_training_rows`` is False) is told of every step (:meth:`Gate.begin_step`); its map is
    trained with the module, and decides. After the last training batch it is finished: the hidden states of ``warmup`` training
    batches are clustered, and ``learn_prior`` is given how the experts did on the validation rows, by ``outcomes`` or gradients as
    above. For that ``training_step`` is called with these batches in evaluation mode; what it logs by ``self.log`` is dropped, and no
    parameter changes. It needs a validation loader and automatic optimization; without them a warning says what is left to do.
    Training that stops early is finished after the last checkpoint was written; with ``fast_dev_run`` nothing is.

    The state is in the checkpoint, the sample too while one is being taken (up to ``sample_size`` · D floats a gate), and
    training resumes bit for bit, also within the warm-up. Under torch.distributed saving a checkpoint is a collective call, as it is
    in Lightning.

    Args:
        warmup: training batches, of each rank, before the first fit; at least 1. The default 100 lets the first, fastest changes of
            the hidden states pass.
        refit_every: batches between fits; None (default) fits once.
        sample_size: tokens kept for each gate, of all ranks together. The default 8192 is 128 for each of 64 clusters.
        observe: whether every batch after the fit is observed. False leaves the evidence to you.
        finish: whether learned priors are finished. False leaves ``fit`` and ``learn_prior`` to you.
        seed: of the sample and of k-means, together with the gate and the batch.

    Raises:
        InvalidArgumentError: a number below its minimum; in training, a module that was compiled, a gate that sees fewer distinct
            tokens than it has clusters, or ``outcomes`` of another shape or range.

    >>> callback = BeliefCallback(warmup=50, refit_every=500)
    >>> trainer = lightning.Trainer(callbacks=[callback], barebones=True, accelerator="cpu")
    """

    def __init__(
        self,
        warmup: int = 100,
        refit_every: int | None = None,
        sample_size: int = 8192,
        observe: bool = True,
        seed: int = 42,
        finish: bool = True,
    ) -> None:
        self.warmup = validation.count("warmup", warmup)
        self.refit_every = None if refit_every is None else validation.count("refit_every", refit_every)
        self.sample_size = validation.count("sample_size", sample_size)
        self.observe, self.seed, self.finish = observe, seed, finish
        self.gates: dict[str, BeliefGate] = {}  # that count training rows
        self.learners: dict[str, BeliefGate] = {}  # that do not, until they are finished
        self._batches = 0  # trained on by each rank
        self._since = 0  # the last fit
        self._waiting: set[str] = set()  # gates without clusters of their own
        self._over = False  # the training of the learned priors
        self._restored = False  # from a checkpoint, for the training to come
        self._samples: dict[str, Reservoir] = {}
        self._step: WatchedStep | None = None
        self._outer: dict[str, str] = {}
        self._handles: list[Any] = []

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Find the gates."""
        found = belief_gates(pl_module)
        self.gates = {name: gate for name, gate in found.items() if gate.counts_training_rows}
        self.learners = {name: gate for name, gate in found.items() if not gate.counts_training_rows}
        self._over = False
        self._outer = {name: outer_name(pl_module, name) for name in found}
        unfitted = {name for name, gate in self.gates.items() if not gate.clusterer.fitted}
        if not self._restored:
            self._batches, self._since, self._waiting, self._samples = 0, 0, unfitted, {}
        for name in unfitted:
            if hosting_router(pl_module, name) is None:
                self._handles.append(fit_provisionally(self.gates[name], generator_for("provisional", self.seed, name)))

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Go on training the learned priors that an earlier training has finished."""
        for gate in self.learners.values():
            if self.finish and gate.clusterer.fitted:
                gate.relearn()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the gates during the batch."""
        for gate in (*self.gates.values(), *self.learners.values()):
            gate.begin_step(trainer.global_step, trainer.current_epoch)
        samples = {name: self._sample(name) for name in self._collected}
        if samples or self._observed:
            self._step = WatchedStep(self.gates, samples, ("sample", self.seed, self._batches), *_rank())

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: Tensor
    ) -> None:
        """Let the step tell the loss from an auxiliary loss of swapped routers."""
        if self._step is not None and any(name != outer for name, outer in self._outer.items()):
            self._step.trace.watch(loss)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample the batch's hidden states with their outcomes, observe, and fit or finish if it is time."""
        step, self._step = self._step, None
        if step is not None:
            step.close()
            self._learn(step, pl_module, batch, outputs)
        if self.gates:
            self._batches, self._since = self._batches + 1, self._since + 1
            if self._due:
                self.fit(pl_module.device)
        last = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if last or trainer.global_step == trainer.max_steps:
            # Before the validation at the end of the epoch, after which the last checkpoint is written.
            self._finish(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Finish the learned priors of a training that stopped early, and say so if it was shorter than the warm-up."""
        self._finish(trainer, pl_module)
        if self._waiting and self._batches < self.warmup and trainer.is_global_zero:
            warnings.warn(
                f"training ended after {self._batches} batches, before the warm-up of gates {sorted(self._waiting)} did: they have no "
                f"evidence; warmup must be at most {self._batches}, got {self.warmup}",
                stacklevel=2,
            )

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Take the hooks off the gates."""
        self._release()

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Take the hooks off the gates."""
        self._release()
        self._restored = False

    @torch.no_grad()
    def fit(self, device: torch.device) -> None:
        """Fit the clusters of the gates that are due to their samples, and measure the sampled outcomes; collective."""
        for name in self._collected:
            gate = self.gates[name]
            sample = self._samples.pop(name, Reservoir(self.sample_size)).merged(device, _sizes(gate))
            if not self._clusters(name, gate, sample, self._since, device):
                continue
            self._waiting.discard(name)
            _measure(gate, sample, device)
        self._since = 0

    def _clusters(self, name: str, gate: BeliefGate, sample: Reservoir, batches: int, device: torch.device) -> bool:
        """Fit a gate to its sample of so many batches; whether there was anything to fit it to."""
        if not len(sample):
            warnings.warn(
                f"no token has reached gate {name!r} in {batches} batches: it stays without clusters", stacklevel=2
            )
            return False
        try:
            gate.fit(sample.hidden.to(device), generator=generator_for("clusters", self.seed, name, self._batches))
        except InvalidArgumentError as error:
            raise InvalidArgumentError(
                f"gate {name!r} cannot be fitted to what it saw in {batches} batches: {error}; raise warmup or lower "
                f"num_clusters"
            ) from error
        return True

    def _finish(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Give the learned priors clusters of training rows, and learn from the validation rows what they are worth."""
        waiting = {name: gate for name, gate in self.learners.items() if not gate.clusterer.fitted}
        dry = trainer.fast_dev_run  # type: ignore[attr-defined]  # which Lightning sets elsewhere
        if not self.finish or self._over or not waiting or dry:
            return
        self._over = True
        held_out = held_out_loader(trainer) if pl_module.automatic_optimization else None
        if held_out is None:
            missing = (
                "a validation loader and validation_step"
                if pl_module.automatic_optimization
                else "automatic optimization"
            )
            warnings.warn(
                f"the learned priors of gates {sorted(waiting)} were not finished, which needs {missing}: fit them and call "
                f"learn_prior on held-out rows",
                stacklevel=2,
            )
            return
        options: dict[str, Any] = {
            "outer": self._outer,
            "size": self.sample_size,
            "seed": self.seed,
            "place": _rank(),
        }
        clustered = sample_of(
            trainer, pl_module, waiting, first_of(train_loader(trainer), self.warmup), judged=False, **options
        )
        judged = sample_of(trainer, pl_module, waiting, first_of(held_out, None), judged=True, **options)
        with whole(pl_module, waiting.values()):
            for name, gate in waiting.items():
                if not self._clusters(name, gate, clustered[name], self.warmup, pl_module.device):
                    continue
                if not _measure(gate, judged[name], pl_module.device):
                    gate.relearn()
                    warnings.warn(
                        f"the validation rows say nothing about the experts of gate {name!r}: its learned prior was not finished",
                        stacklevel=2,
                    )

    def state_dict(self) -> dict[str, Any]:
        """Progress and samples; collective under torch.distributed."""
        samples = {}
        for name in self._collected:
            gate = self.gates[name]
            samples[name] = self._sample(name).merged(gate.posterior.successes.device, _sizes(gate))
        return {
            "batches": self._batches,
            "since": self._since,
            "waiting": sorted(self._waiting),
            "samples": {name: sample.state_dict() for name, sample in samples.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from an earlier state."""
        self._batches, self._since = int(state_dict["batches"]), int(state_dict["since"])
        self._waiting, self._samples, self._restored = set(state_dict["waiting"]), {}, True
        for name, sample in state_dict["samples"].items():
            self._sample(name).load_state_dict(sample)

    @property
    def _due(self) -> bool:
        """Whether the clusters are to be fitted before the next batch."""
        if self._waiting:
            return self._since >= self.warmup
        return self.refit_every is not None and self._since >= self.refit_every

    @property
    def _collected(self) -> list[str]:
        """The gates whose hidden states are being sampled, in the order of the module."""
        if self._waiting:
            return [name for name in self.gates if name in self._waiting]
        soon = self.refit_every is not None and self.refit_every - self._since <= self.warmup
        return list(self.gates) if soon else []

    @property
    def _observed(self) -> list[str]:
        """The gates that learn from the batch."""
        return [name for name in self.gates if self.observe and name not in self._waiting]

    def _sample(self, name: str) -> Reservoir:
        return self._samples.setdefault(name, Reservoir(self.sample_size))

    def _learn(self, step: WatchedStep, pl_module: lightning.LightningModule, batch: Any, outputs: Any) -> None:
        own = getattr(pl_module, "outcomes", None)
        if callable(own):
            with torch.no_grad():
                said = own(batch, outputs)
            credits = crediting.from_module(step.trace, said, self._outer)
        else:
            credits = crediting.from_gradients(step.trace)
        for name in self._collected:
            for rows in step.rows_of(name, credits):
                self._sample(name).add(*rows)
        self._observe(step, credits)

    def _release(self) -> None:
        if self._step is not None:
            self._step.close()
            self._step = None
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _observe(self, step: WatchedStep, credits: list[Credit | None]) -> None:
        """Every gate once, on every rank, since observing is collective."""
        for name in self._observed:
            gate = self.gates[name]
            own = step.credits_of(name, credits)
            if own or _rank()[1] > 1:
                credit = crediting.joined(own) if own else crediting.nothing(gate)
                gate.observe(credit.routing, credit.outcome, dense=credit.dense)


def belief_gates(module: torch.nn.Module) -> dict[str, BeliefGate]:
    """The gates of a module that hold a belief, by name; none for a module without gates.

    Raises:
        InvalidArgumentError: the module, or a part with a gate in it, was compiled.
    """
    if not any(isinstance(part, Gate) for part in module.modules()):
        return {}
    return {name: gate for name, gate in find_gates(module).items() if isinstance(gate, BeliefGate)}


def _measure(gate: BeliefGate, sample: Reservoir, device: torch.device) -> bool:
    """Give the gate the outcomes of a sample that all ranks hold; whether there were any. Collective."""
    observed = ~sample.outcome.isnan().all(dim=1)
    if not observed.any():
        return False
    rank, ranks = _rank()
    gate.measure(*(part[observed][rank::ranks].to(device) for part in (sample.hidden, sample.outcome)))
    return True


def _sizes(gate: BeliefGate) -> tuple[int, int]:
    return gate.hidden_size, gate.num_experts


def _rank() -> tuple[int, int]:
    """Of this process, and how many there are."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
