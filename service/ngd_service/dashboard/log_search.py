"""Looks through the whole log of an attempt, a part at a time, however long it is."""

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

from ngd_service.dashboard.ansi import plain

__all__ = ["Matches", "around_first_error", "first_error", "is_error", "matches"]

ERROR = re.compile(
    r"Traceback \(most recent call last\)|\b[A-Z]\w*(Error|Exception)\b|\b(ERROR|CRITICAL|FATAL)\b|\b[Ee]rror:|"
    r"Segmentation fault|core dumped|\bKilled\b|out of memory"
)

Parts = AsyncIterator[list[str]]


@dataclass
class Matches:
    """The last lines that hold a text, and how many do, of how many."""

    lines: deque[str]
    num_matching: int = 0
    num_lines: int = 0

    def add(self, part: list[str], wanted: str) -> None:
        for line in part:
            self.num_lines += 1
            if wanted in plain(line).casefold():
                self.num_matching += 1
                self.lines.append(line)


async def matches(parts: Parts, wanted: str, most: int) -> Matches:
    """Returns the last `most` lines that hold the text, in whichever case."""
    found = Matches(deque(maxlen=most))
    async for part in parts:
        await asyncio.to_thread(found.add, part, wanted.casefold())
    return found


async def around_first_error(parts: Parts, before: int, most: int) -> tuple[list[str], int, int] | None:
    """Returns up to `most` lines around the first that looks like an error, its place in them, and its number.

    None: no line does.
    """
    earlier: deque[str] = deque(maxlen=before)
    shown: list[str] = []
    place, num_lines, number = 0, 0, 0
    async for part in parts:
        if not shown:
            at = await asyncio.to_thread(first_error, part)
            if at is None:
                earlier.extend(part)
                num_lines += len(part)
                continue
            earlier.extend(part[:at])
            place, number = len(earlier), num_lines + at + 1
            shown = [*earlier, *part[at:]]
        else:
            shown += part
        if len(shown) >= most:
            break
    return (shown[:most], place, number) if shown else None


def is_error(line: str) -> bool:
    """Whether a line looks like an error."""
    return ERROR.search(plain(line)) is not None


def first_error(lines: list[str]) -> int | None:
    """Returns the place of the first line that looks like an error."""
    return next((place for place, line in enumerate(lines) if is_error(line)), None)
