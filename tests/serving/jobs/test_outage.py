"""How long a job waits for a part that is away, and when it is tried again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from calotype.serving.core.errors import ModerationUnavailable
from calotype.serving.jobs.outage import next_outage
from calotype.serving.jobs.records import JobRecord

AWAY = ModerationUnavailable("The safety stage is away.")


def test_the_last_attempt_is_made_when_the_time_is_over_and_not_after_it(
    add_job: Callable[..., JobRecord],
) -> None:
    job, now, longest = add_job(), 1000.0, 100.0
    tried: list[float] = []
    while (outage := next_outage(job, AWAY, now, longest, leased=False)) is not None:
        tried.append(outage.retry_at - now)
        job, now = replace(job, outage=outage.to_payload()), outage.retry_at
    assert now == 1000.0 + longest
    assert tried[:5] == [1.0, 2.0, 4.0, 8.0, 16.0], "pauses grow"
