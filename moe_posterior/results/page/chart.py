"""Line charts as inline SVG, readable without colour: every series has its own marker and dash pattern.

Colours are variables of the style sheet, so a drawing follows the page from light to dark. A chart draws points, intervals and axes
and computes nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moe_posterior import escape

WIDTH, HEIGHT = 400, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 26, 46
STRIP = 62  # height of the optional bars below a chart
GAP = 10
COLOURS = 6
DASHES = ("", "6 3", "2 2.5", "8 3 2 3", "1 3")
SHAPES: tuple[Callable[[float, float], str], ...] = (
    lambda x, y: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.8"',
    lambda x, y: f'<rect x="{x - 3.4:.1f}" y="{y - 3.4:.1f}" width="6.8" height="6.8"',
    lambda x, y: f'<path d="M{x:.1f} {y - 4.4:.1f}l4.2 7.6h-8.4z"',
    lambda x, y: f'<path d="M{x:.1f} {y - 4.8:.1f}l4.8 4.8l-4.8 4.8l-4.8 -4.8z"',
    lambda x, y: f'<path d="M{x:.1f} {y + 4.4:.1f}l4.2 -7.6h-8.4z"',
)


@dataclass(frozen=True)
class Axis:
    """One direction of a chart, with its unit in the label."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False  # log(1 + value): counts from 0 on

    def place(self, value: float) -> float:
        """Position of a value: 0 at the low end, 1 at the high end, clipped to that range.

        >>> Axis("n", 0, 99, [], log=True).place(9)
        0.5
        """
        scale = math.log1p if self.log else float
        low, high = scale(self.low), scale(self.high)
        return min(1.0, max(0.0, (scale(value) - low) / ((high - low) or 1.0)))


