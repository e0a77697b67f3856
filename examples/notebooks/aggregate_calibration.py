# %% [markdown]
# # Calibrated experts, miscalibrated mixture
# Two experts, each perfectly calibrated, can form a mixture that is not: averaging two confident forecasters who know different things
# gives a forecaster that is not confident enough. That is why this library measures the *routed aggregate*. Everything below is
# simulated, so that the truth is known. `python examples/notebooks/aggregate_calibration.py`, a few seconds.

# %%
import torch

from moe_posterior.metrics import calibration_error, reliability_curve

generator = torch.Generator().manual_seed(0)
count = 200_000

# %% [markdown]
# The label depends on two signals. Expert A sees the first and knows its chance exactly, expert B the second.

# %%
first, second = torch.randn(2, count, generator=generator, dtype=torch.float64)
chance = torch.sigmoid(2 * (first + second))
label = (torch.rand(count, generator=generator, dtype=torch.float64) < chance).long()


def chance_given(signal: torch.Tensor) -> torch.Tensor:
    """P(label = 1 | one signal): the other one averaged out, by quadrature."""
    nodes = torch.linspace(-5, 5, 401, dtype=torch.float64)
    weights = torch.exp(-nodes.square() / 2)
    return (torch.sigmoid(2 * (signal[:, None] + nodes)) * weights).sum(1) / weights.sum()


def two_classes(probability: torch.Tensor) -> torch.Tensor:  # (N,) -> (N, 2)
    return torch.stack([1 - probability, probability], dim=1)


grid = torch.linspace(-6, 6, 2401, dtype=torch.float64)
table = chance_given(grid)


def expert(signal: torch.Tensor) -> torch.Tensor:  # (N,) -> (N, 2)
    place = ((signal + 6) / 12 * 2400).round().long().clamp(0, 2400)
    return two_classes(table[place])


a, b = expert(first), expert(second)
mixture = (a + b) / 2
for name, probs in (("expert A", a), ("expert B", b), ("their average", mixture)):
    accuracy = (probs.argmax(1) == label).double().mean().item()
    print(f"{name:14} accuracy {accuracy:.3f}, calibration error {calibration_error(probs, label).item():.4f}")

# %% [markdown]
# Both experts are calibrated, but where their average says 0.7 it is right far more often.

# %%
curve = reliability_curve(mixture, label, n_bins=10)
print("confidence  accuracy")
for confidence, accuracy, rows in zip(curve.confidence, curve.accuracy, curve.count, strict=True):
    if rows:
        print(f"{confidence.item():10.3f} {accuracy.item():9.3f}")

# %% [markdown]
# If the routing changes, the error changes although no expert does: that is *calibration under routing shift*. Send the
# rows on which the experts disagree to their average and the rest to A alone, and measure each routing configuration separately.

# %%
disagree = a.argmax(1) != b.argmax(1)
for name, rows in (("agree", ~disagree), ("disagree", disagree)):
    error = calibration_error(mixture[rows], label[rows]).item()
    print(f"experts {name:9} n = {int(rows.sum()):7,}  calibration error of the average {error:.4f}")
