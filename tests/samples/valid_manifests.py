"""One manifest of each kind that says much and is right, and how to change one field of it."""

from __future__ import annotations

import copy
import enum
from typing import Any

from controlplane.client.objects import Object

API_VERSION = "calotype.dev/v1alpha1"
DIGEST = "0123456789abcdef" * 4


def manifest(kind: str, name: str, spec: Object) -> Object:
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec}


VALID: dict[str, Object] = {
    "ImageModel": manifest(
        "ImageModel",
        "flux-2-dev",
        {
            "source": {"huggingFace": {"repo": "black-forest-labs/FLUX.2-dev", "revision": "main"}},
            "credentialsSecretRef": {"name": "hf-token"},
            "licence": {"name": "flux-dev-non-commercial-license", "accepted": True},
            "precision": "int8",
            "acceleration": {"stepCache": 0.1, "compile": True},
            "resourceProfile": "a100-80gb",
            "runtime": "RayService",
            "replicas": {"min": 1, "max": 8},
            "textEncoder": {"resourceProfile": "a100-80gb", "replicas": {"min": 1, "max": 2}},
            "autoscaling": {
                "targetQueueSeconds": 20,
                "downscaleDelaySeconds": 900,
                "scaleToZeroAfterSeconds": None,
            },
            "defaults": {
                "steps": 28,
                "guidanceScale": 4.0,
                "sampler": "flow-euler",
                "size": "1024x1024",
            },
            "qualityPresets": {"low": {"steps": 12}, "high": {"steps": 36}},
            "limits": {"maxPixels": 4194304, "maxSteps": 50, "maxReferenceImages": 8},
            "adapters": {
                "maxRank": 64,
                "memoryBudget": "8Gi",
                "namespaces": {
                    "from": "Selector",
                    "selector": {
                        "matchLabels": {"images": "allowed"},
                        "matchExpressions": [{"key": "tier", "operator": "In", "values": ["a"]}],
                    },
                },
            },
            "moderationPolicyRef": {"name": "default"},
            "aliases": ["dall-e-3", "gpt-image-1"],
            "cache": {"persistentVolumeClaim": {"storageClassName": "fast", "size": "200Gi"}},
            "upgradeStrategy": "NewCluster",
            "fallback": {"modelRef": {"name": "openai"}, "when": {"queueSecondsAbove": 60}},
            "suspend": False,
        },
    ),
    "LoRAAdapter": manifest(
        "LoRAAdapter",
        "acme-sneaker",
        {
            "modelRef": {"name": "flux-2-dev"},
            "source": {"http": {"url": "https://models.example.com/a.safetensors"}},
            "credentialsSecretRef": {"name": "web"},
            "sha256": DIGEST,
            "scale": {"default": 1.0, "min": 0.0, "max": 1.5},
            "triggerWords": ["acme sneaker"],
            "preload": "OnDemand",
            "access": {"teams": ["shoes"]},
            "probe": {"prompt": "an acme sneaker on white", "seed": 1},
        },
    ),
    "ModerationPolicy": manifest(
        "ModerationPolicy",
        "strict",
        {
            "version": 1,
            "lists": ["sexual"],
            "categories": {"sexual": {"text": {"block": 0.5, "flag": 0.3}}},
            "presets": {"strict": {"categories": {"violence": {"text": {"block": 0.2}}}}},
            "shadow": [{"classifier": "falconsai", "model": "/models/falconsai", "sample": 0.5}],
        },
    ),
    "Team": manifest(
        "Team",
        "shoes",
        {
            "displayName": "Shoes",
            "weight": 2,
            "quotas": {"requestsPerMinute": 60, "gpuSecondsPerDay": 3600.5},
            "models": ["flux-2-dev"],
            "keys": {"rotate": 1},
        },
    ),
    "LoRATraining": manifest(
        "LoRATraining",
        "sneaker-style",
        {
            "modelRef": {"name": "flux-2-dev"},
            "dataset": {"s3": {"uri": "s3://pictures/sneakers/", "region": "eu-central-1"}},
            "caption": {"triggerWord": "acme sneaker", "dropout": 0.1},
            "rank": 16,
            "steps": 1500,
            "learningRate": 0.0001,
            "resolution": 1024,
            "resourceProfile": "a100-80gb",
            "output": {"persistentVolumeClaim": {"claimName": "loras", "path": "sneakers"}},
            "adapterTemplate": {"spec": {"preload": "Always"}},
        },
    ),
}


class Change(enum.Enum):
    """What a changed manifest can have instead of a value."""

    REMOVED = "removed"


REMOVED = Change.REMOVED


def changed(document: Object, field: str, value: Any) -> Object:
    """A copy in which one field has another value; `REMOVED` takes it away."""
    found = copy.deepcopy(document)
    *path, last = field.split(".")
    target = found
    for part in path:
        target = target.setdefault(part, {})
    if value is REMOVED:
        del target[last]
    else:
        target[last] = value
    return found
