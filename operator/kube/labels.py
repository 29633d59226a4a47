"""Names, labels and owners of everything that the operator makes."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from calotype.operator.kube.objects import Manifest, Object
from calotype.operator.kube.resources import GROUP
from calotype.operator.settings import OperatorSettings

Component = Literal["model", "fetch", "training", "gateway"]

MANAGED_BY = "app.kubernetes.io/managed-by"
OPERATOR = "calotype-operator"
FINALIZER = f"{GROUP}/operator"
MODEL = f"{GROUP}/model"
MODEL_NAMESPACE = f"{GROUP}/model-namespace"
ADAPTER = f"{GROUP}/adapter"
ADAPTER_NAMESPACE = f"{GROUP}/adapter-namespace"
TEAM = f"{GROUP}/team"
TRAINING = f"{GROUP}/training"

ACCEPTED = f"{GROUP}/accepted"
FORCE_DELETE = f"{GROUP}/force-delete"
DELETE_DEADLINE = f"{GROUP}/delete-deadline-seconds"
REVISION = f"{GROUP}/revision"
CLUSTER_HASH = f"{GROUP}/cluster-hash"
APPLIED_HASH = f"{GROUP}/applied-hash"
FINGERPRINT = f"{GROUP}/fingerprint"
ATTEMPT = f"{GROUP}/attempt"
ROTATION = f"{GROUP}/rotation"
OWNER_UID = f"{GROUP}/owner-uid"


def labels(settings: OperatorSettings, component: Component, **own: str) -> dict[str, str]:
    """The labels of an object of ours; ``own`` names a model, adapter, team or training."""
    return {
        "app.kubernetes.io/name": "calotype",
        "app.kubernetes.io/instance": settings.release,
        "app.kubernetes.io/component": component,
        MANAGED_BY: OPERATOR,
        "app.kubernetes.io/part-of": "calotype",
        **{f"{GROUP}/{key.replace('_', '-')}": value for key, value in own.items()},
    }


def workload_name(model: str) -> str:
    """What the Deployment or RayService, the Service and so on of a model are called.

    With a prefix, so that a model called ``postgres`` does not meet a Service of that name.
    """
    return f"model-{model}"


def model_of(workload: str) -> str:
    """The model that a RayService is of, by its name."""
    return workload.removeprefix(workload_name(""))


def training_job_name(training: str) -> str:
    """What the RayJob and the ConfigMap of a training are called."""
    return f"train-{training}"


def owned_by(obj: Object, owner: Object) -> bool:
    """Whether an object was made for ``owner``, and not for another one of its name."""
    uid = owner["metadata"]["uid"]
    return any(ref.get("uid") == uid for ref in obj["metadata"].get("ownerReferences") or ())


def owner_reference(owner: Object) -> Manifest:
    """Has Kubernetes delete what ``owner`` leaves behind. Only valid in the owner's namespace."""
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
    }


def digest(value: Any, length: int = 16) -> str:
    """Hexadecimal digest of anything that JSON can write, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def short_name(prefix: str, name: str, suffix: str, longest: int = 63) -> str:
    """``PREFIX-NAME-SUFFIX``, the middle shortened; unique as long as the suffix is."""
    room = longest - len(prefix) - len(suffix) - 2
    return f"{prefix}-{name.replace('.', '-')[:room].rstrip('-')}-{suffix}"
