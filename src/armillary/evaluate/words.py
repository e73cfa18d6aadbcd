"""Numbers as people read them."""

from __future__ import annotations

import math

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def count(value: float) -> str:
    """1234567 → 1.23 M; numbers below 10,000 are written out."""
    return f"{value:,.0f}" if value < 9999.5 else _scaled(value)


def size(value: float) -> str:
    """Bytes with a decimal unit: 1234567 → 1.23 MB."""
    return f"{value:.0f} bytes" if value < 999.5 else f"{_scaled(value)}B"


def _scaled(value: float) -> str:
    scale, unit = next(((scale, unit) for scale, unit in UNITS if value >= scale * 0.9995), UNITS[-1])
    return f"{value / scale:.3g} {unit}" if value < 999.5 * scale else f"{value / scale:,.0f} {unit}"


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
