"""The kinds of KubeRay, as far as the tests' manifests use them: small structural schemas.

A field that is not here is refused by `kubectl apply`, which is what a test of a manifest wants.
What stands inside a container or volume is kept as it is: the API server checks it in the pod.
"""

from typing import Any

Schema = dict[str, Any]
ANY: Schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
TABLE: Schema = {"type": "object", "additionalProperties": TEXT}


def number(minimum: int | None = None, default: int | None = None) -> Schema:
    schema: Schema = {"type": "integer", "format": "int32"}
    schema |= {} if minimum is None else {"minimum": minimum}
    return schema | ({} if default is None else {"default": default})


def choice(*words: str, default: str | None = None) -> Schema:
    schema: Schema = {"type": "string", "enum": list(words)}
    return schema | ({} if default is None else {"default": default})


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def record(properties: dict[str, Schema], *required: str, open_: bool = False) -> Schema:
    schema: Schema = {"type": "object", "properties": properties}
    schema |= {"required": list(required)} if required else {}
    return schema | ({"x-kubernetes-preserve-unknown-fields": True} if open_ else {})


CONTAINER = record({"name": TEXT, "image": TEXT}, "name", open_=True)
POD_SPEC = record({"containers": array(CONTAINER)}, "containers", open_=True)
TEMPLATE = record({"metadata": ANY, "spec": POD_SPEC}, "spec")
HEAD = record(
    {
        "template": TEMPLATE,
        "rayStartParams": TABLE,
        "serviceType": choice("ClusterIP", "NodePort", "LoadBalancer"),
        "headService": ANY,
        "enableIngress": FLAG,
        "resources": TABLE,
        "labels": TABLE,
    },
    "template",
)
GROUP = record(
    {
        "groupName": TEXT,
        "replicas": number(0, 0),
        "minReplicas": number(0, 0),
        "maxReplicas": number(0, 2147483647),
        "numOfHosts": number(1, 1),
        "idleTimeoutSeconds": number(0),
        "suspend": FLAG,
        "rayStartParams": TABLE,
        "resources": TABLE,
        "labels": TABLE,
        "scaleStrategy": record({"workersToDelete": array(TEXT)}),
        "template": TEMPLATE,
    },
    "groupName",
    "template",
)
AUTOSCALER = record(
    {
        "version": choice("v1", "v2"),
        "upscalingMode": choice("Default", "Aggressive", "Conservative"),
        "idleTimeoutSeconds": number(0),
        "image": TEXT,
        "imagePullPolicy": TEXT,
        "resources": ANY,
        "securityContext": ANY,
        **{name: array(ANY) for name in ("env", "envFrom", "volumeMounts")},
    }
)
CLUSTER = record(
    {
        "rayVersion": TEXT,
        "headGroupSpec": HEAD,
        "workerGroupSpecs": array(GROUP),
        "enableInTreeAutoscaling": FLAG,
        "autoscalerOptions": AUTOSCALER,
        "gcsFaultToleranceOptions": ANY,
        "authOptions": ANY,
        "headServiceAnnotations": TABLE,
        "upgradeStrategy": record({"type": choice("Recreate", "None")}),
        "suspend": FLAG,
    },
    "headGroupSpec",
)
STRATEGIES = choice("NewCluster", "None", "NewClusterWithIncrementalUpgrade")
STEPS = record(
    {
        "gatewayClassName": TEXT,
        **{name: number(0) for name in ("maxSurgePercent", "stepSizePercent", "intervalSeconds")},
    }
)
SERVICE = record(
    {
        "rayClusterConfig": CLUSTER,
        "serveConfigV2": TEXT,
        "upgradeStrategy": record({"type": STRATEGIES, "clusterUpgradeOptions": STEPS}),
        "rayClusterDeletionDelaySeconds": number(0),
        "excludeHeadPodFromServeSvc": FLAG,
        "serveService": ANY,
        "suspend": FLAG,
    },
    "rayClusterConfig",
)
JOB = record(
    {
        "entrypoint": TEXT,
        "rayClusterSpec": CLUSTER,
        "clusterSelector": TABLE,
        "submissionMode": choice("K8sJobMode", "HTTPMode", default="K8sJobMode"),
        "shutdownAfterJobFinishes": FLAG,
        "ttlSecondsAfterFinished": number(0, 0),
        "backoffLimit": number(0, 0),
        "activeDeadlineSeconds": number(1),
        "runtimeEnvYAML": TEXT,
        "jobId": TEXT,
        "metadata": TABLE,
        "submitterPodTemplate": TEMPLATE,
        "submitterConfig": record({"backoffLimit": number(0)}),
        "suspend": FLAG,
    }
)
KINDS = {"RayCluster": CLUSTER, "RayService": SERVICE, "RayJob": JOB}


def definitions() -> list[Schema]:
    """The CustomResourceDefinitions of group ray.io."""
    return [_definition(kind, spec) for kind, spec in KINDS.items()]


def _definition(kind: str, spec: Schema) -> Schema:
    plural = f"{kind.lower()}s"
    version: Schema = {
        "name": "v1",
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "schema": {"openAPIV3Schema": record({"spec": spec, "status": ANY}, "spec")},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.ray.io"},
        "spec": {
            "group": "ray.io",
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [version],
        },
    }
