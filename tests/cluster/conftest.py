"""One API server with every kind for the tests of kinds, chart and operator."""

from __future__ import annotations

import pytest
from cluster.kinds.installing import install_kinds
from controlplane.client.cluster import Cluster


@pytest.fixture(scope="session")
def kinds(control_plane: Cluster) -> Cluster:
    """`control_plane` with the kinds of calotype, of KubeRay and of Prometheus' operator."""
    install_kinds(control_plane)
    return control_plane
