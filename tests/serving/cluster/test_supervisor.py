"""The process that holds Ray dies: what is tried again, and what is said meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from calotype.serving.cluster.child_process import Child
from calotype.serving.cluster.supervisor import RestartPolicy, Supervisor
from calotype.serving.core.errors import ModelLoadFailed
from calotype.serving.wire.ray_host import HostOrder, HostReport

APPS = [{"name": "shapes"}]


class Time:
    """A clock that only goes on when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        woken = asyncio.Event()
        self._sleepers.append((self.now + seconds, woken))
        await woken.wait()

    async def pass_by(self, seconds: float) -> None:
        self.now += seconds
        for due, woken in self._sleepers:
            if due <= self.now:
                woken.set()
        await settle()


async def settle() -> None:
    """Until every task that can go on has."""
    for _ in range(50):
        await asyncio.sleep(0)


@dataclass
class FakeChild:
    """A child that reports what the test tells it to."""

    orders: list[HostOrder] = field(default_factory=list)
    status: int = -9
    ended: bool = False
    killed: bool = False
    _said: asyncio.Queue[HostReport | None] = field(default_factory=asyncio.Queue)

    def order(self, order: HostOrder) -> None:
        self.orders.append(order)

    async def reports(self) -> AsyncIterator[HostReport]:
        while (report := await self._said.get()) is not None:
            yield report

    async def wait(self) -> int:
        return self.status

    def end(self) -> None:
        self.ended = True
        self.die(0)

    async def kill(self) -> None:
        self.killed = True

    def die(self, status: int = -9) -> None:
        self.status = status
        self._said.put_nowait(None)

    async def say(self, kind: Any, text: str = "", number: int = 0, final: bool = False) -> None:
        self._said.put_nowait(HostReport(kind=kind, text=text, number=number, final=final))
        await settle()

    async def serve(self) -> None:
        await self.say("started")
        await self.say("serving")
        await self.say("applied", number=self.orders[-1].number)


class Scene:
    """A supervisor whose children and time belong to the test."""

    def __init__(self, policy: RestartPolicy) -> None:
        self.time = Time()
        self.children: list[FakeChild] = []
        self.said: list[str] = []
        self.turns: list[bool] = []
        self.supervisor = Supervisor(
            self._launch, "token", self.said.append, policy, self.time, self.time.sleep
        )
        self.supervisor.on_change = self._turn
        self.supervisor.want(APPS)
        self.running = asyncio.create_task(self.supervisor.run())

    @property
    def child(self) -> FakeChild:
        return self.children[-1]

    async def _launch(self) -> Child:
        self.children.append(FakeChild())
        return self.child

    async def _turn(self, serving: bool) -> None:
        self.turns.append(serving)

    async def close(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)


Begin = Callable[..., Scene]


@pytest.fixture
async def begin() -> AsyncIterator[Begin]:
    scenes: list[Scene] = []

    def start(**policy: Any) -> Scene:
        scenes.append(Scene(RestartPolicy(**policy)))
        return scenes[-1]

    yield start
    for scene in scenes:
        await scene.close()


async def test_a_child_that_dies_is_followed_by_another_after_pauses_that_grow(
    begin: Begin,
) -> None:
    scene = begin(pauses=(1.0, 4.0, 9.0), stable_seconds=100)
    await settle()
    for number, pause in enumerate((1.0, 4.0, 9.0, 9.0), start=1):
        await scene.child.serve()
        assert scene.supervisor.serving
        scene.child.die()
        await settle()
        assert not scene.supervisor.serving
        assert scene.child.killed, "whatever it had started goes with it"
        await scene.time.pass_by(pause - 0.5)
        assert len(scene.children) == number, "the pause is not over"
        await scene.time.pass_by(0.5)
        assert len(scene.children) == number + 1
        assert scene.child.orders[0].applications == APPS, "the next one runs the same"
    assert not scene.running.done()


async def test_serving_for_long_makes_earlier_failures_forgotten(begin: Begin) -> None:
    scene = begin(pauses=(1.0, 50.0), stable_seconds=100)
    await settle()
    for _ in range(3):
        await scene.child.serve()
        await scene.time.pass_by(100)
        scene.child.die()
        await settle()
        await scene.time.pass_by(1)
    assert len(scene.children) == 4


async def test_the_first_start_is_tried_three_times_and_then_says_why_not(begin: Begin) -> None:
    scene = begin(pauses=(1.0,))
    await settle()
    for number in range(3):
        assert len(scene.children) == number + 1
        await scene.child.say("failed", "Ray could not be started: it timed out.")
        scene.child.die(2)
        await settle()
        await scene.time.pass_by(1)
    with pytest.raises(ModelLoadFailed, match="it timed out"):
        await scene.running
    assert len(scene.children) == 3


async def test_what_another_try_would_only_repeat_is_not_tried_again(begin: Begin) -> None:
    scene = begin()
    await settle()
    await scene.child.say("failed", "The application shapes cannot run: no.", final=True)
    scene.child.die(2)
    with pytest.raises(ModelLoadFailed, match="cannot run: no"):
        await scene.running


