"""A callback for transformers' Trainer: the belief learns from every step, and follows the weights through its checkpoints."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from moe_posterior.checks import validation
from moe_posterior.errors import InvalidArgumentError, MissingDependencyError, NotFittedError
from moe_posterior.files.tensorfile import digest
from moe_posterior.huggingface.host import swapped_routers
from moe_posterior.huggingface.loading import load_belief, read_belief
from moe_posterior.huggingface.saving import FILE, belief_of, follow, save_belief
from moe_posterior.replay.record import Trace, record

try:
    from transformers.trainer_callback import ExportableState, TrainerCallback
except ImportError as missing:
    raise MissingDependencyError("transformers", "hf") from missing


class BeliefTrainerCallback(TrainerCallback, ExportableState):
    """Observes, saves, resumes, rolls back and logs the belief of a swapped model under transformers' Trainer.

    - **Observe**: every ``every``-th micro-batch is recorded, and each expert credited by its gradient after the backward pass.
    - **Save**: each checkpoint gets the belief, also one of a PEFT adapter alone.
    - **Resume**: ``trainer.train(resume_from_checkpoint=...)`` goes on with that checkpoint's belief, known by its digest.
    - **Best model**: ``load_best_model_at_end`` also brings back the belief of that checkpoint.
    - **Log**: ``belief_evidence``, the count of outcomes over all layers, and ``belief_layers_biased``, how many layers'
      choices evidence changes now.

    The Trainer's model must be swapped, in the same way as before when resuming, and its clusters fitted. Accumulated micro-batches
    are each observed. A model compiled by ``torch_compile`` runs no hooks: set ``observe=False``.

    Args:
        observe: whether to learn from training steps; False only keeps the belief with its weights.
        every: observe one micro-batch in so many; 1 (default) observes all.
        resume_from: folder of the checkpoint to resume from, if it is not ``output_dir/checkpoint-N``, nor
            ``TrainingArguments.resume_from_checkpoint``.

    Raises, when training begins:
        InvalidArgumentError: the model is not swapped, or is resumed and the belief of that checkpoint cannot be found.
        NotFittedError: a gate that is to observe has no clusters.

    >>> callback = BeliefTrainerCallback(every=4)  # Trainer(model=model, args=args, train_dataset=data, callbacks=[callback])
    """

    def __init__(self, observe: bool = True, every: int = 1, resume_from: str | None = None) -> None:
        self.observe, self.every = observe, validation.count("every", every)
        self.resume_from = resume_from
        self._model: nn.Module | None = None
        self._batches = 0  # micro-batches so far
        self._trace: Trace | None = None
        self._recording: Any = None  # the open record() block

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into ``trainer_state.json``: the arguments, and the digest of the belief at that moment."""
        swapped = self._model is not None and bool(swapped_routers(self._model, required=False))
        args = {"observe": self.observe, "every": self.every, "resume_from": self.resume_from}
        return {"args": args, "attributes": {"saved": _digest(*belief_of(self._model)[::-1])} if swapped else {}}  # type: ignore[arg-type]

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The Trainer loads weights before training begins, and the belief is loaded then."""
        for module in () if model is None else model.modules():
            follow(module)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Load the checkpoint's belief if training is resumed, and see that there is one to observe."""
        routers = swapped_routers(model)
        self._model, self._batches = model, 0
        if state.global_step > 0:
            self._resume(args, state, model)
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        unfitted = [name for name, router in routers.items() if not router.posterior_gate.clusterer.fitted]
        if self.observe and unfitted:
            raise NotFittedError(
                f"the swapped gates must have clusters before training observes them; {unfitted[0]!r} has none: call swapped.fit"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Record the step's first micro-batch."""
        self._begin(model)

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Observe a micro-batch, and record the next one."""
        self._learn()
        self._begin(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Observe the step's last micro-batch."""
        self._learn()

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Save the belief with the checkpoint, where ``save_pretrained`` has not."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir() and not (folder / FILE).is_file():
            save_belief(model, folder)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        """Add the belief's figures to the logs."""
        gates = [router.posterior_gate for router in swapped_routers(model, required=False).values()]
        figures = {
            "belief_evidence": sum(float((g.posterior.successes + g.posterior.failures).sum()) for g in gates),
            "belief_layers_biased": sum(gate.takes_part for gate in gates),
        }
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Bring back the best checkpoint's belief where the Trainer has brought back its weights."""
        self._close()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            load_belief(model, state.best_model_checkpoint)

    def _resume(self, args: Any, state: Any, model: nn.Module) -> None:
        """Find the checkpoint that the Trainer has resumed from, which it tells nobody, by the digest in its state."""
        entry = state.stateful_callbacks.get(type(self).__name__) or {}
        wanted = entry.get("attributes", {}).get("saved")
        given = [self.resume_from, args.resume_from_checkpoint, f"{args.output_dir}/checkpoint-{state.global_step}"]
        folders = [folder for folder in given if isinstance(folder, str) and (Path(folder) / FILE).is_file()]
        for folder in folders:
            if wanted is None or _digest(*read_belief(folder)) == wanted:
                load_belief(model, folder)
                return
        raise InvalidArgumentError(
            f"resume_from must be the folder of the checkpoint of step {state.global_step} with its {FILE}; there is none in "
            f"{[folder for folder in given if folder]} with the belief of that step"
        )

    def _begin(self, model: nn.Module) -> None:
        self._close()
        if self.observe and self._batches % self.every == 0:
            self._recording = record(model)
            self._trace = self._recording.__enter__()
        self._batches += 1

    def _learn(self) -> None:
        trace = self._trace
        if trace is not None and len(trace):
            trace.observe_gradients()
        elif trace is not None:
            self._close()
            raise InvalidArgumentError(
                "observe must be False for a model that runs no hooks, such as one compiled by torch_compile"
            )
        self._close()

    def _close(self) -> None:
        if self._recording is not None:
            self._recording.__exit__(None, None, None)
        if self._trace is not None:
            self._trace.close()
        self._recording = self._trace = None


def _digest(recipe: dict[str, Any], belief: dict[str, Any]) -> str:
    return digest(belief, json.dumps(recipe, sort_keys=True))
