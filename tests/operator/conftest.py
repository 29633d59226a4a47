"""The operator in a fake cluster: in virtual time, or watching it over HTTP."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import AsyncIterator

import pytest

from calotype.operator.testing.apiserver import FakeApiServer

from .live import LiveWorld
from .virtual import World


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.kill()
    await world.cluster.close()


@pytest.fixture
async def live(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LiveWorld]:
    logging.getLogger("kopf").setLevel(logging.CRITICAL)
    server = FakeApiServer()
    world = LiveWorld(server)
    async with server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path)))
        yield world
        await world.kill()
        await world.cluster.close()
