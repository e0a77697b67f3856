"""Data modules: real data sets, their shifts and their hard subsets."""

from moe_posterior.training.data.base import Batch, ClassificationData, EvaluationSet
from moe_posterior.training.data.cifar10h import CIFAR10H
from moe_posterior.training.data.comments import CAD, CivilComments
from moe_posterior.training.data.digits import Digits
from moe_posterior.training.data.features import CachedFeatures
from moe_posterior.training.data.pacs import PACS
from moe_posterior.training.data.shifts import CORRUPTIONS, corrupt

__all__ = [
    "CAD",
    "CIFAR10H",
    "CORRUPTIONS",
    "PACS",
    "Batch",
    "CachedFeatures",
    "CivilComments",
    "ClassificationData",
    "Digits",
    "EvaluationSet",
    "corrupt",
]