@dataclass(frozen=True)
class Series:
    """One line of a chart; a point whose x or y is None or NaN is left out."""

    name: str
    style: int  # the same number gives the same colour, marker and dash in every chart
    x: Sequence[float | None]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    faint: Sequence[bool] = ()  # points with too little data to join the line
    bars: Sequence[float] = field(default=())  # shares in [0, 1] of equal-width bins, drawn in a strip below


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values inside [low, high], about ``count`` of them.

    >>> nice_ticks(0, 0.23)
    [0.0, 0.05, 0.1, 0.15, 0.2]
    """
    raw = (high - low) / max(count - 1, 1) or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda one: abs(one - raw))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def legend(series: Sequence[tuple[str, int]]) -> str:
    """Names beside their line and marker, as a list that wraps."""
    items = "".join(
        f'<li><svg viewBox="0 0 34 14" aria-hidden="true">{_path([(1, 7), (33, 7)], style)}{_mark(17, 7, style)}</svg>'
        f"<span>{escape.html(name)}</span></li>"
        for name, style in series
    )
    return f'<ul class="legend">{items}</ul>'


def line_chart(
    name: str,  # unique on the page: names the title and the description
    title: str,
    description: str,
    series: Sequence[Series],
    x_axis: Axis,
    y_axis: Axis,
    *,
    diagonal: bool = False,
    whiskers: bool = False,
) -> str:
    """Lines with markers, and their intervals as bands or whiskers, as an SVG element.

    Args:
        name: an id, unique on the page.
        title: shown above the chart and read out first by screen readers.
        description: what the chart shows, for screen readers.
        series: what to draw; if any has bars, a strip is added below.
        x_axis, y_axis: ranges and ticks.
        diagonal: draw y = x; both axes must share a range.
        whiskers: draw intervals as whiskers, for points that are separate estimates; otherwise as bands.

    >>> axis = Axis("share", 0, 1, [0, 0.5, 1])
    >>> svg = line_chart("a", "A", "one point", [Series("s", 0, [0.5], [0.5])], axis, axis)
    >>> svg.count("<circle"), '<title id="a-title">A</title>' in svg
    (1, True)
    """
    strip = any(one.bars for one in series)
    height = HEIGHT + (STRIP + GAP if strip else 0)
    place = _placer(x_axis, y_axis)
    drawn = [_axes(x_axis, y_axis, height, strip)]
    if diagonal:
        (x0, y0), (x1, y1) = place(x_axis.low, y_axis.low), place(x_axis.high, y_axis.high)
        drawn.append(f'<path class="ideal" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>')
    drawn += [_series(one, place, whiskers) for one in series]
    if strip:
        drawn.append(_strip(series, height - BOTTOM))
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape.html(title)}</title><desc id="{name}-desc">{escape.html(description)}</desc>'
        f'<text class="name" x="{LEFT}" y="16">{escape.html(_clip(title))}</text>{"".join(drawn)}</svg>'
    )


def _clip(title: str, most: int = 46) -> str:
    return title if len(title) <= most else title[: most - 1] + "…"


def _placer(x_axis: Axis, y_axis: Axis) -> Callable[[float, float], tuple[float, float]]:
    across, up = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return lambda x, y: (LEFT + across * x_axis.place(x), HEIGHT - BOTTOM - up * y_axis.place(y))


def _axes(x_axis: Axis, y_axis: Axis, height: int, strip: bool) -> str:
    place = _placer(x_axis, y_axis)
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{floor - TOP}"/>']
    for tick in x_axis.ticks:
        x, _ = place(tick, y_axis.low)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{floor}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - BOTTOM + 15}" text-anchor="middle">{tick:g}</text>')
    for tick in y_axis.ticks:
        _, y = place(x_axis.low, tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    middle_x, middle_y = (LEFT + right) / 2, (TOP + floor) / 2
    parts.append(
        f'<text class="unit" x="{middle_x}" y="{height - 12}" text-anchor="middle">{escape.html(x_axis.label)}</text>'
    )
    parts.append(_upright(middle_y, y_axis.label))
    if strip:
        parts.append(_upright(floor + GAP + STRIP / 2, "share (%)"))
    return "".join(parts)


def _upright(y: float, label: str) -> str:
    return f'<text class="unit" text-anchor="middle" transform="translate(14 {y:.1f}) rotate(-90)">{escape.html(label)}</text>'


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _series(one: Series, place: Callable[[float, float], tuple[float, float]], whiskers: bool) -> str:
    points: list[tuple[float, float, int]] = []
    for index, (x, y) in enumerate(zip(one.x, one.y, strict=True)):
        if x is not None and y is not None and _known(x) and _known(y):
            points.append((*place(x, y), index))
    faint = {index for index, is_faint in enumerate(one.faint) if is_faint}
    ends = _ends(one, place)
    parts = []
    if whiskers:
        for x, _, index in points:
            if index in ends:
                top, bottom = ends[index][2], ends[index][1]
                parts.append(
                    f'<path class="whisker{" faint" if index in faint else ""}" '
                    f'd="M{x:.1f} {top:.1f}V{bottom:.1f}M{x - 3:.1f} {top:.1f}h6M{x - 3:.1f} {bottom:.1f}h6" '
                    f"{_ink(one.style)}/>"
                )
    elif len(ends) > 1:
        corners = [(x, high) for x, _, high in ends.values()] + [(x, low) for x, low, _ in reversed(ends.values())]
        outline = "L".join(f"{x:.1f} {y:.1f}" for x, y in corners)
        parts.append(f'<path class="band" d="M{outline}z" fill="var(--series-{one.style % COLOURS})"/>')
    parts.append(_path([(x, y) for x, y, index in points if index not in faint], one.style))
    many = len(points) > 40  # markers would hide a dense curve: every tenth of it keeps one
    for position, (x, y, index) in enumerate(points):
        if not many or position % (len(points) // 10) == 0:
            parts.append(_mark(x, y, one.style, faint=index in faint))
    return f'<g aria-label="{escape.html(one.name)}">{"".join(parts)}</g>'


def _ends(
    one: Series, place: Callable[[float, float], tuple[float, float]]
) -> dict[int, tuple[float, float, float]]:  # point -> x, and y of the low and the high end of its interval
    ends = {}
    for index, (x, low, high) in enumerate(zip(one.x, one.low, one.high, strict=False)):
        if x is not None and low is not None and high is not None and all(map(_known, (x, low, high))):
            ends[index] = (place(x, low)[0], place(x, low)[1], place(x, high)[1])
    return ends


def _strip(series: Sequence[Series], floor: float) -> str:
    """Bars of each series beside each other, scaled to the highest."""
    barred = [one for one in series if one.bars]
    highest = max(max(one.bars) for one in barred) or 1.0
    across = WIDTH - LEFT - RIGHT
    parts = [f'<rect class="frame" x="{LEFT}" y="{floor - STRIP}" width="{across}" height="{STRIP}"/>']
    parts.append(
        f'<text class="tick" x="{LEFT - 5}" y="{floor - STRIP + 9}" text-anchor="end">{100 * highest:.0f}</text>'
    )
    parts.append(f'<text class="tick" x="{LEFT - 5}" y="{floor:.0f}" text-anchor="end">0</text>')
    for order, one in enumerate(barred):
        width = across / len(one.bars) / len(barred)
        for index, share in enumerate(one.bars):
            if share:
                x, tall = LEFT + (index * len(barred) + order) * width, (STRIP - 4) * share / highest
                parts.append(
                    f'<rect class="bar" x="{x + 0.05 * width:.1f}" y="{floor - tall:.1f}" width="{0.9 * width:.1f}" '
                    f'height="{tall:.1f}" fill="var(--series-{one.style % COLOURS})"/>'
                )
    return "".join(parts)


def _ink(style: int) -> str:
    return f'stroke="var(--series-{style % COLOURS})"'


def _path(points: Sequence[tuple[float, float]], style: int) -> str:
    if len(points) < 2:
        return ""
    dash = DASHES[style % len(DASHES)]
    pattern = f' stroke-dasharray="{dash}"' if dash else ""
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="curve" d="M{line}" {_ink(style)}{pattern}/>'


def _mark(x: float, y: float, style: int, faint: bool = False) -> str:
    shape = SHAPES[style % len(SHAPES)](x, y)
    return f'{shape} class="mark{" faint" if faint else ""}" fill="var(--series-{style % COLOURS})"/>'
