"""An endpoint behind a real HTTP server on this machine, without Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import uvicorn

from jobs.endpoint.app import make_app
from jobs.endpoint.config import EndpointConfig
from jobs.endpoint.endpoint import Endpoint, open_endpoint
from jobs.run import named_models

ENGINE = {"device": "cpu", "dtype": "float32", "num_threads": 1, "page_size": 16, "num_pages": 512, "max_num_seqs": 64}


@dataclass
class Live:
    url: str
    endpoint: Endpoint
    app: Any

    def client(self, api_key: str = "none needed", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, **{"max_retries": 0, **options})

    def is_empty(self, within_s: float = 5.0) -> bool:
        """Whether all places and pages are given back, or soon are."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            load = self.endpoint.desk.worker.load()
            if self.endpoint.desk.num_taken == load.num_running == load.num_waiting == load.num_pages_in_use == 0:
                return True
            time.sleep(0.02)
        return False


def settings(**sections: Any) -> EndpointConfig:
    """The shipped model, with sections laid over; each step is a piece of a stream of its own."""
    data = {
        "model": "demo",
        **sections,
        "engine": {**ENGINE, **sections.get("engine", {})},
        "limits": {"stream_interval_s": 0.0, **sections.get("limits", {})},
    }
    return EndpointConfig.model_validate(data).resolve(named_models())


@contextmanager
def live_endpoint(config: EndpointConfig, digests: tuple[str, ...] = ()) -> Iterator[Live]:
    endpoint = open_endpoint(config)
    app = make_app(endpoint, digests)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Live(f"http://127.0.0.1:{port}", endpoint, app)
    finally:
        server.should_exit = True
        thread.join(30)
