"""The cards that plans are counted from, made where the service trains jobs on its own machine and so has torch."""

import json
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path
from subprocess import PIPE
from typing import Any

from ngd_dist.cost.card import ModelCard
from ngd_service.client.unpacking import unpack
from ngd_service.dispatchers.archives import Archives
from ngd_service.errors import InvalidSpecError
from ngd_service.resources import ProblemItem
from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec import JobSpec

__all__ = ["ModelCards"]

BUILD_S = 180.0  # for torch to be loaded, the data to be opened and the model to be run once
MOST_CARDS = 64
COUNTED = ("model", "data", "task", "optimizer", "code", "env", "seed")  # the parts that a card depends on


class ModelCards:
    """Makes cards in processes of their own, one at a time, and keeps the newest. is_here: whether jobs train here."""

    def __init__(self, archives: Archives, data_dir: Path | None, *, is_here: bool) -> None:
        self._archives = archives
        self._data_dir = data_dir
        self._is_here = is_here and find_spec("torch") is not None
        self._turn = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._is_closed = False
        self._cards: OrderedDict[str, ModelCard] = OrderedDict()

    def of(self, spec: JobSpec) -> ModelCard | None:
        """Returns the card of the job's model; None: jobs train elsewhere. Raises: InvalidSpecError."""
        if not self._is_here:
            return None
        self._archives.check(spec)
        content = spec.model_dump(mode="json")
        key = json.dumps({name: content[name] for name in COUNTED})
        with self._turn:
            if key not in self._cards:
                self._cards[key] = self._made(content)
                if len(self._cards) > MOST_CARDS:
                    self._cards.popitem(last=False)
            return self._cards[key]

    def _made(self, content: dict[str, Any]) -> ModelCard:
        with tempfile.TemporaryDirectory(prefix="ngd-card-") as place:
            folder = Path(place)
            if content["code"] is not None:
                (folder / "code").mkdir()
                try:
                    unpack(self._archives.path(content["code"]["sha256"]).read_bytes(), folder / "code")
                except SpecError as error:
                    raise _refusal(str(error)) from error
                content = content | {"code": content["code"] | {"directory": "code"}}
            (folder / "spec.json").write_text(json.dumps(content))
            command = [sys.executable, "-m", "ngd_workers.launch.model_card", str(folder / "spec.json")]
            command += ["--data-dir", str(self._data_dir)] if self._data_dir else []
            return self._answer(command, folder)

    def _answer(self, command: list[str], folder: Path) -> ModelCard:
        with subprocess.Popen(command, cwd=folder, stdout=PIPE, stderr=PIPE, text=True) as process:
            self._process = process
            if self._is_closed:
                process.kill()
            try:
                out, err = process.communicate(timeout=BUILD_S)
            except subprocess.TimeoutExpired as error:
                process.kill()
                raise _refusal(f"the model was not built and run once within {BUILD_S:g} s") from error
            finally:
                self._process = None
        if process.returncode:
            raise _refusal((err.strip().splitlines() or ["the model could not be built"])[-1])
        return ModelCard.model_validate_json(out.splitlines()[-1])

    def close(self) -> None:
        """Ends the card that is being made: the service stops."""
        self._is_closed = True
        if (process := self._process) is not None:
            process.kill()


def _refusal(detail: str) -> InvalidSpecError:
    hint = "correct the job, or give a card that was made elsewhere: ngd plan JOB --write-card FILE"
    return InvalidSpecError(detail, [ProblemItem(pointer="/card", code="no_card", detail=detail, hint=hint)])
