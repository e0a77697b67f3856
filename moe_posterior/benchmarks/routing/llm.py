"""Routing among nine real language models on real queries; every model's score on every query is known.

Dimensions: n queries, D = 384 (MiniLM), E = 9 models, C clusters, H nearest clusters.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from moe_posterior.benchmarks.routing.banks import data_folder
from moe_posterior.benchmarks.routing.environments import Environment, Stream, affected_classes, bernoulli, degrade
from moe_posterior.benchmarks.routing.measures import calibration_error, debiased_calibration_error, noise_floor
from moe_posterior.clustering import Clusterer
from moe_posterior.errors import InvalidArgumentError, MissingDependencyError
from moe_posterior.gates import PosteriorGate

STREAMS = ("degraded", "task shift")
NUM_CLASSES = 20  # query classes of the streams: k-means on the embeddings; the 14 tasks are not labelled
FOLDS = 5
CLUSTERINGS = 5  # k-means runs averaged: the luck of a single one moves the test score by two points
FINAL_CLUSTERINGS = 20  # the same on the test queries, where the gate is built once
CHANCE = 0.1
SPACE: dict[str, tuple[Any, ...]] = {  # searched by cross-validation; all are options of a PosteriorGate
    "num_clusters": (32, 64, 128),
    "neighbours": (1, 2, 4, 8),
    "softness": (0.1, 0.2),
    "shrinkage": (None, 20.0),
}


@dataclass(frozen=True, eq=False)
class Scores:
    """Queries with every model's graded score."""

    hidden: Tensor  # (n, D) float32
    score: Tensor  # (n, E) float64 in [0, 1]
    models: tuple[str, ...]


