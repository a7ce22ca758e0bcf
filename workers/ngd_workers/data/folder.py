"""Folders that a spec names: a relative path starts at the data directory."""

from pathlib import Path

from ngd_workers.contract.errors import DataNotFoundError

__all__ = ["find_folder"]


def find_folder(directory: str, data_dir: Path | None) -> Path:
    """Returns the folder that `data.directory` names. Raises: DataNotFoundError."""
    folder = Path(directory)
    if not folder.is_absolute():
        folder = (data_dir or Path()) / folder
    if not folder.is_dir():
        raise DataNotFoundError(
            f"no data directory {folder} (data.directory is {directory!r}); "
            "set NGD_DATA_DIR or --data-dir to the folder that holds it, or give an absolute path"
        )
    return folder
