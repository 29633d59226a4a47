"""The operator as a process on a real API server: schemas, rights and collection are real."""

from __future__ import annotations

import base64
import json
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.operator.operator_process import (
    OperatorProcess,
    no_orphans,
    operator_rights,
    running_operator,
)
from cluster.operator.resources import TEAM, adapter, hub_adapter, model
from cluster.operator.simulated_pods import SimulatedPods
from controlplane.client.cluster import Cluster, condition
from controlplane.client.objects import Object
from controlplane.fixtures import foreign

from calotype.operator.testing.cluster import good_fetch

KILLS = 6
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture
def running(
    kinds: Cluster, cluster_binaries: dict[str, Path], tmp_path: Path
) -> Iterator[tuple[OperatorProcess, SimulatedPods]]:
    with running_operator(kinds, cluster_binaries["helm"], tmp_path) as both:
        both[0].start()
        yield both


def configured(cluster: Cluster, namespace: str) -> set[str]:
    """Names of the adapters in the model's configuration."""
    found = cluster.find("configmap", "model-shapes-app", namespace)
    config = json.loads(found["data"]["model.json"]) if found else {"deployments": []}
    generators = [d for d in config["deployments"] if d["name"] == "Generator"]
    return {a["metadata"]["name"] for g in generators for a in g["user_config"]["adapters"]}


def test_a_user_reads_the_truth_from_kubectl_get(
    kinds: Cluster, running: tuple[OperatorProcess, SimulatedPods]
) -> None:
    operator, _ = running
    namespace = operator.namespace
    kinds.apply_objects(model(), adapter(), hub_adapter(), TEAM, namespace=namespace)
    kinds.wait("imagemodels", "shapes", "Ready", namespace)
    kinds.wait("loraadapters", "stripes", "Ready", namespace)
    found = kinds.wait("loraadapters", "sneaker", "Ready", namespace)
    kinds.wait("teams", "shoes", "Ready", namespace)
    # The schema knows every field that the operator writes: nothing was pruned.
    expected = {
        "conditions",
        "loadStates",
        "loaded",
        "observedGeneration",
        "path",
        "phase",
        "rank",
        "replicas",
        "resolvedRevision",
        "sha256",
        "sizeBytes",
        "sourceHash",
        "targetModules",
    }
    assert set(found["status"]) == expected
    table = kinds.kubectl("get", "loraadapters", "-n", namespace)
    assert "1/1" in table
    assert "Ready" in table
    kinds.until(lambda: not kinds.items("jobs", namespace), "Jobs are cleared up")
    key = kinds.get("secret", "calotype-key-shoes", namespace)["data"]["api-key"]
    assert base64.b64decode(key).startswith(b"ct_live_")
    events = {e["reason"] for e in kinds.events("sneaker", namespace)}
    assert "Ready" in events
    no_orphans(kinds, namespace)
    assert operator.stop() == 0
    said = operator.log.read_text()
    assert "ERROR" not in said and "Traceback" not in said, said[-4000:]


def test_fifty_adapters_applied_at_once_are_one_push(
    kinds: Cluster, running: tuple[OperatorProcess, SimulatedPods]
) -> None:
    operator, pods = running
    namespace = operator.namespace
    kinds.apply_objects(model(), namespace=namespace)
    kinds.wait("imagemodels", "shapes", "Ready", namespace)
    before = len(pods.pushes("shapes"))
    names = [f"a{number:02}" for number in range(50)]
    kinds.apply_objects(*[adapter(name) for name in names], namespace=namespace)
    kinds.until(lambda: all_ready(kinds, namespace), "every adapter is ready")
    assert [len(pushed) for pushed in pods.pushes("shapes")[before:]] == [50]


def test_secrets_that_are_missing_wrong_and_rotated(
    kinds: Cluster, running: tuple[OperatorProcess, SimulatedPods]
) -> None:
    operator, pods = running
    namespace = operator.namespace
    kinds.apply_objects(
        model(), hub_adapter(credentialsSecretRef={"name": "hub"}), namespace=namespace
    )
    kinds.wait("loraadapters", "sneaker", "CredentialsReady=False", namespace)
    refused = {"ok": False, "reason": "CredentialsRejected", "message": "The hub says 403."}
    pods.fetch = lambda config: refused
    kinds.kubectl(
        "create", "secret", "generic", "hub", "--from-literal=HF_TOKEN=old", "-n", namespace
    )
    found = kinds.wait("loraadapters", "sneaker", "Resolved=False", namespace)

    def rejected(found: Object) -> bool:
        return any(c["reason"] == "CredentialsRejected" for c in found["status"]["conditions"])

    kinds.wait("loraadapters", "sneaker", rejected, namespace)
    pods.fetch = good_fetch
    encoded = base64.b64encode(b"new").decode()
    kinds.patch("secret", "hub", {"data": {"HF_TOKEN": encoded}}, namespace)
    kinds.wait("loraadapters", "sneaker", "Ready", namespace)
    assert "new" not in json.dumps(found)


