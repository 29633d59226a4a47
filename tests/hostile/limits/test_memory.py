"""What requests make a gateway hold in memory is bounded, whatever they bring and ask for."""

from __future__ import annotations

import asyncio
import json
import pathlib
import subprocess
import sys

import pytest
import yaml

from calotype.serving.api.state.working_memory import MemoryPool
from calotype.serving.core.errors import Overloaded

HERE = pathlib.Path(__file__).parent
CHART = HERE.parents[2] / "helm" / "values.yaml"
UNITS = {"Mi": 2**20, "Gi": 2**30}


def chart_limit() -> int:
    """Bytes that the chart gives a gateway."""
    text = str(yaml.safe_load(CHART.read_text())["gateway"]["resources"]["limits"]["memory"])
    return int(text[:-2]) * UNITS[text[-2:]]


@pytest.mark.slow
def test_every_route_stays_within_the_charts_limit(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, str(HERE / "memory_child.py"), str(tmp_path), str(chart_limit())]
    paths = [str(HERE.parents[1]), *(path for path in sys.path if path)]
    ended = subprocess.run(
        command,
        env={"PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "MemoryError" not in ended.stderr
    found = json.loads(ended.stdout)
    assert found["statuses"].pop("POST /v1/images/edits") == 504, "nobody draws it"
    assert {path for path, status in found["statuses"].items() if status >= 500} == set()
    for path in ("POST /v1/moderations", "POST /v1/files", "POST /v1/images/generations"):
        assert found["statuses"][path] == 200, path
    assert found["peak"] < chart_limit()


# -- how memory is shared out ------------------------------------------------------------------


async def test_a_large_request_waits_for_room_and_is_not_overtaken_for_ever() -> None:
    pool, order = MemoryPool(100), []

    async def take(team: str, size: int, name: str, done: asyncio.Event) -> None:
        async with pool.reserve(team, size):
            order.append(name)
            await done.wait()

    first, last = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(take("one", 60, "60", first))
        await asyncio.sleep(0)
        tasks.create_task(take("two", 90, "90", last))
        await asyncio.sleep(0)
        tasks.create_task(take("three", 10, "10", last))
        await asyncio.sleep(0)
        assert order == ["60"], "what comes later does not overtake it"
        first.set()
        last.set()
    assert order == ["60", "90", "10"]


async def test_one_team_leaves_room_for_the_others() -> None:
    pool, done = MemoryPool(100), asyncio.Event()
    taken: list[str] = []

    async def take(team: str) -> None:
        async with pool.reserve(team, 30):
            taken.append(team)
            await done.wait()

    async with asyncio.TaskGroup() as tasks:
        for team in ("greedy", "greedy", "greedy", "modest", "other"):
            tasks.create_task(take(team))
        while len(taken) < 3:
            await asyncio.sleep(0)
        assert taken == ["greedy", "modest", "other"]
        done.set()


async def test_who_gets_no_room_is_told_and_takes_none() -> None:
    pool = MemoryPool(100, patience_seconds=0.01)
    async with pool.reserve("one", 1000):
        with pytest.raises(Overloaded, match="no memory"):
            async with pool.reserve("two", 1):
                pass
    async with pool.reserve("two", 100):
        pass
