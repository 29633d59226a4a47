"""The step scheduler decides in plain Python."""

from __future__ import annotations

import subprocess
import sys

import pytest

from calotype.serving.engine.scheduler import Bucket, StepScheduler

SMALL, LARGE = Bucket(4, 4, 32), Bucket(8, 8, 32)


def run(scheduler, until=None):
    """Steps until ``until`` requests ended; the order in which requests ended."""
    ended, left = [], {e.request_id: e.evaluations for e in scheduler._entries.values()}
    while (batch := scheduler.next_batch()) is not None and len(ended) != until:
        scheduler.completed(batch)
        for request_id in list(left):
            if request_id in scheduler and not scheduler._entries[request_id].open_rows:
                scheduler.remove(request_id)
                ended.append(request_id)
                del left[request_id]
    return ended


def test_rows_of_one_bucket_share_a_step_up_to_the_limit():
    scheduler = StepScheduler(max_batch_rows=3)
    scheduler.add("a", SMALL, rows=2, evaluations=4)
    scheduler.add("b", SMALL, rows=2, evaluations=4)
    scheduler.add("c", LARGE, rows=1, evaluations=4)
    batch = scheduler.next_batch()
    assert batch.bucket == SMALL
    assert [(r.request_id, r.index, r.step) for r in batch.rows] == [
        ("a", 0, 0), ("a", 1, 0), ("b", 0, 0),
    ]  # fmt: skip


def test_rows_are_at_their_own_steps():
    scheduler = StepScheduler()
    scheduler.add("a", SMALL, rows=1, evaluations=4)
    scheduler.completed(scheduler.next_batch())
    scheduler.add("b", SMALL, rows=1, evaluations=4)
    assert {r.request_id: r.step for r in scheduler.next_batch().rows} == {"a": 1, "b": 0}


def test_nothing_to_do_gives_none():
    scheduler = StepScheduler()
    assert scheduler.next_batch() is None
    scheduler.add("a", SMALL, rows=1, evaluations=1)
    scheduler.completed(scheduler.next_batch())
    assert scheduler.next_batch() is None
    scheduler.remove("a")
    scheduler.remove("a")
    assert len(scheduler) == 0


def test_requests_of_one_length_end_in_the_order_of_arrival():
    scheduler = StepScheduler(max_batch_rows=1)
    for name in "abcd":
        scheduler.add(name, SMALL, rows=1, evaluations=3)
    assert run(scheduler) == list("abcd")


def test_short_request_overtakes_long_ones():
    scheduler = StepScheduler(max_batch_rows=1)
    for i in range(8):
        scheduler.add(f"long{i}", LARGE, rows=1, evaluations=50)
    for _ in range(3):
        scheduler.completed(scheduler.next_batch())
    scheduler.add("short", SMALL, rows=1, evaluations=4)
    assert run(scheduler, until=1) == ["short"]


def test_long_request_is_not_starved_by_a_stream_of_short_ones():
    scheduler = StepScheduler(max_batch_rows=1)
    scheduler.add("long", LARGE, rows=1, evaluations=10)
    steps = 0
    while scheduler._entries["long"].open_rows:
        if sum(1 for name in scheduler._entries if name != "long") < 2:
            scheduler.add(f"short{steps}", SMALL, rows=1, evaluations=2)
        batch = scheduler.next_batch()
        scheduler.completed(batch)
        for name in [n for n, e in scheduler._entries.items() if n != "long" and not e.open_rows]:
            scheduler.remove(name)
        steps += 1
        assert steps < 400, "the long request never ends"
    others = (steps - 10) * SMALL.tokens
    # Its own work summed over its steps bounds what others got while it waited.
    assert others <= sum(left * LARGE.tokens for left in range(1, 11)) + 10 * 2 * SMALL.tokens


def test_priority_goes_first_and_free_seats_are_filled():
    scheduler = StepScheduler(max_batch_rows=2)
    scheduler.add("low", SMALL, rows=2, evaluations=1)
    scheduler.add("high", SMALL, rows=1, evaluations=9, priority=3)
    assert [r.request_id for r in scheduler.next_batch().rows] == ["high", "low"]


def test_running_rows_are_limited_but_a_large_request_runs_alone():
    scheduler = StepScheduler(max_batch_rows=8, max_running_rows=4)
    scheduler.add("a", SMALL, rows=3, evaluations=2)
    scheduler.add("b", SMALL, rows=3, evaluations=2)
    assert {r.request_id for r in scheduler.next_batch().rows} == {"a"}
    assert scheduler.running_rows == 3
    scheduler.remove("a")
    assert {r.request_id for r in scheduler.next_batch().rows} == {"b"}
    scheduler.remove("b")
    scheduler.add("huge", SMALL, rows=9, evaluations=1)
    assert len(scheduler.next_batch().rows) == 8


def test_bucket_limits():
    scheduler = StepScheduler(8, bucket_rows={LARGE: 1})
    scheduler.add("a", LARGE, rows=3, evaluations=1)
    assert len(scheduler.next_batch().rows) == 1
    scheduler.limit_rows(SMALL, 0)
    scheduler.add("b", SMALL, rows=3, evaluations=1, priority=1)
    assert len(scheduler.next_batch().rows) == 1


@pytest.mark.parametrize("bad", [{"rows": 0, "evaluations": 1}, {"rows": 1, "evaluations": 0}])
def test_programming_errors_are_told(bad):
    scheduler = StepScheduler()
    with pytest.raises(ValueError):
        scheduler.add("a", SMALL, **bad)
    scheduler.add("a", SMALL, rows=1, evaluations=1)
    with pytest.raises(ValueError):
        scheduler.add("a", SMALL, rows=1, evaluations=1)


def test_it_needs_no_torch():
    code = (
        "import sys; import calotype.serving.engine.scheduler; "
        "assert not {'torch', 'numpy'} & set(sys.modules), 'torch or numpy is imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
