"""What was consumed: one row for every job that ended, never changed afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Column, Connection, Integer, case, cast, func, select

from calotype.serving.core.json_object import JsonObject
from calotype.serving.database.accounts.quotas import day_of
from calotype.serving.database.connection import reading
from calotype.serving.database.repository import Repository
from calotype.serving.database.schema.tables import teams, usage_records
from calotype.serving.jobs.records import JobRecord

_INSERT = usage_records.insert()
GROUPS = ("team", "model", "adapter", "day", "key")
_COLUMNS: Mapping[str, Column[Any]] = {
    "team": teams.c.name,
    "model": usage_records.c.model,
    "adapter": usage_records.c.adapters,
    "day": usage_records.c.day,
    "key": usage_records.c.api_key_id,
}


def used_seconds(job: JobRecord) -> float:
    """Device time of a job that is over, however it ended.

    What its result says; without one what its last lease had measured so far; where that said
    nothing, the predicted time of the steps that were done.
    """
    seconds = (job.metrics or {}).get("gpu_seconds")
    if isinstance(seconds, int | float):
        return float(seconds)
    if job.gpu_seconds or not job.steps:
        return job.gpu_seconds
    return job.reserved_seconds * min(1.0, job.step / job.steps)


def record_usage(connection: Connection, job: JobRecord) -> None:
    """Writes the row of a job that has just ended."""
    now = job.completed if job.completed is not None else job.created
    images = len((job.output or {}).get("images", []))
    asked, names = _asked(job)
    megapixels = float((job.metrics or {}).get("megapixels", 0.0)) * images / asked
    usage, seconds = job.usage or {}, used_seconds(job)
    kept = None if job.promised is None or job.status == "canceled" else now <= job.promised
    values = {
        "job_id": job.id,
        "team_id": job.team_id,
        "api_key_id": job.api_key_id,
        "model": job.model,
        "adapters": ",".join(names)[:512],
        "time": now,
        "day": day_of(now),
        "status": job.status,
        "images": images,
        "megapixels": megapixels,
        "gpu_seconds": seconds,
        "cost": seconds * job.price,
        "input_tokens": int(usage.get("input_tokens", 0)),
        "output_tokens": int(usage.get("output_tokens", 0)),
        "promise_kept": kept,
    }
    connection.execute(_INSERT, values)


def _asked(job: JobRecord) -> tuple[int, list[str]]:
    """How many images and which adapters; a row that cannot be read must end all the same."""
    try:
        names = sorted(str(lora["id"]) for lora in job.request.get("loras", []))
        return max(1, int(job.request.get("n", 1))), names
    except (TypeError, KeyError, ValueError):
        return 1, []


class Usage(Repository):
    """What teams consumed."""

    def report(
        self,
        team_id: str | None,
        first_day: str,
        last_day: str,
        group_by: Sequence[str] = ("day", "model"),
        limit: int = 1000,
    ) -> list[JsonObject]:
        """Sums per group, first group first.

        Args:
            team_id: None = of all teams.
            first_day, last_day: ``2026-11-23``, both counted, in UTC.
            group_by: some of `GROUPS`.
        """
        columns = [_COLUMNS[name].label(name) for name in group_by]
        records = usage_records.c
        sums = [
            func.count().label("jobs"),
            func.sum(case((records.status == "succeeded", 1), else_=0)).label("succeeded"),
            *(
                func.sum(records[name]).label(name)
                for name in (
                    *("images", "megapixels", "gpu_seconds", "cost"),
                    *("input_tokens", "output_tokens"),
                )
            ),
        ]
        query = (
            select(*columns, *sums)
            .join_from(usage_records, teams, teams.c.id == records.team_id)
            .where(records.day >= first_day, records.day <= last_day)
        )
        if team_id is not None:
            query = query.where(records.team_id == team_id)
        expressions = [_COLUMNS[name] for name in group_by]
        query = query.group_by(*expressions).order_by(*expressions).limit(limit)
        with reading(self.engine) as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def promises(self) -> list[tuple[str, int, int]]:
        """(model, kept, broken): how often a job was over when it was said to be."""
        records = usage_records.c
        kept = func.sum(cast(records.promise_kept, Integer))
        query = (
            select(records.model, kept, func.count())
            .where(records.promise_kept.is_not(None))
            .group_by(records.model)
        )
        with reading(self.engine) as connection:
            return [
                (model, int(good), int(count) - int(good))
                for model, good, count in connection.execute(query)
            ]
