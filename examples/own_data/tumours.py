"""Your own data and backbone for `moe-posterior fit`: two classes that an experiment file names by `class_path`.

cd examples/own_data
moe-posterior fit --config experiment.yaml          # both gates, a quarter of a minute
moe-posterior evaluate --run runs/tumours           # the report: runs/tumours/report/index.html
"""

from collections.abc import Mapping

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

from moe_posterior.training.data import ClassificationData
from moe_posterior.training.data.base import Split, generator_for, stratified_split


class Tumours(ClassificationData):
    """Measurements of 569 tumours, benign or malignant; the shift is a drifting measuring device.

    Args:
        batch_size: rows of a batch.
        seed: for split, order and shift.
    """

    name = "Tumours"
    class_names = ("malignant", "benign")
    input_shape = (30,)
    known_shifts = default_shifts = ("drift",)

    def load(self) -> Mapping[str, Split]:
        """The three splits; inputs are scaled by the training rows."""
        inputs, targets = (torch.from_numpy(part) for part in load_breast_cancer(return_X_y=True))
        parts = stratified_split(targets, [0.5, 0.2, 0.3], generator_for("split", self.seed))
        mean, std = inputs[parts[0]].mean(0), inputs[parts[0]].std(0)
        inputs = ((inputs - mean) / std).float()
        return {
            name: Split(inputs[rows], targets[rows]) for name, rows in zip(("train", "val", "test"), parts, strict=True)
        }

    def shifted(self, test: Split, shift: str, severity: int) -> Split:
        """Every measurement is off by its own constant, half of `severity` standard deviations on average."""
        offset = torch.randn(30, generator=generator_for("drift", self.seed)) * severity / 2
        return Split(test.inputs + offset, test.targets)

    def subsets(self) -> dict[str, Tensor]:
        """Small tumours are the harder ones."""
        radius = self.split("test").inputs[:, 0]
        return {**super().subsets(), "hard": radius < radius.median(), "easy": radius >= radius.median()}


class Network(nn.Module):
    """The part before the mixture: measurements in, features out."""

    def __init__(self, out_features: int = 32) -> None:
        super().__init__()
        self.out_features = out_features
        self.layers = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, out_features), nn.ReLU())

    def forward(self, measurements: Tensor) -> Tensor:  # (N, 30) -> (N, out_features)
        return self.layers(measurements)
