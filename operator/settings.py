"""The operator's settings: one YAML file that the chart writes, `/etc/calotype/operator.yaml`."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from calotype.serving.config import Quotas

SETTINGS_FILE = pathlib.Path("/etc/calotype/operator.yaml")
NAMESPACE_VARIABLE = "CALOTYPE_OPERATOR_NAMESPACE"
ALL_NAMESPACES = "*"
CA_DIR = "/etc/calotype-ca"
CLUSTER_HOSTS = ("localhost", "127.0.0.1", ".svc", ".cluster.local")
"""Reached without a proxy."""


class SettingsError(Exception):
    """The settings cannot be used; one sentence says which and why."""


class Part(BaseModel):
    """Base of the settings: camelCase in the file, nothing unknown."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True
    )


class SecretKey(Part):
    """One entry of a Secret."""

    name: str = Field(min_length=1, description="Name of the Secret.")
    key: str = Field(min_length=1, description="Key inside it.")


class SecretName(Part):
    """A whole Secret."""

    name: str = Field(min_length=1, description="Name of the Secret.")


class Redis(Part):
    """Where Ray keeps what must survive its head."""

    address: str = Field(min_length=1, description="HOST:PORT.")
    password_secret_ref: SecretKey | None = Field(None, description="Default: no password.")


class ModelsTls(Part):
    """TLS between gateways, operator and model apps."""

    secret: str = Field(
        min_length=1,
        description="Secret with the keys tls.crt, tls.key and ca.crt, by this name in the "
        "namespace of each model.",
    )
    ca_file: str = Field(
        "/etc/calotype-tls/ca.crt", description="Where the operator itself has the key ca.crt."
    )


class Egress(Part):
    """How pods of models, fetch Jobs and trainings reach the world outside the cluster."""

    hf_endpoint: str | None = Field(
        None, description="Address of a Hugging Face mirror. Default: https://huggingface.co."
    )
    https_proxy: str | None = Field(None, description="Proxy for https, such as http://proxy:3128.")
    http_proxy: str | None = Field(None, description="Proxy for plain http.")
    no_proxy: list[str] = Field(
        default_factory=list,
        description="Hosts, domains and networks without proxy, beside the cluster's own services.",
    )
    ca_config_map: str | None = Field(
        None,
        description="ConfigMap with the key ca.crt, by this name in the namespace of each model: "
        "every authority that is believed, those of the system included.",
    )

    def variables(self) -> dict[str, str]:
        """As environment variables that httpx, huggingface_hub and OpenSSL read."""
        proxied = self.https_proxy or self.http_proxy
        found = {
            "HF_ENDPOINT": self.hf_endpoint,
            "HTTPS_PROXY": self.https_proxy,
            "HTTP_PROXY": self.http_proxy,
            "NO_PROXY": ",".join([*CLUSTER_HOSTS, *self.no_proxy]) if proxied else None,
            "SSL_CERT_FILE": f"{CA_DIR}/ca.crt" if self.ca_config_map else None,
        }
        return {name: value for name, value in found.items() if value}


Quantities = dict[str, str | int | float]


class ResourceProfile(Part):
    """One replica's share of a node; an ImageModel names it as ``resourceProfile``."""

    gpus: int = Field(0, ge=0, description="GPUs of one replica; 0 = it draws on the CPU.")
    gpu_resource: str = Field("nvidia.com/gpu", description="What the nodes call their GPUs.")
    requests: Quantities = Field(default_factory=dict, description="Beside the GPUs.")
    limits: Quantities = Field(default_factory=dict, description="Beside the GPUs.")
    node_selector: dict[str, str] = Field(default_factory=dict, description="Labels of nodes.")
    tolerations: list[dict[str, Any]] = Field(default_factory=list, description="As in a pod.")
    affinity: dict[str, Any] = Field(default_factory=dict, description="As in a pod.")
    runtime_class_name: str | None = Field(None, description="Default: the cluster's.")
    priority_class_name: str | None = Field(None, description="Default: the cluster's.")
    threads: int = Field(1, ge=1, description="CPU threads of torch in one replica.")
    hour_cost: float = Field(0.0, ge=0, description="What one replica costs per hour; 0 = unknown.")

    def resources(self) -> dict[str, Any]:
        """The ``resources`` of a container."""
        gpus: Quantities = {self.gpu_resource: self.gpus} if self.gpus else {}
        return {"requests": {**self.requests, **gpus}, "limits": {**self.limits, **gpus}}


