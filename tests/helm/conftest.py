"""The chart and the helm that renders it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from controlplane import binaries
from helm.rendering import COMBINATIONS, WITH_MODEL, Chart, Rendered


@pytest.fixture(scope="session")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Chart:
    """The chart of the repository, or a skip that says how to get helm."""
    found = binaries.find("helm")
    if found is None:
        pytest.skip("no helm on this machine: `make test-cluster` builds it, or put it on the PATH")
    return Chart(found, tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="session")
def combination(chart: Chart) -> Callable[[str], Rendered]:
    """The objects of a combination of values files, with its model where it has one."""

    @functools.cache
    def render(name: str) -> Rendered:
        clouds = name in ("a100-p4d", "a100-a2", "lambda")
        return chart.render(*COMBINATIONS[name], values=WITH_MODEL if clouds else None)

    return render


@pytest.fixture(params=COMBINATIONS)
def rendered(request: pytest.FixtureRequest, combination: Callable[[str], Rendered]) -> Rendered:
    """Every combination of values files, one after another."""
    return combination(request.param)
