"""Line plots as inline SVG and bar plots as HTML, from plain numbers.

Only tick labels live inside the SVG: title, axis names and legend are HTML around it, so that they wrap on a narrow
screen instead of shrinking with the drawing. Colours and sizes are classes of `style.py`. Same input, same output.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from numbers import Integral

WIDTH, HEIGHT = 640, 320  # units of the SVG's own coordinates
LEFT, RIGHT, TOP, BOTTOM = 72, 14, 12, 30
COLOURS = 6  # classes s0...s5 in style.py
DASHES = ("", "7 4", "2 3", "9 3 2 3")  # a second cue beside the colour
MAX_POINTS = 1000  # per series: more than a screen resolves, and reports of long runs stay small

Number = float | int | None


@dataclass(frozen=True)
class Series:
    """One line: `y[i]` at `x[i]`. A `y` of None, NaN or infinity is a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[Number]

    def __post_init__(self):
        if len(self.x) != len(self.y):
            raise ValueError(f"series {self.name!r} has {len(self.x)} x values and {len(self.y)} y values")
        if not all(math.isfinite(x) for x in self.x):
            raise ValueError(f"series {self.name!r} has an x value that is not finite")


@dataclass(frozen=True)
class LinePlot:
    """Lines over a common x axis. With `log_y`, values that are not positive are gaps."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_y: bool = False


@dataclass(frozen=True)
class BarPlot:
    """One horizontal bar for each label, from zero, with its value in `unit` beside it; None and NaN have no bar."""

    title: str
    labels: Sequence[str]
    values: Sequence[Number]
    unit: str = ""

    def __post_init__(self):
        if len(self.labels) != len(self.values):
            raise ValueError(f"bar plot {self.title!r} has {len(self.labels)} labels and {len(self.values)} values")


def format_number(value: Number) -> str:
    """At most four significant digits; whole numbers in full with thousands separators. None is a dash."""
    if value is None:
        return "–"
    if isinstance(value, Integral):
        return f"{int(value):,}"
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) in [low, high], for low < high."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(
        factor for factor, limit in ((1, 1.5), (2, 3.5), (5, 7.5), (10, math.inf)) if raw / power < limit
    )
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # `+ 0.0` turns -0.0 into 0.0; the rounding removes the float noise of a multiple of the step.
    ticks = [round(i * step, 12 - math.floor(math.log10(step))) + 0.0 for i in range(first, last + 1)]
    return [min(max(tick, low), high) for tick in ticks]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], 1, 2 and 5 times them if few, linear ticks if fewer still; for 0 < low < high."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    ticks = [10.0**i for i in range(first, last + 1, max(math.ceil((last - first) / 6), 1))]
    if len(ticks) < 3:
        ladder = [factor * 10.0**i for i in range(first - 1, last + 1) for factor in (1, 2, 5)]
        ticks = [tick for tick in ladder if low <= tick <= high]
    return [min(max(tick, low), high) for tick in ticks] if len(ticks) >= 3 else linear_ticks(low, high)


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels that differ from each other and fit the margin: thousands as 20k unless the ticks span many magnitudes."""
    sizes = [abs(tick) for tick in ticks if tick]
    suffixes = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
    for least, unit, suffix in suffixes:
        if sizes and least <= max(sizes) < 1e12 and min(sizes) >= unit / 100:
            return [f"{tick / unit:.6g}{suffix}" if tick else "0" for tick in ticks]
    labels = [format_number(tick) for tick in ticks]
    digits = 5
    while len(set(labels)) < len(ticks) and digits <= 17:
        labels = [f"{tick:.{digits}g}" for tick in ticks]
        digits += 1
    return labels


def line_plot(plot: LinePlot) -> str:
    """The plot as an HTML figure: title, legend with last values, y axis name, SVG, x axis name."""
    drawn = [_finite(s, plot.log_y) for s in plot.series]
    points = [p for runs in drawn for run in runs for p in run]
    missing = sum(len(s.y) for s in plot.series) - len(points)
    legend = "".join(
        f'<li><svg class="key s{i % COLOURS}" viewBox="0 0 28 8" aria-hidden="true">'
        f'<path d="M0 4H28"{_dash(i)}/></svg>{escape(s.name)} <span class="last">{_last(runs)}</span></li>'
        for i, (s, runs) in enumerate(zip(plot.series, drawn, strict=True))
    )
    note = ""
    if missing:
        why = "not finite or not positive (log axis)" if plot.log_y else "not finite"
        note = f'<p class="note">{missing:,} of {len(points) + missing:,} values are not drawn: {why}.</p>'
    return (
        f'<figure class="plot"><figcaption>{escape(plot.title)}</figcaption><ul class="legend">{legend}</ul>'
        f'<p class="axis">{escape(plot.y_label)}{" (log)" if plot.log_y else ""}</p>'
        f'{_svg(plot, drawn, points)}<p class="axis x">{escape(plot.x_label)}</p>{note}</figure>'
    )