def test_a_namespace_that_is_deleted_goes_and_the_others_are_served_on(
    kinds: Cluster,
    cluster_binaries: dict[str, Path],
    tmp_path: Path,
) -> None:
    """Its RoleBinding may go before the operator has let go of what is in it."""
    with (
        running_operator(kinds, cluster_binaries["helm"], tmp_path) as (operator, _),
        kinds.namespace() as shoes,
    ):
        namespace = operator.namespace
        values = {"rbac": {"namespaces": [shoes]}}
        rights = operator_rights(cluster_binaries["helm"], tmp_path, namespace, values)
        kinds.apply_objects(*rights, namespace=namespace)
        operator.start(namespaces=[namespace, shoes])
        kinds.apply_objects(model(adapters={"namespaces": {"from": "All"}}), namespace=namespace)
        foreign_one = hub_adapter(modelRef={"name": "shapes", "namespace": namespace})
        kinds.apply_objects(foreign_one, TEAM, namespace=shoes)
        kinds.wait("loraadapters", "sneaker", "Ready", shoes)
        kinds.kubectl("delete", "namespace", shoes, "--timeout=250s")
        kinds.until(lambda: "sneaker" not in configured(kinds, namespace), "it is forgotten")
        kinds.apply_objects(adapter(), namespace=namespace)
        kinds.wait("loraadapters", "stripes", "Ready", namespace)
        kinds.until(lambda: not kinds.items("jobs", namespace), "no Job is left over")


@pytest.mark.slow
def test_an_operator_that_is_killed_anywhere_and_a_restarted_api_server(
    kinds: Cluster, running: tuple[OperatorProcess, SimulatedPods]
) -> None:
    """kill -9 at random points: it converges, nothing is done twice, nothing is left over."""
    if foreign():
        pytest.skip("the API server of a cluster that is not ours is not restarted")
    operator, pods = running
    namespace = operator.namespace
    names = [f"sneaker-{number}" for number in range(8)]
    kinds.apply_objects(model(), TEAM, *(hub_adapter(name) for name in names), namespace=namespace)
    dice = random.Random(4)
    for round_ in range(KILLS):
        # It lists every kind when it starts, in some 20 calls, and works then.
        calls = operator.calls() + dice.randrange(10, 60)
        reached = lambda calls=calls: operator.calls() >= calls or all_ready(kinds, namespace)  # noqa: E731
        kinds.until(reached, "the operator is at work")
        operator.kill()
        if round_ == KILLS // 2:
            kinds.processes.restart("kube-apiserver", signal.SIGKILL)
        operator.start()
    for name in names:
        kinds.wait("loraadapters", name, "Ready", namespace)
    kinds.wait("imagemodels", "shapes", "Ready", namespace)
    key = kinds.wait("teams", "shoes", "Ready", namespace)["status"]["keyPrefix"]
    secret = kinds.get("secret", "calotype-key-shoes", namespace)
    assert base64.b64decode(secret["data"]["api-key"]).decode().startswith(key)
    fetched = Counter(job.rsplit("-", 1)[0] for job in pods.fetched)
    assert fetched == {f"fetch-{name}": 1 for name in names}
    kinds.until(lambda: not kinds.items("jobs", namespace), "Jobs are cleared up")
    assert configured(kinds, namespace) == set(names)
    versions = {
        name: kinds.get("loraadapters", name, namespace)["metadata"]["resourceVersion"]
        for name in names
    }
    operator.kill()
    asked = pods.status_calls
    operator.start()
    kinds.until(lambda: pods.status_calls >= asked + 4, "it has looked at the model several times")
    assert versions == {
        found["metadata"]["name"]: found["metadata"]["resourceVersion"]
        for found in kinds.items("loraadapters", namespace)
    }, "a restart alone writes nothing"
    no_orphans(kinds, namespace)


def all_ready(cluster: Cluster, namespace: str) -> bool:
    ready = condition("Ready")
    return all(map(ready, cluster.items("loraadapters", namespace)))
