"""cluster.yaml against Ray's own schema and AWS provider, and deploy/aws/prepare.py, with moto as the AWS account.

moto and botocore's models say that each call is well formed; whether AWS grants it to the roles, only AWS can say.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import boto3
import pytest
import yaml
from botocore.stub import Stubber
from local_head import REPOSITORY
from moto import mock_aws

IMAGES = {"HEAD_IMAGE": "ami-1e749f67", "WORKER_IMAGE": "ami-12c6146b"}
"""Two that moto knows."""

GPU_TYPES = {"gpu-l4": "g6.xlarge", "gpu-a10g": "g5.xlarge", "gpu-l40s": "g6e.xlarge"}


def load_prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shoal_prepare", REPOSITORY / "deploy/aws/prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def template() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    return loaded


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty AWS account, and a home for the key that Ray makes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    with mock_aws():
        yield


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """prepare.py, with the images of moto: it has none of the public parameters."""
    module = load_prepare()
    monkeypatch.setattr(module, "find_images", lambda ssm: dict(IMAGES))
    return module


def run_prepare(prepare: ModuleType, output: Path, *, ssh_from: str = "203.0.113.7/32") -> dict[str, Any]:
    words = ["--region", "us-west-2", "--bucket", "rows", "--ssh-from", ssh_from, "--output", str(output)]
    assert prepare.main(words) == 0
    filled: dict[str, Any] = yaml.safe_load(output.read_text())
    return filled


def validated(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    whole: dict[str, Any] = prepare_config(config)
    validate_config(whole)
    return whole


def test_the_template_passes_rays_schema(template: dict[str, Any]) -> None:
    assert validated(template)["available_node_types"].keys() == {"head", *GPU_TYPES}


def test_rays_schema_refuses_a_wrong_key(template: dict[str, Any]) -> None:
    import jsonschema

    with pytest.raises(jsonschema.ValidationError, match="max_wokers"):
        validated({**template, "max_wokers": 4})


def test_nothing_runs_but_the_head_until_there_is_work(template: dict[str, Any]) -> None:
    assert [kind["min_workers"] for kind in template["available_node_types"].values()] == [0] * 4
    assert template["max_workers"] == 4
    assert template["idle_timeout_minutes"] <= 5
    assert template["provider"]["cache_stopped_nodes"] is False
    for kind in template["available_node_types"].values():
        assert kind["node_config"]["InstanceInitiatedShutdownBehavior"] == "terminate"
        assert all(disk["Ebs"]["DeleteOnTermination"] for disk in kind["node_config"]["BlockDeviceMappings"])


def test_every_node_asks_for_the_token_and_the_head_gives_jobs_time_to_drain(template: dict[str, Any]) -> None:
    from jobs.run import DRAIN_S

    (_, head), (_, worker) = template["head_start_ray_commands"], template["worker_start_ray_commands"]
    assert "RAY_AUTH_MODE=token" in head and "RAY_AUTH_MODE=token" in worker
    assert "--dashboard-host=127.0.0.1" in head
    found = re.search(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", head)
    assert found is not None and int(found[1]) >= 2 * DRAIN_S
    assert "--object-spilling-directory=/opt/dlami/nvme/" in worker


@pytest.mark.parametrize("commands", ["setup_commands", "head_start_ray_commands", "worker_start_ray_commands"])
def test_commands_are_shell_and_ray_knows_their_options(template: dict[str, Any], commands: str) -> None:
    from ray.scripts.scripts import start

    for command in template[commands]:
        subprocess.run(["bash", "-n", "-c", command], check=True)
        for words in re.findall(r"ray start (.*)", command):
            start.make_context("start", words.replace("$RAY_HEAD_IP", "127.0.0.1").split())


def test_the_template_as_it_is_starts_nothing(template: dict[str, Any], account: None) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = validated({**template, "provider": {**template["provider"], "region": "us-west-2"}})
    with pytest.raises((AssertionError, SystemExit)):
        AWSNodeProvider.bootstrap_config(config)


def test_ray_starts_every_node_type_of_a_prepared_cluster(prepare: ModuleType, account: None, tmp_path: Path) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = AWSNodeProvider.bootstrap_config(validated(run_prepare(prepare, tmp_path / "my-cluster.yaml")))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for kind in config["available_node_types"].values():
        assert provider.create_node(kind["node_config"], {"ray-node-kind": "worker"}, 1)
    ec2 = boto3.client("ec2", region_name="us-west-2")
    instances = [one for many in ec2.describe_instances()["Reservations"] for one in many["Instances"]]
    by_type = {one["InstanceType"]: one for one in instances}
    assert by_type.keys() == {"m7i.xlarge", *GPU_TYPES.values()}
    head = by_type.pop("m7i.xlarge")
    assert head["ImageId"] == IMAGES["HEAD_IMAGE"] and "InstanceLifecycle" not in head
    assert head["IamInstanceProfile"]["Arn"].endswith("/shoal-head")
    for worker in by_type.values():
        assert worker["ImageId"] == IMAGES["WORKER_IMAGE"] and worker["InstanceLifecycle"] == "spot"
        assert worker["IamInstanceProfile"]["Arn"].endswith("/shoal-worker")
        assert {"Key": "ray-cluster-name", "Value": "shoal"} in worker["Tags"]
        assert {"Key": "project", "Value": "shoal"} in worker["Tags"]


def test_prepare_again_changes_nothing_but_the_address_that_ssh_may_come_from(
    prepare: ModuleType, account: None, tmp_path: Path
) -> None:
    first = run_prepare(prepare, tmp_path / "a.yaml")
    assert run_prepare(prepare, tmp_path / "b.yaml", ssh_from="198.51.100.0/24") == first
    ec2 = boto3.client("ec2", region_name="us-west-2")
    (group,) = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["shoal"]}])["SecurityGroups"]
    assert [group["GroupId"]] == first["available_node_types"]["head"]["node_config"]["SecurityGroupIds"]
    from_outside = [rule for rule in group["IpPermissions"] if rule["IpRanges"]]
    assert [(rule["FromPort"], [r["CidrIp"] for r in rule["IpRanges"]]) for rule in from_outside] == [
        (22, ["198.51.100.0/24"])
    ]
    within = [rule for rule in group["IpPermissions"] if rule["UserIdGroupPairs"]]
    assert [pair["GroupId"] for rule in within for pair in rule["UserIdGroupPairs"]] == [group["GroupId"]]


def test_ssh_from_everywhere_is_refused(prepare: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prepare.main(["--region", "us-west-2", "--bucket", "rows", "--ssh-from", "0.0.0.0/0"])
    assert "everybody" in capsys.readouterr().err


def test_the_roles_reach_one_bucket_and_start_only_the_clusters_types(
    prepare: ModuleType, account: None, tmp_path: Path, template: dict[str, Any]
) -> None:
    run_prepare(prepare, tmp_path / "my-cluster.yaml")
    iam = boto3.client("iam")
    assert iam.list_role_policies(RoleName="shoal-worker")["PolicyNames"] == ["shoal-storage"]
    storage = iam.get_role_policy(RoleName="shoal-worker", PolicyName="shoal-storage")["PolicyDocument"]["Statement"]
    assert {one["Resource"] for one in storage} == {"arn:aws:s3:::rows", "arn:aws:s3:::rows/*"}
    cluster = iam.get_role_policy(RoleName="shoal-head", PolicyName="shoal-cluster")["PolicyDocument"]["Statement"]
    (start,) = [one for one in cluster if one["Sid"] == "StartWorkersOfTheseTypes"]
    assert set(start["Condition"]["StringEquals"]["ec2:InstanceType"]) == set(GPU_TYPES.values())
    assert start["Condition"]["StringEquals"]["aws:RequestTag/ray-cluster-name"] == template["cluster_name"]
    for statement in [*storage, *cluster]:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert not any("*" in action for action in actions)
        assert statement["Resource"] != "*" or all(action.startswith("ec2:Describe") for action in actions)
        assert "${" not in json.dumps(statement)


def test_images_come_from_the_public_parameters(account: None) -> None:
    ssm = boto3.client("ssm", region_name="eu-central-1")
    with Stubber(ssm) as stub:
        for name, image in (("canonical/ubuntu/server/24.04", "ami-0a"), ("deeplearning/ami/x86_64", "ami-0b")):
            known = load_prepare().IMAGE_PARAMETERS.values()
            (parameter,) = [one for one in known if one.startswith(f"/aws/service/{name}/")]
            stub.add_response("get_parameter", {"Parameter": {"Value": image}}, {"Name": parameter})
        assert load_prepare().find_images(ssm) == {"HEAD_IMAGE": "ami-0a", "WORKER_IMAGE": "ami-0b"}


@pytest.mark.parametrize(("raylet", "minutes"), [("absent", 30), ("present", None), ("comes back", 51)])
def test_a_worker_without_ray_for_half_an_hour_ends_itself(
    template: dict[str, Any], tmp_path: Path, raylet: str, minutes: int | None
) -> None:
    """The watchdog of UserData, with programs of the same names that count minutes instead of waiting for them."""
    fakes = {
        "systemd-run": 'shift; exec "$@"',
        "sleep": '[ "$1" = 60 ] || exit 3; echo m >> minutes; [ "$(wc -l < minutes)" -le 100 ]',
        "pgrep": {
            "absent": "exit 1",
            "present": "exit 0",
            "comes back": '[ "$(wc -l < minutes)" -eq 21 ]',
        }[raylet],
        "shutdown": 'echo "$@" > ended',
    }
    for name, body in fakes.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    script = tmp_path / "user-data"
    script.write_text(template["available_node_types"]["gpu-l4"]["node_config"]["UserData"])
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(script)], cwd=tmp_path, env=env, timeout=60, check=False)
    if minutes is None:
        assert not (tmp_path / "ended").exists()
    else:
        assert (tmp_path / "ended").read_text() == "-h now\n"
        assert len((tmp_path / "minutes").read_text().splitlines()) == minutes
