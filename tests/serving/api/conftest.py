"""A real gateway for each test or each file: see `servers.gateway`."""

from __future__ import annotations

import contextlib
import itertools
import pathlib
from collections.abc import Callable, Iterator

import pytest
from servers.gateway import QUICK, Service, running

from calotype.serving.api.state.settings import GatewaySettings


@pytest.fixture
def start_service(tmp_path: pathlib.Path) -> Iterator[Callable[..., Service]]:
    """Starts gateways that are not the usual one: see `running`."""
    with contextlib.ExitStack() as stack:
        count = itertools.count()
        yield lambda **parts: stack.enter_context(running(tmp_path / str(next(count)), **parts))


@pytest.fixture(scope="session")
def shared_running() -> Callable[..., contextlib.AbstractContextManager[Service]]:
    """`running` for fixtures of a whole file: ``shared_running(folder, features=...)``."""
    return lambda folder, **more: running(folder, GatewaySettings(hangup_grace=0, **QUICK, **more))


@pytest.fixture
def quick() -> Callable[..., GatewaySettings]:
    """Settings with short pauses: ``quick(features=...)``."""
    return lambda **more: GatewaySettings(**({"hangup_grace": 0} | QUICK | more))


@pytest.fixture
def service(tmp_path: pathlib.Path) -> Iterator[Service]:
    with running(tmp_path) as service:
        yield service


@pytest.fixture(scope="module")
def shared_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One gateway for all cases of a file: none of them may harm the next."""
    with running(tmp_path_factory.mktemp("shared")) as service:
        yield service
