"""`kubectl apply` of wrong manifests: the API server refuses each and says what to write."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from controlplane.client.cluster import Cluster
from samples.valid_manifests import VALID, changed
from samples.wrong_manifests import WRONG, Wrong

from calotype.operator.api.crdgen import FOLDER

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster(control_plane: Cluster) -> Cluster:
    control_plane.apply(FOLDER, "--server-side")
    names = [f"crd/{file.stem}.calotype.dev" for file in FOLDER.glob("*.yaml")]
    control_plane.kubectl("wait", "--for=condition=Established", *names)
    return control_plane


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_wrong_manifest_is_refused_with_what_to_write(cluster: Cluster, wrong: Wrong) -> None:
    answer = cluster.apply(wrong.manifest, check=False)
    assert answer.code != 0, answer
    assert (wrong.server or wrong.says) in answer.err


@pytest.mark.parametrize("kind", VALID)
def test_the_manifests_that_are_changed_are_accepted(cluster: Cluster, kind: str) -> None:
    assert "created" in cluster.apply(VALID[kind], "--dry-run=server")


# Field of a valid object, its next value, and what is said.
FORBIDDEN = [
    ("ImageModel", "spec.runtime", "SinglePod", "runtime cannot be changed"),
    (
        "ImageModel",
        "spec.source",
        {"provider": {"name": "openai", "model": "gpt-image-1"}},
        "cannot become each other",
    ),
    (
        "ImageModel",
        "spec.cache.persistentVolumeClaim.storageClassName",
        "slow",
        "the storage class of a volume cannot be changed",
    ),
    (
        "ImageModel",
        "spec.cache.persistentVolumeClaim.size",
        "199Gi",
        "a volume can grow but not shrink",
    ),
    (
        "ModerationPolicy",
        "spec.categories.sexual.text.block",
        0.9,
        "raise spec.version with every change",
    ),
    ("Team", "spec.keys.rotate", 0, "keys.rotate only counts up"),
    ("LoRATraining", "spec.rank", 32, "create another LoRATraining"),
    ("LoRATraining", "spec.caption.dropout", 0.2, "create another LoRATraining"),
]

ALLOWED = [
    ("ImageModel", "spec.cache.persistentVolumeClaim.size", "1Ti"),
    ("ImageModel", "spec.cache", None),
    ("ImageModel", "spec.suspend", True),
    ("ModerationPolicy", "spec.version", 2),
    ("Team", "spec.keys.rotate", 2),
    ("LoRATraining", "spec.suspend", True),
    ("LoRATraining", "spec.adapterTemplate.spec.preload", "OnDemand"),
    ("LoRAAdapter", "spec.modelRef.name", "flux-2-klein"),
]


@pytest.fixture(scope="module")
def stored(cluster: Cluster) -> Iterator[Cluster]:
    for document in VALID.values():
        cluster.apply(document)
    yield cluster
    for kind, document in VALID.items():
        cluster.delete(kind, document["metadata"]["name"], "default")


@pytest.mark.parametrize(("kind", "field", "value", "says"), FORBIDDEN)
def test_what_cannot_change_is_refused_with_what_to_do(
    stored: Cluster, kind: str, field: str, value: object, says: str
) -> None:
    answer = stored.apply(changed(VALID[kind], field, value), check=False)
    assert answer.code != 0, answer
    assert says in answer.err


@pytest.mark.parametrize(("kind", "field", "value"), ALLOWED)
def test_what_can_change_is_accepted(stored: Cluster, kind: str, field: str, value: object) -> None:
    answer = stored.apply(changed(VALID[kind], field, value), "--dry-run=server")
    assert "configured" in answer


def test_an_adapter_stays_with_the_model_that_it_was_checked_for(stored: Cluster) -> None:
    document = changed(VALID["LoRAAdapter"], "metadata.name", "checked")
    stored.apply(document)
    stored.patch(
        "LoRAAdapter", "checked", {"status": {"sha256": "a" * 64}}, "default", sub="status"
    )
    moved = changed(document, "spec.modelRef.name", "flux-2-klein")
    answer = stored.apply(moved, check=False)
    assert "spec.modelRef cannot be changed after the adapter was checked" in answer.err
    stored.delete("LoRAAdapter", "checked", "default")


def test_scaling_beyond_the_most_replicas_is_refused(stored: Cluster) -> None:
    stored.kubectl("scale", "imagemodel/flux-2-dev", "--replicas=3")
    assert stored.get("ImageModel", "flux-2-dev")["spec"]["replicas"] == {"min": 3, "max": 8}
    answer = stored.kubectl("scale", "imagemodel/flux-2-dev", "--replicas=9", check=False)
    assert "replicas.min must not exceed replicas.max" in answer.err
