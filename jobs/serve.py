"""`shoal serve`: the endpoint on Ray Serve; and `build`, which `serve run deploy/serve.yaml` and KubeRay call.

The only file that speaks Ray Serve. A replica holds one engine; `jobs.endpoint` is everything it answers with.
"""

from __future__ import annotations

import ipaddress
import math
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import serve
from ray.util.metrics import Gauge

from actors.weights.checkpoint import check_model
from jobs.endpoint.app import make_app
from jobs.endpoint.config import EndpointConfig, load_endpoint
from jobs.endpoint.endpoint import open_endpoint
from jobs.endpoint.keys import read_key_digests
from jobs.ingress import set_front_door
from jobs.run import named_models
from pipeline.graph import close_ray, start_ray
from pipeline.settings_file import JobError

APPLICATION = "shoal"

_SPARE_CALLS = 64
"""Requests that a replica takes beyond its places, so that it is the endpoint that refuses them, with 429."""

_METRICS_S = 5.0
"""Between two looks at the metrics; Ray itself reports every ten seconds."""

_ENDING_S = 30
"""For a replica to go once it is empty."""


class Replica:
    """One engine and its routes."""

    def __init__(self, config: EndpointConfig, digests: tuple[str, ...]) -> None:
        self._endpoint = open_endpoint(config)
        self._digests = digests
        self._gauges: dict[str, Gauge] = {}
        name = serve.get_replica_context().replica_tag
        threading.Thread(target=self._tell_ray, args=[name], name="metrics", daemon=True).start()

    def __serve_build_asgi_app__(self) -> Any:
        return make_app(self._endpoint, self._digests)

    def _tell_ray(self, replica: str) -> None:
        """Hand what /metrics shows to Ray again and again: there all replicas are to be seen, each by its name."""
        while True:
            for name, labels, value in self._endpoint.desk.metrics.samples():
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, tag_keys=("replica", *labels))
                self._gauges[name].set(value, {"replica": replica, **labels})
            time.sleep(_METRICS_S)

    def check_health(self) -> None:
        """Serve asks this every few seconds, and replaces a replica that raises."""
        failure = self._endpoint.desk.worker.failure
        if failure is not None:
            raise RuntimeError(f"the engine broke: {type(failure).__name__}: {failure}")


deployment: Any = serve.deployment(name=APPLICATION)(serve.ingress()(Replica))


def run_serve(path: str | None, overrides: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT, then finish what is running. JobError for wrong settings, before Ray starts."""
    config = load_endpoint(path, {}, overrides).resolve(named_models())
    check_model(config.model)
    digests = _read_keys(config, is_private=_is_loopback(config.host))
    stop = threading.Event()
    set_front_door(digests, _max_in_flight(config))
    is_ours = start_ray()
    try:
        serve.start(proxy_location="HeadOnly", http_options=http_options(config))
        serve.run(application(config, digests), name=APPLICATION, route_prefix="/")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        who = f"{len(digests)} API keys" if digests else "no API key needed"
        print(f"{config.name} answers on http://{config.host}:{config.port}/v1 ({who}); Ctrl-C ends it", flush=True)
        while not stop.wait(1.0):
            pass
        print("finishing what is running", flush=True)
    finally:
        _end_application(config.replicas.drain_s)
        if is_ours:
            close_ray()
    return 0


def build(args: Mapping[str, Any]) -> serve.Application:
    """The import_path of a Serve configuration. `args`: the endpoint's settings; `config` names a file below them.

    Host and port are Serve's own there, so an endpoint without keys has to say `access.allow_anonymous: true`.
    """
    settings = {key: value for key, value in args.items() if key != "config"}
    config = load_endpoint(args.get("config"), settings).resolve(named_models())
    check_model(config.model)
    return application(config, _read_keys(config, is_private=False))


def application(config: EndpointConfig, digests: tuple[str, ...]) -> serve.Application:
    """The application of resolved settings."""
    replicas = config.replicas
    scale: dict[str, Any] = {"num_replicas": replicas.min}
    if replicas.min != replicas.max:
        autoscaling = {
            "min_replicas": replicas.min,
            "max_replicas": replicas.max,
            # Of what a batch holds; a replica that is this full answers its next request later than a new one would.
            "target_ongoing_requests": max(1.0, 0.75 * config.engine.max_num_seqs),
            "downscale_delay_s": replicas.idle_s,
        }
        scale = {"autoscaling_config": autoscaling}
    return deployment.options(
        **scale,
        ray_actor_options={"num_cpus": replicas.num_cpus, "num_gpus": _gpus_per_replica(config)},
        max_ongoing_requests=config.num_places + _SPARE_CALLS,
        max_queued_requests=config.num_places + _SPARE_CALLS,
        graceful_shutdown_wait_loop_s=1.0,
        graceful_shutdown_timeout_s=replicas.drain_s,
        health_check_period_s=5.0,
        # A line per request would be most of what is written here; /metrics counts them.
        logging_config={"enable_access_log": False},
    ).bind(config, digests)


def _end_application(drain_s: float) -> None:
    """Let it finish what is running; Serve itself goes too, unless it serves something else of this cluster's."""
    if APPLICATION in serve.status().applications:
        serve.delete(APPLICATION, _blocking=False)  # which would wait for a minute at most
        deadline = time.monotonic() + drain_s + _ENDING_S
        while APPLICATION in serve.status().applications and time.monotonic() < deadline:
            time.sleep(0.2)
    if not serve.status().applications:
        serve.shutdown()


def _max_in_flight(config: EndpointConfig) -> int:
    """Requests beyond which the front door says 429 itself: so many that the replicas, who know better, would have
    refused some already, and few enough that a crowd costs no replica's time."""
    return math.ceil(1.25 * config.num_places * config.replicas.max)


def http_options(config: EndpointConfig) -> dict[str, Any]:
    """Of Serve's proxy. It has no timeout of its own: an answer may take as long as it takes."""
    return {"host": config.host, "port": config.port}


def _read_keys(config: EndpointConfig, *, is_private: bool) -> tuple[str, ...]:
    digests = read_key_digests(config.access)
    if not digests and not is_private and not config.access.allow_anonymous:
        raise JobError(
            "others could reach this endpoint, and no API keys are set; set access.api_key_file or access.api_key_env, "
            "or access.allow_anonymous: true if everybody may ask"
        )
    return digests


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _gpus_per_replica(config: EndpointConfig) -> float:
    if config.replicas.num_gpus is not None:
        return config.replicas.num_gpus
    if config.engine.device == "cpu":
        return 0.0
    is_cuda = config.engine.device.startswith("cuda") or (
        ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
    )
    return 1.0 if is_cuda else 0.0
