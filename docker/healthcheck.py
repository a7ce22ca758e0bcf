"""Ends with 0 if what runs in this container answers: `healthcheck.py service` or `healthcheck.py ray`.

Only the standard library, and no HTTP proxy: the question never leaves the container.
"""

import http.client
import os
import sys

TIMEOUT_S = 3.0
# Ray's agent on each node, head or worker, tells of the node's raylet; KubeRay asks it the same. It needs no token.
RAY_AGENT_PORT = "52365"
ASKED = {
    "service": (os.environ.get("NGD_PORT") or "8000", "/healthz"),
    "ray": (os.environ.get("NGD_RAY_AGENT_PORT") or RAY_AGENT_PORT, "/api/healthz"),
}


def main(arguments: list[str]) -> str | None:
    """Returns what is wrong, or None."""
    if len(arguments) != 1 or arguments[0] not in ASKED:
        return f"healthcheck.py: give one of {', '.join(ASKED)}, got {arguments}"
    port, path = ASKED[arguments[0]]
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        status = connection.getresponse().status
    except OSError as error:
        return f"nothing answers on port {port}: {error}"
    return None if status == 200 else f"GET {path} on port {port} answered {status}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
