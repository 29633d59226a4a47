"""Which test files run in one worker of pytest-xdist: those that share something expensive.

A plugin of the tests. xdist's own groups (`--dist loadgroup`) do not work with pytest 9.2.
"""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

SHARED = (
    ("tests/e2e/test_cluster_runtime.py", "a gateway and a model app"),
    ("tests/e2e/test_kill_pods.py", "a gateway and a model app"),
    # A service of its own: beside both others it would only take their processors.
    ("tests/serving/engine/test_full_layout.py", "a gateway and a model app"),
    ("tests/e2e/*", "calotype serve"),
    ("tests/cluster/models/*", "pods"),
    ("tests/controlplane/test_kuberay.py", "pods"),
    ("tests/controlplane/test_node.py", "pods"),
    ("tests/controlplane/test_pod_cluster.py", "pods"),
    ("tests/cluster/chart/test_lifecycle.py", "an API server of its own"),
    ("tests/cluster/*", "API server"),
    ("tests/controlplane/test_control_plane.py", "API server"),
)


class SharingFiles(LoadScopeScheduling):  # type: ignore[misc]
    """`--dist loadfile`, where some files belong together."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return next((what for path, what in SHARED if fnmatch.fnmatch(file, path)), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return SharingFiles(config, log) if config.getvalue("dist") == "loadfile" else None
