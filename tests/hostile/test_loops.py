"""Background work survives every fault; what always fails is set aside, and /healthz knows."""

from __future__ import annotations

import asyncio
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from servers.gateway import Service, running
from servers.job_rows import add_job_row
from sqlalchemy import update

from calotype.serving.api.background import batch_runner
from calotype.serving.api.background.tasks import Sweeper
from calotype.serving.core.errors import StorageFailed
from calotype.serving.database.schema.tables import jobs
from calotype.serving.dispatch.dispatcher import Dispatcher
from calotype.serving.dispatch.policy import DispatchPolicy
from calotype.serving.jobs.moderation_checks import CheckRetries
from calotype.serving.jobs.records import JobRecord
from calotype.serving.observability import metrics
from calotype.serving.observability.loops import STUCK_SECONDS, Loop, Loops
from calotype.serving.testing.in_memory import ManualClock, ScriptedSafety, decision


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@pytest.fixture
def service(tmp_path: pathlib.Path) -> Iterator[Service]:
    with running(tmp_path) as service:
        yield service


def faults(loop: str, kind: str) -> float:
    labels = {"loop": loop, "kind": kind}
    return metrics.REGISTRY.get_sample_value("calotype_loop_faults_total", labels) or 0.0


# -- the loop itself -----------------------------------------------------------------------------


class Rounds:
    """Work that fails as often as it is told to."""

    def __init__(self, *faults: BaseException) -> None:
        self.faults = list(faults)
        self.begun = 0

    async def __call__(self) -> float:
        self.begun += 1
        if self.faults:
            raise self.faults.pop(0)
        return 5.0


