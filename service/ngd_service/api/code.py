"""/code/{sha256}: the archives of users' code, which jobs name."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import FileResponse

from ngd_service.api.container import ContainerDep
from ngd_service.errors import NotFoundError
from ngd_workers.contract.spec.code import SHA256_PATTERN

__all__ = ["CODE_PREFIX", "router"]

CODE_PREFIX = "/api/v1/code"
ARCHIVE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
Sha256 = Annotated[str, Path(pattern=SHA256_PATTERN, description="SHA-256 of the archive, in lower-case hex.")]
router = APIRouter(prefix=CODE_PREFIX, tags=["code"])


@router.head("/{sha256}", status_code=204, response_class=Response)
async def has_code(container: ContainerDep, sha256: Sha256) -> None:
    """Answers 204 if the archive is here, so that it need not be sent, and 404 if it is not."""
    if not await asyncio.to_thread(container.files.archives.holds, sha256):
        raise NotFoundError(f"there is no code {sha256}; send it by PUT")


@router.get("/{sha256}", response_class=FileResponse)
async def get_code(container: ContainerDep, sha256: Sha256) -> FileResponse:
    """Returns the archive, a tar.gz, or the bytes of a Range of it."""
    await has_code(container, sha256)
    path = container.files.archives.path(sha256)
    return FileResponse(path, media_type="application/gzip", filename=path.name, headers={"ETag": f'"{sha256}"'})


@router.put("/{sha256}", status_code=204, response_class=Response, openapi_extra=ARCHIVE_BODY)
async def put_code(request: Request, container: ContainerDep, sha256: Sha256) -> None:
    """Stores a tar.gz of a folder of code; a second time changes nothing. Jobs may name it as `code.sha256` then."""
    await container.files.archives.take(sha256, request.stream())