CPU_PROFILE = ResourceProfile(requests={"cpu": "500m", "memory": "3Gi"}, limits={"memory": "6Gi"})
"""The profile named `default` where the chart gives none of that name: no GPU."""


class TeamGrant(Part):
    """What the Teams of one namespace may give themselves."""

    teams: int = Field(5, ge=0, description="Teams at most; the oldest ones are served.")
    weight: float = Field(1.0, gt=0, le=1000, description="Largest weight of a Team.")
    models: list[str] = Field(
        default_factory=list, description="ImageModels that a Team may use; empty = every one."
    )
    quotas: Quotas = Field(
        default_factory=Quotas, description="Largest quotas of a Team, also of one without any."
    )
    takes: list[str] = Field(
        default_factory=list,
        description="Names of teams that exist, or existed, which a Team of this namespace takes "
        "over with their jobs and pictures.",
    )


UNBOUNDED = TeamGrant(teams=100_000, weight=1000)
"""Of the operator's own namespace: whoever writes there administers the service anyway."""


class TeamGrants(Part):
    """An administrator's word on what Teams may give themselves."""

    default: TeamGrant = Field(
        default_factory=TeamGrant, description="Of a namespace that is not named below."
    )
    namespaces: dict[str, TeamGrant] = Field(
        default_factory=dict, description="Namespace -> its grant, instead of the default one."
    )