@lru_cache(maxsize=2)
def load(part: str) -> Scores:
    """Load a split, ``train`` or ``test``.

    Raises:
        MissingDataError: the files are absent. MissingDependencyError: without pyarrow.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "train") from error
    table = pyarrow.parquet.read_table(data_folder("llm_routing", f"{part}.parquet") / f"{part}.parquet")
    columns = [name for name in table.column_names if name.startswith("score_")]
    flat = table["embedding"].combine_chunks().flatten().to_numpy()
    hidden = torch.as_tensor(flat.astype("float32")).view(table.num_rows, -1)
    score = torch.stack([torch.as_tensor(table[name].to_numpy().copy()).double() for name in columns], dim=1)
    return Scores(hidden, score, tuple(name.removeprefix("score_") for name in columns))


def fit_posterior(hidden: Tensor, score: Tensor, options: Mapping[str, Any], seed: int) -> PosteriorGate:
    """A posterior gate warm-started on these scores."""
    gate = PosteriorGate(hidden.shape[1], score.shape[1], top_k=1, **{"clusterings": CLUSTERINGS, **options})
    clusters = _clusters(hidden, gate, seed)
    gate.clusterer.load_state_dict(clusters[0].state_dict())
    if gate.members is not None:
        gate.members.adopt(gate.clusterer, clusters[1:], hidden)
    gate.warm_start(hidden, score)
    return gate


_CLUSTERS: dict[tuple[int, int, int, float], list[Clusterer]] = {}


def _clusters(hidden: Tensor, gate: PosteriorGate, seed: int) -> list[Clusterer]:
    """Clusterings are cached by rows, count and seed: a search tries many options on the same folds."""
    runs = gate.posterior.clusterings
    found = _CLUSTERS.setdefault((len(hidden), gate.clusterer.num_clusters, seed, float(hidden.double().sum())), [])
    for run in range(len(found), runs):
        generator = torch.Generator().manual_seed(1000 * seed + run)
        found.append(Clusterer(gate.clusterer.num_clusters, hidden.shape[1]).fit(hidden, generator=generator))
    return found[:runs]


def out_of_fold(data: Scores, options: Sequence[Mapping[str, Any]], seed: int) -> list[float]:
    """Mean score of the chosen models over five folds of the training queries, for each of the options."""
    totals = [0.0] * len(options)
    for held in _folds(len(data.hidden), seed):
        train_hidden, train_score = data.hidden[~held], data.score[~held]
        for index, chosen in enumerate(options):
            estimate = estimate_with(train_hidden, train_score, data.hidden[held], chosen, seed)
            totals[index] += float(data.score[held].gather(1, estimate.argmax(dim=1, keepdim=True)).sum())
    return [total / len(data.hidden) for total in totals]


def _folds(count: int, seed: int) -> Iterator[Tensor]:  # (count,) bool, True where held out
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    for fold in range(FOLDS):
        yield torch.zeros(count, dtype=torch.bool).index_fill_(0, order[fold::FOLDS], True)


def confidence_line(data: Scores, options: Mapping[str, Any], seed: int) -> tuple[float, float]:
    """Least-squares line (intercept, slope) from a chosen model's estimate to its score, on held-out training queries.

    The highest of nine noisy estimates is too high on average; held-out scores show by how much.
    """
    estimate = torch.empty_like(data.score)
    for held in _folds(len(data.hidden), seed):
        estimate[held] = estimate_with(data.hidden[~held], data.score[~held], data.hidden[held], options, seed)
    best = estimate.max(dim=1)
    got = data.score.gather(1, best.indices[:, None])[:, 0]
    centred = best.values - best.values.mean()
    slope = float((centred * got).sum() / centred.square().sum())
    return float(got.mean()) - slope * float(best.values.mean()), slope


def estimate_with(
    train_hidden: Tensor, train_score: Tensor, hidden: Tensor, options: Mapping[str, Any], seed: int
) -> Tensor:  # (N, E)
    """Estimated scores of every model: posterior means of a gate with these options."""
    gate = fit_posterior(train_hidden, train_score, options, seed)
    return torch.cat([gate.estimates(rows) for rows in hidden.split(2048)])


def grid() -> list[dict[str, Any]]:
    """Every distinct combination of :data:`SPACE`: with one neighbour there is nothing to spread over."""
    everything = [dict(zip(SPACE, values, strict=True)) for values in product(*SPACE.values())]
    return [options for options in everything if options["neighbours"] > 1 or options["softness"] == 0.1]


def search(data: Scores, seed: int) -> tuple[dict[str, Any], float]:
    """The options with the best cross-validated score inside the training queries, and that score."""
    options = grid()
    scores = out_of_fold(data, options, seed)
    best = max(range(len(options)), key=scores.__getitem__)
    _CLUSTERS.clear()
    return options[best], scores[best]


def measure_static(
    estimate: Tensor,  # (N, E)
    score: Tensor,  # (N, E)
    line: tuple[float, float] = (0.0, 1.0),
) -> dict[str, float]:
    """Mean score of the chosen model, and how well the estimate predicted it after the line (intercept, slope)."""
    highest, chosen = estimate.max(dim=1)
    confidence = (line[0] + line[1] * highest).clamp(0, 1)
    got = score.gather(1, chosen[:, None])[:, 0]
    return {
        "score": float(got.mean()),
        "score_error": float(got.std() / len(got) ** 0.5),  # the test sample is small
        "regret": float((score.amax(dim=1) - got).mean()),
        "ece": calibration_error(confidence, got),
        "ece_debiased": debiased_calibration_error(confidence, got),
        "ece_floor": noise_floor(confidence),
        "mean_confidence": float(confidence.mean()),
    }


def baselines(train: Scores, hidden: Tensor) -> dict[str, Tensor]:  # name -> (N, E)
    """Estimates of the two baselines: the best single model, and 40 nearest neighbours by cosine."""
    nearest = (hidden @ train.hidden.T).topk(40, dim=1).indices
    return {
        "best single": train.score.mean(dim=0).expand(len(hidden), -1),
        "40 nearest neighbours": train.score[nearest].mean(dim=1),
    }


@lru_cache(maxsize=1)
def _query_classes() -> Tensor:  # (n,)
    data = load("train")
    classes = Clusterer(NUM_CLASSES, data.hidden.shape[1]).fit(data.hidden, generator=torch.Generator().manual_seed(0))
    return classes(data.hidden).cluster_ids


def stream(name: str, seed: int, *, num_queries: int = 1000) -> Environment:
    """The training queries as a stream.

    - ``degraded``: after half of the stream the model with the best mean score answers a random 60 % of the query classes (k-means, 20)
      at chance (.1).
    - ``task shift``: the warm start and the first half of the stream hold a random half of the query classes, the second half of the
      stream holds the others.

    Raises:
        InvalidArgumentError: an unknown name.
    """
    if name not in STREAMS:
        raise InvalidArgumentError(f"environment must be one of {list(STREAMS)}; got {name!r}")
    data, generator = load("train"), torch.Generator().manual_seed(15_485_863 * (seed + 1))
    query_class = _query_classes()
    order = torch.randperm(len(data.hidden), generator=generator)
    half = num_queries // 2
    if name == "degraded":
        rows, warm = order[:num_queries], order[num_queries:]
    else:
        late = torch.randperm(NUM_CLASSES, generator=generator)[: NUM_CLASSES // 2]
        is_late = torch.isin(query_class[order], late)
        early_rows, late_rows = order[~is_late], order[is_late]
        rows, warm = torch.cat([early_rows[:half], late_rows[: num_queries - half]]), early_rows[half:]
    score, warm_score = data.score[rows], data.score[warm]
    affected, degraded, outcomes = torch.zeros(len(rows), dtype=torch.bool), None, score
    if name == "degraded":
        degraded = int(warm_score.mean(dim=0).argmax())
        affected = affected_classes(NUM_CLASSES, generator)[query_class[rows]]
        affected[:half] = False
        score = degrade(score, affected, degraded, CHANCE)
        guesses = bernoulli(torch.full((len(rows),), CHANCE), generator)
        outcomes = torch.where(affected[:, None] & (torch.arange(score.shape[1]) == degraded), guesses[:, None], score)
    parts = Stream(data.hidden[rows], score, outcomes, query_class[rows], affected)
    return Environment("llm", name, seed, data.hidden[warm], warm_score, parts, degraded, half)
