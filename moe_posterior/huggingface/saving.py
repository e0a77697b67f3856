"""Save the belief of a swapped model next to its weights, and never lose it silently.

transformers renames weights as it saves and loads, rounds buffers to the requested dtype, and drops what it does not know. So the
belief is kept in a safetensors file of its own, which also holds how the model was swapped; the model's ``config.json`` names that
file and its digest; and the weights include one tensor that no model expects, so that a plain load warns.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_posterior.errors import InvalidArgumentError, MissingDependencyError
from moe_posterior.files.tensorfile import save_tensors
from moe_posterior.huggingface.host import CHILD, swapped_routers

FILE = "moe_posterior.safetensors"
KIND = "belief"  # what the file's own header says it is
ENTRY = "moe_posterior"  # in config.json
MARKER = "the_belief_is_in_moe_posterior.safetensors_and_loaded_by_load_swapped"
VERSION = 1


def save_belief(model: nn.Module, directory: str | os.PathLike[str]) -> str:
    """Write the belief of a swapped model to ``moe_posterior.safetensors`` in ``directory``, bit for bit; returns its SHA-256.

    ``save_pretrained`` of a transformers model or a PEFT wrapper that was swapped does it too.

    Raises:
        InvalidArgumentError: the model is not swapped.
    """
    libraries()
    routers = swapped_routers(model)
    belief = {
        f"{name}.{key}": tensor
        for name, router in routers.items()
        for key, tensor in router.posterior_gate.state_dict().items()
    }
    recipe = dict(next(iter(routers.values())).moe_posterior.recipe)
    gates = {name: router.posterior_gate for name, router in routers.items()}
    recipe["configured"] = {name: gate.knobs for name, gate in gates.items() if gate.knobs}
    path = Path(directory) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, belief, {"kind": KIND, "version": VERSION, **recipe})
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Saver:
    """Replaces a swapped model's own ``save_pretrained``; an object, so that a copied model saves the copy."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> Any:
        """Save the model and, next to it, the belief; takes the arguments of the model's own method.

        Raises:
            InvalidArgumentError: ``push_to_hub``, which would upload the model without its belief.
        """
        if push_to_hub:
            raise InvalidArgumentError("push_to_hub must be False for a swapped model: save it, then upload the folder")
        transformers, _ = libraries()
        own: Any = type(self.model).save_pretrained  # type: ignore[attr-defined]
        saves = getattr(self.model, "should_save_on_this_rank", bool)(is_main_process)
        digest = save_belief(self.model, save_directory) if saves else ""
        options["is_main_process"] = is_main_process
        if not isinstance(self.model, transformers.PreTrainedModel):  # a wrapper, which saves only what it adds
            return own(self.model, save_directory, **options)
        weights = self.model.state_dict() if state_dict is None else state_dict
        weights = {name: tensor for name, tensor in weights.items() if f".{CHILD}." not in name}
        weights[MARKER] = torch.zeros(1)
        setattr(self.model.config, ENTRY, {"version": VERSION, "file": FILE, "sha256": digest})
        try:
            return own(self.model, save_directory, state_dict=weights, **options)
        finally:
            delattr(self.model.config, ENTRY)


def install_savers(model: nn.Module) -> None:
    """Give the model, and every model inside it that holds swapped routers, a :class:`Saver`."""
    for module in model.modules():
        if hasattr(type(module), "save_pretrained") and swapped_routers(module, required=False):
            module.save_pretrained = Saver(module)  # type: ignore[assignment]


def remove_savers(model: nn.Module) -> None:
    """Undo :func:`install_savers`."""
    for module in model.modules():
        if isinstance(vars(module).get("save_pretrained"), Saver):
            del module.save_pretrained


def libraries() -> tuple[Any, Any]:
    """transformers and safetensors.torch."""
    try:
        import safetensors.torch
        import transformers
    except ImportError as error:
        raise MissingDependencyError(error.name or "transformers", "hf") from error
    return transformers, safetensors.torch
