"""Prepare an AWS account for cluster.yaml, and write my-cluster.yaml. Run again, it makes only what is missing.

    python deploy/aws/prepare.py --region us-west-2 --bucket my-bucket --ssh-from 203.0.113.7/32

Finds the newest images by the public parameters of Canonical and AWS, makes the roles and instance profiles shoal-head
and shoal-worker from the policies beside this file, and a security group that lets SSH in from --ssh-from only (Ray's
own would from everywhere). Needs boto3 and rights on IAM, EC2 and SSM; starts nothing that costs money.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import string
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import ClientError

HERE = Path(__file__).parent
TEMPLATE = HERE.parents[1] / "cluster.yaml"
IMAGE_PARAMETERS = {
    "HEAD_IMAGE": "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id",
    "WORKER_IMAGE": "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id",
}
SECURITY_GROUP = "shoal"


def find_images(ssm: Any) -> dict[str, str]:
    """The image ids that the public parameters name today, in this client's region."""
    return {
        name: ssm.get_parameter(Name=parameter)["Parameter"]["Value"] for name, parameter in IMAGE_PARAMETERS.items()
    }


def make_profile(iam: Any, name: str, policies: Mapping[str, str]) -> None:
    """A role that EC2 instances may take, with exactly these policies, and the instance profile of the same name."""
    _unless_there(iam.create_role, RoleName=name, AssumeRolePolicyDocument=(HERE / "trust.json").read_text())
    for policy, document in policies.items():
        iam.put_role_policy(RoleName=name, PolicyName=policy, PolicyDocument=document)
    for policy in iam.list_role_policies(RoleName=name)["PolicyNames"]:
        if policy not in policies:
            iam.delete_role_policy(RoleName=name, PolicyName=policy)
    _unless_there(iam.create_instance_profile, InstanceProfileName=name)
    if not iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]:
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


def read_policy(name: str, values: Mapping[str, str]) -> str:
    """A policy of this folder with its ${...} filled in, as JSON text."""
    document = string.Template((HERE / f"{name}-policy.json").read_text()).substitute(values)
    return json.dumps(json.loads(document))


def make_security_group(ec2: Any, ssh_from: str) -> str:
    """The id of a group of the default VPC: everything between its members, SSH from one network, nothing else."""
    vpcs = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not vpcs:
        raise ValueError(
            "this region has no default VPC; write SubnetIds and SecurityGroupIds into cluster.yaml yourself"
        )
    vpc = vpcs[0]["VpcId"]
    filters = [{"Name": "vpc-id", "Values": [vpc]}, {"Name": "group-name", "Values": [SECURITY_GROUP]}]
    found = ec2.describe_security_groups(Filters=filters)["SecurityGroups"]
    if found:
        group = found[0]["GroupId"]
        if found[0]["IpPermissions"]:
            ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=found[0]["IpPermissions"])
    else:
        group = ec2.create_security_group(
            GroupName=SECURITY_GROUP, Description="Nodes of the Ray cluster shoal", VpcId=vpc
        )["GroupId"]
    ec2.authorize_security_group_ingress(
        GroupId=group,
        IpPermissions=[
            {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]},
            {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": ssh_from}]},
        ],
    )
    return str(group)


def allow_spot(iam: Any) -> None:
    """The role by which EC2 itself starts spot instances; an account that never used spot has none."""
    _unless_there(iam.create_service_linked_role, AWSServiceName="spot.amazonaws.com")


def network(text: str) -> str:
    """An IPv4 network that is not the whole internet."""
    value = ipaddress.IPv4Network(text)
    if value.prefixlen == 0:
        raise argparse.ArgumentTypeError("0.0.0.0/0 is everybody; give your own address as A.B.C.D/32")
    return str(value)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--region", required=True, help="where the bucket is: rows that cross regions are paid for")
    made.add_argument("--bucket", required=True, help="the one bucket that nodes may read and write")
    made.add_argument("--ssh-from", required=True, type=network, help="your network, as 203.0.113.7/32")
    made.add_argument("--output", default="my-cluster.yaml", type=Path)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    session = boto3.Session(region_name=arguments.region)
    iam = session.client("iam")
    values = {"REGION": arguments.region, "BUCKET": arguments.bucket}
    values["ACCOUNT"] = session.client("sts").get_caller_identity()["Account"]
    values |= find_images(session.client("ssm"))
    worker = {"shoal-storage": read_policy("worker", values)}
    make_profile(iam, "shoal-worker", worker)
    make_profile(iam, "shoal-head", {**worker, "shoal-cluster": read_policy("head", values)})
    allow_spot(iam)
    values["SECURITY_GROUP"] = make_security_group(session.client("ec2"), arguments.ssh_from)
    arguments.output.write_text(fill_template(TEMPLATE.read_text(), values))
    print(f"{arguments.output}: {values['HEAD_IMAGE']} (head), {values['WORKER_IMAGE']} (workers)", file=sys.stderr)
    return 0


def fill_template(text: str, values: Mapping[str, str]) -> str:
    """cluster.yaml with its own ${...} replaced; the dollar signs of its shell commands stay."""
    for name in ("REGION", "HEAD_IMAGE", "WORKER_IMAGE", "SECURITY_GROUP"):
        text = text.replace(f"${{{name}}}", values[name])
    return text


def _unless_there(create: Any, **arguments: Any) -> None:
    try:
        create(**arguments)
    except ClientError as error:
        code = error.response["Error"]["Code"]
        # A service's own role that exists is InvalidInput, with these words.
        if code != "EntityAlreadyExists" and "has been taken in this account" not in str(error):
            raise


if __name__ == "__main__":
    sys.exit(main())
