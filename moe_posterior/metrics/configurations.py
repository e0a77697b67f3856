"""Calibration per routing configuration: the cluster of an input and the set of experts that answered it.

Dimensions: N predictions, K classes, k experts per input, G configurations, V distinct displayed confidences. A sparse gate
over clusters has finitely many configurations, so the accuracy in each can be estimated. Someone who sees only the
confidence cannot tell apart predictions of different configurations that display the same one; if their accuracies
differ, a shift in how often each occurs breaks a calibration that held on average.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import count as read_count
from moe_posterior.checks.validation import described, tensor
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics.calibration import read_predictions, top_label
from moe_posterior.metrics.reading import read_ids

MIN_COUNT = 20  # the standard error of an accuracy is then at most 0.11


class Configurations(NamedTuple):
    """The configuration of each input, and what each configuration is."""

    ids: Tensor  # (N,) int64, dense in [0, G)
    table: Tensor  # (G, 1 + k) int64: the cluster, then the experts in rising order; rows in lexicographic order


@dataclass(frozen=True, eq=False)
class ConfigurationCalibration:
    """Calibration of each configuration."""

    count: Tensor  # (G,) int64
    share: Tensor  # (G,) of all predictions
    accuracy: Tensor  # (G,)
    confidence: Tensor  # (G,) mean top-label confidence
    gap: Tensor  # (G,) accuracy − confidence, negative if overconfident; NaN below min_count


class SharedConfidence(NamedTuple):
    """How many inputs display a confidence that inputs of another configuration also display."""

    shared: int  # inputs whose displayed confidence belongs to two configurations or more
    total: int  # N
    displayed: Tensor  # (V,) the distinct displayed confidences, rising
    inputs: Tensor  # (V,) int64, inputs that display it
    configurations: Tensor  # (V,) int64, configurations among them


@as_declared
def configuration_ids(
    cluster_ids: Tensor,  # (N,) int64
    expert_indices: Tensor,  # (N, k) int64
    num_experts: int,
    *,
    num_clusters: int,
) -> Configurations:
    """Number the configurations that occur: (cluster, set of selected experts), whatever the order of the experts.

    Args:
        cluster_ids: cluster of each input; zeros, with ``num_clusters=1``, for a gate without clusters.
        expert_indices: the experts that answered, each at most once per input.
        num_experts, num_clusters: bounds of the two, to catch ids of another model.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, or an expert twice in one row.

    Source: *Toward Calibrated Mixture-of-Experts Under Distribution Shift* (arXiv 2606.20544), for the pair that hard
    routing conditions on; here the displayed confidence is left out.

    >>> ids, table = configuration_ids(torch.tensor([1, 0, 1]), torch.tensor([[2, 0], [0, 1], [0, 2]]), 3, num_clusters=2)
    >>> ids.tolist(), table.tolist()
    ([1, 0, 1], [[0, 0, 1], [1, 0, 2]])
    """
    read_count("num_clusters", num_clusters)
    read_count("num_experts", num_experts)
    cluster_ids = read_ids("cluster_ids", cluster_ids, 1, num_clusters)
    expert_indices = read_ids("expert_indices", expert_indices, 2, num_experts)
    if len(cluster_ids) != len(expert_indices):
        raise InvalidArgumentError(
            f"cluster_ids and expert_indices must have equally many rows; got {len(cluster_ids)} and {len(expert_indices)}"
        )
    experts = expert_indices.sort(dim=1).values
    twice = (experts[:, 1:] == experts[:, :-1]).any(1)
    if twice.any():
        row = int(twice.nonzero()[0])
        raise InvalidArgumentError(
            f"expert_indices must name an expert once per row; got {expert_indices[row].tolist()} in row {row}"
        )
    rows = torch.cat([cluster_ids[:, None], experts], dim=1)  # (N, 1 + k)
    if not len(rows):
        return Configurations(cluster_ids, rows)
    table, ids = torch.unique(rows, dim=0, return_inverse=True)
    return Configurations(ids, table)


@as_declared
def configuration_calibration(
    preds: Tensor,  # (N, K) probabilities or (N,) confidences
    target: Tensor,  # (N,)
    configurations: Configurations,
    *,
    min_count: int = MIN_COUNT,
) -> ConfigurationCalibration:
    """Count, share, accuracy, mean confidence and gap of each configuration, all but the count in float64.

    A gap is one number per configuration, not a binned error: over- and underconfident inputs of one configuration cancel.
    For binned errors per configuration give ``configurations.ids`` to
    :func:`~moe_posterior.metrics.grouped_calibration_error`.

    Args:
        preds, target: as in :func:`~moe_posterior.metrics.calibration_error`.
        configurations: from :func:`configuration_ids`.
        min_count: fewer predictions give a NaN gap; at 20 the standard error of the accuracy is at most 0.11.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    >>> configurations = configuration_ids(torch.zeros(3).long(), torch.tensor([[0], [0], [1]]), 2, num_clusters=1)
    >>> result = configuration_calibration(torch.tensor([0.75, 0.75, 0.5]), torch.tensor([1, 0, 1]), configurations, min_count=2)
    >>> result.count.tolist(), result.gap.tolist()
    ([2, 1], [-0.25, nan])
    """
    preds, target = read_predictions(preds, target)
    configurations = read_configurations(configurations, len(preds), min_count)
    confidence, correct = top_label(preds, target)
    ids, groups = configurations.ids, len(configurations.table)
    values = torch.stack([torch.ones_like(confidence), correct, confidence])
    count, hits, total = values.new_zeros(3, groups).index_add_(1, ids, values).unbind()
    gap = ((hits - total) / count).masked_fill(count < min_count, torch.nan)
    return ConfigurationCalibration(count.long(), count / len(ids), hits / count, total / count, gap)


@as_declared
def shared_confidence(
    preds: Tensor,  # (N, K) probabilities or (N,) confidences
    configurations: Configurations,
    *,
    decimals: int = 2,
) -> SharedConfidence:
    """How many inputs share a displayed confidence across different configurations.

    Args:
        preds: class probabilities or confidences.
        configurations: from :func:`configuration_ids`.
        decimals: the confidence is displayed rounded to these; 2 is a whole per cent.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    >>> configurations = configuration_ids(torch.zeros(3).long(), torch.tensor([[0], [1], [1]]), 2, num_clusters=1)
    >>> shared_confidence(torch.tensor([0.751, 0.749, 0.5]), configurations)[:2]
    (2, 3)
    """
    preds = tensor("preds", preds)
    preds, _ = read_predictions(preds, torch.zeros(preds.shape[:1], dtype=torch.int64, device=preds.device))
    configurations = read_configurations(configurations, len(preds), 1)
    decimals = read_count("decimals", decimals, least=0, most=12)
    confidence = (preds if preds.ndim == 1 else preds.amax(1)).double().clamp(0, 1)
    steps = (confidence * 10**decimals).round().long()
    displayed, place, inputs = steps.unique(return_inverse=True, return_counts=True)
    groups = max(len(configurations.table), 1)
    pairs = (place * groups + configurations.ids).unique()  # one per (displayed confidence, configuration)
    several = torch.bincount(pairs // groups, minlength=len(displayed))
    shared = int(inputs[several > 1].sum())
    return SharedConfidence(shared, len(preds), displayed.double() / 10**decimals, inputs, several)


def read_configurations(configurations: Configurations, num_predictions: int, min_count: int) -> Configurations:
    """The configurations of these predictions, ids of any width as int64.

    Raises:
        InvalidArgumentError: they are those of other predictions, or the minimum is no count.
    """
    read_count("min_count", min_count)
    if not isinstance(configurations, tuple) or len(configurations) != 2:
        raise InvalidArgumentError(f"configurations must be Configurations; got {described(configurations)}")
    ids, table = configurations
    table = tensor("configurations.table", table)
    ids = read_ids("configurations.ids", ids, 1, len(table))
    if len(ids) != num_predictions:
        raise InvalidArgumentError(f"configurations must hold {num_predictions} ids; got {len(ids)}")
    return Configurations(ids, table)