async def test_once_it_has_served_nothing_ends_it(begin: Begin) -> None:
    scene = begin(pauses=(1.0,))
    await settle()
    await scene.child.serve()
    for _ in range(8):
        await scene.child.say("failed", "The disk is full.", final=True)
        scene.child.die(2)
        await settle()
        await scene.time.pass_by(1)
    assert not scene.running.done() and len(scene.children) == 9
    assert not scene.supervisor.hopeful, "the kubelet may try a new pod"
    await scene.child.serve()
    assert scene.supervisor.hopeful


async def test_a_start_that_takes_too_long_is_ended_and_tried_again(begin: Begin) -> None:
    scene = begin(start_seconds=0.05, pauses=(1.0,))
    await settle()
    first = scene.child
    async with asyncio.timeout(600):
        while not first.killed:
            await asyncio.sleep(0.01)
    await settle()
    assert any("Ray did not start within 0.05 s" in sentence for sentence in scene.said)
    await scene.time.pass_by(1)
    assert len(scene.children) == 2
    await scene.child.say("started")
    await asyncio.sleep(0.1)
    assert not scene.child.killed, "the limit is for Ray's own start, not for loading a model"


async def test_progress_is_told_with_the_stage_the_seconds_and_the_attempt(begin: Begin) -> None:
    scene = begin(progress_seconds=10, pauses=(1.0,))
    await settle()
    await scene.time.pass_by(10)
    await scene.time.pass_by(10)
    assert scene.said == ["Starting Ray: 10 s so far.", "Starting Ray: 20 s so far."]
    scene.child.die()
    await settle()
    await scene.time.pass_by(1)
    await scene.child.say("stage", "Deploying shapes")
    await scene.time.pass_by(9)
    assert scene.said[-1] == "Deploying shapes: 9 s so far, attempt 2 of 3."
    await scene.child.serve()
    told = len(scene.said)
    await scene.time.pass_by(50)
    assert len(scene.said) == told, "while it serves there is nothing to tell"


async def test_the_estimate_follows_from_how_long_it_took_before(begin: Begin) -> None:
    scene = begin(pauses=(5.0,))
    await settle()
    await scene.time.pass_by(20)
    await scene.child.serve()
    scene.child.die()
    await settle()
    assert scene.supervisor.away_seconds() == 25
    await scene.time.pass_by(5)
    await scene.time.pass_by(8)
    assert scene.supervisor.away_seconds() == 12
    problem = scene.supervisor.problem()
    assert (problem.code, problem.retry_after) == ("model_not_ready", 12)
    assert problem.details == {"estimated_seconds": 12}
    await scene.time.pass_by(500)
    assert scene.supervisor.away_seconds() == 1, "overdue: any moment now"
    await scene.child.serve()
    assert scene.said[-1] == "It is back after 513 s."


async def test_the_stand_in_and_the_child_take_turns(begin: Begin) -> None:
    scene = begin(pauses=(1.0,))
    await settle()
    assert scene.turns == [False]
    await scene.child.serve()
    scene.child.die()
    await settle()
    await scene.time.pass_by(1)
    await scene.child.serve()
    assert scene.turns == [False, True, False, True]


async def test_it_ends_with_its_child_and_also_in_a_pause(begin: Begin) -> None:
    for dead in (False, True):
        scene = begin(pauses=(1000.0,))
        await settle()
        await scene.child.serve()
        if dead:
            scene.child.die()
            await settle()
        scene.supervisor.end()
        async with asyncio.timeout(600):
            await scene.running
        assert scene.child.killed and scene.child.ended is not dead


async def test_applying_waits_until_it_runs_and_a_refusal_leaves_what_ran(begin: Begin) -> None:
    scene = begin(pauses=(1.0,))
    await settle()
    await scene.child.serve()
    better, worse = [{"name": "better"}], [{"name": "worse"}]

    def apply(applications: Sequence[Any]) -> asyncio.Task[None]:
        return asyncio.create_task(scene.supervisor.apply(applications))

    applying = apply(better)
    await settle()
    assert not applying.done()
    await scene.child.say("applied", number=scene.child.orders[-1].number)
    await applying
    refused = apply(worse)
    await settle()
    await scene.child.say("refused", "worse cannot run.", scene.child.orders[-1].number)
    with pytest.raises(ModelLoadFailed, match="worse cannot run"):
        await refused
    scene.child.die()
    await settle()
    await scene.time.pass_by(1)
    assert scene.child.orders[0].applications == better


async def test_what_was_applied_while_it_was_away_runs_when_it_is_back(begin: Begin) -> None:
    scene = begin(pauses=(1.0,))
    await settle()
    await scene.child.serve()
    scene.child.die()
    await settle()
    applying = asyncio.create_task(scene.supervisor.apply([{"name": "new"}]))
    await scene.time.pass_by(1)
    assert scene.child.orders[0].applications == [{"name": "new"}]
    await scene.child.serve()
    await applying


def test_the_limit_of_the_start_is_an_option_with_the_supervisors_default() -> None:
    from calotype.serving.cluster.supervisor import START_SECONDS
    from calotype.serving.commands.cluster import model_app
    from calotype.serving.commands.serve import serve

    for command in (serve, model_app):
        with _option(command, []) as default:
            assert default == START_SECONDS
        with _option(command, ["--ray-start-seconds", "30"]) as given:
            assert given == 30


@contextlib.contextmanager
def _option(command: Any, words: list[str]) -> Iterator[float]:
    with command.make_context("x", words) as context:
        yield context.params["ray_start_seconds"]
