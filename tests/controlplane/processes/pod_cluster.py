"""A whole cluster on this machine: control plane, a node whose pods really run, and KubeRay.

All of it is in one network namespace; the test process is outside and is the cluster's admin.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from controlplane.child_process import ChildProcess
from controlplane.client.cluster import Cluster
from controlplane.client.commands import Answer
from controlplane.kuberay import schema
from controlplane.node.images import Image, Images
from controlplane.processes.control_plane import ControlPlane
from controlplane.processes.network import BRIDGE, GATEWAY, NetworkNamespace, free_ports

TESTS = Path(__file__).resolve().parents[2]
CHECKOUT = TESTS.parent
NODE = "process-node"
CAPACITY = {"cpu": "64", "memory": "64Gi", "pods": "110", "ephemeral-storage": "100Gi"}
REGISTRY = "registry.test/calotype"
USER, HOME = 10001, "/home/calotype"


class PodCluster(Cluster):
    """The cluster, and what a test may do to its pods beyond kubectl."""

    def logs(self, pod: str, namespace: str = "default", container: str = "", *words: str) -> str:
        """`kubectl logs`, of the pod's first container by default."""
        chosen = ("-c", container) if container else ()
        return self.kubectl("logs", pod, "-n", namespace, *chosen, *words, check=False)

    @contextlib.contextmanager
    def forward(self, target: str, port: int, namespace: str = "default") -> Iterator[str]:
        """A base URL at which the test process reaches a port of "svc/NAME" or "pod/NAME"."""
        if self._processes is None:
            with self._port_forward(target, port, namespace) as url:
                yield url
            return
        kind, _, name = target.partition("/")
        found = self.get(kind, name, namespace)
        if found["kind"] == "Service":
            address = found["spec"]["clusterIP"]
        else:
            address = found["status"]["podIP"]
        yield f"http://127.0.0.1:{self._processes.network.forward(address, port)}"

    def exec(
        self, pod: str, *words: str, namespace: str = "default", container: str = ""
    ) -> Answer:
        """Runs a command in a container, as its user; the answer has its exit code."""
        if self._processes is None:
            chosen = ("-c", container) if container else ()
            return self.kubectl("exec", pod, "-n", namespace, *chosen, "--", *words, check=False)
        process = self.pid(pod, namespace, container)
        environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        env = dict(item.split(b"=", 1) for item in environment if b"=" in item)
        status = Path(f"/proc/{process}/status").read_text().splitlines()
        ids = {line.split(":")[0]: line.split()[1] for line in status if line[1:4] == "id:"}
        enter = ["nsenter", "-t", str(process), "-n", "-u", "-i", "-m", "-p", "-r", "-w"]
        user = ["-S", ids["Uid"], "-G", ids["Gid"], "--"]
        done = subprocess.run(
            [*enter, *user, *words], env=env, capture_output=True, text=True, timeout=120
        )
        return Answer(done)

    def pid(self, pod: str, namespace: str = "default", container: str = "") -> int:
        """Process 1 of a running container, as the test process may send it a signal."""
        folder = self.processes.folder  # skips where the cluster is not ours
        found = self.get("pod", pod, namespace)
        name = container or found["spec"]["containers"][0]["name"]
        statuses = found["status"].get("containerStatuses", [])
        [restarts] = [one["restartCount"] for one in statuses if one["name"] == name]
        run = folder / "scratch" / "pods" / found["metadata"]["uid"] / f"{name}-{restarts}"
        return int(Path(f"/proc/{self._holder}/root{run}/state").read_text())

    def claim_folder(self, name: str, namespace: str = "default") -> Path:
        """The folder of a bound claim on this machine."""
        assert self.processes
        volume = self.get("pvc", name, namespace)["spec"]["volumeName"]
        return Path(self.get("pv", volume)["spec"]["hostPath"]["path"])

    def image(self, name: str) -> str:
        """The name under which the node knows calotype-gateway, -serve or -operator."""
        return f"{os.environ.get('CALOTYPE_TEST_REGISTRY', REGISTRY)}/{name}:test"

    @property
    def _holder(self) -> int:
        network = self.processes.network
        assert isinstance(network, NetworkNamespace)
        return network.holder.pid

    @contextlib.contextmanager
    def _port_forward(self, target: str, port: int, namespace: str) -> Iterator[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            local = int(probe.getsockname()[1])
        command = [str(self._binaries["kubectl"]), "port-forward", target, f"{local}:{port}"]
        log = self.folder / f"port-forward-{local}.log"
        child = ChildProcess("kubectl port-forward", [*command, "-n", namespace], log, self.env)
        try:

            def forwards() -> bool:
                child.check()
                return "Forwarding" in child.tail()

            self.until(forwards, "a forwarded port")
            yield f"http://127.0.0.1:{local}"
        finally:
            child.end()


@contextlib.contextmanager
def start_pod_cluster(binaries: Mapping[str, Path], folder: Path) -> Iterator[PodCluster]:
    """Starts everything and ends it; PermissionError says why this machine cannot."""
    network = NetworkNamespace(folder / "scratch", folder / "namespace.log")
    try:
        control_plane = ControlPlane(binaries, folder, network)
        try:
            control_plane.start_api()
            cluster = PodCluster(control_plane.admin, binaries, folder, control_plane)
            try:
                install_kuberay(cluster)
                control_plane.start_controllers()
                start_node(control_plane, network, images())
                start_kuberay(control_plane)
                cluster.until(lambda: cluster.find("node", NODE), "the process node has registered")
                account = lambda: cluster.find("serviceaccount", "default")  # noqa: E731
                cluster.until(account, "ServiceAccount default, without which pods are refused")
                yield cluster
            finally:
                cluster.close()
        finally:
            for name in ("kuberay", "node"):
                if name in control_plane.children:
                    control_plane.children[name].signal(signal.SIGKILL)
                    control_plane.end(name)
            control_plane.stop()
    finally:
        network.close()


def start_node(
    control_plane: ControlPlane, network: NetworkNamespace, table: Images
) -> ChildProcess:
    """Starts the process node beside a control plane in a namespace."""
    folder = control_plane.folder
    certificate, key = control_plane.authority.server("kubelet", [GATEWAY])
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    settings: dict[str, Any] = {
        "kubeconfig": str(control_plane.kubeconfig("node", NODE, ("system:masters",), inside=True)),
        "certificate": str(certificate),
        "key": str(key),
        "apiPort": control_plane.port,
        "name": NODE,
        "address": GATEWAY,
        "bridge": BRIDGE,
        "capacity": CAPACITY,
        "images": str(table.save(folder / "images.json")),
        "scratch": str(network.scratch),
        "claims": str(folder / "claims"),
        "logs": str(logs),
        "refresh": 1.0,
        "delayScale": 0.1,
    }
    file = folder / "node.json"
    file.write_text(json.dumps(settings))
    control_plane.binaries["node"] = Path(sys.executable)
    return control_plane.spawn(
        "node", ["-m", "controlplane.node", str(file)], {"PYTHONPATH": str(TESTS)}
    )


def install_kuberay(cluster: Cluster) -> None:
    """The kinds of KubeRay: those of $KUBERAY_CRDS (a folder), or ours."""
    if given := os.environ.get("KUBERAY_CRDS"):
        cluster.apply(Path(given), "--server-side")
    else:
        cluster.apply(schema.definitions(), "--server-side")
    for plural in ("rayclusters", "rayservices", "rayjobs"):
        # `kubectl wait` fails on a kind that has no conditions yet; large ones have none for long.
        cluster.wait("crd", f"{plural}.ray.io", "Established", seconds=180)


def start_kuberay(control_plane: ControlPlane) -> ChildProcess:
    """KubeRay's operator where $KUBERAY_OPERATOR (a program) is given, else the stand-in."""
    user = ("kuberay", "kuberay", ("system:masters",))
    kubeconfig = control_plane.kubeconfig(*user, inside=True)
    if given := os.environ.get("KUBERAY_OPERATOR"):
        control_plane.binaries["kuberay"] = Path(given)
        flags = ["--enable-leader-election=false", "--metrics-addr=0"]
        [port] = control_plane.network.call(lambda: free_ports(1))
        flags.append(f"--health-probe-bind-address=127.0.0.1:{port}")
        return control_plane.spawn("kuberay", flags, {"KUBECONFIG": str(kubeconfig)})
    control_plane.binaries["kuberay"] = Path(sys.executable)
    words = ["-m", "controlplane.kuberay", str(kubeconfig)]
    return control_plane.spawn("kuberay", words, {"PYTHONPATH": str(TESTS)})


def images() -> Images:
    """The images of the chart, made of this checkout and its virtual environment; and `tools`, with
    the programs of the system only."""
    # Real paths: the environment may be a link to one that several checkouts share.
    seen = sorted({str(CHECKOUT), *map(os.path.realpath, (sys.prefix, sys.base_prefix))})
    calotype = Image(
        path=[f"{sys.prefix}/bin"],
        env={
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(CHECKOUT / ".editable"),
        },
        visible=seen,
        uid=USER,
        user="calotype",
        home=HOME,
    )
    tools = Image(uid=65532, user="nonroot", home="/")
    return Images(
        {
            r"(.*/)?calotype-(gateway|serve|operator)([:@].*)?": calotype,
            r"(.*/)?(tools|busybox|alpine|debian)([:@].*)?": tools,
        }
    )
