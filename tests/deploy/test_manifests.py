"""deploy/kubernetes against models of the published types (see manifest_models), and against each other.

Nothing here talks to a Kubernetes cluster: that the objects are well formed is tested, what an operator does with them
is not.
"""

from __future__ import annotations

import copy
import importlib
import re
from typing import Any

import manifest_models
import pytest
import yaml
from local_head import REPOSITORY
from manifest_models import ClusterSpec, CronJob, RayCluster, RayCronJob, RayJob, RayService, Strict
from pydantic import ValidationError

from jobs.endpoint.config import load_endpoint
from jobs.run import DRAIN_S
from pipeline.job import load_job
from pipeline.settings_file import JobError

FOLDER = REPOSITORY / "deploy/kubernetes"
JOBS = REPOSITORY / "deploy/jobs"
MOUNT = "/etc/shoal/"
"""Where ConfigMap shoal-jobs, made of deploy/jobs, is mounted."""


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text()))


def parse(document: dict[str, Any]) -> Strict:
    return manifest_models.KINDS[document["kind"]].model_validate(document)


def read(name: str, kind: type[Strict]) -> Any:
    (document,) = documents(name)
    parsed = parse(document)
    assert isinstance(parsed, kind)
    return parsed


def cluster_specs() -> dict[str, ClusterSpec]:
    return {
        "raycluster": read("raycluster", RayCluster).spec,
        "rayjob": read("rayjob", RayJob).spec.ray_cluster_spec,
        "raycronjob": read("raycronjob", RayCronJob).spec.job_template.ray_cluster_spec,
        "rayservice": read("rayservice", RayService).spec.ray_cluster_config,
    }


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_a_manifest_has_only_known_fields_of_the_right_types(name: str) -> None:
    assert all(parse(document) for document in documents(name))


@pytest.mark.parametrize("path", [("spec",), ("spec", "jobTemplate", "spec", "template", "spec", "containers", 0)])
def test_a_field_in_the_wrong_place_is_found(path: tuple[Any, ...]) -> None:
    (document,) = copy.deepcopy(documents("cronjob"))
    place = document
    for key in path:
        place = place[key]
    place["concurencyPolicy"] = "Forbid"
    with pytest.raises(ValidationError, match="concurencyPolicy"):
        parse(document)


def test_all_clusters_have_the_same_nodes() -> None:
    specs = cluster_specs()
    for group in (specs["rayservice"].head_group_spec, *specs["rayservice"].worker_group_specs):
        (container,) = group.template.spec.containers
        container.env = [env for env in container.env if not env.name.startswith(("RAY_SERVE_", "SHOAL_"))]
    first, *others = specs.values()
    assert all(other == first for other in others)


