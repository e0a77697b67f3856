"""Data modules: real data sets, their shifts and their hard subsets."""

from moe_posterior.training.data.base import Batch, ClassificationData, EvaluationSet
from moe_posterior.training.data.cifar10h import CIFAR10H
from moe_posterior.training.data.digits import Digits
from moe_posterior.training.data.shifts import CORRUPTIONS, corrupt

__all__ = [
    "CIFAR10H",
    "CORRUPTIONS",
    "Batch",
    "ClassificationData",
    "Digits",
    "EvaluationSet",
    "corrupt",
]
