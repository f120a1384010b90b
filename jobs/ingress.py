"""How requests come in: Serve's settings that are only read from the environment, before Serve is imported.

Serve's own proxy is Python, and each piece of a stream crosses two processes. HAProxy, which comes with Ray Serve,
hands connections straight to the replicas, at a fraction of the cost; but it may notice late that a client has left
which waits for a whole answer (11 s seen, with a client that sends head and body apart), so it has to be asked for.

Knows no Ray; called by `shoal serve` for a Ray of its own. On another's cluster the same variables are set where that
is started.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

DIGESTS = "SHOAL_API_KEY_DIGESTS"
"""Of API keys, for the front door; only digests ever leave the starting process."""

KEY_FILE = "SHOAL_API_KEY_FILE"
"""A file of keys or digests for the front door, as `access.api_key_file` names one for the replicas."""

MAX_IN_FLIGHT = "SHOAL_MAX_IN_FLIGHT"
"""Requests for completions that the front door lets in at the same time."""


def choose_ingress(folder: Path) -> None:
    """Set Serve's variables for this process and the Ray that it starts. With RAY_SERVE_ENABLE_HA_PROXY=1 there,
    HAProxy gets ports of its own, and `folder`, this endpoint's alone, for its sockets."""
    os.environ.update(
        {
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "jobs.endpoint.front_door:middlewares",
            # The application runs in the replica's own loop: no hop between threads per piece of a stream.
            "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        }
    )
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
        return
    stats, metrics, fallback = _free_ports(3)
    os.environ.update(
        {
            # By default these are the same for every Ray on the machine.
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
            # Time for HAProxy to hear that a replica ends. All of them are on this machine; 30 s is Serve's default.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        }
    )


def set_front_door(digests: Sequence[str], max_in_flight: int) -> None:
    """Tell the front doors of a Ray that is started from here whom to let in, and how many; before it is started."""
    os.environ[DIGESTS] = ",".join(digests)
    os.environ[MAX_IN_FLIGHT] = str(max_in_flight)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
