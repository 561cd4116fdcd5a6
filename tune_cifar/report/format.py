"""Numbers as people read them."""

from __future__ import annotations

import math
from datetime import timedelta


def format_seconds(seconds: float) -> str:
    """Return hours, minutes and seconds without fractions."""
    return str(timedelta(seconds=round(seconds)))


def format_percent(fraction: float | None) -> str:
    """Return a fraction such as an accuracy in percent; a dash for None and NaN."""
    return "-" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.2f} %"


def format_value(value: object) -> str:
    """Return a knob's value, floats with three significant digits; nothing for a missing one."""
    if value is None or str(value) in ("nan", "<NA>"):
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
