"""Leases, fences, fairness, orders and the ledger of trainings."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from dataclasses import replace

import pytest

from calotype.serving.core.errors import Conflict, EngineError, NotFound
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.database.training.training_records import Result, TrainingRecord
from calotype.serving.database.training.trainings import LeaseLost
from calotype.serving.testing.in_memory import ManualClock

PASSED = {"outcome": "promoted", "gates": []}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1000.0)


@pytest.fixture
def database(tmp_path: pathlib.Path, clock: ManualClock) -> Iterator[Database]:
    found = Database.open(sqlite_url(tmp_path), clock)
    yield found
    found.close()


def ask(database: Database, number: int = 1, team: str = "acme", **changed: object) -> str:
    record = TrainingRecord(
        id=f"training_{number}",
        team_id=database.teams.ensure_team(team).id,
        api_key_id="key_1",
        model="shapes",
        name=f"zorbl-{number}",
        dataset_id="dataset_1",
        settings={"steps": 10},
        created=database.clock.time(),
        price=0.5,
    )
    database.trainings.add_training(replace(record, **changed))  # type: ignore[arg-type]
    return record.id


def lease(database: Database, seconds: float = 60.0) -> TrainingRecord:
    found = database.trainings.lease(["shapes"], seconds)
    assert found is not None
    return found


def test_a_training_is_leased_once_and_its_end_is_charged(database: Database) -> None:
    name = ask(database)
    mine = lease(database)
    assert (mine.id, mine.status, mine.fence) == (name, "running", 1)
    assert database.trainings.lease(["shapes"], 60) is None
    assert database.trainings.lease(["flux"], 60) is None
    told = ("step", {"sequence": 3, "step": 4, "loss": 0.2})
    saved = ("checkpoint_saved", {"sequence": 4, "step": 4, "file": "a"})
    assert database.trainings.beat(name, 1, 60, 5.0, [told, saved]) == "run"
    assert database.trainings.beat(name, 1, 60, 3.0) == "run"
    done = database.trainings.finish(name, 1, Result("file_1", "ab" * 32, PASSED))
    assert (done.status, done.progress["loss"], done.cost) == ("succeeded", 0.2, 4.0)
    assert done.checkpoints == [{"sequence": 4, "step": 4, "file": "a"}]
    assert done.promoted is not None
    types = [e.type for e in database.trainings.events_after(name, 0)]
    assert types == ["queued", "started", "step", "checkpoint_saved", "succeeded", "promoted"]
    assert [e.number for e in database.trainings.events_after(name, 2)] == [3, 4, 5, 6]
    (row,) = database.usage.report(None, "1970-01-01", "1970-01-02", ["model"])
    assert (row["gpu_seconds"], row["cost"]) == (8.0, 4.0)
    with pytest.raises(LeaseLost):
        database.trainings.finish(name, 1, None)


def test_whoever_lost_the_lease_is_refused_by_the_fence(
    database: Database, clock: ManualClock
) -> None:
    name = ask(database)
    dead = lease(database, 60)
    clock.advance(59)
    assert database.trainings.lease(["shapes"], 60) is None
    clock.advance(2)
    alive = lease(database)
    assert (alive.id, alive.fence) == (name, 2)
    with pytest.raises(LeaseLost):
        database.trainings.beat(name, dead.fence, 60, 1.0)
    with pytest.raises(LeaseLost):
        database.trainings.finish(name, dead.fence, EngineError("late"))
    assert database.trainings.get_training(name).status == "running"


def test_a_team_that_has_used_less_comes_first(database: Database) -> None:
    first = ask(database, 1, "acme")
    ask(database, 2, "acme")
    other = ask(database, 3, "tiny")
    mine = lease(database)
    assert mine.id == first
    database.trainings.beat(first, mine.fence, 60, 100.0)
    assert lease(database).id == other


def test_orders_reach_the_worker_and_a_suspended_training_waits(database: Database) -> None:
    name = ask(database)
    team = database.trainings.get_training(name).team_id
    mine = lease(database)
    database.trainings.want(name, team, "suspend")
    assert database.trainings.beat(name, mine.fence, 60, 1.0) == "suspend"
    assert database.trainings.give_back(name, mine.fence).status == "suspended"
    assert database.trainings.lease(["shapes"], 60) is None
    assert database.trainings.want(name, team, "run").status == "queued"
    again = lease(database)
    assert again.fence == 2
    database.trainings.want(name, team, "cancel")
    assert database.trainings.beat(name, 2, 60, 1.0) == "cancel"
    assert database.trainings.finish(name, 2, None).status == "canceled"
    with pytest.raises(Conflict, match="canceled"):
        database.trainings.want(name, team, "run")
    assert database.trainings.want(name, team, "cancel").status == "canceled"


def test_a_waiting_training_is_canceled_at_once(database: Database) -> None:
    name = ask(database)
    team = database.trainings.get_training(name).team_id
    assert database.trainings.want(name, team, "cancel").status == "canceled"
    with pytest.raises(NotFound):
        database.trainings.want(name, "team_other", "cancel")


def test_a_spent_budget_stops(database: Database) -> None:
    name = ask(database, budget_seconds=10.0)
    mine = lease(database)
    assert database.trainings.beat(name, mine.fence, 60, 9.0) == "run"
    assert database.trainings.beat(name, mine.fence, 60, 1.0) == "stop"


def test_only_what_passed_is_promoted(database: Database) -> None:
    name = ask(database)
    team = database.trainings.get_training(name).team_id
    with pytest.raises(Conflict, match="has no adapter"):
        database.trainings.promote(name, team)
    mine = lease(database)
    refused = {"outcome": "refused", "gates": []}
    database.trainings.finish(name, mine.fence, Result("file_1", "ab" * 32, refused))
    with pytest.raises(Conflict) as error:
        database.trainings.promote(name, team)
    assert error.value.code == "acceptance_failed"
    staged = ask(database, 2)
    mine = lease(database)
    database.trainings.finish(staged, mine.fence, Result("f", "ab" * 32, {"outcome": "staged"}))
    assert database.trainings.get_training(staged).promoted is None
    assert database.trainings.promote(staged, team).promoted is not None
