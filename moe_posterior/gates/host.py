"""What a host router tells the code that records, replays or exports its routing, while a gate lives inside it."""

from abc import abstractmethod

from torch import nn


class GateHost(nn.Module):
    """A router that holds a gate as its child; the model calls the router."""

    @property
    @abstractmethod
    def chooses(self) -> bool:
        """Whether the router's own rule chooses and weighs experts; False where the gate does it in its place."""

    @property
    @abstractmethod
    def whole(self) -> bool:
        """Whether a choice and its weights are all that the router makes of its logits."""
