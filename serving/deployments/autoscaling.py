"""Replicas by predicted work: how many does it take to clear the queue in the target time?"""

from __future__ import annotations

import math
from typing import Any


class QueueSecondsPolicy:
    """A Ray Serve autoscaling policy (`serve.config.AutoscalingPolicy`).

    Every generator replica reports the dispatcher's backlog in predicted device seconds. Clearing
    ``backlog`` seconds of work in ``target_queue_seconds`` takes their quotient in replicas; Ray
    applies delays and bounds.

    The target of the manifest arrives with the backlog: as an argument of the policy, in a Serve
    config file, its change would restart every replica.

    Args:
        target_queue_seconds: the wait that is thought acceptable, where no replica says it.
    """

    def __init__(self, target_queue_seconds: float = 20.0) -> None:
        self.target_queue_seconds = target_queue_seconds

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Desired replicas (Ray applies delays and bounds), and the state kept for next time."""
        metrics = context.aggregated_metrics or {}
        reports = metrics.get("backlog_seconds") or {}
        if not reports:
            # No replica, so nobody reports: calls that wait at a handle are the only sign of work.
            waiting = context.total_num_requests
            return max(float(context.capacity_adjusted_min_replicas), float(waiting > 0)), {}
        targets = metrics.get("target_queue_seconds") or {}
        return self.replicas(max(reports.values()), max(targets.values(), default=None)), {}

    def replicas(self, backlog_seconds: float, target: float | None = None) -> float:
        """Replicas for a backlog; at least one, as zero could not report when work comes."""
        if not math.isfinite(backlog_seconds) or backlog_seconds <= 0:
            return 1.0
        return max(1.0, backlog_seconds / (target or self.target_queue_seconds))
