"""Curves as inline SVG and bars as HTML: no script and no library is needed to see them.

Colours are classes of `report.css`, so that light and dark pages share one drawing. All text is escaped.
"""

from __future__ import annotations

import html
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from armillary.evaluate.words import count, short

SMALL, WIDE = (500, 240), (960, 300)  # sizes near those on the page, so that letters keep theirs
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 34
MOST_POINTS = 300

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve. tone: a colour of the page (a, b, c); dots: mark each point."""

    name: str
    points: Sequence[Point]
    tone: str = "a"
    dots: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar; low and high: ends of an interval; ours: drawn in the accent colour."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    ours: bool = False


def text(value: object) -> str:
    """Escaped for HTML, inside and outside of attributes."""
    return html.escape(str(value), quote=True)


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` finite points, each the mean of as many neighbours."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(finite) <= most:
        return finite
    edges = [len(finite) * i // most for i in range(most + 1)]
    groups = [finite[a:b] for a, b in itertools.pairwise(edges)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers inside [low, high], about `wanted` of them."""
    span = high - low
    rough = span / max(1, wanted)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def line_chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    lines: Sequence[tuple[str, float]] = (),
    from_zero: bool = False,
    wide: bool = False,
    show: Callable[[float], str] = short,
) -> str:
    """A chart over training steps, or "" when there is nothing to draw.

    lines: (name, height) of levels to compare with; from_zero: the y axis begins at 0; wide: as
    wide as the page; show: how values are written.
    """
    drawn = [Series(s.name, thinned(s.points), s.tone, s.dots) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return ""
    width, height = WIDE if wide else SMALL
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points]
    left, right = min(0.0, min(xs)), max(xs)
    low, high = min(ys), max(ys)
    for _, level in lines:
        low, high = min(low, level), max(high, level)
    if from_zero:
        low = min(0.0, low)
    spread = high - low or abs(high) or 1.0
    low, high = low - (0 if from_zero and low == 0 else 0.06 * spread), high + 0.06 * spread
    if right <= left:
        right = left + 1

    def px(x: float) -> float:
        return LEFT + (x - left) / (right - left) * (width - LEFT - RIGHT)

    def py(y: float) -> float:
        return height - BOTTOM - (y - low) / (high - low) * (height - TOP - BOTTOM)

    parts = [f"<title>{text(title)}</title><desc>{text(_spoken(drawn, unit, show))}</desc>"]
    for y in ticks(low, high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{text(show(y))}</text>')
    for x in ticks(left, right, 6):
        anchor = "end" if px(x) > width - RIGHT - 12 else "middle"
        label = text(count(x))
        parts.append(f'<text class="tick" x="{px(x):.1f}" y="{height - 12}" text-anchor="{anchor}">{label}</text>')
    for s in drawn:
        path = "M" + "L".join(f"{px(x):.1f},{py(y):.1f}" for x, y in s.points)
        parts.append(f'<path class="curve {s.tone}" d="{path}"/>')
        if s.dots or len(s.points) == 1:
            parts += [f'<circle class="dot {s.tone}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.5"/>' for x, y in s.points]
    for name, level in lines:
        at = py(level)
        parts.append(f'<line class="level" x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        above = at - 6 if at - 6 > TOP + 8 else at + 15
        label = text(f"{name}: {show(level)}")
        parts.append(f'<text class="note" x="{width - RIGHT}" y="{above:.1f}" text-anchor="end">{label}</text>')
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{height - BOTTOM}" x1="0" x2="0" visibility="hidden"/>')
    hover = [
        {
            "name": s.name,
            "points": [[round(px(x), 1), round(py(y), 1), f"{x:,.0f}", show(y)] for x, y in s.points],
        }
        for s in drawn
    ]
    wide_class = ' class="wide"' if wide else ""
    keys = ""
    if len(drawn) > 1:
        keys = "".join(f'<span><i class="key {s.tone}"></i>{text(s.name)}</span>' for s in drawn)
        keys = f'<p class="keys">{keys}</p>'
    return (
        f'<figure class="chart" data-hover="{text(json.dumps(hover))}">'
        f"<figcaption><b>{text(title)}</b> <span>{text(unit)}</span></figcaption>{keys}"
        f'<div class="scroll"><svg{wide_class} viewBox="0 0 {width} {height}" role="img">'
        f"{''.join(parts)}</svg></div>"
        '<div class="tip" hidden></div></figure>'
    )


def bar_chart(bars: Sequence[Bar], unit: str) -> str:
    """Horizontal bars from 0, each with its value; an interval is drawn as a thin line over the bar's end."""
    top = max(max(bar.value, bar.high or 0.0) for bar in bars) or 1.0

    def share(value: float) -> str:
        return f"{100 * value / top:.2f}%"

    rows = []
    for bar in bars:
        whisker = ""
        if bar.low is not None and bar.high is not None:
            low, wide = share(bar.low), share(bar.high - bar.low)
            whisker = f'<i class="whisker" style="left:{low};width:{wide}"></i>'
        rows.append(
            f'<div class="bar{" ours" if bar.ours else ""}"><span class="name">{text(bar.name)}</span>'
            f'<span class="track"><i class="fill" style="width:{share(bar.value)}"></i>{whisker}</span>'
            f'<span class="value">{bar.value:.3f}</span></div>'
        )
    return f'<div class="bars" role="group" aria-label="{text(unit)}">{"".join(rows)}</div>'


def _spoken(series: Sequence[Series], unit: str, show: Callable[[float], str]) -> str:
    """The chart in one sentence, for those who cannot see it."""
    said = [
        f"{s.name} goes from {show(s.points[0][1])} at step {s.points[0][0]:,.0f} "
        f"to {show(s.points[-1][1])} at step {s.points[-1][0]:,.0f}"
        for s in series
    ]
    return f"{unit}: {'; '.join(said)}."
