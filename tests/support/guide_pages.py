"""The fenced blocks of a page of docs/, in order, and the way to follow them as a reader would."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

BLOCK = re.compile(r"^```(?: ?\{ \.(\w+)(?: title=\"([^\"]+)\")? \}|(\w+))\n(.*?)^```", re.MULTILINE | re.DOTALL)
INCLUDED = re.compile(r'--8<-- "([^"]+)"\n')
NUMBER = re.compile(r"\d+(\\\.\d+)?(e-?\d+)?")
RUN_S = 200


@dataclass(frozen=True)
class Block:
    """language: sh, python, diff, yaml or text; title: the file that a reader writes it to, empty if none."""

    language: str
    title: str
    text: str


def blocks(page: str) -> list[Block]:
    """Returns the fenced blocks of docs/<page>, with the files that they include."""
    found = BLOCK.findall((ROOT / "docs" / page).read_text())
    return [
        Block(by_brace or plain, title, INCLUDED.sub(lambda name: (ROOT / name[1]).read_text(), text))
        for by_brace, title, plain, text in found
    ]


def shell(command: str, folder: Path, **variables: str) -> str:
    """Runs it in the folder, with the programs of this environment; returns both outputs. It must succeed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        ["sh", "-ec", command],
        cwd=folder,
        env=os.environ | {"PATH": path} | variables,
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout}{ended.stderr}"
    return ended.stdout + ended.stderr


def changed(text: str, diff: str) -> str:
    """Returns the text after a diff in which "..." stands for any lines; each part of it must be found."""
    for part in diff.split("...\n"):
        lines = part.splitlines()
        old = "".join(f"{line[1:]}\n" for line in lines if line[:1] in " -")
        new = "".join(f"{line[1:]}\n" for line in lines if line[:1] in " +")
        assert text.count(old) == 1, f"not found once: {old}"
        text = text.replace(old, new)
    return text


def lines_missing(shown: str, output: str) -> list[str]:
    """Returns the lines of a page that the output lacks; numbers, and the widths of gaps, may be others."""
    wanted = {line: re.sub(r"(\\ )+", r"\\s+", re.escape(line)) for line in shown.splitlines() if line != "..."}
    return [line for line, form in wanted.items() if not re.search(NUMBER.sub(r"[\\d.e-]+", form), output)]
