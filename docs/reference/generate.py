"""Writes the pages of docs/ that are made from the code: python docs/reference/generate.py

`--check` writes nothing, names the pages that are not current, and then ends with status 1.
"""

import sys
from pathlib import Path

import configuration_page
import job_page
import service_pages

DOCS = Path(__file__).parents[1]
PAGES = {
    "configuration.md": configuration_page.page,
    "reference/job.md": job_page.page,
    "reference/command.md": service_pages.command,
    "reference/rest.md": service_pages.rest,
    "reference/service-settings.md": service_pages.settings,
    "reference/events.md": service_pages.events,
    "reference/metrics.md": service_pages.metrics,
}


def main(arguments: list[str]) -> int:
    stale = [name for name, page in PAGES.items() if not (DOCS / name).exists() or (DOCS / name).read_text() != page()]
    if "--check" in arguments:
        print("\n".join(stale))
        return int(bool(stale))
    for name in stale:
        (DOCS / name).write_text(PAGES[name]())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