class OperatorSettings(Part):
    """Everything that the operator does not read from the API server."""

    release: str = Field(min_length=1, description="Name of the Helm release.")
    namespaces: list[str] = Field(
        default_factory=list,
        description="Namespaces that are watched; ['*'] = all of them; empty = the operator's own.",
    )
    operator_namespace: str = Field("", description="Where the operator runs; from its pod.")
    serve_image: str = Field(min_length=1, description="Image of model pods and fetch Jobs.")
    serve_image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: list[str | SecretName] = Field(default_factory=list)
    gateway_config_map: str = Field("", description="Default: RELEASE-gateway-config.")
    gateway_url: str = Field(
        "{scheme}://{release}-internal.{namespace}.svc:8001",
        description="Internal port of the gateways, where model apps reach their jobs.",
    )
    internal_token_secret_ref: SecretKey | None = Field(
        None, description="The internal token; tokens of models follow from it."
    )
    models_tls: ModelsTls | None = Field(
        None, description="None = model apps and the internal port speak plain HTTP."
    )
    data_claim: str | None = Field(
        None, description="PersistentVolumeClaim at /var/lib/calotype; None = nothing is shared."
    )
    audit_claim: str | None = Field(
        None,
        description="PersistentVolumeClaim of audit logs, by this name in the namespace of each "
        "model; None = they lie in /var/lib/calotype.",
    )
    egress: Egress = Field(
        default_factory=Egress, description="Mirror, proxies and authorities of pods of models."
    )
    redis: Redis | None = None
    resource_profiles: dict[str, ResourceProfile] = Field(default_factory=dict)
    ray_version: str = "2.60.0"
    control_resources: dict[str, Quantities] = Field(
        {"requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"memory": "4Gi"}},
        description="Of a Ray head, and of the pod of dispatcher, moderator and HTTP ingress.",
    )
    fetch_resources: dict[str, Quantities] = Field(
        {"requests": {"cpu": "200m", "memory": "512Mi"}, "limits": {"memory": "4Gi"}},
        description="Of a fetch-and-check Job.",
    )
    pod_security_context: dict[str, Any] = Field(
        default_factory=dict, description="Over the defaults, which are those of `restricted`."
    )
    container_security_context: dict[str, Any] = Field(
        default_factory=dict, description="Over the defaults, which are those of `restricted`."
    )
    gateway_class_name: str | None = Field(
        None, description="GatewayClass for upgradeStrategy Incremental; None = not available."
    )
    model_url: str = Field(
        "{scheme}://{service}.{namespace}.svc:8000", description="Address of a model app."
    )
    debounce_seconds: float = Field(2.0, ge=0, description="Adapters changed within it: one push.")
    debounce_at_most_seconds: float = Field(20.0, ge=0, description="A push waits no longer.")
    status_poll_seconds: float = Field(10.0, gt=0, description="Between two looks at a model app.")
    busy_poll_seconds: float = Field(1.5, gt=0, description="The same while something loads.")
    secret_poll_seconds: float = Field(15.0, gt=0, description="Between two looks at a Secret.")
    resync_seconds: float = Field(300.0, gt=0, description="Between two looks at everything.")
    bind_seconds: float = Field(120.0, ge=0, description="A volume unbound for longer is reported.")
    fetch_seconds: int = Field(14_400, ge=1, description="A fetch Job may take.")
    retry_seconds: float = Field(30.0, gt=0, description="First pause after a failed fetch.")
    longest_retry_seconds: float = Field(3600.0, gt=0, description="Longest pause.")
    max_adapters_per_model: int = Field(1000, ge=0)
    max_config_bytes: int = Field(
        850_000, ge=1000, description="Of all adapters' manifests; a ConfigMap has 1 MiB."
    )
    max_model_bytes: int = Field(100_000, ge=1000, description="Of all models' manifests together.")
    max_policy_bytes: int = Field(
        64_000, ge=1000, description="Of one ModerationPolicy, and of those of one namespace."
    )
    max_policies_bytes: int = Field(
        100_000, ge=1000, description="Of all ModerationPolicies; they travel with every model."
    )
    adapter_folders: list[str] = Field(
        default_factory=list,
        description="Folders in the model's pods that source.path of a LoRAAdapter may lead into; "
        "what trainings of its namespace left is always allowed.",
    )
    model_names: dict[str, str] = Field(
        default_factory=dict,
        description="Name or alias of a model -> NAMESPACE/NAME of the ImageModel that has it.",
    )
    default_model: str | None = Field(
        None,
        description="Model of requests that name none; None = the first of the release's own "
        "namespace.",
    )
    max_fetch_jobs: int = Field(8, ge=1, description="At the same time, of one model's namespace.")
    team_grants: TeamGrants = Field(
        default_factory=TeamGrants, description="What Teams may give themselves, by namespace."
    )
    drain_seconds: float = Field(
        5.0, ge=0, description="Between an adapter's leaving the API and its unloading."
    )
    delete_deadline_seconds: float = Field(300.0, ge=0, description="Longest draining.")
    health_port: int = Field(8080, ge=0, le=65535, description="0 = none.")
    metrics_port: int = Field(9090, ge=0, le=65535, description="0 = none.")
    max_outage_seconds: float = Field(
        900.0, ge=0, description="How long jobs wait for a part that is away before they fail."
    )
    workers: int = Field(8, ge=1, description="Reconciles at the same time.")
    lease: bool = Field(True, description="Hold a Lease, so that two operators never act.")

    @property
    def all_namespaces(self) -> bool:
        return ALL_NAMESPACES in self.namespaces

    @property
    def watched(self) -> list[str]:
        """Names of the watched namespaces; without meaning where all are watched."""
        return self.namespaces or [self.operator_namespace]

    @property
    def gateway_config(self) -> str:
        return self.gateway_config_map or f"{self.release}-gateway-config"

    @property
    def scheme(self) -> str:
        """Of model apps, and of the gateways' internal port."""
        return "http" if self.models_tls is None else "https"

    @property
    def job_store_url(self) -> str:
        """Where the pods of models reach their jobs and pictures."""
        return self.gateway_url.format(
            scheme=self.scheme, release=self.release, namespace=self.operator_namespace
        )

    @property
    def gateway_teams(self) -> str:
        return f"{self.release}-gateway-teams"

    def team_grant(self, namespace: str) -> TeamGrant:
        """What the Teams of a namespace may give themselves."""
        granted = self.team_grants.namespaces.get(namespace)
        if granted is not None:
            return granted
        return UNBOUNDED if namespace == self.operator_namespace else self.team_grants.default

    def profile(self, name: str) -> ResourceProfile | None:
        """The profile of that name; `default` always exists."""
        if name == "default":
            return self.resource_profiles.get(name, CPU_PROFILE)
        return self.resource_profiles.get(name)


def load_settings(path: pathlib.Path) -> OperatorSettings:
    """Reads the file; the operator's namespace comes from the environment of its pod.

    Raises:
        SettingsError: the file is missing, is no YAML, or says something that is not a setting.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}).") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: is not YAML: {error}") from None
    if not isinstance(document, dict):
        raise SettingsError(f"{path}: must be a mapping, beginning with release: NAME.")
    namespace = os.environ.get(NAMESPACE_VARIABLE)
    if namespace:
        document.setdefault("operatorNamespace", namespace)
    try:
        settings = OperatorSettings.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise SettingsError(f"{path}: {field}: {first['msg']}.") from None
    if not settings.operator_namespace:
        raise SettingsError(
            f"The operator's namespace is not known: set {NAMESPACE_VARIABLE}, or "
            f"operatorNamespace in {path}."
        )
    return settings
