"""Manifests that everybody refuses, and the words that say what to write instead.

`WRONG` is one table for two tests: files read by `calotype serve -f`, and `kubectl apply` against a
real API server. Each is one change of a manifest of `valid_manifests`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from samples.valid_manifests import DIGEST, REMOVED, VALID, Object, changed


@dataclass(frozen=True)
class Wrong:
    """One change of a valid manifest: ``field`` (dotted, from the root) becomes ``value``."""

    kind: str
    field: str
    value: Any
    says: str
    """Part of the sentence, the same from a file and from the API server."""
    server: str | None = None
    """What the API server says instead, where Kubernetes has its own words."""

    @property
    def manifest(self) -> Object:
        return changed(VALID[self.kind], self.field, self.value)

    def __str__(self) -> str:
        return f"{self.kind}.{self.field}={str(self.value)[:40]}"


_UNKNOWN = "is not a field; remove it or correct its spelling"
_HTTP = {"url": "https://a.example.com/m.tar"}

WRONG = [
    Wrong(
        "ImageModel",
        "apiVersion",
        "calotype.dev/v1",
        "apiVersion must be 'calotype.dev/v1alpha1'",
        'no matches for kind "ImageModel" in version "calotype.dev/v1"',
    ),
    Wrong(
        "ImageModel",
        "kind",
        "ImageModal",
        "kind must be ImageModel, LoRAAdapter",
        'no matches for kind "ImageModal"',
    ),
    Wrong(
        "ImageModel",
        "spec.acceleration",
        {"devicesPerPicture": 8, "stepCache": 0.1},
        "several devices draw every step whole: set devicesPerPicture to 1 or stepCache to 0",
    ),
    Wrong(
        "ImageModel",
        "spec.acceleration",
        {"devicesPerPicture": 8, "compile": True},
        "steps on several devices are not compiled: set devicesPerPicture to 1 or compile to false",
    ),
    Wrong("ImageModel", "metadata.name", "flux.2", "40 characters at most"),
    Wrong("ImageModel", "metadata.name", "f" * 41, "its Ray cluster are named after it"),
    Wrong(
        "ImageModel",
        "spec.source",
        REMOVED,
        "spec.source: Field required",
        "spec.source: Required value",
    ),
    Wrong("ImageModel", "spec.source", {}, "name exactly one of builtIn, path, huggingFace, s3"),
    Wrong(
        "ImageModel", "spec.source.http", _HTTP, "name exactly one of builtIn, path, huggingFace"
    ),
    Wrong(
        "ImageModel",
        "spec.source.huggingFace.repo",
        "https://huggingface.co/a/b",
        "a repository is OWNER/NAME",
    ),
    Wrong(
        "ImageModel",
        "spec.source.huggingFace.filename",
        "a.safetensors",
        "a model is a whole repository: remove source.huggingFace.filename",
    ),
    Wrong(
        "ImageModel",
        "spec.source",
        {"s3": {"uri": "https://bucket/key"}},
        "an S3 address is s3://BUCKET/KEY",
    ),
    Wrong(
        "ImageModel",
        "spec.source",
        {"http": {"url": "ftp://a.example.com/m.tar"}},
        "an address begins with https://",
    ),
    Wrong(
        "ImageModel",
        "spec.source",
        {"persistentVolumeClaim": {"claimName": "weights", "path": "/models"}},
        "a path inside the volume does not begin with '/'",
    ),
    Wrong(
        "ImageModel",
        "spec.source",
        {"provider": {"name": "midjourney", "model": "v7"}},
        "Input should be 'openai', 'bfl'",
        'supported values: "openai", "bfl"',
    ),
    Wrong(
        "ImageModel",
        "spec",
        {"source": {"provider": {"name": "openai", "model": "gpt-image-1"}}},
        "a provider wants an API key",
    ),
    Wrong(
        "ImageModel",
        "spec.credentialsSecretRef",
        {"name": "HF Token"},
        "a name has lower-case letters",
    ),
    Wrong("ImageModel", "spec.licence.accepted", False, "read it and set accepted: true"),
    Wrong("ImageModel", "spec.precison", "int8", _UNKNOWN, 'unknown field "spec.precison"'),
    Wrong(
        "ImageModel",
        "spec.quality_presets",
        {"low": {"steps": 3}},
        _UNKNOWN,
        'unknown field "spec.quality_presets"',
    ),
    Wrong(
        "ImageModel",
        "spec.precision",
        "fp8",
        "Input should be 'float32', 'bfloat16'",
        'supported values: "float32", "bfloat16"',
    ),
    Wrong(
        "ImageModel",
        "spec.runtime",
        "Deployment",
        "Input should be 'RayService' or 'SinglePod'",
        'supported values: "RayService", "SinglePod"',
    ),
    Wrong(
        "ImageModel",
        "spec.replicas",
        {"min": 3, "max": 2},
        "replicas.min must not exceed replicas.max",
    ),
    Wrong(
        "ImageModel",
        "spec.replicas.max",
        "3",
        "Input should be a valid integer",
        "must be of type integer",
    ),
    Wrong(
        "ImageModel",
        "spec.replicas.min",
        -1,
        "greater than or equal to 0",
        "greater than or equal to 0",
    ),
    Wrong(
        "ImageModel",
        "spec.textEncoder.replicas",
        {"min": 2, "max": 1},
        "replicas.min must not exceed replicas.max",
    ),
    Wrong(
        "ImageModel",
        "spec.autoscaling.scaleToZeroAfterSeconds",
        600,
        "set replicas.min to 0 or remove scaleToZeroAfterSeconds",
    ),
    Wrong("ImageModel", "spec.defaults.size", "1000x1000", "both multiples of 16"),
    Wrong("ImageModel", "spec.defaults.size", "large", "a size is WIDTHxHEIGHT in pixels"),
    Wrong("ImageModel", "spec.defaults.size", "4096x4096", "more pixels than limits.maxPixels"),
    Wrong("ImageModel", "spec.defaults.size", "32x1024", "smaller than limits.minSide allows"),
    Wrong(
        "ImageModel", "spec.defaults.steps", 60, "defaults.steps must not exceed limits.maxSteps"
    ),
    Wrong(
        "ImageModel",
        "spec.defaults.sampler",
        "euler-a",
        "a sampler is one of flow-euler, flow-heun",
    ),
    Wrong(
        "ImageModel",
        "spec.qualityPresets.high.steps",
        80,
        "steps of a quality preset must not exceed limits.maxSteps",
    ),
    Wrong(
        "ImageModel",
        "spec.qualityPresets.ultra",
        {"steps": 50},
        "Input should be 'low', 'medium' or 'high'",
        "there are only these names: low, medium, high",
    ),
    Wrong("ImageModel", "spec.limits.minSide", 4096, "lower minSide or raise maxPixels"),
    Wrong(
        "ImageModel", "spec.adapters.memoryBudget", "8 gigabytes", "an amount is a number above 0"
    ),
    Wrong("ImageModel", "spec.adapters.memoryBudget", 0, "an amount is a number above 0"),
    Wrong(
        "ImageModel",
        "spec.cache.persistentVolumeClaim.size",
        "200GB",
        "an amount is a number above 0",
    ),
    Wrong(
        "ImageModel",
        "spec.adapters.namespaces",
        {"from": "Selector"},
        "selector is given with from: Selector",
    ),
    Wrong(
        "ImageModel",
        "spec.adapters.namespaces",
        {"from": "Selector", "selector": {}},
        "an empty selector would choose every namespace",
    ),
    Wrong(
        "ImageModel",
        "spec.adapters.namespaces.selector.matchExpressions",
        [{"key": "tier", "operator": "Exists", "values": ["a"]}],
        "values are given for the operators In and NotIn",
    ),
    Wrong("ImageModel", "spec.aliases", ["dall-e-3", "dall-e-3"], "Duplicate value"),
    Wrong("ImageModel", "spec.aliases", ["flux-2-dev"], "holds the model's own name"),
    Wrong("ImageModel", "spec.aliases", ["dall e"], "an alias has letters, digits"),
    Wrong("ImageModel", "spec.fallback.modelRef.name", "flux-2-dev", "names the model itself"),
    Wrong(
        "LoRAAdapter",
        "spec.modelRef",
        REMOVED,
        "spec.modelRef: Field required",
        "spec.modelRef: Required value",
    ),
    Wrong("LoRAAdapter", "spec.modelRef.namespace", "Team A", "a namespace has lower-case letters"),
    Wrong(
        "LoRAAdapter",
        "spec.source",
        {"provider": {"name": "openai", "model": "a"}},
        _UNKNOWN,
        'unknown field "spec.source.provider"',
    ),
    Wrong(
        "LoRAAdapter", "spec.sha256", "sha256:" + DIGEST[:57], "a sha256 is 64 hexadecimal digits"
    ),
    Wrong(
        "LoRAAdapter",
        "spec.source.http.sha256",
        DIGEST[::-1],
        "sha256 and source.http.sha256 differ",
    ),
    Wrong("LoRAAdapter", "spec.scale", {"default": 2.0, "max": 1.5}, "min <= default <= max"),
    Wrong("LoRAAdapter", "spec.scale", {"default": 0.1, "min": 0.5}, "min <= default <= max"),
    Wrong("LoRAAdapter", "spec.scale.max", float("1e3"), "less than or equal to 10"),
    Wrong(
        "LoRAAdapter",
        "spec.triggerWords",
        [""],
        "at least 1 character",
        "should be at least 1 chars long",
    ),
    Wrong("LoRAAdapter", "spec.triggerWords", ["a"] * 33, "at most 32 items", "at most 32 items"),
    Wrong(
        "LoRAAdapter",
        "spec.preload",
        "Never",
        "Input should be 'Always' or 'OnDemand'",
        'supported values: "Always", "OnDemand"',
    ),
    Wrong("ModerationPolicy", "spec.version", 0, "greater than or equal to 1"),
    Wrong(
        "ModerationPolicy",
        "spec.categories",
        {},
        "at least 1 item",
        "should have at least 1 properties",
    ),
    Wrong(
        "ModerationPolicy",
        "spec.categories.nudity",
        {"text": {"block": 0.5}},
        "Input should be 'sexual'",
        "there are only these names: sexual, sexual/minors",
    ),
    Wrong("ModerationPolicy", "spec.categories.sexual.text.block", 1.5, "less than or equal to 1"),
    Wrong(
        "ModerationPolicy",
        "spec.categories.sexual.text.block",
        "0.5",
        "Input should be a valid number",
        "must be of type number",
    ),
    Wrong(
        "ModerationPolicy", "spec.categories.sexual.text.flag", 0.9, "flag must not be above block"
    ),
    Wrong(
        "ModerationPolicy",
        "spec.lists",
        ["sexuel"],
        "there is no list 'sexuel'",
        'Unsupported value: "sexuel"',
    ),
    Wrong(
        "ModerationPolicy",
        "spec.presets.strict.tolerances",
        [7],
        "less than or equal to 6",
    ),
    Wrong(
        "ModerationPolicy",
        "spec.presets.strict.categories.violence.text.block",
        1.5,
        "less than or equal to 1",
    ),
    Wrong(
        "ModerationPolicy",
        "spec.shadow",
        [{"classifier": "nudenet", "model": "/models/nudenet"}],
        "Input should be 'qwen3guard'",
        'Unsupported value: "nudenet"',
    ),
    Wrong(
        "ModerationPolicy",
        "spec.shadow",
        [{"classifier": "falconsai", "model": "/models/falconsai", "sample": 0}],
        "greater than 0",
        "should be greater than 0",
    ),
    Wrong(
        "ModerationPolicy",
        "spec.onError",
        "allow",
        "Input should be 'block' or 'review'",
        'supported values: "block", "review"',
    ),
    Wrong(
        "Team",
        "metadata.name",
        "Shoes",
        "a name has lower-case letters",
        "a lowercase RFC 1123 subdomain must consist of",
    ),
    Wrong("Team", "spec.weight", 0, "greater than 0", "should be greater than 0"),
    Wrong("Team", "spec.models", ["a", "a"], "Duplicate value"),
    Wrong("Team", "spec.quotas.requestsPerMinute", 0, "greater than or equal to 1"),
    Wrong(
        "Team",
        "spec.quotas.requestsPerHour",
        9,
        _UNKNOWN,
        'unknown field "spec.quotas.requestsPerHour"',
    ),
    Wrong("LoRATraining", "spec.resolution", 1000, "resolution must be a multiple of 16"),
    Wrong("LoRATraining", "spec.rank", 0, "greater than or equal to 1"),
    Wrong(
        "LoRATraining",
        "spec.dataset",
        {"s3": {"uri": "s3://pictures/b"}, "http": _HTTP},
        "name exactly one of s3, persistentVolumeClaim, http, assets",
    ),
    Wrong(
        "LoRATraining",
        "spec.dataset",
        {"assets": {"ids": ["../secret"]}},
        "an asset's id has letters",
    ),
    Wrong("LoRATraining", "spec.output", {}, "name exactly one of s3, persistentVolumeClaim"),
    Wrong("LoRATraining", "spec.caption.dropout", 5, "less than or equal to 1"),
]
