"""A data module that trains in a second, a backbone for it, and a logger."""

import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

from moe_posterior.training.data.base import ClassificationData, Split


class Points(ClassificationData):
    """Three overlapping classes in the plane, in two groups."""

    name, class_names, input_shape, group_names = "points", ("a", "b", "c"), (2,), ("left", "right")

    def load(self) -> dict[str, Split]:
        generator = torch.Generator().manual_seed(0)
        splits = {}
        for part, rows in (("train", 240), ("val", 60), ("test", 60)):
            target = torch.randint(3, (rows,), generator=generator)
            points = torch.randn(rows, 2, generator=generator) + 1.5 * target[:, None]
            splits[part] = Split(points, target, groups=(points[:, 0] > 1.5).long())
        return splits


class Plane(nn.Linear):
    """From points to six features."""

    def __init__(self) -> None:
        super().__init__(2, 6)


class Tracker(DummyLogger):
    """A logger of another package, which wants a server."""

    def __init__(self, server: str = "") -> None:
        super().__init__()
        if server != "here":
            raise LookupError(f"no server at {server!r}")
