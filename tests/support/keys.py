"""Folders of API keys, as people and Kubernetes make them."""

import os
from pathlib import Path

ALICE, BOB = "alice-0123456789-0123456789", "bob-9876543210-9876543210"


def write_keys(folder: Path, **keys: str) -> Path:
    """Returns the folder, with a file for each holder."""
    folder.mkdir(parents=True, exist_ok=True)
    for holder, key in keys.items():
        (folder / holder).write_text(f"{key}\n")
    return folder


def swap_volume(mount: Path, version: str, **keys: str) -> Path:
    """Returns the mount of a secret after its content has become `keys`: kubelet's way, by renaming one link."""
    write_keys(mount / f"..{version}", **keys)
    fresh = mount / "..data_tmp"
    fresh.symlink_to(f"..{version}")
    os.replace(fresh, mount / "..data")
    for name in {path.name for path in mount.iterdir() if not path.name.startswith(".")} - keys.keys():
        (mount / name).unlink()
    for name in keys:
        if not (mount / name).is_symlink():
            (mount / name).symlink_to(f"..data/{name}")
    return mount
