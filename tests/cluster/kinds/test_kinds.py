"""The kinds on a real API server: defaults, columns, status, scaling, and the examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from controlplane.client.cluster import Cluster
from controlplane.client.objects import Object
from samples.valid_manifests import VALID, changed, manifest

from calotype.operator.api.crdgen import FOLDER, KINDS

pytestmark = pytest.mark.cluster

EXAMPLES = Path(__file__).parents[3] / "examples"
NOW = "2026-11-23T09:00:00Z"
DIGEST = "a" * 64
CLASSES = {kind.name: kind for kind in KINDS}
CONDITIONS = [
    {
        "type": "Ready",
        "status": "True",
        "observedGeneration": 1,
        "lastTransitionTime": NOW,
        "reason": "AllReplicasReady",
        "message": "Every replica is ready.",
    }
]
FAILURE = {
    "time": NOW,
    "reason": "Unreachable",
    "message": "The source did not answer.",
    "attempts": 3,
    "nextRetryTime": NOW,
    "fingerprint": DIGEST,
}
STATUS: dict[str, Object] = {
    "ImageModel": {
        "observedGeneration": 1,
        "conditions": CONDITIONS,
        "phase": "Ready",
        "url": "http://flux-2-dev.calotype.svc:8000",
        "replicas": {"ready": 2, "desired": 3, "max": 8},
        "serving": "2/3",
        "selector": "calotype.dev/model=flux-2-dev",
        "adapters": {"loaded": 4, "desired": 5},
        "resolvedRevision": "0123abcd",
        "weightsSha256": DIGEST,
        "weightsPath": "/var/lib/calotype/cache/models/a",
        "weightsBytes": 64_000_000_000,
        "sourceHash": DIGEST,
        "configHash": DIGEST,
        "queueSeconds": 1.5,
        "gpuHourCost": 11.2,
        "lastFailure": FAILURE,
    },
    "LoRAAdapter": {
        "observedGeneration": 1,
        "conditions": CONDITIONS,
        "phase": "Degraded",
        "resolvedRevision": "0123abcd",
        "sha256": DIGEST,
        "sizeBytes": 1024,
        "rank": 16,
        "targetModules": ["attn.to_q"],
        "path": "/var/lib/calotype/cache/adapters/a",
        "sourceHash": DIGEST,
        "acceptedRevisions": [
            {
                "sha256": DIGEST,
                "resolvedRevision": "0123abcd",
                "path": "/var/lib/calotype/cache/adapters/a",
            }
        ],
        "loaded": "3/5",
        "replicas": {"desired": 5, "loaded": 3, "failed": 1},
        "loadStates": [
            {
                "replica": "r1",
                "node": "gpu-1",
                "revision": "0123abcd",
                "state": "failed",
                "message": "out of memory",
                "loadMilliseconds": 12.5,
            }
        ],
        "lastFailure": FAILURE,
    },
    "ModerationPolicy": {
        "observedGeneration": 1,
        "conditions": CONDITIONS,
        "sha256": DIGEST,
        "usedBy": 2,
    },
    "Team": {
        "observedGeneration": 1,
        "conditions": CONDITIONS,
        "phase": "Ready",
        "keySecretRef": {"name": "calotype-key-shoes", "key": "api-key"},
        "keyPrefix": "ct_live_abc",
        "rotation": "1",
        "usage": {
            "month": "2026-11",
            "requests": 9,
            "images": 12,
            "gpuSeconds": 80.5,
            "cost": 0.5,
            "updatedTime": NOW,
        },
        "lastFailure": {key: FAILURE[key] for key in ("time", "reason", "message")},
    },
    "LoRATraining": {
        "observedGeneration": 1,
        "conditions": CONDITIONS,
        "phase": "Running",
        "step": 120,
        "totalSteps": 1500,
        "progress": "120/1500",
        "loss": 0.25,
        "etaSeconds": 600,
        "jobName": "sneaker-style-abc",
        "startTime": NOW,
        "completionTime": NOW,
        "samples": [{"step": 100, "url": "s3://pictures/100.png"}],
        "adapterRef": {"name": "sneaker-style", "namespace": "shoes"},
        "lastFailure": FAILURE,
    },
}
COLUMNS = {
    "ImageModel": (
        "NAME PHASE READY MAX ADAPTERS QUEUE REVISION URL REASON AGE",
        "flux-2-dev Ready 2/3 8 4 1.5 0123abcd http://flux-2-dev.calotype.svc:8000 "
        "AllReplicasReady",
    ),
    "LoRAAdapter": (
        "NAME MODEL PHASE LOADED REVISION REASON AGE",
        "acme-sneaker flux-2-dev Degraded 3/5 0123abcd AllReplicasReady",
    ),
    "ModerationPolicy": (
        "NAME VERSION USED-BY READY REASON AGE",
        "strict 1 2 True AllReplicasReady",
    ),
    "Team": (
        "NAME WEIGHT KEY IMAGES READY COST REASON AGE",
        "shoes 2 calotype-key-shoes 12 True 0.5 AllReplicasReady",
    ),
    "LoRATraining": (
        "NAME MODEL PHASE PROGRESS LOSS ADAPTER REASON AGE",
        "sneaker-style flux-2-dev Running 120/1500 0.25 sneaker-style AllReplicasReady",
    ),
}


def test_the_definitions_apply_twice_without_a_change(kinds: Cluster) -> None:
    def generations() -> dict[str, int]:
        found = [crd["metadata"] for crd in kinds.items("crd", None)]
        return {m["name"]: m["generation"] for m in found if m["name"].endswith(".calotype.dev")}

    apply = (FOLDER, "--server-side", "--force-conflicts")
    kinds.apply(*apply)
    before = generations()
    kinds.apply(*apply)
    assert len(before) == len(KINDS)
    assert generations() == before


@pytest.mark.parametrize("kind", VALID)
def test_what_is_stored_is_what_the_classes_read(kinds: Cluster, namespace: str, kind: str) -> None:
    stored = kinds.create(VALID[kind], namespace)
    resource = CLASSES[kind].resource
    read = resource.model_validate(stored)
    assert read.model_dump(mode="json", by_alias=True, exclude_none=True)["spec"] == stored["spec"]
    assert read.spec == resource.model_validate(VALID[kind]).spec  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", STATUS)
def test_a_status_is_stored_whole_and_shown(kinds: Cluster, namespace: str, kind: str) -> None:
    name = VALID[kind]["metadata"]["name"]
    kinds.create(VALID[kind], namespace)
    status = STATUS[kind]
    said = CLASSES[kind].status.model_validate(status)
    assert set(status) == {f.alias for f in type(said).model_fields.values()}, "every field is here"
    stored = kinds.patch(kind, name, {"status": status}, namespace, sub="status")
    assert stored["status"] == status
    assert stored["metadata"]["generation"] == 1
    header, row = kinds.kubectl("get", kind, "-n", namespace, "-o", "wide").splitlines()
    wanted, values = COLUMNS[kind]
    assert header.split() == wanted.split()
    assert row.split()[:-1] == values.split()
    kinds.kubectl("wait", "--for=condition=Ready", f"{kind}/{name}", "-n", namespace)


def test_a_status_field_that_no_class_has_is_refused_by_a_strict_writer(
    kinds: Cluster, namespace: str
) -> None:
    kinds.create(VALID["Team"], namespace)
    url = kinds.path("Team", namespace, "shoes") + "/status?fieldValidation=Strict"
    answer = kinds.api.patch(
        url,
        json={"status": {"mood": "good"}},
        headers={"content-type": "application/merge-patch+json"},
    )
    assert answer.status_code == 422
    assert 'unknown field "status.mood"' in answer.json()["message"]


def test_short_names_and_the_category(kinds: Cluster, namespace: str) -> None:
    for document in VALID.values():
        kinds.create(document, namespace)
    short = kinds.kubectl("get", "im,lora,modpol,team,loratrain", "-n", namespace, "-o", "name")
    category = kinds.kubectl("get", "calotype", "-n", namespace, "-o", "name")
    assert sorted(short.split()) == sorted(category.split())
    assert len(short.split()) == len(VALID)


def test_null_and_no_spec_at_all_are_defaults(kinds: Cluster, namespace: str) -> None:
    nulls = manifest(
        "ImageModel",
        "nulls",
        {
            "source": {"builtIn": {"name": "shapes"}, "path": None},
            "replicas": None,
            "enlarge": None,
            "precision": None,
        },
    )
    spec = kinds.create(nulls, namespace)["spec"]
    assert spec["source"] == {"builtIn": {"name": "shapes"}}
    assert spec["replicas"] == {"min": 1, "max": 1}
    assert spec["precision"] == "bfloat16"
    assert "enlarge" not in spec
    team: dict[str, Any] = {**VALID["Team"]}
    del team["spec"]
    assert kinds.create(team, namespace)["spec"]["weight"] == 1


def test_a_number_of_bytes_is_an_amount_too(kinds: Cluster, namespace: str) -> None:
    plain = changed(VALID["ImageModel"], "spec.cache.persistentVolumeClaim.size", 2**40)
    kinds.create(plain, namespace)
    smaller = changed(plain, "spec.cache.persistentVolumeClaim.size", "1000Gi")
    answer = kinds.apply(smaller, "-n", namespace, check=False)
    assert "a volume can grow but not shrink" in answer.err
    larger = changed(plain, "spec.cache.persistentVolumeClaim.size", "2Ti")
    kinds.apply(larger, "-n", namespace)


def test_every_field_is_explained(kinds: Cluster) -> None:
    said = kinds.kubectl("explain", "loraadapter.spec.scale")
    assert "Largest scale of a request. Default: 1.5." in said
    said = kinds.kubectl("explain", "imagemodel.spec.autoscaling.scaleToZeroAfterSeconds")
    assert "in seconds" in " ".join(said.split())


def test_the_examples_apply_as_they_are(kinds: Cluster, namespace: str) -> None:
    first = kinds.apply(EXAMPLES, "-n", namespace)
    assert first.count("created") == len(list(EXAMPLES.glob("*.yaml")))
    assert kinds.apply(EXAMPLES, "-n", namespace).count("unchanged") == first.count("created")
