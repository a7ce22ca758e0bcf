"""The Python SDK: `from ngd_service.client import Client`, or AsyncClient. Start at client.py."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ngd_service.client.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ngd_service.client import client

    return getattr(client, name)
