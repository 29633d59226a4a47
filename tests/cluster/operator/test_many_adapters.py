"""A thousand adapters of one model: all are served, and the operator's memory stays bounded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.kinds.installing import install_kinds
from cluster.operator.many_adapters import MANY, ManyAdapters, is_ready
from cluster.operator.operator_process import running_operator
from cluster.operator.resources import model
from controlplane.client.cluster import Cluster
from controlplane.client.objects import Object

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

MOST_MEMORY = 150.0
"""MB of the operator's process with a thousand custom resources."""


@pytest.fixture(scope="module")
def thousand_adapters(
    control_plane: Cluster,
    cluster_binaries: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ManyAdapters]:
    install_kinds(control_plane)
    folder = tmp_path_factory.mktemp("many")
    with running_operator(control_plane, cluster_binaries["helm"], folder) as (operator, pods):
        operator.start()
        control_plane.apply(model(), "-n", operator.namespace)
        control_plane.wait("imagemodels", "shapes", "Ready", operator.namespace)
        yield ManyAdapters(control_plane, operator, pods)


def test_a_thousand_are_served_and_the_next_one_waits_for_room(
    thousand_adapters: ManyAdapters,
) -> None:
    cluster, namespace = thousand_adapters.cluster, thousand_adapters.namespace
    names = [f"a{number:04}" for number in range(MANY)]
    thousand_adapters.create(names)
    thousand_adapters.wait_ready(MANY)
    assert thousand_adapters.configured() == set(names)
    thousand_adapters.create(["one-more"])

    def refused(found: Object) -> bool:
        conditions = found.get("status", {}).get("conditions", [])
        return any(c["reason"] == "CapacityExceeded" for c in conditions)

    found = cluster.wait("loraadapters", "one-more", refused, namespace)
    said = next(c for c in found["status"]["conditions"] if c["type"] == "Accepted")
    assert f"{MANY} adapters" in said["message"]
    assert "taken as soon as another one is deleted" in said["message"]
    assert thousand_adapters.count(is_ready) == MANY, "the others are served on"
    assert thousand_adapters.operator.memory() <= MOST_MEMORY
    cluster.kubectl("delete", "loraadapter", "a0000", "-n", namespace, "--timeout=120s")
    cluster.wait("loraadapters", "one-more", "Ready", namespace, seconds=120)
    assert thousand_adapters.configured() == {*names, "one-more"} - {"a0000"}


def test_a_changed_adapter_among_a_thousand_is_one_push(thousand_adapters: ManyAdapters) -> None:
    before = len(thousand_adapters.pods.app("shapes").pushes)
    assert thousand_adapters.seconds_of_a_change("a0500", ["a new word"]) > 0

    def told() -> bool:
        adapters = thousand_adapters.pods.app("shapes").adapters()
        return bool(adapters["a0500"]["spec"].get("triggerWords") == ["a new word"])

    thousand_adapters.cluster.until(told, "the replicas are told", 60)
    assert len(thousand_adapters.pods.app("shapes").pushes) == before + 1
