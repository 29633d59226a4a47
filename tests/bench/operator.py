"""What the operator costs with a thousand adapters: memory, and how soon it answers a change.

The operator runs as its own process on a real API server; model apps are pretended. Without the
programs of the control plane (`make controlplane`) nothing is measured.
"""

from __future__ import annotations

import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # as pytest does

from cluster.kinds.installing import install_kinds
from cluster.operator.many_adapters import ManyAdapters
from cluster.operator.operator_process import running_operator
from cluster.operator.resources import model
from controlplane import binaries
from controlplane.client.cluster import Cluster
from controlplane.processes.control_plane import ControlPlane

MANY = 1000
"""The most adapters of one model, as the operator's settings have it by default."""
CHANGED = range(50, MANY, 50)
"""Which of the adapters are changed, one after the other."""


def measure() -> dict[str, dict[str, Any]]:
    """name -> value, unit, bar, better; empty without the programs."""
    try:
        programs = binaries.find_all()
    except FileNotFoundError as missing:
        print(missing, file=sys.stderr)
        return {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        control_plane = ControlPlane(programs, folder)
        try:
            control_plane.start()
            cluster = Cluster(control_plane.admin, programs, folder, control_plane)
            try:
                return measure_many_adapters(cluster, programs["helm"], folder)
            finally:
                cluster.close()
        finally:
            control_plane.stop()


def measure_many_adapters(
    cluster: Cluster, helm: pathlib.Path, folder: pathlib.Path
) -> dict[str, dict[str, Any]]:
    """A model without adapters, then with a thousand, then one change after the other."""
    install_kinds(cluster)
    with running_operator(cluster, helm, folder) as (operator, pods):
        operator.start()
        many = ManyAdapters(cluster, operator, pods)
        cluster.apply_objects(model(), namespace=many.namespace)
        cluster.wait("imagemodels", "shapes", "Ready", many.namespace)
        empty = operator.memory()
        pushes = len(pods.pushes("shapes"))
        begun = time.perf_counter()
        many.create(f"a{number:04}" for number in range(MANY))
        many.wait_ready(MANY)
        took = time.perf_counter() - begun
        pushed = len(pods.pushes("shapes")) - pushes
        full = operator.memory()
        change = many.median_change(f"a{number:04}" for number in CHANGED)
        bare = statistics.median(bare_writes(cluster, many.namespace))
    return {
        "operator, memory with 1 resource": entry(empty, "MB", None),
        f"operator, memory with {MANY} adapters": entry(full, "MB", 150),
        "API server, one bare write": entry(bare, "s", None),
        f"operator, one change among {MANY} adapters until its status": entry(
            change / bare, "x a bare write", 100
        ),
        f"operator, {MANY} adapters from the first create until all are Ready": entry(
            took, "s", None
        ),
        f"operator, configurations pushed for {MANY} adapters": entry(pushed, "pushes", None),
    }


def bare_writes(cluster: Cluster, namespace: str) -> Iterable[float]:
    """Seconds of the API server for a change, without what follows from it."""
    for number in range(len(CHANGED)):
        begun = time.perf_counter()
        cluster.patch("namespaces", namespace, {"metadata": {"labels": {"bench": str(number)}}})
        yield time.perf_counter() - begun


def entry(value: float, unit: str, bar: float | None) -> dict[str, Any]:
    return {"value": round(value, 3), "unit": unit, "bar": bar, "better": "lower"}
