"""One team fills the queue: the others have room all the same, and what is refused is no job."""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Callable, Iterator

import pytest

from calotype.serving.core.errors import Overloaded
from calotype.serving.database.accounts.queue_shares import QueueBound
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.jobs.endings import canceled_ending
from calotype.serving.jobs.records import JobRecord, NewJob, new_id

Ask = Callable[..., JobRecord]
BOUND = 12


@pytest.fixture
def database(tmp_path: pathlib.Path) -> Iterator[Database]:
    database = Database.open(sqlite_url(tmp_path))
    yield database
    database.close()


@pytest.fixture
def ask(database: Database) -> Ask:
    def ask(team: str, model: str = "shapes") -> JobRecord:
        request = {"steps": 1, "size": "64x64", "rendered_size": "64x64", "n": 1}
        team_id = database.teams.ensure_team(team).id
        new = NewJob(id=new_id("job"), team_id=team_id, model=model, input={}, request=request)
        return database.jobs.admit_job(new, QueueBound(BOUND, 7.0))[0]

    return ask


def fill(ask: Ask, team: str) -> int:
    """Asks until the team is refused; how many of its jobs were taken."""
    for taken in range(10 * BOUND):
        try:
            ask(team)
        except Overloaded as error:
            assert (error.code, error.retry_after) == ("queue_full", 7.0)
            return taken
    raise AssertionError("the queue has no bound")


def test_a_team_alone_may_fill_the_queue_and_no_more(database: Database, ask: Ask) -> None:
    assert fill(ask, "greedy") == BOUND
    team = database.teams.ensure_team("greedy").id
    assert len(database.jobs.list_jobs(team, limit=100)) == BOUND, "a refusal makes no job"
    ask("greedy", model="another")


def test_every_team_has_room_for_its_share_of_a_full_queue(ask: Ask) -> None:
    assert fill(ask, "greedy") == BOUND
    assert fill(ask, "second") == BOUND // 2
    assert fill(ask, "third") == BOUND // 3


def test_the_first_request_of_an_idle_team_is_always_taken(ask: Ask) -> None:
    fill(ask, "greedy")
    for number in range(3 * BOUND):
        ask(f"team {number}")


def test_a_share_follows_the_weight_of_its_team(database: Database, ask: Ask) -> None:
    database.teams.set_team("heavy", weight=3.0)
    fill(ask, "greedy")
    assert fill(ask, "heavy") == BOUND * 3 // 4


def test_who_filled_the_queue_has_room_again_when_its_jobs_are_over(
    database: Database, ask: Ask
) -> None:
    jobs = [ask("greedy") for _ in range(BOUND)]
    ask("second")
    for job in jobs[:2]:
        database.jobs.finish_job(job.id, canceled_ending())
    ask("greedy")
    with pytest.raises(Overloaded):
        ask("greedy")


def test_a_team_that_floods_at_once_is_bounded_as_well(database: Database, ask: Ask) -> None:
    taken: list[JobRecord] = []

    def flood() -> None:
        for _ in range(5):
            try:
                taken.append(ask("greedy"))
            except Overloaded:
                return

    threads = [threading.Thread(target=flood) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == BOUND