def test_a_strangers_request_meets_the_front_door_before_it_starts_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    service = read("rayservice", RayService).spec
    (container,) = service.ray_cluster_config.head_group_spec.template.spec.containers
    env = {one.name: one.value for one in container.env}
    module, name = env["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].split(":")
    middlewares = getattr(importlib.import_module(module), name)
    file = env["SHOAL_API_KEY_FILE"]
    config = load_endpoint(str(JOBS / "serve.yaml"), {})
    assert file == config.access.api_key_file and file.startswith(MOUNT)
    assert any(mount.mount_path == MOUNT.rstrip("/") for mount in container.volume_mounts)
    monkeypatch.setenv("SHOAL_API_KEY_FILE", file)
    with pytest.raises(JobError, match=file):
        middlewares()
    (worker,) = service.ray_cluster_config.worker_group_specs[0].template.spec.containers
    names = [one.name for one in worker.env]
    from ray.serve._private import constants

    for name in (*names, "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"):
        assert hasattr(constants, name), "Ray reads a variable of this name"


def test_a_cluster_has_no_gpu_until_there_is_work_and_at_most_four() -> None:
    for spec in cluster_specs().values():
        assert [(group.min_replicas, group.replicas, group.max_replicas) for group in spec.worker_group_specs] == [
            (0, 0, 4)
        ]
        assert spec.enable_in_tree_autoscaling and spec.autoscaler_options.idle_timeout_seconds <= 300


def test_the_dashboard_is_inside_and_asks_for_a_token() -> None:
    for spec in cluster_specs().values():
        assert spec.head_group_spec.service_type == "ClusterIP"
        assert spec.auth_options.mode == "token"


def test_nodes_run_the_ray_that_is_tested() -> None:
    found = re.search(r"^ray==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    assert {spec.ray_version for spec in cluster_specs().values()} == {found[1]}
    assert f"FROM rayproject/ray:{found[1]}-py311\n" in (FOLDER / "Dockerfile").read_text()


def test_start_parameters_are_options_of_ray_start() -> None:
    from ray.scripts.scripts import start

    for spec in cluster_specs().values():
        for group in (spec.head_group_spec, *spec.worker_group_specs):
            start.make_context("start", [f"--{key}={value}" for key, value in group.ray_start_params.items()])


def test_a_job_has_time_to_drain_wherever_it_is_stopped() -> None:
    from ray.runtime_env import RuntimeEnv

    for spec in (read("rayjob", RayJob).spec, read("raycronjob", RayCronJob).spec.job_template):
        runtime_env = RuntimeEnv(**yaml.safe_load(spec.runtime_env_yaml))
        assert int(runtime_env.env_vars()["RAY_JOB_STOP_WAIT_TIME_S"]) >= 2 * DRAIN_S
    for spec in cluster_specs().values():
        pod = spec.head_group_spec.template.spec
        (wait,) = [env.value for env in pod.containers[0].env if env.name == "RAY_JOB_STOP_WAIT_TIME_S"]
        assert int(wait) >= 2 * DRAIN_S
        assert pod.termination_grace_period_seconds > int(wait)
    pod = read("cronjob", CronJob).spec.job_template.spec.template.spec
    assert pod.termination_grace_period_seconds > 90


def test_two_nights_never_overlap() -> None:
    cron = read("cronjob", CronJob).spec
    assert cron.concurrency_policy == "Forbid"
    assert cron.job_template.spec.active_deadline_seconds < 86400
    assert read("raycronjob", RayCronJob).spec.job_template.active_deadline_seconds < 86400


def test_nothing_is_tried_twice_with_the_budget_again() -> None:
    assert read("cronjob", CronJob).spec.job_template.spec.backoff_limit == 0
    for spec in (read("rayjob", RayJob).spec, read("raycronjob", RayCronJob).spec.job_template):
        assert spec.backoff_limit == 0 and spec.shutdown_after_job_finishes


def test_a_night_ends_by_its_own_deadline_and_with_a_budget() -> None:
    job = load_job(str(JOBS / "nightly.yaml"), [])
    assert job.limits.budget_usd is not None and job.limits.deadline_s is not None
    outer = [
        read("cronjob", CronJob).spec.job_template.spec.active_deadline_seconds,
        read("rayjob", RayJob).spec.active_deadline_seconds,
        read("raycronjob", RayCronJob).spec.job_template.active_deadline_seconds,
    ]
    assert all(job.limits.deadline_s + 600 < seconds for seconds in outer)


def test_the_nights_pool_fits_every_cluster() -> None:
    pool = load_job(str(JOBS / "nightly.yaml"), []).pool
    assert pool.num_gpus == 1, "a cluster that starts without GPUs grows only for actors that ask for one"
    assert isinstance(pool.num_actors, tuple)
    of_aws = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    assert pool.num_actors[1] <= of_aws["max_workers"]
    for spec in cluster_specs().values():
        assert pool.num_actors[1] <= sum(group.max_replicas for group in spec.worker_group_specs)


def test_what_manifests_run_is_in_the_config_map() -> None:
    (submit,) = read("cronjob", CronJob).spec.job_template.spec.template.spec.containers
    lines = [submit.command, read("rayjob", RayJob).spec.entrypoint.split()]
    lines.append(read("raycronjob", RayCronJob).spec.job_template.entrypoint.split())
    for shell, *files in lines:
        assert shell == "bash"
        for file in files:
            assert file.startswith(MOUNT) and (JOBS / file.removeprefix(MOUNT)).is_file()


def test_what_a_night_runs_is_said_in_one_place() -> None:
    places = [REPOSITORY / "cluster.yaml", *(path for path in (REPOSITORY / "deploy").rglob("*") if path.is_file())]
    assert [path.name for path in places if "-m jobs" in path.read_text()] == ["nightly.sh"]


def test_the_submitter_is_pointed_at_the_cluster_and_its_secret() -> None:
    (cluster,), (submit,) = (
        documents("raycluster"),
        read("cronjob", CronJob).spec.job_template.spec.template.spec.containers,
    )
    env = {one.name: one for one in submit.env}
    name = cluster["metadata"]["name"]
    assert env["RAY_API_SERVER_ADDRESS"].value == f"http://{name}-head-svc:8265"
    assert env["RAY_AUTH_TOKEN"].value_from.secret_key_ref.name == name


def test_the_serve_configuration_passes_rays_own_schema() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(read("rayservice", RayService).spec.serve_config_v2))
    assert [application.route_prefix for application in config.applications] == ["/"]


def test_the_endpoint_of_a_cluster_has_settings_that_fit_it() -> None:
    service = read("rayservice", RayService).spec
    (application,) = yaml.safe_load(service.serve_config_v2)["applications"]
    module, name = application["import_path"].split(":")
    assert callable(getattr(importlib.import_module(module), name))
    file = application["args"]["config"]
    assert file.startswith(MOUNT)
    config = load_endpoint(str(JOBS / file.removeprefix(MOUNT)), {})
    assert config.access.api_key_file is not None and config.access.api_key_file.startswith(MOUNT)
    assert config.replicas.num_gpus == 1
    assert config.replicas.max <= sum(group.max_replicas for group in service.ray_cluster_config.worker_group_specs)
    pod = service.ray_cluster_config.worker_group_specs[0].template.spec
    assert pod.termination_grace_period_seconds > config.replicas.drain_s


def test_the_serve_file_for_this_machine_is_valid_and_open_to_it_only() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load((REPOSITORY / "deploy/serve.yaml").read_text()))
    assert config.http_options.host == "127.0.0.1"
    (application,) = config.applications
    assert application.import_path == "jobs.serve:build"
    assert load_endpoint(None, application.args).name == "demo"


def test_no_file_holds_a_secret() -> None:
    looks_like_one = re.compile(
        r"AKIA[0-9A-Z]{16}|-----BEGIN|aws_secret_access_key\s*[=:]\s*\S|(TOKEN|PASSWORD|SECRET)\w*\s*[=:]\s*[\"']?(?=\w*\d)\w{8,}",
        re.I,
    )
    for path in [REPOSITORY / "cluster.yaml", *(REPOSITORY / "deploy").rglob("*")]:
        if path.is_file():
            assert not looks_like_one.search(path.read_text()), path
