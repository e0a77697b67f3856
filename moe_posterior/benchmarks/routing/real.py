"""Benchmarks on real data: the experts are classifiers trained on parts of the domains; a correct answer is a success.

Dimensions: n examples, D hidden size, E experts.

One third of the images trains the experts, another warm-starts the gates, the last is the stream. The hidden state that the gates
see is what the experts classify; nothing in it reveals that an expert is degraded.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_posterior.benchmarks.routing import banks
from moe_posterior.benchmarks.routing.banks import Bank
from moe_posterior.benchmarks.routing.environments import (
    NUM_QUERIES,
    NUM_WARM,
    Benchmark,
    Environment,
    Stream,
    affected_classes,
    bernoulli,
    degrade,
    popular_expert,
)
from moe_posterior.errors import InvalidArgumentError, MissingDependencyError

ROWS_AN_EXPERT = 3000
HELD_OUT_SHARE = 1 / 3  # probability that an expert was also trained on a domain new to the gates


@dataclass(frozen=True)
class _Sample:
    hidden: Tensor  # (n, D)
    right: Tensor  # (n, E) float64, 1 where the expert's answer is correct
    query_class: Tensor  # (n,)


def real(
    name: str,
    benchmark: Benchmark,
    seed: int,
    num_experts: int = 16,
    *,
    num_queries: int = NUM_QUERIES,
    num_warm: int = NUM_WARM,
) -> Environment:
    """Benchmark A, B or C with trained classifiers.

    - **A**: every expert is trained on all in-distribution domains, on its own half of the training images.
    - **B**: expert 0 is trained on all of them, every other on one or two. The expert that a softmax gate trained on the warm-start
      data prefers most often answers a random 60 % of the query classes at chance from the first query on.
    - **C**: as A, and each expert also on each held-out domain with probability 1/3. The second half of the stream comes from the
      held-out domains alone.

    Args:
        name: a key of :data:`moe_posterior.benchmarks.routing.banks.BANKS`.
        benchmark: "a", "b" or "c".
        seed: of the split, the experts and the draws.
        num_experts: E.
        num_queries, num_warm: T and W; rows are drawn with replacement if there are fewer.

    Raises:
        InvalidArgumentError: an unknown name or benchmark. MissingDataError, MissingDependencyError: data or scikit-learn are absent.
    """
    if name not in banks.BANKS or benchmark not in ("a", "b", "c"):
        raise InvalidArgumentError(
            f"name must be one of {sorted(banks.BANKS)} and benchmark 'a', 'b' or 'c'; got {name!r}, {benchmark!r}"
        )
    generator = torch.Generator().manual_seed(104_729 * seed + 7)
    bank = banks.BANKS[name](seed)
    experts = _train_pool(bank, benchmark, num_experts, generator)
    warm = _ask(bank, experts, _draw(bank, "warm", num_warm, False, generator))
    change_at = num_queries // 2 if benchmark == "c" else 0
    rows = _draw(bank, "stream", change_at or num_queries, False, generator)
    if benchmark == "c":
        rows = torch.cat([rows, _draw(bank, "stream", num_queries - change_at, True, generator)])
    sample = _ask(bank, experts, rows)
    competence, degraded = sample.right, None
    affected = torch.zeros(num_queries, dtype=torch.bool)
    if benchmark == "b":
        degraded = popular_expert(warm.hidden, warm.right)
        affected = affected_classes(bank.num_classes, generator)[sample.query_class]
        competence = degrade(sample.right, affected, degraded, 1 / bank.num_labels)
    stream = Stream(sample.hidden, competence, bernoulli(competence, generator), sample.query_class, affected)
    return Environment(benchmark, name, seed, warm.hidden, warm.right, stream, degraded, change_at)


def _draw(bank: Bank, part: str, count: int, held_out: bool, generator: torch.Generator) -> Tensor:  # (count,) rows
    rows = ((bank.part == banks.PARTS.index(part)) & (bank.is_held_out == held_out)).nonzero()[:, 0]
    if len(rows) >= count:
        return rows[torch.randperm(len(rows), generator=generator)[:count]]
    return rows[torch.randint(len(rows), (count,), generator=generator)]


def _train_pool(bank: Bank, benchmark: Benchmark, num_experts: int, generator: torch.Generator) -> list[Any]:
    experts = []
    for expert in range(num_experts):
        domains = _home_domains(bank, benchmark, expert, generator)
        candidates = (bank.part == banks.PARTS.index("experts")) & torch.isin(bank.domain, domains)
        rows = candidates.nonzero()[:, 0]
        keep = min(ROWS_AN_EXPERT, max(1, len(rows) // 2))
        rows = rows[torch.randperm(len(rows), generator=generator)[:keep]]
        experts.append(_classifier(bank).fit(bank.hidden[rows].numpy(), bank.label[rows].numpy()))
    return experts


def _home_domains(bank: Bank, benchmark: Benchmark, expert: int, generator: torch.Generator) -> Tensor:
    known = (~bank.held_out).nonzero()[:, 0]
    if benchmark == "a" or (benchmark == "b" and expert == 0):
        return known
    if benchmark == "b":
        count = 1 + int(torch.randint(2, (), generator=generator))
        return known[torch.randperm(len(known), generator=generator)[:count]]
    extra = bank.held_out.nonzero()[:, 0]
    return torch.cat([known, extra[torch.rand(len(extra), generator=generator) < HELD_OUT_SHARE]])


def _classifier(bank: Bank) -> Any:
    try:
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
        from sklearn.svm import SVC
    except ImportError as error:
        raise MissingDependencyError("scikit-learn", "train") from error
    if bank.linear:
        return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    return SVC(C=5.0)


def _ask(bank: Bank, experts: list[Any], rows: Tensor) -> _Sample:
    hidden, label = bank.hidden[rows], bank.label[rows]
    answers = [torch.as_tensor(expert.predict(hidden.numpy())) for expert in experts]
    right = torch.stack([(answer == label).double() for answer in answers], dim=1)
    return _Sample(hidden, right, bank.query_class[rows])
