"""Jobs of three teams while every process of `calotype serve` is killed: none is lost."""

from __future__ import annotations

from typing import Any

import pytest
from e2e.killing import Target, kill_everything

from calotype.serving.database.connection import sqlite_url

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_no_accepted_job_is_lost_or_doubled(service: Any) -> None:
    kill_everything(
        Target(
            url=service.url,
            database=sqlite_url(service.data_dir),
            assets=service.data_dir / "assets",
            root=lambda: int(service.process.pid),
            until=service.wait_for,
            ready=lambda: bool(service.status().get("ready")),
            crashes={"calotype serve": service.crash},
        )
    )
