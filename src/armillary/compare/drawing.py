"""Drawings of a comparison as inline SVG: intervals, Pareto fronts, curves by length.

A variant has one colour and one shape everywhere, and its name stands beside it, so that colour is
never needed to tell two apart. Colours are classes of `compare.css`, for light and dark pages.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from armillary.evaluate.charts import text, ticks
from armillary.evaluate.words import count, short

COLOURS = 8
WIDE, SMALL = 960, 470
LETTER = 6.9  # width of one at the size of labels, a little too much on purpose
DASHES = ("", "7 4", "2 4", "9 3 2 3")

Show = Callable[[float], str]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Row:
    """One line of an interval plot. wide: the interval over both, None for none; thin: (name, low, high)
    of the intervals over one thing alone; said: what is written at the end."""

    name: str
    tone: int
    value: float
    wide: tuple[float, float] | None
    thin: Sequence[tuple[str, float, float]] = ()
    said: str = ""


@dataclass(frozen=True)
class Spot:
    """One variant in a plane; low, high: of y."""

    name: str
    tone: int
    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """One variant's line; note: added to its name."""

    name: str
    tone: int
    points: Sequence[tuple[float, float]]
    note: str = ""


def marker(tone: int, x: float, y: float, size: float = 5.0, title: str = "") -> str:
    """The shape of a variant at a place."""
    s, kind = size, f"v v{tone % COLOURS}"
    inner = f"<title>{text(title)}</title>" if title else ""
    shapes = [
        lambda: f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{s:.1f}">{inner}</circle>',
        lambda: _polygon(kind, inner, [(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]),
        lambda: _polygon(kind, inner, [(x, y - 1.25 * s), (x + 1.2 * s, y + s), (x - 1.2 * s, y + s)]),
        lambda: _polygon(kind, inner, [(x, y - 1.4 * s), (x + 1.4 * s, y), (x, y + 1.4 * s), (x - 1.4 * s, y)]),
        lambda: _polygon(kind, inner, [(x, y + 1.25 * s), (x + 1.2 * s, y - s), (x - 1.2 * s, y - s)]),
        lambda: _polygon(kind, inner, _star(x, y, 1.5 * s, 0.6 * s, 5)),
        lambda: _polygon(kind, inner, _star(x, y, 1.4 * s, 0.5 * s, 4)),
        lambda: _polygon(kind, inner, _star(x, y, 1.25 * s, 1.08 * s, 3)),
    ]
    return shapes[(tone + tone // COLOURS) % len(shapes)]()


def intervals(
    title: str,
    unit: str,
    rows: Sequence[Row],
    *,
    zero: str = "",
    band: tuple[float, float, str] | None = None,
    show: Show = short,
) -> str:
    """Means with intervals, one line each; zero: what 0 means, drawn as a line; band: (low, high, name)."""
    if not rows:
        return ""
    left, right, top, line = 24 + LETTER * min(30, max(len(row.name) for row in rows)), 190, 14, 34
    height = top + line * len(rows) + 40
    ends = [row.value for row in rows] + [end for row in rows if row.wide for end in row.wide]
    ends += [end for row in rows for _, low, high in row.thin for end in (low, high)]
    ends += [0.0] if zero else []
    ends += list(band[:2]) if band else []
    low, high = _room(min(ends), max(ends))

    def px(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDE - left - right)

    bottom = top + line * len(rows)
    said = "; ".join(f"{row.name} {row.said or show(row.value)}" for row in rows)
    parts = [f"<title>{text(title)}</title><desc>{text(f'{unit}: {said}.')}</desc>"]
    if band:
        a, b = px(band[0]), px(band[1])
        parts.append(f'<rect class="band" x="{a:.1f}" y="{top}" width="{b - a:.1f}" height="{bottom - top}"/>')
        label = text(band[2])
        parts.append(f'<text class="tick" x="{(a + b) / 2:.1f}" y="{top + 4}" text-anchor="middle">{label}</text>')
    for tick in ticks(low, high, 6):
        parts.append(f'<line class="grid" x1="{px(tick):.1f}" x2="{px(tick):.1f}" y1="{top}" y2="{bottom}"/>')
        label = text(show(tick))
        parts.append(f'<text class="tick" x="{px(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{label}</text>')
    if zero:
        parts.append(f'<line class="level" x1="{px(0):.1f}" x2="{px(0):.1f}" y1="{top}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{px(0):.1f}" y="{bottom + 34}" text-anchor="middle">{text(zero)}</text>')
    for number, row in enumerate(rows):
        y = top + line * (number + 0.5)
        parts.append(
            f'<text class="name" x="{left - 14:.0f}" y="{y + 4:.1f}" text-anchor="end">{_cut(row.name)}</text>'
        )
        if row.wide:
            a, b = px(row.wide[0]), px(row.wide[1])
            parts.append(
                f'<line class="whisk s{row.tone % COLOURS}" x1="{a:.1f}" x2="{b:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
        for place, (what, a, b) in enumerate(row.thin):
            at = y + 8 + 4 * place
            dash = f' stroke-dasharray="{DASHES[2]}"' if place else ""
            parts.append(
                f'<line class="hair" x1="{px(a):.1f}" x2="{px(b):.1f}" y1="{at:.1f}" y2="{at:.1f}"{dash}>'
                f"<title>{text(f'{row.name}, {what}: {show(a)} to {show(b)}')}</title></line>"
            )
        parts.append(marker(row.tone, px(row.value), y, 5, f"{row.name}: {row.said or show(row.value)}"))
        parts.append(
            f'<text class="said" x="{WIDE - right + 12}" y="{y + 4:.1f}">{text(row.said or show(row.value))}</text>'
        )
    return _figure(title, unit, WIDE, height, parts)


def front(
    title: str, unit: str, spots: Sequence[Spot], best: Sequence[str], *, x_is: str, y_is: str, rising: bool, show: Show
) -> str:
    """Quality (y, less is better) against a cost (x); rising: more x is better, as for a speed. best:
    names on the front, which is drawn as a staircase through them."""
    if len(spots) < 2:
        return ""
    width, height, left, right, top, bottom = SMALL, 320, 62, 18, 16, 50
    logarithmic = max(s.x for s in spots) > 8 * min(s.x for s in spots) > 0
    fx: Callable[[float], float] = math.log10 if logarithmic else float
    low, high = _room(min(fx(s.x) for s in spots), max(fx(s.x) for s in spots), 0.12)
    ys = [y for s in spots for y in (s.y, s.low, s.high) if y is not None]
    floor, ceiling = _room(min(ys), max(ys), 0.1)

    def px(x: float) -> float:
        return left + (fx(x) - low) / (high - low) * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (y - floor) / (ceiling - floor) * (height - top - bottom)

    said = "; ".join(f"{s.name}: {show(s.x)}, {s.y:.3f}" for s in spots)
    parts = [f"<title>{text(title)}</title><desc>{text(f'{x_is}, then {y_is}. {said}.')}</desc>"]
    parts += _frame(width, height, left, right, top, bottom, px, py, (low, high), (floor, ceiling), logarithmic, show)
    parts.append(f'<text class="tick" x="{(left + width - right) / 2:.0f}" y="{height - 8}" text-anchor="middle">')
    parts.append(f"{text(x_is)} {'→ better' if rising else '(less is better ←)'}</text>")
    chosen = sorted((s for s in spots if s.name in best), key=lambda s: s.x)
    if chosen:
        # Walk towards what is reached at more cost: the staircase bounds what some variant attains.
        steps = [(px(chosen[0].x), py(chosen[0].y))]
        for before, after in itertools.pairwise(chosen):
            corner = (px(before.x), py(after.y)) if rising else (px(after.x), py(before.y))
            steps += [corner, (px(after.x), py(after.y))]
        path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in steps)
        parts.append(f'<path class="front" d="{path}"/>')
    taken: list[Box] = [(px(s.x) - 8, py(s.y) - 8, px(s.x) + 8, py(s.y) + 8) for s in spots]
    for spot in spots:
        x, y = px(spot.x), py(spot.y)
        if spot.low is not None and spot.high is not None:
            a, b = py(spot.low), py(spot.high)
            parts.append(
                f'<line class="bar-y s{spot.tone % COLOURS}" x1="{x:.1f}" x2="{x:.1f}" y1="{a:.1f}" y2="{b:.1f}"/>'
            )
        parts.append(marker(spot.tone, x, y, 5.5, f"{spot.name}: {show(spot.x)}, {spot.y:.4f}"))
    for spot in spots:
        parts.append(
            _label(_short_name(spot.name), px(spot.x), py(spot.y), taken, (left, top, width - 4, height - bottom))
        )
    return _figure(title, unit, width, height, parts)


def curves(
    title: str,
    unit: str,
    lines: Sequence[Curve],
    *,
    x_is: str,
    show: Show,
    logarithmic: bool = True,
    show_x: Show = count,
) -> str:
    """Values by length (or by another count), both axes logarithmic unless told otherwise."""
    lines = [line for line in lines if len(line.points) > 1]
    if not lines:
        return ""
    width, height, left, right, top, bottom = SMALL, 300, 66, 18, 14, 46
    f: Callable[[float], float] = math.log10 if logarithmic else float
    if logarithmic:
        lines = [Curve(c.name, c.tone, [(x, y) for x, y in c.points if x > 0 and y > 0], c.note) for c in lines]
    xs, ys = [f(x) for c in lines for x, _ in c.points], [f(y) for c in lines for _, y in c.points]
    low, high = min(xs), max(xs)
    floor, ceiling = _room(min(ys), max(ys))

    def px(x: float) -> float:
        return left + (f(x) - low) / (high - low or 1) * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (f(y) - floor) / (ceiling - floor) * (height - top - bottom)

    said = "; ".join(f"{c.name} from {show(c.points[0][1])} to {show(c.points[-1][1])} {c.note}".strip() for c in lines)
    parts = [f"<title>{text(title)}</title><desc>{text(f'{unit}, by {x_is}: {said}.')}</desc>"]
    marks = sorted({x for c in lines for x, _ in c.points}) if logarithmic else None
    parts += _frame(
        width, height, left, right, top, bottom, px, py, (low, high), (floor, ceiling), False, show_x,
        logarithmic_y=logarithmic, show_y=show, marks=marks,
    )  # fmt: skip
    parts.append(
        f'<text class="tick" x="{(left + width - right) / 2:.0f}" y="{height - 8}" text-anchor="middle">'
        f"{text(x_is)}</text>"
    )
    for c in lines:
        path = "M" + "L".join(f"{px(x):.1f},{py(y):.1f}" for x, y in c.points)
        dash = DASHES[c.tone % len(DASHES)]
        parts.append(
            f'<path class="trace s{c.tone % COLOURS}" d="{path}"' + (f' stroke-dasharray="{dash}"/>' if dash else "/>")
        )
        every = max(1, len(c.points) // 8)
        for x, y in [*c.points[::every], c.points[-1]]:
            parts.append(marker(c.tone, px(x), py(y), 3.6, f"{c.name}: {show(y)} at {show_x(x)}"))
    return _figure(title, unit, width, height, parts, keys=[(c.name, c.tone, c.note) for c in lines])


def keys(entries: Sequence[tuple[str, int, str]]) -> str:
    """A legend: shape, colour and name of each variant."""
    items = "".join(
        f'<span><svg class="sign" viewBox="0 0 16 16" aria-hidden="true">{marker(tone, 8, 8, 4.6)}</svg>'
        f"{text(name)}{f' <i>{text(note)}</i>' if note else ''}</span>"
        for name, tone, note in entries
    )
    return f'<p class="keys">{items}</p>'


# -- parts


def _figure(
    title: str, unit: str, width: float, height: float, parts: Sequence[str], keys: Sequence[tuple[str, int, str]] = ()
) -> str:
    legend = _legend(keys) if keys else ""
    wide = ' class="wide"' if width == WIDE else ""
    return (
        f'<figure class="chart"><figcaption><b>{text(title)}</b> <span>{text(unit)}</span></figcaption>{legend}'
        f'<div class="scroll"><svg{wide} viewBox="0 0 {width:.0f} {height:.0f}" role="img">{"".join(parts)}</svg>'
        "</div></figure>"
    )


def _legend(entries: Sequence[tuple[str, int, str]]) -> str:
    return keys(entries)


def _frame(
    width: float,
    height: float,
    left: float,
    right: float,
    top: float,
    bottom: float,
    px: Callable[[float], float],
    py: Callable[[float], float],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    logarithmic_x: bool,
    show_x: Show,
    *,
    logarithmic_y: bool = False,
    show_y: Show = short,
    marks: Sequence[float] | None = None,
) -> list[str]:
    """Grid and ticks. Ranges are in the axes' own units (logarithms where they are logarithmic)."""
    parts = []
    for y in _log_ticks(*y_range) if logarithmic_y else ticks(*y_range):
        at = py(y)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{text(show_y(y))}</text>')
    chosen = marks if marks is not None else _log_ticks(*x_range) if logarithmic_x else ticks(*x_range, 4)
    end = -math.inf
    for x in chosen:
        label, at = show_x(x), px(x)
        half = LETTER * len(label) / 2
        if at - half < end + 8:
            continue  # no room for this one
        end = at + half
        anchor = "end" if end > width - 2 else "middle"
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{height - bottom + 18:.0f}" text-anchor="{anchor}">'
            f"{text(label)}</text>"
        )
    return parts


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between 10^low and 10^high, thinned out over long ranges."""
    factors = (1, 2, 5) if high - low < 2.2 else (1,)
    step = 1 if high - low < 7 else 2
    powers = range(math.floor(low), math.ceil(high) + 1, step)
    return [f * 10.0**p for p in powers for f in factors if low - 1e-9 <= math.log10(f * 10.0**p) <= high + 1e-9]


def _room(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    around = (high - low) or abs(high) * 0.1 or 1.0
    return low - share * around, high + share * around


def _label(name: str, x: float, y: float, taken: list[Box], inside: Box) -> str:
    """The name beside its mark, where it covers nothing if there is such a place."""
    wide = LETTER * len(name)
    places = [
        (x + 11, y + 4, "start", (x + 11, y - 8, x + 11 + wide, y + 7)),
        (x - 11, y + 4, "end", (x - 11 - wide, y - 8, x - 11, y + 7)),
        (x, y - 13, "middle", (x - wide / 2, y - 25, x + wide / 2, y - 10)),
        (x, y + 23, "middle", (x - wide / 2, y + 11, x + wide / 2, y + 26)),
        (x + 9, y - 13, "start", (x + 9, y - 25, x + 9 + wide, y - 10)),
        (x + 9, y + 21, "start", (x + 9, y + 9, x + 9 + wide, y + 24)),
        (x - 9, y - 13, "end", (x - 9 - wide, y - 25, x - 9, y - 10)),
        (x - 9, y + 21, "end", (x - 9 - wide, y + 9, x - 9, y + 24)),
    ]

    def cost(box: Box) -> float:
        outside = max(0.0, inside[0] - box[0]) + max(0.0, box[2] - inside[2])
        outside += max(0.0, inside[1] - box[1]) + max(0.0, box[3] - inside[3])
        return 100 * outside + sum(_overlap(box, other) for other in taken)

    at, over, anchor, box = min(places, key=lambda place: cost(place[3]))
    taken.append(box)
    return f'<text class="name" x="{at:.1f}" y="{over:.1f}" text-anchor="{anchor}">{text(name)}</text>'


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _short_name(name: str, most: int = 30) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _cut(name: str) -> str:
    return text(_short_name(name))


def _polygon(kind: str, inner: str, points: Sequence[tuple[float, float]]) -> str:
    return f'<polygon class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}">{inner}</polygon>'


def _star(x: float, y: float, outer: float, inner: float, tips: int) -> list[tuple[float, float]]:
    found = []
    for i in range(2 * tips):
        radius, angle = (inner if i % 2 else outer), math.pi * i / tips - math.pi / 2
        found.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
    return found
