"""The step scheduler decides in plain Python."""

from __future__ import annotations

import subprocess
import sys

import pytest

from calotype.serving.engine.scheduling.scheduler import Bucket, Memory, StepScheduler

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
        "import sys; import calotype.serving.engine.scheduling.scheduler; "
        "assert not {'torch', 'numpy'} & set(sys.modules), 'torch or numpy is imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def serve(scheduler, steps, now=0.0, seconds=0.0):
    """Steps a while; how many rows of each request were run."""
    given = {}
    for _ in range(steps):
        batch = scheduler.next_batch(now)
        if batch is None:
            break
        for row in batch.rows:
            given[row.request_id] = given.get(row.request_id, 0) + 1
        if seconds:
            scheduler.measured(batch, seconds)
        scheduler.completed(batch)
    return given


@pytest.mark.parametrize(("weight", "share"), [(1.0, 0.5), (3.0, 0.75), (0.25, 0.2)])
def test_tenants_share_the_steps_by_their_weight(weight, share):
    scheduler = StepScheduler(max_batch_rows=1)
    for i in range(9):
        scheduler.add(f"many{i}", SMALL, rows=1, evaluations=100, tenant="many")
    scheduler.add("few", SMALL, rows=1, evaluations=500, tenant="few", weight=weight)
    given = serve(scheduler, 400)
    assert given["few"] / 400 == pytest.approx(share, abs=0.01)


def test_tenants_are_charged_for_the_size_of_their_images():
    scheduler = StepScheduler(max_batch_rows=1)
    scheduler.add("large", LARGE, rows=1, evaluations=500, tenant="a")
    scheduler.add("small", SMALL, rows=1, evaluations=500, tenant="b")
    given = serve(scheduler, 400)
    ratio = given["small"] * SMALL.tokens / (given["large"] * LARGE.tokens)
    assert ratio == pytest.approx(1.0, abs=0.02)


def test_a_tenant_that_was_away_has_saved_up_nothing():
    scheduler = StepScheduler(max_batch_rows=1)
    scheduler.add("early", SMALL, rows=1, evaluations=1000, tenant="a")
    serve(scheduler, 300)
    scheduler.add("late", SMALL, rows=1, evaluations=1000, tenant="b")
    assert serve(scheduler, 100) == {"early": 50, "late": 50}


def test_a_tenant_gains_nothing_by_leaving_and_coming_back():
    scheduler = StepScheduler(max_batch_rows=1)
    scheduler.add("steady", SMALL, rows=1, evaluations=10_000, tenant="a")
    fresh = 0
    for i in range(300):
        name = f"fresh{i}"
        scheduler.add(name, SMALL, rows=1, evaluations=1, tenant="b")
        fresh += serve(scheduler, 1).get(name, 0)
        scheduler.remove(name)
    assert fresh == pytest.approx(150, abs=2)


def test_priority_stands_above_shares():
    scheduler = StepScheduler(max_batch_rows=1)
    scheduler.add("low", SMALL, rows=1, evaluations=50, tenant="a", weight=1000)
    scheduler.add("high", SMALL, rows=1, evaluations=50, tenant="b", priority=1)
    assert serve(scheduler, 50) == {"high": 50}


def test_a_tenant_alone_fills_the_batch():
    scheduler = StepScheduler(max_batch_rows=4)
    scheduler.add("a", SMALL, rows=3, evaluations=5, tenant="a")
    scheduler.add("b", SMALL, rows=3, evaluations=5, tenant="b")
    assert len(scheduler.next_batch().rows) == 4


def test_a_deadline_that_waiting_would_miss_goes_first():
    scheduler = StepScheduler(max_batch_rows=1)
    scheduler.add("short", SMALL, rows=1, evaluations=4)
    serve(scheduler, 1, seconds=1.0)
    scheduler.add("due", SMALL, rows=1, evaluations=10, deadline=20.0)
    assert scheduler.next_batch(now=0.0).rows[0].request_id == "short"
    assert scheduler.next_batch(now=9.0).rows[0].request_id == "due"
    scheduler.add("sooner", SMALL, rows=1, evaluations=10, deadline=19.5)
    assert scheduler.next_batch(now=9.0).rows[0].request_id == "sooner"


def test_a_deadline_that_cannot_be_kept_is_told():
    scheduler = StepScheduler(max_batch_rows=1)
    scheduler.add("due", SMALL, rows=2, evaluations=5, deadline=9.5)
    assert scheduler.hopeless(0.0) == [], "nothing is known of the pace yet"
    serve(scheduler, 1, seconds=1.0)
    assert scheduler.hopeless(0.4) == []
    assert scheduler.hopeless(0.6) == ["due"]
    scheduler.add("never", SMALL, rows=1, evaluations=5)
    assert scheduler.hopeless(1e9) == ["due"]


def test_memory_limits_what_runs_and_what_shares_a_step():
    scheduler = StepScheduler(8, memory=Memory(total=10.5 * LARGE.tokens, token=1.0))
    for name, rows in (("a", 4), ("b", 3), ("c", 3)):
        scheduler.add(name, LARGE, rows=rows, evaluations=2, row_bytes=LARGE.tokens)
    assert len(scheduler.next_batch().rows) == 4
    assert scheduler.running_rows == 6, "a would leave no room for a step"
    assert scheduler.row_limit(LARGE) == 4
    assert scheduler.row_limit(SMALL) == 8
    assert scheduler.fits(LARGE, 9, LARGE.tokens)
    assert not scheduler.fits(LARGE, 10, LARGE.tokens)
    for name in "bc":
        scheduler.remove(name)
    assert {row.request_id for row in scheduler.next_batch().rows} == {"a"}


def test_a_request_that_needs_all_memory_runs_alone_and_is_not_overtaken_for_ever():
    scheduler = StepScheduler(8, memory=Memory(total=5 * SMALL.tokens, token=1.0))
    scheduler.add("small", SMALL, rows=1, evaluations=2, row_bytes=SMALL.tokens)
    scheduler.next_batch()
    scheduler.add("huge", SMALL, rows=4, evaluations=1, row_bytes=SMALL.tokens)
    scheduler.add("behind", SMALL, rows=1, evaluations=9, row_bytes=SMALL.tokens)
    assert run(scheduler) == ["small", "huge", "behind"]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_is_above_zero(weight):
    with pytest.raises(ValueError, match="weight"):
        StepScheduler().add("a", SMALL, rows=1, evaluations=1, weight=weight)
