"""Wrong manifests: the API server refuses each and says what to write."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from controlplane.client.cluster import Cluster
from samples.valid_manifests import VALID, changed
from samples.wrong_manifests import WRONG, Wrong

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_wrong_manifest_is_refused_with_what_to_write(kinds: Cluster, wrong: Wrong) -> None:
    if wrong.field in ("apiVersion", "kind"):  # kubectl finds no such kind and asks for nothing
        answer = kinds.apply(wrong.manifest, check=False)
        assert answer.code != 0, answer
        message = answer.err
    else:
        message = kinds.dry_create(wrong.manifest).message
    assert (wrong.server or wrong.says) in message


def test_kubectl_says_what_the_api_server_says(kinds: Cluster) -> None:
    several = [wrong for wrong in WRONG if wrong.field not in ("apiVersion", "kind")][::10]
    manifests = [
        changed(wrong.manifest, "metadata.name", f"wrong-{number}")
        for number, wrong in enumerate(several)
        if wrong.field != "metadata.name"
    ]
    answer = kinds.apply(manifests, check=False)
    assert answer.code != 0, answer
    for wrong in several:
        if wrong.field != "metadata.name":
            assert (wrong.server or wrong.says) in answer.err


@pytest.mark.parametrize("kind", VALID)
def test_the_manifests_that_are_changed_are_accepted(kinds: Cluster, kind: str) -> None:
    assert kinds.dry_create(VALID[kind]).message == ""


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
def stored(kinds: Cluster) -> Iterator[str]:
    """A namespace with one object of each kind."""
    with kinds.namespace() as namespace:
        for document in VALID.values():
            kinds.create(document, namespace)
        yield namespace


@pytest.mark.parametrize(("kind", "field", "value", "says"), FORBIDDEN)
def test_what_cannot_change_is_refused_with_what_to_do(
    kinds: Cluster, stored: str, kind: str, field: str, value: object, says: str
) -> None:
    assert says in kinds.dry_replace(changed(VALID[kind], field, value), stored).message


@pytest.mark.parametrize(("kind", "field", "value"), ALLOWED)
def test_what_can_change_is_accepted(
    kinds: Cluster, stored: str, kind: str, field: str, value: object
) -> None:
    assert kinds.dry_replace(changed(VALID[kind], field, value), stored).message == ""


def test_an_adapter_stays_with_the_model_that_it_was_checked_for(
    kinds: Cluster, stored: str
) -> None:
    document = changed(VALID["LoRAAdapter"], "metadata.name", "checked")
    kinds.create(document, stored)
    kinds.patch("LoRAAdapter", "checked", {"status": {"sha256": "a" * 64}}, stored, sub="status")
    moved = changed(document, "spec.modelRef.name", "flux-2-klein")
    said = kinds.dry_replace(moved, stored).message
    assert "spec.modelRef cannot be changed after the adapter was checked" in said


def test_scaling_beyond_the_most_replicas_is_refused(kinds: Cluster, stored: str) -> None:
    scale = ("scale", "imagemodel/flux-2-dev", "-n", stored)
    kinds.kubectl(*scale, "--replicas=3")
    replicas = kinds.get("ImageModel", "flux-2-dev", stored)["spec"]["replicas"]
    assert replicas == {"min": 3, "max": 8}
    answer = kinds.kubectl(*scale, "--replicas=9", check=False)
    assert "replicas.min must not exceed replicas.max" in answer.err
