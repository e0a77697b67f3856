"""Pure functions on class probabilities: tempering, and moving the top label's confidence.

Dimensions: N rows, K classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

FLOOR = 1e-12  # below it a probability says no more than "never", and its logarithm would dominate every fit
LOGIT_BOUND = 13.8  # about the logit of 1 - 1e-6


def top_label(probs: Tensor) -> Tensor:  # (N, K) -> (N,)
    """The answer: the class ``max`` returns, as the metrics take it."""
    return probs.max(dim=1).indices


def top_confidence(probs: Tensor) -> Tensor:  # (N, K) -> (N,)
    """The probability of the answer, within [0, 1] despite rounding."""
    return probs.amax(dim=1).clamp(0, 1)


def safe_log(probs: Tensor) -> Tensor:
    """Logarithm of probabilities that may be 0."""
    return probs.clamp(min=FLOOR).log()


def safe_logit(confidence: Tensor) -> Tensor:
    """Logit of a confidence, bounded where it is 0 or 1.

    >>> safe_logit(torch.tensor([0.0, 0.5, 1.0])).tolist()[1]
    0.0
    """
    return torch.logit(confidence.double(), eps=FLOOR).clamp(-LOGIT_BOUND, LOGIT_BOUND)


def temper(
    probs: Tensor,  # (..., K)
    temperature: Tensor | float,  # broadcasts with (..., K)
) -> Tensor:  # (..., K)
    """``softmax(log p / T)``: T above 1 flattens, below 1 sharpens; the order of the classes stays.

    >>> temper(torch.tensor([[0.8, 0.2]], dtype=torch.float64), 0.5)
    tensor([[0.9412, 0.0588]], dtype=torch.float64)
    """
    return torch.softmax(safe_log(probs) / temperature, dim=-1)


def with_confidence(
    probs: Tensor,  # (N, K)
    confidence: Tensor,  # (N,)
) -> Tensor:  # (N, K)
    """Give the top label this confidence and share the rest among the other classes in their old proportions.

    The top label must stay on top. So a confidence below 1/K becomes 1/K; and where the runner-up would overtake, the rest
    is mixed with the uniform distribution just enough that the two tie: the requested confidence is still used.

    >>> with_confidence(torch.tensor([[0.8, 0.2, 0.0], [0.8, 0.2, 0.0]]), torch.tensor([0.6, 0.4]))
    tensor([[0.6000, 0.4000, 0.0000],
            [0.4000, 0.4000, 0.2000]])
    """
    num_classes = probs.shape[1]
    if num_classes == 1:
        return torch.ones_like(probs)
    top = torch.nn.functional.one_hot(top_label(probs), num_classes).bool()
    confidence = confidence.clamp(1 / num_classes, 1)[:, None]  # (N, 1)
    others = probs.clamp(min=0).masked_fill(top, 0)
    mass = others.sum(1, keepdim=True)
    uniform = (~top).to(probs.dtype) / (num_classes - 1)
    share = torch.where(mass > 0, others / mass.clamp(min=torch.finfo(probs.dtype).tiny), uniform)
    rest = 1 - confidence
    excess = rest * share.amax(1, keepdim=True) - confidence
    room = rest * (share.amax(1, keepdim=True) - 1 / (num_classes - 1))
    mixing = torch.where(excess > 0, excess / room.clamp(min=FLOOR), 0).clamp(0, 1)
    return torch.where(top, confidence, rest * (share + mixing * (uniform - share)))


def keep_top(
    probs: Tensor,  # (N, K)
    label: Tensor,  # (N,)
) -> Tensor:  # (N, K)
    """Where rounding let another class tie with or pass ``label``, raise ``label`` by one unit in the last place.

    >>> keep_top(torch.tensor([[0.5, 0.5]]), torch.tensor([1])).argmax(1)
    tensor([1])
    """
    best, found = probs.max(dim=1)
    raised = torch.where(found == label, probs.gather(1, label[:, None])[:, 0], best.nextafter(best + 1))
    return probs.scatter(1, label[:, None], raised[:, None])


def root(
    increasing: Callable[[Tensor], Tensor],  # (...) -> (...)
    low: Tensor,
    high: Tensor,
    steps: int = 64,
) -> Tensor:
    """Where an elementwise increasing function crosses 0, by bisection; the nearer bound where it does not.

    The slope of a convex loss is such a function, and bisection has no step size to tune.

    >>> root(lambda x: x**2 - 2, torch.zeros(1, dtype=torch.float64), torch.full((1,), 2.0, dtype=torch.float64))
    tensor([1.4142], dtype=torch.float64)
    """
    for _ in range(steps):
        middle = (low + high) / 2
        below = increasing(middle) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def minimise(
    loss: Callable[[Tensor], Tensor],  # (P,) -> scalar
    start: Tensor,  # (P,)
    steps: int = 300,
) -> Tensor:  # (P,)
    """Minimum of a smooth function by L-BFGS with a line search, without randomness.

    >>> minimise(lambda x: (x - 3).square().sum(), torch.zeros(2, dtype=torch.float64))
    tensor([3., 3.], dtype=torch.float64)
    """
    point = start.detach().clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [point],
        max_iter=steps,
        tolerance_grad=1e-9,
        tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        with torch.enable_grad():
            value = loss(point)
            value.backward()
        return value

    optimiser.step(closure)
    return point.detach()
