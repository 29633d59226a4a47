"""The kinds of object that the operator reads or writes, and where the API server keeps them."""

from __future__ import annotations

from dataclasses import dataclass

from calotype.operator.kube.objects import Manifest

GROUP = "calotype.dev"


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind in one version of its group; all of ours are namespaced."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None = None, name: str = "", subresource: str = "") -> str:
        """URL path; without a namespace the collection of the whole cluster."""
        parts = [
            f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}",
            *(["namespaces", namespace] if namespace and self.namespaced else []),
            self.plural,
            *([name] if name else []),
            *([subresource] if subresource else []),
        ]
        return "/".join(parts)


IMAGE_MODELS = Resource(GROUP, "v1alpha1", "imagemodels", "ImageModel")
LORA_ADAPTERS = Resource(GROUP, "v1alpha1", "loraadapters", "LoRAAdapter")
MODERATION_POLICIES = Resource(GROUP, "v1alpha1", "moderationpolicies", "ModerationPolicy")
TEAMS = Resource(GROUP, "v1alpha1", "teams", "Team")
LORA_TRAININGS = Resource(GROUP, "v1alpha1", "loratrainings", "LoRATraining")
OWN = (IMAGE_MODELS, LORA_ADAPTERS, MODERATION_POLICIES, TEAMS, LORA_TRAININGS)

DEPLOYMENTS = Resource("apps", "v1", "deployments", "Deployment")
JOBS = Resource("batch", "v1", "jobs", "Job")
LEASES = Resource("coordination.k8s.io", "v1", "leases", "Lease")
SERVICES = Resource("", "v1", "services", "Service")
CONFIG_MAPS = Resource("", "v1", "configmaps", "ConfigMap")
CLAIMS = Resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim")
SECRETS = Resource("", "v1", "secrets", "Secret")
PODS = Resource("", "v1", "pods", "Pod")
EVENTS = Resource("", "v1", "events", "Event")
NAMESPACES = Resource("", "v1", "namespaces", "Namespace", namespaced=False)
RAY_SERVICES = Resource("ray.io", "v1", "rayservices", "RayService")
RAY_CLUSTERS = Resource("ray.io", "v1", "rayclusters", "RayCluster")
RAY_JOBS = Resource("ray.io", "v1", "rayjobs", "RayJob")
RAY = (RAY_SERVICES, RAY_CLUSTERS, RAY_JOBS)
POD_MONITORS = Resource("monitoring.coreos.com", "v1", "podmonitors", "PodMonitor")

ALL = (
    *OWN,
    DEPLOYMENTS,
    JOBS,
    LEASES,
    SERVICES,
    CONFIG_MAPS,
    CLAIMS,
    SECRETS,
    PODS,
    EVENTS,
    NAMESPACES,
    *RAY,
    POD_MONITORS,
)
_BY_KIND = {(resource.api_version, resource.kind): resource for resource in ALL}


def resource_of(manifest: Manifest) -> Resource:
    """The resource of a manifest of ours; a kind that is not listed above is our own mistake."""
    return _BY_KIND[manifest["apiVersion"], manifest["kind"]]
