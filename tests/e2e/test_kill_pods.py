"""Jobs of three teams while every process of two pods is killed: none is lost. On PostgreSQL."""

from __future__ import annotations

import pytest
from e2e.killing import Target, kill_everything
from servers.pods import GATEWAY, MODEL_APP, Pods
from servers.postgres import PostgresServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_no_accepted_job_is_lost_or_doubled(pods: Pods, postgres: PostgresServer | None) -> None:
    def crash(name: str) -> None:
        pods.kill(name)
        pods.start(name)

    target = Target(
        url=pods.url,
        database=pods.database,
        assets=pods.folder / "data" / "assets",
        root=pods.root,
        until=pods.until,
        ready=pods.ready,
        crashes={GATEWAY: lambda: crash(GATEWAY), MODEL_APP: lambda: crash(MODEL_APP)},
    )
    if postgres is not None:
        target.crashes["database"] = postgres.crash
    kill_everything(target)
