"""Ends with 0 if what runs in this container answers: `healthcheck.py service` or `healthcheck.py ray [AGENT_PORT]`.

Only the standard library, and no HTTP proxy: the question never leaves the container.
"""

import http.client
import os
import sys

TIMEOUT_S = 3.0
USAGE = "usage: healthcheck.py service | ray [AGENT_PORT]"
# Ray's agent on each node, head or worker, tells of the node's raylet; KubeRay asks it the same. It needs no token.
RAY_AGENT_PORT = "52365"


def main(arguments: list[str]) -> str | None:
    """Returns what is wrong, or None."""
    match arguments:
        case ["service"]:
            port, path = os.environ.get("NGD_PORT") or "8000", "/healthz"
        case ["ray", *rest] if len(rest) <= 1:
            port, path = rest[0] if rest else RAY_AGENT_PORT, "/api/healthz"
        case _:
            return USAGE
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"nothing healthy answers on port {port}: {error!r}"
    return None if status == http.client.OK else f"GET {path} on port {port} answered {status}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
