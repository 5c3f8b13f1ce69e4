"""Numbers as people read them."""

from __future__ import annotations


def size(num_bytes: float) -> str:
    """Decimal units, three digits: `0 B`, `61.1 GB`."""
    value, units = float(num_bytes), ("B", "kB", "MB", "GB", "TB", "PB")
    for unit in units:
        if abs(value) < 999.5 or unit == units[-1]:
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 100 else f"{value:.3g} {unit}"


def seconds(value: float) -> str:
    """`12.3 ms`, `1.25 s`."""
    if value >= 1:
        return f"{value:.3g} s"
    return f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} us"
