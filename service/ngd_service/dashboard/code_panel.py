"""The code of a job that is submitted from a page: files of the reader's, packed and sent as `ngd submit` does."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from nicegui import ui
from nicegui.events import MultiUploadEventArguments

from ngd_service.client.client import AsyncClient, ServiceError
from ngd_service.client.code import Archive, Shipment, pack
from ngd_service.client.unpacking import unpack_upload
from ngd_service.dashboard.theme import panel, pick_files
from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec import Code
from ngd_workers.contract.spec.code import MAX_ARCHIVE_BYTES

__all__ = ["CodePanel"]

HELP = (
    "The folder with your functions, as one .zip or .tar.gz, or its files by themselves. It is packed as ngd submit "
    "packs it: what .gitignore and code.exclude name stays out."
)


class CodePanel:
    """Takes an upload. code_of: returns the spec's `code`, {} if it has none; use: is told the archive's SHA-256."""

    def __init__(
        self,
        api: AsyncClient,
        code_of: Callable[[], Mapping[str, Any]],
        use: Callable[[str], Awaitable[None]],
    ) -> None:
        self.api = api
        self._code_of = code_of
        self._use = use
        with panel("Code") as head, ui.element("div").classes("panel-body stack"):
            ui.label(HELP).classes("muted")
            self.state = ui.label().classes("digits").props("role=status")
            self.trouble = ui.label().classes("refusal").props("role=alert")
            self.upload = ui.upload(
                multiple=True, auto_upload=True, max_total_size=MAX_ARCHIVE_BYTES, on_multi_upload=self._take
            )
            self.upload.on_rejected(lambda: self._refuse(f"more than {MAX_ARCHIVE_BYTES >> 20} MiB is no code"))
            self.upload.classes("hidden-upload").props("hide-upload-btn")
        with head:
            ui.element("div").classes("spread")
            self.choose = ui.button("Choose files", icon="upload_file", color=None).props("outline no-caps dense")
            self.choose.classes("plain").on("click", js_handler=pick_files(self.upload))
        self.sent: dict[str, str] = {}  # what is said of an archive, by its SHA-256

    def show(self) -> None:
        """Says whether the spec's code is at the service."""
        code = self._code_of()
        sha256 = code.get("sha256")
        if sha256:
            self.state.set_text(self.sent.get(sha256, f"The archive {str(sha256)[:12]}, which the service has."))
        elif code:
            self.state.set_text("The job names a folder: choose its files, for the service does not have it yet.")
        else:
            self.state.set_text("This job has no code of its own.")

    async def _take(self, event: MultiUploadEventArguments) -> None:
        self.trouble.set_text("")
        self.state.set_text("Packing ...")
        try:
            uploads = {file.name: await file.read() for file in event.files}
            archive = await asyncio.to_thread(_packed, uploads, dict(self._code_of()))
            was_there = await self.api.send_code(archive)
        except (SpecError, ServiceError) as error:
            self._refuse(str(error))
        else:
            said = str(Shipment({}, archive, was_there))
            self.sent[archive.sha256] = said[:1].upper() + said[1:]
            await self._use(archive.sha256)
        self.upload.reset()

    def _refuse(self, why: str) -> None:
        self.trouble.set_text(why)
        self.show()


def _packed(uploads: dict[str, bytes], given: dict[str, Any]) -> Archive:
    """Returns the archive of what was uploaded. given: the spec's `code`, whose patterns count. Raises: SpecError."""
    with tempfile.TemporaryDirectory(prefix="ngd-code-") as place:
        root = Path(place).resolve()
        unpack_upload(uploads, root)
        patterns = {name: given[name] for name in ("include", "exclude", "requirements") if name in given}
        try:
            code = Code.model_validate(patterns, strict=True)
        except ValueError as error:
            raise SpecError("code.include, code.exclude or code.requirements is wrong; correct it first") from error
        directory = str(given.get("directory") or ".")
        is_inside = (root / directory).resolve().is_relative_to(root) and (root / directory).is_dir()
        return pack(code.model_copy(update={"directory": directory if is_inside else "."}), root)
