"""Numbers and texts as people read them."""

from __future__ import annotations


def amount(value: float, unit: str = "") -> str:
    """12_345_678 → '12.3 M'; with a unit, '12.3 MB'."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".strip()


def clock(seconds: float) -> str:
    """3725 → '1:02:05', 65 → '1:05'."""
    whole = round(max(0.0, seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def printable(text: str) -> str:
    """Control characters as \ufffd: what a model writes must not steer the terminal."""
    return "".join(letter if letter in "\n\t" or letter.isprintable() else "\ufffd" for letter in text)
