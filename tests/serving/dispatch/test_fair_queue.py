"""Who is next, and what a job will cost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calotype.serving.dispatch.fair_queue import FairQueue, QueuedJob
from calotype.serving.jobs.predictor import Work, WorkPredictor


def job(name: str, team: str = "a", seconds: float = 1.0, priority: int = 0) -> QueuedJob:
    return QueuedJob(name, team, seconds, priority)


def drain(queue: FairQueue, most: int = 1000) -> list[QueuedJob]:
    taken: list[QueuedJob] = []
    while len(taken) < most and (found := queue.pop()) is not None:
        taken.append(found)
    return taken


def test_one_team_is_served_in_order_of_arrival_and_priority() -> None:
    queue = FairQueue()
    for name, priority in [("1", 0), ("2", 0), ("low", -1), ("high", 1)]:
        queue.push(job(name, priority=priority))
    assert [taken.job_id for taken in drain(queue)] == ["high", "1", "2", "low"]
    assert queue.pop() is None


def test_a_team_that_comes_late_is_served_within_two() -> None:
    queue = FairQueue()
    for i in range(200):
        queue.push(job(f"a{i}"))
    drain(queue, 50)
    queue.push(job("b0", "b"))
    assert "b0" in [taken.job_id for taken in drain(queue, 2)]


def test_an_idle_team_saves_up_no_credit() -> None:
    queue = FairQueue()
    for i in range(100):
        queue.push(job(f"a{i}"))
    queue.push(job("b0", "b"))
    drain(queue, 80)
    for i in range(10):
        queue.push(job(f"b{i + 1}", "b"))
    teams = [taken.team for taken in drain(queue, 10)]
    assert 4 <= teams.count("b") <= 6


def test_teams_share_seconds_not_jobs_and_by_weight() -> None:
    queue = FairQueue()
    queue.set_weight("heavy", 2.0)
    for i in range(300):
        queue.push(job(f"h{i}", "heavy", seconds=4.0))
        queue.push(job(f"l{i}", "light", seconds=1.0))
    spent = {"heavy": 0.0, "light": 0.0}
    for taken in drain(queue, 150):
        spent[taken.team] += taken.seconds
    assert spent["heavy"] / spent["light"] == pytest.approx(2.0, rel=0.1)


def test_what_comes_back_is_not_charged_again_before_other_teams() -> None:
    queue = FairQueue()
    queue.push(job("1", seconds=10))
    queue.push(job("2", seconds=10))
    assert queue.pop() == job("1", seconds=10)
    for number in range(30):
        queue.push(job(f"b{number}", "b"))
    queue.push(QueuedJob("1", "a", 10.0, charged=True))
    taken = [found.job_id for found in drain(queue)]
    assert taken.index("2") == taken.index("1") + 1 <= 13


def test_what_comes_back_goes_before_older_ones_of_its_team() -> None:
    queue = FairQueue()
    queue.push(QueuedJob("older", "a", 1.0, created=1.0))
    queue.push(QueuedJob("back", "a", 1.0, charged=True, created=5.0))
    assert [taken.job_id for taken in drain(queue)] == ["back", "older"]


def test_what_comes_back_goes_first_and_is_not_charged_twice() -> None:
    queue = FairQueue()
    queue.push(job("1", seconds=100))
    queue.push(job("2"))
    assert queue.pop() == job("1", seconds=100)
    queue.push(QueuedJob("1", "a", 100.0, charged=True))
    assert [taken.job_id for taken in drain(queue)] == ["1", "2"]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.floats(0.01, 100), st.integers(-1, 1), st.booleans()),
        max_size=40,
    )
)
def test_every_job_leaves_once_unless_it_was_removed(
    arrivals: list[tuple[str, float, int, bool]],
) -> None:
    queue = FairQueue()
    for i, (team, seconds, priority, _) in enumerate(arrivals):
        queue.push(job(str(i), team, seconds, priority))
        queue.push(job(str(i), team, seconds, priority))
    kept = {str(i) for i, arrival in enumerate(arrivals) if not arrival[3]}
    for i, arrival in enumerate(arrivals):
        if arrival[3]:
            assert queue.remove(str(i))
            assert not queue.remove(str(i))
    taken = [found.job_id for found in drain(queue)]
    assert sorted(taken) == sorted(kept)
    assert len(queue) == 0


def test_predictions_follow_what_was_measured() -> None:
    work = Work("1000x1000", steps=10, n=2)
    assert work.units == pytest.approx(20.0)
    predictor = WorkPredictor()
    predictor.learn(work, 40.0)
    assert predictor.predict(work) == pytest.approx(40.0)
    predictor.learn(work, 80.0)
    assert 40.0 < predictor.predict(work) < 80.0
    before = predictor.seconds_per_unit
    for nonsense in (0.0, -1.0, float("nan"), float("inf")):
        predictor.learn(work, nonsense)
    assert predictor.seconds_per_unit == before
