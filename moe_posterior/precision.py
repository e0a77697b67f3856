"""Buffers that keep their dtype and their sense: counts and centroids must survive casts, and low-precision or damaged loads."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_posterior.checks.soundness import require_sound
from moe_posterior.errors import InvalidArgumentError


def outlasting(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that can still be written to once the ``inference_mode`` block it was made in is over."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


class FixedPrecision(nn.Module):
    """A module whose own buffers move between devices but never change dtype.

    In bfloat16 a count stops growing at 256 and in float32 at 2^24, silently. Casting a whole model is routine, so the modules
    that count derive from this class: ``module.half()``, ``module.to(torch.bfloat16)``, ``load_state_dict`` of a cast
    checkpoint and ``load_state_dict(assign=True)`` all leave the dtype of their own buffers as it was. Child modules are cast
    as usual. A checkpoint that arrives in a lower precision is loaded with a warning: its values were rounded when it was cast.
    One that holds what no belief can be made of is refused, see :func:`~moe_posterior.checks.soundness.require_sound`.
    Buffers that are made under ``torch.inference_mode`` are ordinary tensors all the same: state outlives the block.

    What writes into a tensor's ``data``, as FSDP's ``MixedPrecision(buffer_dtype=...)`` does, asks no module. The buffers are then
    rounded already, and :meth:`require_precision` says so before anything is decided or counted by them.
    """

    signed_counts = False  # whether evidence may be below 0

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, None if tensor is None else outlasting(tensor), persistent)
        if tensor is not None:
            self.__dict__.setdefault("_dtypes", {})[name] = tensor.dtype

    def require_precision(self) -> None:
        """Raise InvalidArgumentError if a buffer of this module itself was cast behind its back."""
        for name, dtype in self.__dict__.get("_dtypes", {}).items():
            buffer = self._buffers.get(name)
            if buffer is not None and buffer.dtype != dtype:
                raise InvalidArgumentError(
                    f"{type(self).__name__}.{name} must stay {dtype}; got {buffer.dtype}: its data was cast in place, which rounds "
                    f"it; leave FSDP's MixedPrecision(buffer_dtype=None), and load the state again"
                )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, outlasting(value) if isinstance(value, Tensor) else value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return outlasting(moved if moved.dtype == tensor.dtype else tensor.to(moved.device))

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(move_only, recurse=False)

    def require_loadable(self, state_dict: Mapping[str, Any], prefix: str = "") -> None:
        """Raise InvalidArgumentError if this module's own entries of a state are such that it must not load them."""
        lasting = [name for name in self._buffers if name not in self._non_persistent_buffers_set]
        own = {name: state_dict.get(prefix + name) for name in lasting}
        tables = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        require_sound(tables, signed=self.signed_counts, of=prefix)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.require_loadable(state_dict, prefix)
        for name, buffer in self._buffers.items():
            incoming = state_dict.get(prefix + name)
            if buffer is None or not isinstance(incoming, Tensor) or incoming.dtype == buffer.dtype:
                continue
            if incoming.dtype.itemsize < buffer.dtype.itemsize:
                warnings.warn(
                    f"{prefix}{name} is stored as {incoming.dtype}, not {buffer.dtype}: it was rounded when the checkpoint was "
                    f"cast, and loading cannot restore it; save the state_dict before casting",
                    stacklevel=2,
                )
            state_dict[prefix + name] = incoming.to(buffer.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)


def require_all_loadable(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Ask every :class:`FixedPrecision` inside a module, before any part of it has loaded what it must not keep alone."""
    for place, part in module.named_modules(prefix=prefix.removesuffix(".")):
        if isinstance(part, FixedPrecision):
            part.require_loadable(state_dict, f"{place}." if place else "")
