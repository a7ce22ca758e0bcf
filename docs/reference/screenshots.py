"""Takes the pictures in docs/pictures: the dashboard on the runs of `make demo`, which it makes if there are none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from deploy import demo
from ngd_service.client.client import Client
from ngd_service.client.comparison import address

PICTURES = Path(__file__).parents[1] / "pictures"
WIDTH_PX, HEIGHTS_PX = 1280, {"jobs": 420, "compare": 1380, "job": 1060}


def main() -> None:
    """Writes each page in light and in dark."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("no chromium to take pictures with: apt-get install chromium")
    if not (demo.HOME / "ngd.sqlite").exists():
        subprocess.run([sys.executable, "deploy/demo.py"], cwd=demo.ROOT, check=True)
    PICTURES.mkdir(exist_ok=True)
    with demo.service_of(demo.HOME) as client, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for name, page in pages(client).items():
            for scheme in ("light", "dark"):
                take(browser, page, scheme, PICTURES / f"{name}-{scheme}.png", HEIGHTS_PX[name])
        browser.close()


def pages(client: Client) -> dict[str, str]:
    """Returns the address of each page by the name of its picture; the demo's first job is that of NGD."""
    ids = [job.id for job in reversed(client.list_jobs(page_size=2).jobs)]
    url = client.base_url
    return {"jobs": f"{url}/?selected={','.join(ids)}", "compare": address(url, ids), "job": f"{url}/jobs/{ids[0]}"}


def take(browser: Browser, url: str, scheme: str, path: Path, height_px: int) -> None:
    """Writes the page as it is once it says that all of it is there."""
    page = browser.new_page(viewport={"width": WIDTH_PX, "height": height_px}, color_scheme=scheme)
    page.goto(url)
    page.locator(".fresh.final, .fresh.live").wait_for()
    for chart in page.locator(".nicegui-echart:visible").all():
        chart.locator("path").first.wait_for(state="attached")
    page.screenshot(path=path)
    page.close()
    sys.stdout.write(f"{os.path.relpath(path)}\n")


if __name__ == "__main__":
    main()
