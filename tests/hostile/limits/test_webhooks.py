"""A receiver of webhooks that is silent, or fails, costs nobody but its own team."""

from __future__ import annotations

import asyncio
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.testing.in_memory import ManualClock
from calotype.serving.webhooks import sender as sending
from calotype.serving.webhooks.receivers import AT_ONCE, PER_RECEIVER, PER_TEAM
from calotype.serving.webhooks.safe_http import Answer, OutboundFailed, OutboundPolicy, Target
from calotype.serving.webhooks.sender import WebhookSender


class Internet:
    """Receivers by the host of their address: silent, failing, or well."""

    def __init__(self) -> None:
        self.silent, self.failing = {"silent.example"}, {"failing.example"}
        self.open: Counter[str] = Counter()
        self.most_open: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.speak = asyncio.Event()

    async def resolve(self, url: str, policy: OutboundPolicy) -> Target:
        host = url.split("/")[2]
        return Target(url, "https", host, 443, "/", "192.0.2.1")

    async def send(self, target: Target, *arguments: Any, **more: Any) -> Answer:
        self.asked[target.host] += 1
        self.open[target.host] += 1
        self.most_open[target.host] = max(self.most_open[target.host], self.open[target.host])
        try:
            if target.host in self.silent:
                await self.speak.wait()
            if target.host in self.failing:
                raise OutboundFailed("connection refused")
            return Answer(200, {}, b"")
        finally:
            self.open[target.host] -= 1


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def database(tmp_path: pathlib.Path, clock: ManualClock) -> Iterator[Database]:
    database = Database.open(sqlite_url(tmp_path), clock)
    yield database
    database.close()


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> Internet:
    found = Internet()
    monkeypatch.setattr(sending, "resolve_url", found.resolve)
    monkeypatch.setattr(sending, "send", found.send)
    return found


def add_events(database: Database, team: str, host: str, count: int, endpoints: int = 1) -> None:
    team_id = database.teams.ensure_team(team).id
    for number in range(endpoints):
        url = f"https://{host}/{number}"
        endpoint = database.webhooks.add_endpoint(team_id, "", url, ["image.job.succeeded"])
        for _ in range(count // endpoints):
            database.webhooks.add_delivery(team_id, endpoint.id, url, "webhook.test", "{}")


def pending(database: Database, team: str) -> int:
    team_id = database.teams.ensure_team(team).id
    found = database.webhooks.list_deliveries(team_id, limit=1000, status="pending")
    return len(found)


async def rounds(sender: WebhookSender, count: int) -> None:
    for _ in range(count):
        await sender.work(0.01)


async def test_a_silent_receiver_delays_nobody_else(database: Database, internet: Internet) -> None:
    add_events(database, "a", "silent.example", 80)
    add_events(database, "b", "well.example", 12)
    sender = WebhookSender(database, OutboundPolicy(), lambda job: {})
    while pending(database, "b"):
        await sender.work(0.01)
    assert internet.open["silent.example"] == PER_RECEIVER == internet.most_open["silent.example"]
    internet.speak.set()
    await sender.send_due()
    assert pending(database, "a") == 0


async def test_a_team_of_many_silent_receivers_has_its_share_of_the_connections(
    database: Database, internet: Internet
) -> None:
    for team in ("a1", "a2", "a3", "a4", "a5", "a6", "a7", "a8"):
        add_events(database, team, "silent.example", 60, endpoints=20)
    sender = WebhookSender(database, OutboundPolicy(), lambda job: {})
    await rounds(sender, 4)
    running = internet.open["silent.example"]
    assert 2 * PER_TEAM <= running < AT_ONCE, "some are kept for teams that come later"
    add_events(database, "b", "well.example", 3)
    while pending(database, "b"):
        await sender.work(0.01)
    assert internet.open["silent.example"] >= running
    await sender.close()
    assert internet.open["silent.example"] == 0


async def test_a_receiver_that_fails_again_and_again_is_left_alone_for_a_while(
    database: Database, internet: Internet, clock: ManualClock
) -> None:
    add_events(database, "a", "failing.example", 60)
    sender = WebhookSender(database, OutboundPolicy(), lambda job: {})
    await sender.send_due()
    asked = internet.asked["failing.example"]
    assert asked < 5 + PER_RECEIVER, "the circuit opens"
    clock.advance(29)
    await sender.send_due()
    assert internet.asked["failing.example"] == asked
    clock.advance(2)
    await sender.send_due()
    assert internet.asked["failing.example"] == asked + 1, "one attempt shows how it is"
    internet.failing.clear()
    clock.advance(61)
    await sender.send_due()
    assert pending(database, "a") == 0, "the others come when it is well"


async def test_what_waits_for_a_receiver_that_is_left_alone_keeps_nobody_busy(
    database: Database, internet: Internet
) -> None:
    add_events(database, "a", "failing.example", 60)
    sender = WebhookSender(database, OutboundPolicy(), lambda job: {})
    await sender.send_due()
    assert pending(database, "a") == 60
    assert await sender.work(20.0) == 20.0, "nothing that may be sent is due"
    add_events(database, "b", "well.example", 1)
    assert await sender.work(20.0) == 0.0
    assert pending(database, "b") == 0
    await sender.close()
