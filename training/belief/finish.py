"""The end of a learned prior's training in any module: clusters of training rows, and what the prior is worth on held-out rows.

Dimensions: M tokens, D hidden size, E experts.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import BeliefGate
from moe_posterior.training.belief import credits as crediting
from moe_posterior.training.belief.reservoir import Reservoir
from moe_posterior.training.belief.step import WatchedStep

__all__ = ["first_of", "held_out_loader", "sample_of", "train_loader", "whole"]

Place = tuple[int, int]  # rank, and how many there are


def held_out_loader(trainer: lightning.Trainer) -> CombinedLoader | None:
    """The validation batches of the fit, as many as the trainer reads, one loader after the other; None without any."""
    trainer.fit_loop.epoch_loop.val_loop.setup_data()
    if not trainer.enable_validation or trainer.val_dataloaders is None:
        return None
    loader = CombinedLoader(trainer.val_dataloaders, "sequential")
    limits = trainer.num_val_batches
    loader.limits = limits if isinstance(limits, list) else [limits]
    return loader


def train_loader(trainer: lightning.Trainer) -> CombinedLoader:
    """The training batches, anew."""
    return CombinedLoader(trainer.train_dataloader, "max_size_cycle")


def first_of(loader: CombinedLoader, count: int | None) -> Iterator[Any]:
    """The first so many batches of a loader; None: all."""
    return (batch for batch, _, _ in islice(iter(loader), count))


def sample_of(
    trainer: lightning.Trainer,
    module: lightning.LightningModule,
    gates: Mapping[str, BeliefGate],
    batches: Iterable[Any],
    *,
    judged: bool,
    outer: Mapping[str, str],
    size: int,
    seed: int,
    place: Place,
) -> dict[str, Reservoir]:
    """The hidden states that reach each gate in these batches, of all ranks, and how the experts did; a collective call.

    The module is in evaluation mode meanwhile, draws are undone, and nothing that it logs by ``self.log`` is kept.

    Args:
        batches: what ``training_step`` is given; more than a loader's length of them are not read.
        judged: also find the outcomes, as in training: by the module's ``outcomes``, or else by the loss's gradient on the routing
            weights, which reaches no parameter.
        outer: as :func:`~moe_posterior.training.belief.credits.from_module` takes it.
        size: tokens kept for each gate.
        seed: of the sample.
        place: of this process.

    Raises:
        InvalidArgumentError: ``training_step`` returns no loss, or ``outcomes`` is as in training.
    """
    samples = {name: Reservoir(size) for name in gates}
    stream = "held out" if judged else "clusters"
    with _undisturbed(module), torch.set_grad_enabled(judged):
        for number, batch in enumerate(batches):
            step = WatchedStep(gates, samples, (stream, seed, number), *place)
            try:
                moved = _moved(trainer, module, batch)
                with trainer.precision_plugin.train_step_context():
                    outputs = module.training_step(moved, number)
            finally:
                step.close()
            credits = _judged(module, step, moved, outputs, outer) if judged else [None] * len(step.trace.routings)
            for name in gates:
                for rows in step.rows_of(name, credits):
                    samples[name].add(*rows)
    sizes = {name: (gate.hidden_size, gate.num_experts) for name, gate in gates.items()}
    return {name: sample.merged(module.device, sizes[name]) for name, sample in samples.items()}


def _judged(
    module: lightning.LightningModule, step: WatchedStep, batch: Any, outputs: Any, outer: Mapping[str, str]
) -> list[crediting.Credit | None]:
    own = getattr(module, "outcomes", None)
    if callable(own):
        with torch.no_grad():
            return crediting.from_module(step.trace, own(batch, outputs), outer)
    loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor):
        raise InvalidArgumentError(
            f"training_step must return a loss, or a dictionary with one, to learn a prior from; got {type(loss).__name__}"
        )
    weights = [routing.routing_weights for _, routing in step.trace.routings]
    reached = [weight for weight in weights if weight.requires_grad]
    if loss.requires_grad and reached:
        loss.backward(inputs=reached)
    return crediting.from_gradients(step.trace)


def _moved(trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any) -> Any:
    """The batch as ``training_step`` gets it."""
    converted = trainer.precision_plugin.convert_input(batch)
    return trainer.strategy.batch_to_device(module.on_before_batch_transfer(converted, 0), dataloader_idx=0)


@contextmanager
def whole(module: lightning.LightningModule, gates: Iterable[BeliefGate]) -> Iterator[None]:
    """The parameters of these gates as whole tensors, where FSDP2 splits them over the ranks outside of a forward pass."""
    parts = {part for gate in gates for part in gate.modules()}
    split = [each for each in module.modules() if isinstance(each, FSDPModule) and parts.intersection(each.modules())]
    for each in split:
        each.unshard()
    try:
        yield
    finally:
        for each in split:
            each.reshard()


@contextmanager
def _undisturbed(module: lightning.LightningModule) -> Iterator[None]:
    """Evaluation mode, and no trace of what happens within in the module's mode, the random states and the logged figures."""

    def nothing(*arguments: Any, **options: Any) -> None:
        return None

    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    vars(module).update(log=nothing, log_dict=nothing)  # figures of these rows are none of training
    try:
        with isolate_rng():
            yield
    finally:
        del vars(module)["log"], vars(module)["log_dict"]
        for part, training in modes:
            part.training = training