async def pauses_of(rounds: Rounds, count: int) -> list[float]:
    """The pauses of the first rounds."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == count:
            raise asyncio.CancelledError

    loop = Loop("tried", rounds, clock=ManualClock(), sleep=sleep)
    with pytest.raises(asyncio.CancelledError):
        await loop.run()
    return slept


async def test_a_fault_ends_no_loop_and_its_pauses_grow() -> None:
    before = faults("tried", "unexpected"), faults("tried", "passing")
    bugs = RecursionError(), KeyError("x")
    rounds = Rounds(*bugs, StorageFailed("away"), asyncio.CancelledError())
    assert await pauses_of(rounds, 6) == [1.0, 2.0, 4.0, 8.0, 5.0, 5.0]
    after = faults("tried", "unexpected"), faults("tried", "passing")
    assert (after[0] - before[0], after[1] - before[1]) == (3, 1)


async def test_a_loop_that_only_fails_is_stuck_and_one_whose_database_is_away_is_not() -> None:
    clock, bug, outage = ManualClock(), Rounds(), Rounds()
    broken, waiting = Loop("broken", bug, clock=clock), Loop("waiting", outage, clock=clock)
    states = []
    for _ in range(3):
        bug.faults.append(ValueError("a bug"))
        outage.faults.append(StorageFailed("away"))
        await broken.once()
        await waiting.once()
        states.append((broken.state, waiting.state))
        clock.advance(STUCK_SECONDS * 0.6)
    assert states == [("retrying", "ok"), ("retrying", "ok"), ("stuck", "ok")]
    await broken.once()
    assert broken.state == "ok"


async def test_a_round_that_hangs_makes_its_loop_stuck() -> None:
    clock, never = ManualClock(), asyncio.Event()

    async def hang() -> float:
        await never.wait()
        return 0.0

    loops = Loops()
    loops.start(Loop("hanging", hang, clock=clock))
    await asyncio.sleep(0)
    assert loops.states() == {"hanging": "ok"}
    clock.advance(STUCK_SECONDS + 1)
    assert loops.states() == {"hanging": "stuck"}
    await loops.stop()


# -- the gateway's -------------------------------------------------------------------------------


def test_healthz_tells_of_every_loop(service: Service) -> None:
    health = service.http().get("/healthz")
    assert health.status_code == 200
    assert {"batches", "webhooks", "sweeper", "event_streams"} <= set(health.json()["loops"])
    [loop] = [loop for loop in service.gateway().loops._loops if loop.name == "sweeper"]

    def stuck() -> bool:
        loop._failing = time.monotonic() - 2 * STUCK_SECONDS  # its next round is in a minute
        health = service.http().get("/healthz")
        return (health.status_code, health.json()["status"]) == (503, "stuck")

    until(stuck, "nobody is told")


def start_batch(service: Service, *prompts: str, response_format: str = "url") -> str:
    lines = [
        {
            "custom_id": prompt,
            "method": "POST",
            "url": "/v1/images/generations",
            "body": {"prompt": prompt, "response_format": response_format},
        }
        for prompt in prompts
    ]
    data = b"\n".join(json.dumps(line).encode() for line in lines)
    sdk = service.sdk()
    file = sdk.files.create(file=("in.jsonl", data), purpose="batch")
    made = sdk.batches.create(
        input_file_id=file.id, endpoint="/v1/images/generations", completion_window="24h"
    )
    return made.id


def test_a_line_that_always_fails_is_set_aside_and_the_others_are_drawn(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried = batch_runner.expand_recipe, []

    def deep(body: Any) -> Any:
        if body["prompt"] == "poison":
            tried.append(body)
            raise RecursionError("maximum recursion depth exceeded")
        return real(body)

    monkeypatch.setattr(batch_runner, "expand_recipe", deep)
    poisoned, other = start_batch(service, "poison", "a dog"), start_batch(service, "a cat")
    sdk = service.sdk()
    for batch_id in (other, poisoned):

        def completed(batch_id: str = batch_id) -> bool:
            return sdk.batches.retrieve(batch_id).status == "completed"

        until(completed, "a batch stands still")
    assert len(tried) == 3
    batch = sdk.batches.retrieve(poisoned)
    counts = batch.request_counts
    assert counts is not None and (counts.completed, counts.failed) == (1, 1)
    [line] = map(json.loads, sdk.files.content(batch.error_file_id or "").text.splitlines())
    assert line["custom_id"] == "poison"
    assert line["response"]["body"]["error"]["reason"] == "set_aside"


def test_a_store_that_is_away_while_a_batch_is_written_costs_no_line(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "_CLAIM_SECONDS", 0.0)
    monkeypatch.setattr("calotype.serving.observability.loops.FIRST_PAUSE", 0.01)
    away, real = [StorageFailed("The bucket is away.")] * 3, service.blobs.get

    def get(key: str) -> bytes:
        if away and key.endswith(".png"):
            raise away.pop()
        return real(key)

    monkeypatch.setattr(service.blobs, "get", get)
    batch_id, sdk = start_batch(service, "a dog", response_format="b64_json"), service.sdk()
    until(lambda: sdk.batches.retrieve(batch_id).status == "completed", "it is not written")
    batch = sdk.batches.retrieve(batch_id)
    assert (away, batch.error_file_id) == ([], None)
    assert "b64_json" in sdk.files.content(batch.output_file_id or "").text


def test_a_line_whose_job_waited_too_long_is_started_anew(tmp_path: pathlib.Path) -> None:
    away = DispatchPolicy(check_retries=CheckRetries(delays=()), max_outage_seconds=0.0)
    with running(tmp_path, policy=away) as service:
        service.safety.prompt = lambda text: decision("input", unavailable=True)
        batch_id, sdk = start_batch(service, "a dog"), service.sdk()
        until(lambda: len(service.jobs()) >= 2, "the line is not started anew")
        service.safety.prompt = lambda text: decision("input")
        until(lambda: sdk.batches.retrieve(batch_id).status == "completed", "it is not drawn")
        counts = sdk.batches.retrieve(batch_id).request_counts
        assert counts is not None and (counts.completed, counts.failed) == (1, 0)


def test_a_batch_that_cannot_be_worked_on_fails_with_its_reason_and_holds_up_nobody(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "_REST_SECONDS", 0.0)
    monkeypatch.setattr("calotype.serving.observability.loops.FIRST_PAUSE", 0.01)
    real = service.database.batches.unanswered_lines
    poisoned: list[str] = []

    def lines(batch_id: str, **more: Any) -> Any:
        if batch_id in poisoned:
            raise ValueError("a row that cannot be read")
        return real(batch_id, **more)

    monkeypatch.setattr(service.database.batches, "unanswered_lines", lines)
    service.backend.pause()
    poisoned.append(start_batch(service, "a dog"))
    service.backend.resume()
    other, sdk = start_batch(service, "a cat"), service.sdk()
    until(lambda: sdk.batches.retrieve(other).status == "completed", "the other batch waits")
    until(lambda: sdk.batches.retrieve(poisoned[0]).status == "failed", "it is tried for ever")
    errors = sdk.batches.retrieve(poisoned[0]).errors
    assert errors is not None and errors.data and errors.data[0].code == "set_aside"


async def test_a_step_of_the_sweeper_that_fails_keeps_no_other_from_its_work(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def broken() -> int:
        raise ValueError("a row that cannot be read")

    def expire() -> int:
        done.append("files")
        return 0

    monkeypatch.setattr(service.database.retention, "purge_jobs", broken)
    monkeypatch.setattr(service.database.files, "expire_files", expire)
    with pytest.raises(ValueError, match="cannot be read"):
        await Sweeper(service.gateway()).sweep()
    assert done


def test_a_webhook_that_cannot_be_prepared_ends_like_one_that_cannot_be_sent(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr(service.database.webhooks, "write_body", broken)
    client = service.http()
    hook = {"url": "https://hooks.example.com/x", "events": ["image.job.succeeded"]}
    made = client.post("/v1/jobs", json={"input": {"prompt": "a dog"}, "webhook": hook})
    assert made.status_code == 202, made.text

    def attempts() -> list[dict[str, Any]]:
        found = client.get("/v1/webhook_deliveries").json()["data"]
        return [delivery for delivery in found if delivery["attempts"]]

    until(lambda: bool(attempts()), "the fault was not recorded")


# -- the dispatcher's ----------------------------------------------------------------------------


def add_job(service: Service, **request: Any) -> JobRecord:
    return add_job_row(service.database, {"steps": 2, **request})


@pytest.mark.parametrize("damage", [{"rendered_size": "huge"}, {"loras": 7}, {"n": "many"}])
async def test_a_row_that_cannot_be_read_is_set_aside_and_the_next_is_leased(
    tmp_path: pathlib.Path, damage: dict[str, Any]
) -> None:
    with running(tmp_path) as service:
        service.backend.pause()
        database, clock = service.database, ManualClock(time.time())
        bad, good = add_job(service), add_job(service)
        with database.engine.begin() as connection:
            change = update(jobs).where(jobs.c.id == bad.id)
            connection.execute(change.values(request=bad.request | damage))
        dispatcher = Dispatcher(
            *(database, ScriptedSafety(), clock),
            DispatchPolicy(sweep_seconds=None, rescan_seconds=15.0),
        )
        await dispatcher.start()
        leased: set[str] = set()
        for _ in range(5):
            leased |= {lease.job_id for lease in await dispatcher.lease("r1", 4, 0.05)}
            clock.advance(15.0)
            await dispatcher.sweep()
        await dispatcher.stop()
        assert leased == {good.id}
        found = database.jobs.get_job(bad.id)
        assert found is not None and found.error is not None
        assert found.error["code"] == "invalid_value" or found.error["details"] == {
            "reason": "set_aside"
        }
