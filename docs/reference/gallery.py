"""Writes docs/gallery.md: each example, what it is about, and what it printed. Run: make pictures"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "gallery.md"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SHOWN = 4  # of the lines, the last ones
# What frameworks print on their own behalf.
CHATTER = re.compile(
    r"Warning|warn\(|^\[|^W\d|HPU|TPU|GPU available|^ *$|litmodels|it/s|LOCAL_RANK|num_workers|'train_"
)
HEAD = """<!-- Written by docs/reference/gallery.py, which runs each example. -->
# Gallery

Whole programs, each of at most some 60 lines, and the last lines that each printed. Losses are those of one machine; a
test runs them all.
"""


def main() -> None:
    sections = [HEAD]
    for path in sorted((ROOT / "examples").glob("*.py")):
        print(path.name, flush=True)
        sections.append(section(path))
    PAGE.write_text("\n".join(sections))


def section(path: Path) -> str:
    """Returns a heading, the command, the last lines of the output, and the code, which opens on a click."""
    told = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    about, run = told.partition(". ")[0], re.search(r"Run: (.*\.py)", told)
    command = run[1] if run else f"python examples/{path.name}"
    launcher = TORCHRUN if "torchrun" in command else ()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                                "PYTHONWARNINGS": "ignore", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    ended = subprocess.run([sys.executable, *launcher, path], cwd=os.environ.get("TMPDIR", "/tmp"), env=environment,
                           capture_output=True, text=True, check=True)  # fmt: skip
    lines = [line for line in ended.stdout.splitlines() if not CHATTER.search(line)]
    return "\n".join(
        [
            f"## {about.rstrip('.')}\n",
            f"```sh\n{command}\n```\n",
            f"```text\n{'...' + chr(10) if len(lines) > SHOWN else ''}{chr(10).join(lines[-SHOWN:])}\n```\n",
            '<details markdown="1">\n<summary>The program</summary>\n',
            f'``` {{ .python }}\n--8<-- "examples/{path.name}"\n```\n',
            "</details>\n",
        ]
    )


if __name__ == "__main__":
    main()
