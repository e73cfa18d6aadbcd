"""Numbers as people read them."""

from __future__ import annotations

import math


def count(value: float) -> str:
    """1234567 → 1.23 M; whole numbers below 10,000 stay as they are."""
    if value < 10_000:
        return f"{value:,.0f}"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:.0f} {unit}"
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes with a decimal unit: 1234567 → 1.23 MB."""
    return (
        f"{value:.0f} bytes"
        if value < 1000
        else f"{count(max(value, 10_000)) if value >= 10_000 else f'{value / 1e3:.3g} k'}B"
    )


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def short(value: float) -> str:
    """A figure with about four digits, as on an axis."""
    if not math.isfinite(value):
        return str(value)
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
