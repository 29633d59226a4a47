"""The clusters of the tests: `control_plane`, `kwok` and `pod_cluster`.

They are made once in a session, and only when a test asks for one. Where the programs are missing
the test is skipped with a sentence that says how to get them.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from controlplane import binaries
from controlplane.client.cluster import Cluster
from controlplane.processes.control_plane import ControlPlane
from controlplane.processes.fake_nodes import FakeNodes
from controlplane.processes.pod_cluster import PodCluster, start_pod_cluster

FOREIGN = "CALOTYPE_TEST_CLUSTER"


@pytest.fixture(scope="session")
def cluster_binaries() -> dict[str, Path]:
    """Every program of the control plane by its name, or a skip that says how to get them."""
    if foreign():
        programs = {name: shutil.which(name) for name in ("kubectl", "helm")}
        if missing := [name for name, path in programs.items() if path is None]:
            pytest.skip(f"a cluster that is not ours needs these on PATH: {', '.join(missing)}")
        return {name: Path(path) for name, path in programs.items() if path}
    try:
        return binaries.find_all()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def control_plane(
    cluster_binaries: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """A real API server with RBAC, Pod Security, garbage collection and a scheduler, as its admin.

    It has no node (see `kwok`), no kind of calotype and none of KubeRay: apply what you test. See
    Cluster for kubectl, helm, apply, get, find, wait, until, namespace and as_account, and
    `control_plane.processes` for its processes. KUBECONFIG with CALOTYPE_TEST_CLUSTER=1 takes a
    cluster that is not ours instead.
    """
    folder = tmp_path_factory.mktemp("control-plane")
    if foreign():
        cluster = Cluster(Path(os.environ["KUBECONFIG"]), cluster_binaries, folder)
        yield cluster
        cluster.close()
        return
    processes = ControlPlane(cluster_binaries, folder)
    try:
        processes.start()
        cluster = Cluster(processes.admin, cluster_binaries, folder, processes)
        yield cluster
        cluster.close()
    finally:
        processes.stop()


@pytest.fixture
def namespace(control_plane: Cluster) -> Iterator[str]:
    """The name of a new namespace of `control_plane` in which Pod Security is `restricted`."""
    with control_plane.namespace() as name:
        yield name


@pytest.fixture
def new_namespace(control_plane: Cluster) -> Callable[..., AbstractContextManager[str]]:
    """Makes further namespaces: ``with new_namespace(labels={...}) as name``."""
    return control_plane.namespace


@pytest.fixture(scope="session")
def _kwok(control_plane: Cluster) -> FakeNodes:
    if foreign():
        pytest.skip("fake nodes are not put into a cluster that is not ours")
    nodes = FakeNodes(control_plane.processes, control_plane)
    nodes.start()
    return nodes


@pytest.fixture
def kwok(_kwok: FakeNodes) -> Iterator[FakeNodes]:
    """Fake nodes for `control_plane`: `kwok.add_p4d(3)`, `kwok.add_plain()`. Pods on them are Ready
    at once and run nothing. The nodes go with the test."""
    yield _kwok
    _kwok.clear()


@pytest.fixture(scope="session")
def pod_cluster(
    cluster_binaries: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PodCluster]:
    """A whole cluster in a network namespace of its own: control plane, a node on which pods really
    run as processes, and KubeRay.

    It is another cluster than `control_plane`. Beyond what a Cluster does, see PodCluster: logs,
    exec, forward (a URL for a Service or pod), pid and claim_folder. The images of the chart are
    this checkout: `pod_cluster.image("calotype-gateway")`.
    """
    folder = tmp_path_factory.mktemp("pod_cluster")
    if foreign():
        cluster = PodCluster(Path(os.environ["KUBECONFIG"]), cluster_binaries, folder)
        yield cluster
        cluster.close()
        return
    try:
        with start_pod_cluster(cluster_binaries, folder) as cluster:
            yield cluster
    except PermissionError as refused:
        pytest.skip(str(refused))


@pytest.fixture
def pod_namespace(pod_cluster: PodCluster) -> Iterator[str]:
    """The name of a new namespace of `pod_cluster` in which Pod Security is `restricted`."""
    with pod_cluster.namespace() as name:
        yield name


def foreign() -> bool:
    """Whether the tests are to use the cluster of $KUBECONFIG, which somebody else runs."""
    if os.environ.get(FOREIGN, "") not in ("", "0"):
        if not os.environ.get("KUBECONFIG"):
            raise pytest.UsageError(f"{FOREIGN}=1 needs KUBECONFIG: the file of that cluster")
        return True
    return False
