"""Numbers as a person reads them: 3 to 4 significant digits, binary bytes, relative times."""

import math
from datetime import UTC, datetime

__all__ = ["NOTHING", "ago", "binary_bytes", "counted", "duration", "moment", "number", "percent", "seconds"]

NOTHING = "—"
BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def number(value: float | None) -> str:
    """Four significant digits, whole with thousands separators from 1,000 on; a dash for None."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    if 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def counted(count: int, name: str) -> str:
    """A number of things: 1 worker, 1,000 samples."""
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def percent(share: float | None) -> str:
    """A share in [0, 1] as percent with two decimals; a dash for None or NaN."""
    return NOTHING if share is None or not math.isfinite(share) else f"{100 * share:.2f}%"


def duration(seconds: float | None) -> str:
    """The two largest units, such as 1 h 05 min; a dash for None."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, left_s = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {left_s:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"


def seconds(value: float) -> str:
    """A short time to a tenth of a second, from a minute on as duration() has it."""
    return f"{value:.1f} s" if value < 59.95 else duration(value)


def ago(moment: datetime | None, now: datetime | None = None) -> str:
    """How long before now, in one unit: 20 s ago, 3 min ago; a dash for None. A page is sent each change of it."""
    if moment is None:
        return NOTHING
    seconds = max(0.0, ((now or datetime.now(UTC)) - moment).total_seconds())
    for size_s, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size_s:
            return f"{int(seconds // size_s)} {unit} ago"
    tens = int(seconds // 10) * 10
    return f"{tens} s ago" if tens else "just now"


def moment(time: datetime) -> str:
    """A date and a time of day in UTC, to the second."""
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def binary_bytes(count: float | None) -> str:
    """Bytes in the largest binary unit that keeps the value at or above 1: 1.5 MiB."""
    if count is None:
        return NOTHING
    power = min(int(math.log2(count) // 10), len(BINARY_UNITS) - 1) if count >= 1 else 0
    return f"{count / 1024**power:.4g} {BINARY_UNITS[power]}"
