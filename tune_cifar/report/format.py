"""Numbers as people read them."""

from __future__ import annotations

from datetime import timedelta


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds without fractions."""
    return str(timedelta(seconds=round(seconds)))


def format_percent(accuracy: float | None) -> str:
    """An accuracy for people; a dash where there is none."""
    return "-" if accuracy is None else f"{100 * accuracy:.2f} %"


def format_value(value: object) -> str:
    """A knob's value, floats to three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
