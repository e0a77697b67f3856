"""The study's curves as a picture: calibration error while outcomes are delivered."""

import os

from moe_posterior.escape import label
from moe_posterior.report.figures import ARM_STYLES
from moe_posterior.results.figures import canvas, save
from moe_posterior.results.intervals import mean_interval
from moe_posterior.training.study.values import Records, by_seed

__all__ = ["SHOWN", "online_figure"]

SHOWN = (
    ("vanilla", "softmax"),
    ("robust filtered", "softmax"),
    ("vanilla", "posterior"),
    ("robust filtered", "posterior"),
)


def online_figure(records: Records, path: str | os.PathLike[str]) -> None:
    """Draw hard ECE against outcomes delivered, one panel a setting, with 95 % intervals over seeds.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    settings = list(dict.fromkeys(record["setting"] for record in records))
    figure = canvas(width=0.8 + 3.0 * len(settings), height=3.4)
    axes = figure.subplots(1, len(settings), squeeze=False, sharey=True)[0]
    for axis, setting in zip(axes, settings, strict=True):
        own = [record for record in records if record["setting"] == setting and record["calibrator"] == "online"]
        delivered = sorted({int(record["metric"].rsplit("_", 1)[1]) for record in own})
        for (method, gate), style in zip(SHOWN, ARM_STYLES, strict=True):
            curves = [by_seed(own, method=method, gate=gate, subset="hard", metric=f"ece_after_{m}") for m in delivered]
            found = [
                (m, mean_interval(list(curve.values()))) for m, curve in zip(delivered, curves, strict=True) if curve
            ]
            places = [delivered.index(m) for m, _ in found]  # evenly spaced: 0 has no place on a logarithmic axis
            axis.errorbar(
                places,
                [one.mean for _, one in found],
                [one.half_width for _, one in found],
                label=label(f"{method}, {gate}"),
                capsize=2,
                markersize=4,
                **style,
            )
        axis.set_xticks(range(len(delivered)), [str(m) for m in delivered])
        axis.set_title(label(setting.replace("_", " ")), fontsize=10)
        axis.set_xlabel("outcomes delivered")
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("hard ECE")
    axes[-1].legend(fontsize=7, frameon=False)
    save(figure, path)
