"""Fake GPU nodes: kwok answers for them, and every pod on them says that it runs."""

import datetime
from pathlib import Path
from typing import Any

from controlplane.client.cluster import Cluster
from controlplane.processes.control_plane import ControlPlane
from controlplane.processes.network import free_ports

STAGES = Path(__file__).with_name("kwok_stages.yaml")
# A range for benchmarks that no network routes: a call to such a pod goes nowhere.
POD_RANGE, NODE_ADDRESS = "198.18.0.0/16", "198.19.0.1"
GPU = "nvidia.com/gpu"
TAINT = {"key": GPU, "value": "present", "effect": "NoSchedule"}
P4D = {"cpu": "96", "memory": "1152Gi", GPU: "8"}


class FakeNodes:
    """kwok beside a control plane, and the nodes that it plays."""

    def __init__(self, control_plane: ControlPlane, cluster: Cluster) -> None:
        self._processes, self._cluster = control_plane, cluster
        self._made = 0
        self.names: list[str] = []

    def start(self) -> None:
        kubeconfig = self._processes.kubeconfig("kwok", "kwok", ("system:masters",), inside=True)
        [port] = self._processes.network.call(lambda: free_ports(1))
        arguments = [
            f"--kubeconfig={kubeconfig}",
            f"--config={STAGES}",
            "--manage-all-nodes=false",
            "--manage-nodes-with-label-selector=calotype.test/fake=true",
            f"--cidr={POD_RANGE}",
            f"--node-ip={NODE_ADDRESS}",
            "--node-lease-duration-seconds=40",
            f"--server-address=127.0.0.1:{port}",
        ]
        # kwok reads and writes ~/.kwok.
        self._processes.spawn("kwok", arguments, {"HOME": str(self._processes.folder)})
        self._processes.await_health("kwok", f"http://127.0.0.1:{port}/healthz")

    def add_p4d(self, count: int = 1) -> list[str]:
        """Nodes like AWS p4d.24xlarge: 8 A100 40GB each, tainted as GPU nodes are; their names."""
        labels = {
            "node.kubernetes.io/instance-type": "p4d.24xlarge",
            "nvidia.com/gpu.product": "NVIDIA-A100-SXM4-40GB",
            "nvidia.com/gpu.memory": "40960",
        }
        return [self.add(P4D, labels, [TAINT]) for _ in range(count)]

    def add_plain(self, count: int = 1) -> list[str]:
        """Nodes without a GPU and without a taint."""
        return [self.add({"cpu": "32", "memory": "128Gi"}, {}, []) for _ in range(count)]

    def add(
        self, capacity: dict[str, str], labels: dict[str, str], taints: list[dict[str, str]]
    ) -> str:
        """A ready node of this capacity; its name."""
        name, self._made = f"fake-{self._made}", self._made + 1
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        ready = {"type": "Ready", "status": "True", "reason": "FakeNode"}
        ready |= {"lastHeartbeatTime": now, "lastTransitionTime": now}
        has = {"pods": "250", "ephemeral-storage": "1Ti", **capacity}
        standard = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}
        standard |= {"kubernetes.io/arch": "amd64", "calotype.test/fake": "true"}
        node: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": {**standard, **labels}},
            "spec": {"taints": taints},
            "status": {
                "capacity": has,
                "allocatable": has,
                "conditions": [ready],
                "addresses": [{"type": "InternalIP", "address": NODE_ADDRESS}],
            },
        }
        self._cluster.create(node)
        self.names.append(name)
        return name

    def clear(self) -> None:
        """Removes every fake node; their pods go with them."""
        for name in self.names:
            self._cluster.delete("node", name)
        self.names.clear()
