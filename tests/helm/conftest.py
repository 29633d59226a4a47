"""The chart and the helm that renders it."""

from __future__ import annotations

import functools

import pytest
from controlplane import binaries
from helm.rendering import COMBINATIONS, Chart, Combinations, Rendered


@pytest.fixture(scope="session")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Chart:
    """The chart of the repository, or a skip that says how to get helm."""
    found = binaries.find("helm")
    if found is None:
        pytest.skip("no helm on this machine: `make test-cluster` builds it, or put it on the PATH")
    return Chart(found, tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="session")
def combination(chart: Chart) -> Combinations:
    """The objects of a combination of values files; parsed once, so not to be changed."""
    return functools.cache(chart.combination)


@pytest.fixture(params=COMBINATIONS)
def rendered(request: pytest.FixtureRequest, combination: Combinations) -> Rendered:
    """Every combination of values files, one after another."""
    return combination(request.param)
