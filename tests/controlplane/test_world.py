"""The world as a whole: its end, and what happens when parts of it are killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest
from controlplane.cluster import Object
from controlplane.world import World, process_world

pytestmark = pytest.mark.cluster

# A process that leaves its parent and its session, as a daemon does.
SERVER = "setsid sleep 3600 & exec python -m http.server 8000"


def server(world: World, name: str) -> list[Object]:
    """A pod that answers on port 8000, and its Service."""
    container = {"name": "main", "image": world.image("calotype-gateway")}
    container |= {"command": ["bash", "-c", SERVER]}
    container["readinessProbe"] = {"httpGet": {"port": 8000}, "periodSeconds": 1}
    meta = {"name": name, "labels": {"app": name}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {"containers": [container]}}
    spec = {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": 8000}]}
    return [pod, {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}]


def processes(network: str) -> set[int]:
    """Every process of a network namespace."""
    found = set()
    for one in Path("/proc").iterdir():
        try:
            if one.name.isdigit() and os.readlink(one / "ns/net") == network:
                found.add(int(one.name))
        except OSError:
            pass  # it ended meanwhile
    return found


def test_a_world_ends_without_a_trace(cluster_binaries: dict[str, Path], tmp_path: Path) -> None:
    if "etcd" not in cluster_binaries:
        pytest.skip("a cluster that is not ours is not started by the tests")
    try:
        with process_world(cluster_binaries, tmp_path) as world:
            world.apply(server(world, "web"))
            world.wait("pod", "web", "Ready")
            pid, holder = world.pid("web"), world.plane.children["etcd"].pid
            networks = [os.readlink(f"/proc/{one}/ns/net") for one in (pid, holder)]
            assert all(len(processes(one)) >= 2 for one in networks)
    except PermissionError as refused:
        pytest.skip(str(refused))
    assert [processes(one) for one in networks] == [set(), set()]
    assert not any((tmp_path / "scratch").iterdir())
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def test_pods_die_with_a_killed_node_and_run_again_with_it(
    world: World, world_namespace: str
) -> None:
    label = "pod-security.kubernetes.io/enforce=privileged"
    world.kubectl("label", "namespace", world_namespace, label, "--overwrite")
    world.apply(server(world, "web"), "-n", world_namespace)
    world.wait("pod", "web", "Ready", world_namespace)
    before = world.pid("web", world_namespace)
    network = os.readlink(f"/proc/{before}/ns/net")

    world.plane.children["node"].signal(signal.SIGKILL)
    world.until(lambda: not processes(network), "the killed node's processes are gone")
    world.plane.restart("node")
    world.plane.restart("kube-apiserver", signal.SIGKILL)
    with world.forward("svc/web", 80, world_namespace) as url:
        world.until(lambda: answers(url), "the pod answers again, through its Service")
    assert world.pid("web", world_namespace) != before


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False
