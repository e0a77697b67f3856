"""The 1,797 handwritten digits that come with scikit-learn: real data, always there, trained on in seconds."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.training.data.base import ClassificationData, Split, generator_for, stratified_split
from moe_posterior.training.data.shifts import corrupt

__all__ = ["Digits"]

NEIGHBOURS = 15
MIN_VOTE_SHARE = 0.8


class Digits(ClassificationData):
    """8×8 images of handwritten digits, split by class and seed into training, validation and test rows.

    A test digit is hard where fewer than 80 % of its 15 nearest training digits agree on a class. With the default split that holds for
    92 of 629 test rows; the neighbours' majority is wrong on 23 % of them and on none of the other, easy ones. The rule
    looks at the labels of training rows only.

    Shifts: rotation, gaussian_noise, gaussian_blur and contrast, with constants for small images (see `shifts`).

    Args:
        batch_size: rows of a batch.
        seed: of split, order and shifts.
        val_fraction, test_fraction: shares of all rows, drawn per class; the test share is large because its errors are few.

    Shapes: input (N, 1, 8, 8) float in [0, 1].

    Raises:
        InvalidArgumentError: the fractions are not positive or leave no training rows.

    Source: Alpaydin and Kaynak, *Optical Recognition of Handwritten Digits*, UCI 1998, as in `sklearn.datasets.load_digits`.

    >>> data = Digits()
    >>> [len(data.split(part)) for part in ("train", "val", "test")]
    [898, 270, 629]
    """

    name = "Digits"
    class_names = tuple(str(digit) for digit in range(10))
    input_shape = (1, 8, 8)
    test_shift = None  # a random part of the same rows
    known_shifts = ("rotation", "gaussian_noise", "gaussian_blur", "contrast")
    default_shifts = known_shifts

    def __init__(
        self, batch_size: int = 128, seed: int = 42, val_fraction: float = 0.15, test_fraction: float = 0.35
    ) -> None:
        if val_fraction <= 0 or test_fraction <= 0 or val_fraction + test_fraction >= 1:
            raise InvalidArgumentError(
                "val_fraction and test_fraction must be positive and sum to less than 1; "
                f"got {val_fraction} and {test_fraction}"
            )
        super().__init__(batch_size, seed)
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    def load(self) -> Mapping[str, Split]:
        """The splits; images stay the stored integers from 0 to 16."""
        from sklearn.datasets import load_digits

        raw = load_digits()
        images = torch.from_numpy(raw.images).to(torch.uint8)[:, None]
        targets = torch.from_numpy(raw.target).long()
        shares = [1 - self.val_fraction - self.test_fraction, self.val_fraction, self.test_fraction]
        parts = stratified_split(targets, shares, generator_for("split", self.seed))
        names = ("train", "val", "test")
        return {name: Split(images[rows], targets[rows], scale=16) for name, rows in zip(names, parts, strict=True)}

    def shifted(self, test: Split, shift: str, severity: int) -> Split:
        """The test digits under a corruption, as floats: 17 grey levels are too few to round to."""
        generator = generator_for("shift", self.seed, shift, severity)
        return Split(corrupt(test.inputs.float() / 16, shift, severity, generator), test.targets)

    def subsets(self) -> dict[str, Tensor]:
        """Masks over the test rows: overall, hard (under 80 % of the nearest training digits agree) and easy (the rest)."""
        from sklearn.neighbors import KNeighborsClassifier

        train, test = self.split("train"), self.split("test")
        neighbours = KNeighborsClassifier(NEIGHBOURS).fit(train.inputs.flatten(1).numpy(), train.targets.numpy())
        shares = torch.from_numpy(neighbours.predict_proba(test.inputs.flatten(1).numpy()))
        hard = shares.amax(dim=1) < MIN_VOTE_SHARE
        return {**super().subsets(), "hard": hard, "easy": ~hard}
