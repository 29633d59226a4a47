"""Replicas follow the predicted seconds of work, not the number of requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from calotype.serving.deployments.autoscaling import QueueSecondsPolicy


def context(backlogs: dict[str, float], waiting: float = 0, least: int = 1) -> Any:
    return SimpleNamespace(
        aggregated_metrics={"backlog_seconds": backlogs},
        total_num_requests=waiting,
        capacity_adjusted_min_replicas=least,
    )


@pytest.mark.parametrize(
    ("backlog", "replicas"), [(0, 1), (5, 1), (20, 1), (50, 2.5), (200, 10), (float("nan"), 1)]
)
def test_replicas_clear_the_backlog_in_the_target_time(backlog: float, replicas: float) -> None:
    desired, _ = QueueSecondsPolicy(target_queue_seconds=20)(context({"a": backlog}))
    assert desired == replicas


def test_replicas_report_one_backlog_which_counts_once() -> None:
    desired, _ = QueueSecondsPolicy(20)(context({"a": 100.0, "b": 90.0, "c": 100.0}))
    assert desired == 5


def test_the_target_of_the_manifest_arrives_with_the_backlog() -> None:
    told = context({"a": 100.0, "b": 100.0})
    told.aggregated_metrics["target_queue_seconds"] = {"a": 50.0, "b": 50.0}
    desired, _ = QueueSecondsPolicy(20)(told)
    assert desired == 2


def test_without_replicas_a_waiting_call_wakes_the_first() -> None:
    asleep, _ = QueueSecondsPolicy(20)(context({}, waiting=0, least=0))
    woken, _ = QueueSecondsPolicy(20)(context({}, waiting=1, least=0))
    assert (asleep, woken) == (0, 1)
