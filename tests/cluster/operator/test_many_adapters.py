"""As many adapters as a model may have: all are served, and the operator's memory stays bounded.

The limit is a fifth of the default one here: each adapter takes the API server and the operator
0.1 s of CPU. `tests/bench/operator.py` measures the default limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.operator.many_adapters import ManyAdapters, is_ready
from cluster.operator.operator_process import running_operator
from cluster.operator.resources import model
from controlplane.client.cluster import Cluster
from controlplane.client.objects import Object

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

LIMIT, DEFAULT_LIMIT = 200, 1000
MOST_MEMORY = 150.0
"""MB of the operator's process with DEFAULT_LIMIT custom resources."""


@pytest.fixture(scope="module")
def many_adapters(
    kinds: Cluster,
    cluster_binaries: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ManyAdapters]:
    folder = tmp_path_factory.mktemp("many")
    with running_operator(kinds, cluster_binaries["helm"], folder) as (operator, pods):
        operator.start(maxAdaptersPerModel=LIMIT)
        kinds.apply_objects(model(), namespace=operator.namespace)
        kinds.wait("imagemodels", "shapes", "Ready", operator.namespace)
        yield ManyAdapters(kinds, operator, pods)


def test_as_many_as_may_be_are_served_and_the_next_one_waits_for_room(
    many_adapters: ManyAdapters,
) -> None:
    cluster, namespace = many_adapters.cluster, many_adapters.namespace
    names = [f"a{number:03}" for number in range(LIMIT)]
    empty = many_adapters.operator.memory()
    many_adapters.create(names)
    many_adapters.wait_ready(LIMIT)
    assert many_adapters.configured() == set(names)
    many_adapters.create(["one-more"])

    def refused(found: Object) -> bool:
        conditions = found.get("status", {}).get("conditions", [])
        return any(c["reason"] == "CapacityExceeded" for c in conditions)

    found = cluster.wait("loraadapters", "one-more", refused, namespace)
    said = next(c for c in found["status"]["conditions"] if c["type"] == "Accepted")
    assert f"{LIMIT} adapters" in said["message"]
    assert "taken as soon as another one is deleted" in said["message"]
    assert many_adapters.count(is_ready) == LIMIT, "the others are served on"
    grown = many_adapters.operator.memory() - empty
    assert empty + grown * DEFAULT_LIMIT / LIMIT <= MOST_MEMORY
    cluster.delete("loraadapters", "a000", namespace)
    cluster.wait_gone("loraadapters", "a000", namespace)
    cluster.wait("loraadapters", "one-more", "Ready", namespace)
    assert many_adapters.configured() == {*names, "one-more"} - {"a000"}


def test_a_changed_adapter_among_many_is_one_push(many_adapters: ManyAdapters) -> None:
    before = len(many_adapters.pods.pushes("shapes"))
    assert many_adapters.seconds_of_a_change("a100", ["a new word"]) > 0

    def configured() -> bool:
        adapters = many_adapters.pods.adapters("shapes")
        return bool(adapters["a100"]["spec"].get("triggerWords") == ["a new word"])

    many_adapters.cluster.until(configured, "the replicas are configured")
    assert len(many_adapters.pods.pushes("shapes")) == before + 1
