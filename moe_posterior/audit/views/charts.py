"""Trajectories as figures of the page: one panel an expert, with its 95 % band and the pool beside it.

Dimensions: S samples, C clusters, E experts.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from moe_posterior import beta as posterior
from moe_posterior.audit.views.competence import Z
from moe_posterior.audit.views.flags import Flag, moments
from moe_posterior.audit.views.survey import SourceSurvey
from moe_posterior.audit.views.trajectories import Samples
from moe_posterior.results.page import Axis, Series, details, figure, legend, line_chart, nice_ticks
from moe_posterior.results.tables import show

EXPERTS, CLUSTERS, PANELS = 16, 12, 4  # drawn at most: experts over all clusters, clusters, experts of one cluster
_POINTS = 80
_SHARES = (0, 0.2, 0.4, 0.6, 0.8, 1)
_LEGEND = [("expert, 95 % interval", 0), ("mean of the active experts", 1)]
_MANY = 400.0  # pseudo-counts above which a Beta distribution looks normal


def interval(alpha: NDArray, beta: NDArray) -> tuple[NDArray, NDArray]:  # (S, P), (S, P) -> 2 x (S, P)
    """The central 95 % interval of Beta posteriors; NaN where there is none.

    Exact up to 400 pseudo-counts; beyond, mean ± 1.96 std, which for a mean between 0.05 and 0.95 is off by less than a panel can show.
    """
    a, b = (np.asarray(part, dtype=np.float64) for part in (alpha, beta))
    mean, std = moments(a, b)
    exact = np.isfinite(a) & np.isfinite(b) & (a > 0) & (b > 0) & (a + b < _MANY)
    ends = []
    for sign, level in ((-1, 0.025), (1, 0.975)):
        end = (mean + sign * Z * std).clip(0, 1)
        if exact.any():
            end[exact] = posterior.quantile(torch.from_numpy(a[exact]), torch.from_numpy(b[exact]), level).numpy()
        ends.append(end)
    return ends[0], ends[1]


def over_all(samples: Samples) -> tuple[NDArray, NDArray]:  # -> 2 x (S, E)
    """The experts' plain means over all clusters and their stds, treating cells as independent."""
    mean, std = moments(samples.alpha.astype(np.float64), samples.beta.astype(np.float64))
    return mean.mean(axis=1), np.sqrt((std**2).sum(axis=1)) / mean.shape[1]


def experts_figure(name: str, source: SourceSurvey, samples: Samples, flags: list[Flag]) -> str:
    """The experts' competence over all clusters; flagged experts first, then by traffic."""
    chosen = _ranked([flag.expert for flag in flags], source.traffic.sum(axis=0), EXPERTS)
    kept = _thinned(samples)
    mean, std = over_all(kept)
    pool = np.nanmean(mean[:, _active(source, mean.shape[1])], axis=1)
    low, high = (mean - Z * std).clip(0, 1), (mean + Z * std).clip(0, 1)
    drawings = [
        _panel(f"{name}-expert-{e}", f"expert {e}, all clusters", kept, mean[:, e], low[:, e], high[:, e], pool)
        for e in chosen
    ]
    left = len(source.chosen) - len(chosen)
    caption = "Posterior mean over all clusters against decisions, as the decisions saw it."
    caption += f" {left} more experts, without flags and with less traffic, are in the table above." if left > 0 else ""
    return figure(drawings, caption, legend(_LEGEND))


def cluster_figures(name: str, source: SourceSurvey, samples: Samples, flags: list[Flag]) -> str:
    """For the clusters with most traffic, collapsed: their experts with most traffic or a flag."""
    kept = _thinned(samples)
    mean, _ = moments(kept.alpha.astype(np.float64), kept.beta.astype(np.float64))
    active = _active(source, mean.shape[2])
    traffic = source.traffic.sum(axis=1)
    busiest = [c for c in np.argsort(-traffic, kind="stable")[:CLUSTERS].tolist() if traffic[c]]
    flagged = {c: [flag.expert for flag in flags if flag.cluster == c] for c in busiest}
    cells = [(c, e) for c in busiest for e in _ranked(flagged[c], source.traffic[c], PANELS)]
    rows, columns = np.array(cells, dtype=np.int64).reshape(-1, 2).T
    low, high = interval(kept.alpha[:, rows, columns], kept.beta[:, rows, columns])
    panels: dict[int, list[str]] = {}
    for place, (c, e) in enumerate(cells):
        pool = np.nanmean(mean[:, c, active], axis=1)
        title = f"expert {e}, asked {show(int(source.traffic[c, e]))} times"
        drawn = _panel(f"{name}-cell-{c}-{e}", title, kept, mean[:, c, e], low[:, place], high[:, place], pool)
        panels.setdefault(c, []).append(drawn)
    parts = []
    for c in busiest:
        summary = f"cluster {c}: {show(int(traffic[c]))} times asked" + (", flags" if flagged[c] else "")
        parts.append(details(summary, figure(panels[c], f"Posterior mean on cluster {c}.", legend(_LEGEND))))
    return "".join(parts)


def _ranked(flagged: list[int], traffic: NDArray, most: int) -> list[int]:
    """Experts worth a panel."""
    by_traffic = [e for e in np.argsort(-traffic, kind="stable").tolist() if traffic[e]]
    return list(dict.fromkeys([*flagged, *by_traffic]))[:most]


def _active(source: SourceSurvey, num_experts: int) -> NDArray[np.bool_]:
    active = np.ones(num_experts, dtype=np.bool_)
    if source.flagging is not None and source.flagging.active.any():
        active = source.flagging.active
    return active


def _thinned(samples: Samples) -> Samples:
    """At most as many points as a small panel can show, including the last one."""
    kept = np.unique(np.linspace(0, len(samples.numbers) - 1, _POINTS).round().astype(np.int64))
    return Samples(samples.numbers[kept], samples.times[kept], samples.alpha[kept], samples.beta[kept])


def _panel(
    name: str, title: str, samples: Samples, mean: NDArray, low: NDArray, high: NDArray, pool: NDArray
) -> str:  # all (S,)
    numbers = samples.numbers.tolist()
    last = max(int(numbers[-1]), 1)
    x_axis = Axis("decisions", 0, last, nice_ticks(0, last, 4))
    y_axis = Axis("competence (probability)", 0, 1, _SHARES)
    series = [
        Series("pool", 1, numbers, pool.tolist()),
        Series(title, 0, numbers, mean.tolist(), low.tolist(), high.tolist()),
    ]
    about = (
        f"{title}: posterior mean from {show(float(mean[0]))} to {show(float(mean[-1]))} over {show(last)} decisions."
    )
    return line_chart(name, title, about, series, x_axis, y_axis)
