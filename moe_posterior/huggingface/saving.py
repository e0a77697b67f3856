"""Save the belief of a swapped model next to its weights, and never lose it silently.

transformers renames weights as it saves and loads, rounds buffers to the requested dtype, and drops what it does not know; PEFT saves
only what it added. So the belief is kept in a safetensors file of its own, which also holds how the model was swapped; and the weights
include one tensor that no model expects: a plain load warns of it by its name, and its content is the digest of the belief that belongs
to these weights.
"""

import functools
import hashlib
import inspect
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_posterior.errors import InvalidArgumentError, MissingDependencyError
from moe_posterior.files.tensorfile import save_tensors
from moe_posterior.huggingface.host import CHILD, swapped_routers

FILE = "moe_posterior.safetensors"
KIND = "belief"  # what the file's own header says it is
ENTRY = "moe_posterior"  # in the config.json of release 0.1, which named the file and its digest
MARKER = "the_belief_is_in_moe_posterior.safetensors_and_loaded_by_load_swapped"
VERSION = 1
_followed: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_WRAPPED = "saves_belief_of_swapped_routers"  # attribute of a save_pretrained that does


def save_belief(model: nn.Module, directory: str | os.PathLike[str]) -> str:
    """Write the belief of a swapped model to ``moe_posterior.safetensors`` in ``directory``, bit for bit; returns its SHA-256.

    ``save_pretrained`` of any transformers or PEFT model that holds swapped routers does it too.

    Raises:
        InvalidArgumentError: the model is not swapped, or its parts were swapped in different ways.
    """
    libraries()
    belief, recipe = belief_of(model)
    path = Path(directory) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, belief, {"kind": KIND, "version": VERSION, **recipe})
    return hashlib.sha256(path.read_bytes()).hexdigest()


def belief_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The belief of a swapped model, by the names of its routers, and how it was swapped.

    Raises:
        InvalidArgumentError: as :func:`save_belief`.
    """
    routers = swapped_routers(model)
    recipe = dict(next(iter(routers.values())).moe_posterior.recipe)
    for name, router in routers.items():
        if router.moe_posterior.recipe != recipe:
            raise InvalidArgumentError(
                f"model must have been swapped by one call of swap_gates, with {recipe}; router {name!r} was with "
                f"{router.moe_posterior.recipe}: save the parts separately"
            )
    belief = {
        f"{name}.{key}": tensor
        for name, router in routers.items()
        for key, tensor in router.posterior_gate.state_dict().items()
    }
    gates = {name: router.posterior_gate for name, router in routers.items()}
    recipe["configured"] = {name: gate.knobs for name, gate in gates.items() if gate.knobs}
    proved = all(router.moe_posterior.proved for router in routers.values())
    recipe["proved"] = (
        transformers_version() if proved else None
    )  # with which routers have shown that their adapters fit
    return belief, recipe


def transformers_version() -> str | None:
    """The version of transformers in this process, if it was imported."""
    return getattr(sys.modules.get("transformers"), "__version__", None)


def save_beliefs_with_models() -> None:
    """Make ``save_pretrained`` of transformers' and, if it was imported, PEFT's models save the belief of swapped routers too.

    It is one method of one class in each library, which every way to save a model goes through: a model around the one that was
    swapped, a PEFT wrapper made later, a Trainer. A model without swapped routers is saved as ever.
    """
    places = (
        ("transformers.modeling_utils", "PreTrainedModel"),
        ("peft.peft_model", "PeftModel"),
        ("peft.mixed_model", "PeftMixedModel"),
    )
    for module, name in places:
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and not hasattr(kind.save_pretrained, _WRAPPED):
            kind.save_pretrained = _with_belief(kind.save_pretrained, whole=name == "PreTrainedModel")


def _with_belief(own: Callable[..., Any], whole: bool) -> Callable[..., Any]:
    """A class's ``save_pretrained`` that saves the belief too; ``whole`` if it saves all weights, and so can save the marker."""
    signature = inspect.signature(own)

    @functools.wraps(own)
    def save_pretrained(self: Any, *args: Any, **options: Any) -> Any:
        if not swapped_routers(self, required=False):
            return own(self, *args, **options)
        call = signature.bind(self, *args, **options)
        given = {**call.arguments, **call.arguments.get("kwargs", {})}
        if given.get("push_to_hub"):
            raise InvalidArgumentError(
                "push_to_hub must be False for a swapped model, whose belief it would leave out: save it, then upload the folder"
            )
        main = given.get("is_main_process", True)
        saves = self.should_save_on_this_rank(main) if hasattr(self, "should_save_on_this_rank") else main
        digest = save_belief(self, given["save_directory"]) if saves else ""
        if whole:
            state = given.get("state_dict")
            weights = dict(self.state_dict() if state is None else state)
            weights = {name: tensor for name, tensor in weights.items() if f".{CHILD}." not in name}
            weights[MARKER] = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
            call.arguments["state_dict"] = weights
        return own(*call.args, **call.kwargs)

    setattr(save_pretrained, _WRAPPED, True)
    return save_pretrained


class LoadWatcher:
    """Warns where weights that were saved with a belief are loaded into a swapped model without it; a hook before a state is loaded."""

    def __call__(self, model: nn.Module, state: Mapping[str, Any], prefix: str, *given: Any) -> None:
        """As torch's hooks are called."""
        if prefix + MARKER not in state or model in _followed or any(f".{CHILD}." in name for name in state):
            return
        warnings.warn(
            f"the weights that are loaded were saved with a belief, which is in a file of its own, {FILE}: the swapped routers keep "
            f"the belief that they have. Call load_belief(model, folder); under transformers' Trainer, add a BeliefTrainerCallback",
            stacklevel=2,
        )


def follow(model: nn.Module) -> None:
    """Say that somebody loads this model's belief along with its weights, so that there is nothing to warn of."""
    _followed.add(model)


def libraries() -> tuple[Any, Any]:
    """transformers and safetensors.torch."""
    try:
        import safetensors.torch
        import transformers
    except ImportError as error:
        raise MissingDependencyError(error.name or "transformers", "hf") from error
    return transformers, safetensors.torch
