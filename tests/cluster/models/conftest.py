"""One installed release for all tests of models: an installation takes half a minute of CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster.models.release import Release, installed
from controlplane.processes.pod_cluster import PodCluster


@pytest.fixture(scope="session")
def release(pod_cluster: PodCluster) -> Iterator[Release]:
    """The chart with the values of a trial. Who applies more objects deletes them again."""
    with installed(pod_cluster) as found:
        yield found
