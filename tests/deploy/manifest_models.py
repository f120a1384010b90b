"""The Kubernetes objects that deploy/kubernetes uses, field by field, with whatever is not here refused.

No schema package is installed, so these are written by hand from what is published: batch/v1, v1 and
networking.k8s.io/v1 of Kubernetes 1.34, and ray.io/v1 of KubeRay 1.7 (the types behind its CRDs). They hold the fields
used here and no others: they find typing errors, wrong places and wrong types, not what an admission webhook or an
operator would find.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$")]
Schedule = Annotated[str, Field(pattern=r"^(\S+\s+){4}\S+$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Metadata(Strict):
    name: Name | None = None
    generate_name: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


# --- v1: pods


class SecretKey(Strict):
    name: Name
    key: str


class ValueFrom(Strict):
    secret_key_ref: SecretKey


class Env(Strict):
    name: str
    value: str | None = None
    value_from: ValueFrom | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        assert (self.value is None) != (self.value_from is None)
        return self


class Seccomp(Strict):
    type: Literal["RuntimeDefault"]


class PodSecurity(Strict):
    run_as_non_root: bool
    run_as_user: int
    run_as_group: int
    fs_group: int | None = None
    seccomp_profile: Seccomp


class Capabilities(Strict):
    drop: list[str]


class ContainerSecurity(Strict):
    allow_privilege_escalation: bool
    capabilities: Capabilities


class Resources(Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]

    @model_validator(mode="after")
    def _gpus_are_requested_as_limited(self) -> Self:
        assert self.requests.get("nvidia.com/gpu") == self.limits.get("nvidia.com/gpu")
        return self


class Mount(Strict):
    name: Name
    mount_path: Annotated[str, Field(pattern="^/")]
    read_only: bool = False


class Container(Strict):
    name: Name
    image: str
    command: list[str] | None = None
    env: list[Env] = []
    security_context: ContainerSecurity
    resources: Resources
    volume_mounts: list[Mount] = []


class ConfigMapVolume(Strict):
    name: Name


class EmptyDir(Strict):
    size_limit: Quantity


class Volume(Strict):
    name: Name
    config_map: ConfigMapVolume | None = None
    empty_dir: EmptyDir | None = None


class Requirement(Strict):
    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: list[str] | None = None

    @model_validator(mode="after")
    def _values_go_with_in(self) -> Self:
        assert (self.values is not None) == (self.operator in ("In", "NotIn"))
        return self


class NodeSelectorTerm(Strict):
    match_expressions: list[Requirement]


class NodeSelector(Strict):
    node_selector_terms: list[NodeSelectorTerm]


class NodeAffinity(Strict):
    # pydantic's camel case gives the very name: requiredDuringSchedulingIgnoredDuringExecution
    required_during_scheduling_ignored_during_execution: NodeSelector


class Affinity(Strict):
    node_affinity: NodeAffinity


class Toleration(Strict):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class Pod(Strict):
    node_selector: dict[str, str] | None = None
    service_account_name: Name | None = None
    automount_service_account_token: bool | None = None
    restart_policy: Literal["Never", "OnFailure", "Always"]
    termination_grace_period_seconds: int
    security_context: PodSecurity
    affinity: Affinity | None = None
    tolerations: list[Toleration] = []
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []

    @model_validator(mode="after")
    def _mounts_have_volumes(self) -> Self:
        mounted = {mount.name for container in self.containers for mount in container.volume_mounts}
        assert mounted == {volume.name for volume in self.volumes}
        return self


class PodTemplate(Strict):
    metadata: Metadata | None = None
    spec: Pod


class ServiceAccount(Strict):
    api_version: Literal["v1"]
    kind: Literal["ServiceAccount"]
    metadata: Metadata


# --- batch/v1


class JobSpec(Strict):
    backoff_limit: int
    active_deadline_seconds: Annotated[int, Field(gt=0)]
    ttl_seconds_after_finished: Annotated[int, Field(ge=0)]
    template: PodTemplate


class JobTemplate(Strict):
    spec: JobSpec


class CronJobSpec(Strict):
    schedule: Schedule
    time_zone: str
    concurrency_policy: Literal["Allow", "Forbid", "Replace"]
    starting_deadline_seconds: int
    successful_jobs_history_limit: int
    failed_jobs_history_limit: int
    job_template: JobTemplate


class CronJob(Strict):
    api_version: Literal["batch/v1"]
    kind: Literal["CronJob"]
    metadata: Metadata
    spec: CronJobSpec


# --- networking.k8s.io/v1


class Selector(Strict):
    match_labels: dict[str, str] | None = None
    match_expressions: list[Requirement] | None = None


class Peer(Strict):
    pod_selector: Selector | None = None
    namespace_selector: Selector | None = None


class Port(Strict):
    protocol: Literal["TCP", "UDP"]
    port: int


class Ingress(Strict):
    from_: Annotated[list[Peer], Field(alias="from")]
    ports: list[Port] = []


class NetworkPolicySpec(Strict):
    pod_selector: Selector
    policy_types: list[Literal["Ingress", "Egress"]]
    ingress: list[Ingress]


class NetworkPolicy(Strict):
    api_version: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    metadata: Metadata
    spec: NetworkPolicySpec


# --- ray.io/v1


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]


class AutoscalerOptions(Strict):
    version: Literal["v1", "v2"]
    idle_timeout_seconds: int
    upscaling_mode: Literal["Default", "Aggressive", "Conservative"] = "Default"
    resources: Resources


class HeadGroup(Strict):
    service_type: Literal["ClusterIP", "NodePort", "LoadBalancer"]
    ray_start_params: dict[str, str]
    template: PodTemplate


class WorkerGroup(Strict):
    group_name: Name
    replicas: Annotated[int, Field(ge=0)]
    min_replicas: Annotated[int, Field(ge=0)]
    max_replicas: Annotated[int, Field(ge=0)]
    ray_start_params: dict[str, str]
    template: PodTemplate

    @model_validator(mode="after")
    def _replicas_are_in_order(self) -> Self:
        assert self.min_replicas <= self.replicas <= self.max_replicas
        return self


class ClusterSpec(Strict):
    ray_version: str
    auth_options: AuthOptions
    enable_in_tree_autoscaling: bool
    autoscaler_options: AutoscalerOptions
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup]


class RayCluster(Strict):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class RayJobSpec(Strict):
    entrypoint: str
    submission_mode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    runtime_env_yaml: Annotated[str, Field(alias="runtimeEnvYAML")]
    shutdown_after_job_finishes: bool
    ttl_seconds_after_finished: Annotated[int, Field(ge=0)]
    active_deadline_seconds: Annotated[int, Field(gt=0)]
    backoff_limit: Annotated[int, Field(ge=0)]
    suspend: bool
    ray_cluster_spec: ClusterSpec

    @model_validator(mode="after")
    def _a_time_to_live_needs_a_shutdown(self) -> Self:
        assert self.shutdown_after_job_finishes or self.ttl_seconds_after_finished == 0
        return self


class RayJob(Strict):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class RayCronJobSpec(Strict):
    schedule: Schedule
    time_zone: str
    suspend: bool
    job_template: RayJobSpec


class RayCronJob(Strict):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayCronJob"]
    metadata: Metadata
    spec: RayCronJobSpec


class UpgradeStrategy(Strict):
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]


class RayServiceSpec(Strict):
    upgrade_strategy: UpgradeStrategy
    serve_config_v2: Annotated[str, Field(alias="serveConfigV2")]
    ray_cluster_config: ClusterSpec


class RayService(Strict):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec


KINDS: dict[str, type[Strict]] = {
    kind.__name__: kind for kind in (ServiceAccount, CronJob, NetworkPolicy, RayCluster, RayJob, RayCronJob, RayService)
}