def bar_plot(plot: BarPlot) -> str:
    """The plot as an HTML figure with one row for each label."""
    finite = [float(v) for v in plot.values if v is not None and math.isfinite(v)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    span = (high - low) or 1.0
    rows = []
    for label, value in zip(plot.labels, plot.values, strict=True):
        bar, shown = "", format_number(value)
        if value is not None and math.isfinite(value):
            left, width = (min(value, 0.0) - low) / span * 100, abs(value) / span * 100
            bar = f'<i style="left:{left:.2f}%;width:{width:.2f}%"></i>'
            shown = f"{format_number(value)} {plot.unit}".strip()
        rows.append(f'<dt>{escape(label)}</dt><dd><span class="track">{bar}</span><b>{escape(shown)}</b></dd>')
    return f'<figure class="bars"><figcaption>{escape(plot.title)}</figcaption><dl>{"".join(rows)}</dl></figure>'


Point = tuple[float, float]


def _finite(series: Series, log_y: bool) -> list[list[Point]]:
    """Runs of consecutive values that can be drawn."""
    runs: list[list[Point]] = [[]]
    for x, y in zip(series.x, series.y, strict=True):
        if y is not None and math.isfinite(y) and (y > 0 or not log_y):
            runs[-1].append((float(x), float(y)))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _last(runs: list[list[Point]]) -> str:
    return format_number(runs[-1][-1][1]) if runs else "no values"


def _thin(run: list[Point], limit: int) -> list[Point]:
    """At most `limit` points: of each stretch its lowest and highest, so that spikes stay; the ends stay too."""
    if len(run) <= limit:
        return run
    stretches = max(limit // 2 - 1, 1)
    inner = run[1:-1]
    kept = [run[0]]
    for i in range(stretches):
        stretch = inner[len(inner) * i // stretches : len(inner) * (i + 1) // stretches]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return [*kept, run[-1]]


def _range(values: Iterable[float], pad: float) -> tuple[float, float]:
    """Smallest and largest value, widened by `pad` of the span, and by something when there is no span."""
    values = list(values) or [0.0, 1.0]
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    return low - pad * (high - low), high + pad * (high - low)


def _svg(plot: LinePlot, drawn: list[list[list[Point]]], points: list[Point]) -> str:
    scale = math.log10 if plot.log_y else float
    x_low, x_high = _range((x for x, _ in points), 0.0)
    y_low, y_high = _range((scale(y) for _, y in points), 0.04)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (right - LEFT)

    def down(y: float) -> float:
        return bottom - (scale(y) - y_low) / (y_high - y_low) * (bottom - TOP)

    parts = []
    y_ticks = log_ticks(10.0**y_low, 10.0**y_high) if plot.log_y else linear_ticks(y_low, y_high)
    for tick, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
        y = f"{down(tick):.1f}"
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{right}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y}" dy=".35em" text-anchor="end">{label}</text>')
    x_ticks = linear_ticks(x_low, x_high)
    for tick, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x = f"{across(tick):.1f}"
        parts.append(f'<path class="mark" d="M{x} {bottom}v5"/>')
        parts.append(f'<text class="tick" x="{x}" y="{bottom + 9}" dy=".8em" text-anchor="middle">{label}</text>')
    parts.append(f'<path class="frame" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    for i, runs in enumerate(drawn):
        limit = max(MAX_POINTS // len(runs), 4) if runs else 0
        lines, dots = [], []
        for run in runs:
            corners = [f"{across(x):.1f} {down(y):.1f}" for x, y in _thin(run, limit)]
            if len(corners) > 1:
                lines.append("M" + "L".join(corners))
            else:
                dots.append(f"M{corners[0]}h0")  # a round cap makes the empty stroke a dot
        parts.append(f'<g class="line s{i % COLOURS}">')
        parts.append(f'<path d="{"".join(lines)}"{_dash(i)}/>' if lines else "")
        parts.append(f'<path class="dot" d="{"".join(dots)}"/>' if dots else "")
        parts.append("</g>")
    if not points:
        parts.append(
            f'<text class="tick" x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">no values to draw</text>'
        )
    spoken = "; ".join(f"{s.name}: last value {_last(runs)}" for s, runs in zip(plot.series, drawn, strict=True))
    label = escape(f"{plot.title}: {plot.y_label} over {plot.x_label}. {spoken}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _dash(index: int) -> str:
    # The dash changes with the colour, and once more each time the colours repeat.
    dash = DASHES[(index + index // COLOURS) % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""
