"""A model with very many adapters, on a real API server and with the operator's own process."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cluster.operator.operator_process import OperatorProcess
from cluster.operator.resources import adapter
from cluster.operator.simulated_pods import SimulatedPods
from controlplane.client.cluster import Cluster
from controlplane.client.objects import Object

WRITERS = 8


@dataclass(frozen=True)
class ManyAdapters:
    """The adapters of one model, and how far the operator is with them."""

    cluster: Cluster
    operator: OperatorProcess
    pods: SimulatedPods

    @property
    def namespace(self) -> str:
        return self.operator.namespace

    def create(self, names: Iterable[str]) -> None:
        """Makes them as fast as the API server takes them."""
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(lambda n: self.cluster.create(adapter(n), self.namespace), names))

    def count(self, holds: Callable[[Object], bool]) -> int:
        return sum(map(holds, self.cluster.items("loraadapters", self.namespace)))

    def wait_ready(self, count: int, seconds: float = 500) -> None:
        """Until so many of them are Ready. The model's status is asked until then: a list of all
        adapters takes the API server 0.2 s."""

        def loaded(model: Object) -> bool:
            return bool(model["status"]["adapters"]["loaded"] == count)

        self.cluster.wait("imagemodels", "shapes", loaded, self.namespace, seconds)
        self.cluster.until(lambda: self.count(is_ready) == count, f"{count} are Ready")

    def configured(self) -> set[str]:
        """Names of the adapters in the model's configuration."""
        found = self.cluster.find("configmap", "model-shapes-app", self.namespace)
        config = json.loads(found["data"]["model.json"]) if found else {"deployments": []}
        generators = [d for d in config["deployments"] if d["name"] == "Generator"]
        return {a["metadata"]["name"] for g in generators for a in g["user_config"]["adapters"]}

    def seconds_of_a_change(self, name: str, words: list[str]) -> float:
        """From the answer to a changed manifest until its status speaks of the new generation."""
        path = self.cluster.path("loraadapters", self.namespace, name)
        changed = self.cluster.patch(
            "loraadapters", name, {"spec": {"triggerWords": words}}, self.namespace
        )
        begun, wanted = time.perf_counter(), changed["metadata"]["generation"]
        while time.perf_counter() < begun + 60:
            found = self.cluster.api.get(path).json()
            if found["status"]["observedGeneration"] == wanted:
                return time.perf_counter() - begun
            time.sleep(0.005)
        raise AssertionError(f"{name} was not looked at within a minute: {found['status']}")

    def median_change(self, names: Iterable[str]) -> float:
        times = [self.seconds_of_a_change(name, [f"word of {name}"]) for name in names]
        return statistics.median(times)


def is_ready(obj: Object) -> bool:
    conditions = obj.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
