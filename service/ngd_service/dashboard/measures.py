"""How numbers of one kind are written: by the browser on axes and in tooltips, by Python in words and tables."""

from collections.abc import Callable
from dataclasses import dataclass

from ngd_service.client.units import binary_bytes, number, percent

__all__ = ["BYTES", "COUNT", "PLAIN", "RATE", "SECONDS", "SHARE", "Unit"]


@dataclass(frozen=True, slots=True)
class Unit:
    """One kind of number: its name, a function of the browser, and one of Python."""

    name: str
    browser: str
    words: Callable[[float], str]


SIGNIFICANT = (
    "v => { if (v == null) return 'not finite'; const a = Math.abs(v), four = +(+v).toPrecision(4); "
    "return a < 1e3 ? String(four) : a < 1e9 ? (+v).toLocaleString('en-US', {maximumFractionDigits: 1}) : "
    "four.toExponential(); }"
)
PLAIN = Unit("", SIGNIFICANT, number)
RATE = Unit("samples/s", SIGNIFICANT, lambda value: f"{number(value)} samples/s")
COUNT = Unit("", "v => (+v).toLocaleString('en-US')", lambda value: f"{value:,.0f}")
SHARE = Unit("%", "v => v == null ? 'not finite' : +(100 * v).toFixed(2) + '%'", percent)
SECONDS = Unit(
    "seconds",
    "v => v == null ? '' : Math.abs(v) >= 1 || !v ? +v.toPrecision(3) + ' s' : +(1000 * v).toPrecision(3) + ' ms'",
    lambda value: number(value) + " s" if value >= 1 else number(1000 * value) + " ms",
)
BYTES = Unit(
    "bytes",
    "v => { if (!v) return v == null ? '' : '0 B'; const p = Math.min(4, Math.floor(Math.log2(v) / 10)); "
    "return +(v / 1024 ** p).toPrecision(3) + ' ' + ['B', 'KiB', 'MiB', 'GiB', 'TiB'][p]; }",
    binary_bytes,
)
