"""The scaling of a plan as a picture: characters for a terminal, SVG for a file. No library: a few lines and texts."""

from collections.abc import Sequence
from math import floor, log2, log10

from ngd_dist.cost.plan import Plan, ScalingPoint

__all__ = ["svg", "text_chart"]

ROWS, COLUMNS = 12, 55
WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 48, 52
# Distinct in grey too, and in line style.
SERIES = (
    ("ideal", "#888888", "2 4", "."),
    ("same samples on each rank", "#1f5fa8", "", "*"),
    ("same samples in all", "#c2571a", "8 4", "o"),
)

Points = Sequence[tuple[int, float]]


def text_chart(plan: Plan) -> str:
    """Returns samples a second over ranks, both in powers, in plain characters."""
    series = _series(plan)
    lowest, highest = _range(series)
    last = max(ranks for points in series for ranks, _ in points)
    grid = [[" "] * (COLUMNS + 1) for _ in range(ROWS + 1)]
    for points, (_, _, _, mark) in zip(series, SERIES, strict=True):
        for ranks, rate in points:
            column = round(COLUMNS * log2(ranks) / max(1.0, log2(last)))
            row = ROWS - round(ROWS * (log10(rate) - lowest) / (highest - lowest))
            grid[min(max(row, 0), ROWS)][column] = mark
    lines = ["samples a second"]
    for index, marks in enumerate(grid):
        exponent = highest - index * (highest - lowest) / ROWS
        label = f"{_short(10**exponent):>9}" if index % 4 == 0 else " " * 9
        lines.append(f"{label} |{''.join(marks)}".rstrip())
    axis, ticks = " " * 10 + "+" + "-" * (COLUMNS + 1), [" "] * (COLUMNS + 8)
    for ranks in _ticks(last):
        place = round(COLUMNS * log2(ranks) / max(1.0, log2(last)))
        ticks[place : place + len(f"{ranks}")] = list(f"{ranks}")
    legend = "   ".join(f"{mark} {name}" for (name, _, _, mark), points in zip(SERIES, series, strict=True) if points)
    return "\n".join([*lines, axis, (" " * 11 + "".join(ticks)).rstrip() + "  ranks", f"  {legend}"])


def svg(plan: Plan, title: str) -> str:
    """Returns the same as an SVG document, whose text says in words what it shows."""
    series = _series(plan)
    lowest, highest = _range(series)
    last = max(ranks for points in series for ranks, _ in points)

    def x(ranks: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * log2(ranks) / max(1.0, log2(last))

    def y(rate: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (log10(rate) - lowest) / (highest - lowest)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12" role="img">',
        f"<title>{_escaped(title)}</title>",
        f"<desc>{_escaped(_words(plan))}</desc>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{_escaped(title)}</text>',
    ]
    for ranks in _ticks(last):
        parts.append(
            f'<line x1="{x(ranks):.1f}" x2="{x(ranks):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#e4e4e4"/>'
        )
        parts.append(f'<text x="{x(ranks):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{ranks:,}</text>')
    for exponent in range(floor(lowest), floor(highest) + 1):
        if lowest <= exponent <= highest:
            at = y(10.0**exponent)
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e4e4e4"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_short(10.0**exponent)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 12}" text-anchor="middle">ranks</text>')
    parts.append(f'<text transform="rotate(-90)" x="{-HEIGHT / 2}" y="16" text-anchor="middle">samples a second</text>')
    legend = LEFT
    for points, (name, colour, dashes, _) in zip(series, SERIES, strict=True):
        if not points:
            continue
        path = " ".join(f"{x(ranks):.1f},{y(rate):.1f}" for ranks, rate in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>'
        )
        parts.append(
            f'<line x1="{legend}" x2="{legend + 24}" y1="36" y2="36" stroke="{colour}" stroke-width="2" '
            f'stroke-dasharray="{dashes}"/><text x="{legend + 30}" y="40">{name}</text>'
        )
        legend += 60 + 7 * len(name)  # a letter is some 7 wide
    return "\n".join([*parts, "</svg>", ""])


def _series(plan: Plan) -> list[Points]:
    first = plan.scaling[0].samples_per_second
    ideal = [(point.ranks, first * point.ranks) for point in plan.scaling]
    return [ideal, _rates(plan.scaling), _rates(plan.strong_scaling)]


def _rates(points: Sequence[ScalingPoint]) -> list[tuple[int, float]]:
    return [(point.ranks, point.samples_per_second) for point in points]


def _range(series: Sequence[Points]) -> tuple[float, float]:
    """Returns the powers of ten between which all rates lie."""
    powers = [log10(rate) for points in series for _, rate in points]
    return min(powers) - 0.05, max(*powers, min(powers) + 1) + 0.05


def _ticks(last: int) -> list[int]:
    return [2**power for power in range(0, int(log2(last)) + 1, 2)]


def _short(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _words(plan: Plan) -> str:
    return "Samples a second with the same samples on each rank: " + ", ".join(
        f"{point.ranks} ranks {point.samples_per_second:.4g}" for point in plan.scaling
    )


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
