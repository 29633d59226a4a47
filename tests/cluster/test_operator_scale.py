"""A thousand adapters of one model: taken, counted and remembered within bounds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.crowd import MANY, Crowd, is_ready, model
from cluster.operating import install_kinds, operated
from controlplane.cluster import Cluster, Object

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

MOST_MEMORY = 150.0
"""MB of the operator's process with a thousand custom resources."""


@pytest.fixture(scope="module")
def crowd(
    control_plane: Cluster,
    cluster_binaries: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Crowd]:
    install_kinds(control_plane)
    folder = tmp_path_factory.mktemp("crowd")
    with operated(control_plane, cluster_binaries["helm"], folder) as (operator, pretence):
        operator.start()
        control_plane.apply(model(), "-n", operator.namespace)
        control_plane.wait("imagemodels", "shapes", "Ready", operator.namespace)
        yield Crowd(control_plane, operator, pretence)


def test_a_thousand_are_served_and_the_next_one_waits_for_room(crowd: Crowd) -> None:
    cluster, namespace = crowd.cluster, crowd.namespace
    names = [f"a{number:04}" for number in range(MANY)]
    crowd.gather(names)
    crowd.wait_ready(MANY)
    assert crowd.configured() == set(names)
    crowd.gather(["one-more"])

    def refused(found: Object) -> bool:
        conditions = found.get("status", {}).get("conditions", [])
        return any(c["reason"] == "CapacityExceeded" for c in conditions)

    found = cluster.wait("loraadapters", "one-more", refused, namespace)
    said = next(c for c in found["status"]["conditions"] if c["type"] == "Accepted")
    assert f"{MANY} adapters" in said["message"]
    assert "taken as soon as another one is deleted" in said["message"]
    assert crowd.count(is_ready) == MANY, "the others are served on"
    assert crowd.operator.memory() <= MOST_MEMORY
    cluster.kubectl("delete", "loraadapter", "a0000", "-n", namespace, "--timeout=120s")
    cluster.wait("loraadapters", "one-more", "Ready", namespace, seconds=120)
    assert crowd.configured() == {*names, "one-more"} - {"a0000"}


def test_a_changed_one_travels_among_the_thousand(crowd: Crowd) -> None:
    before = len(crowd.pretence.app("shapes").pushes)
    assert crowd.seconds_of_a_change("a0500", ["a new word"]) > 0

    def told() -> bool:
        adapters = crowd.pretence.app("shapes").adapters()
        return bool(adapters["a0500"]["spec"].get("triggerWords") == ["a new word"])

    crowd.cluster.until(told, "the replicas are told", 60)
    assert len(crowd.pretence.app("shapes").pushes) == before + 1
