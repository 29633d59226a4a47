"""What a team may take: requests a minute, open jobs, GPU-seconds a day, money a month.

Everything is decided and written in the transaction that makes or ends the job: a quota is
reserved when the job is accepted, settled with what was measured when it succeeds, and released
when it fails. The team's row is locked meanwhile, so that racing gateways cannot overdraw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, bindparam, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from calotype.serving.core.errors import PermissionDenied, QuotaExceeded
from calotype.serving.database.schema.tables import jobs, team_days, teams
from calotype.serving.jobs.records import JobRecord, NewJob, TeamRecord

_LONGEST_WAIT = 60.0
_LOCKED_TEAM = select(teams).where(teams.c.id == bindparam("team")).with_for_update()


@dataclass(frozen=True, slots=True)
class RateState:
    """The team's bucket of requests after this one."""

    limit: int
    remaining: int
    reset_seconds: float
    """Until the bucket is full again."""


def day_of(moment: float) -> str:
    """``2026-11-23``, in UTC."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d")


def reserve(connection: Connection, new: NewJob, now: float) -> tuple[RateState | None, str]:
    """Charges the team for an accepted job.

    Returns:
        The state of its rate limit, if it has one, and the day that the reservation is on.

    Raises:
        PermissionDenied: the team may not use this model.
        QuotaExceeded: a limit is reached; says which and when it is over.
    """
    team = locked_team(connection, new.team_id)
    if team.allowed_models is not None and new.model not in team.allowed_models:
        raise PermissionDenied(
            f"The team '{team.name}' may not use the model '{new.model}' (it may use: "
            f"{', '.join(team.allowed_models) or 'none'}).",
            param="model",
        )
    _check_open_jobs(connection, team)
    day = day_of(now)
    _check_spending(connection, team, new, day)
    state = take_token(connection, team, now)
    if new.reserved_seconds:
        _add_to_day(connection, new.team_id, day, reserved=new.reserved_seconds)
    return state, day


def settle(connection: Connection, job: JobRecord, used_seconds: float) -> None:
    """Replaces the reservation of a job that has just ended by what it used."""
    if job.reserved_day is None or not (job.reserved_seconds or used_seconds):
        return
    _add_to_day(
        connection,
        job.team_id,
        job.reserved_day,
        reserved=-job.reserved_seconds,
        used=used_seconds,
        cost=used_seconds * job.price,
    )


def rate_state(team: TeamRecord, now: float) -> RateState | None:
    """The bucket as it is now, nothing taken."""
    if team.requests_per_minute is None:
        return None
    return _state(team.requests_per_minute, _tokens(team, team.requests_per_minute, now))


def _check_open_jobs(connection: Connection, team: TeamRecord) -> None:
    if team.concurrent_jobs is None:
        return
    query = select(func.count()).where(
        jobs.c.team_id == team.id, jobs.c.status.in_(("queued", "running"))
    )
    open_jobs = connection.execute(query).scalar_one()
    if open_jobs >= team.concurrent_jobs:
        raise QuotaExceeded(
            f"The team '{team.name}' has {open_jobs} open jobs and may have "
            f"{team.concurrent_jobs} at once; wait until one is over.",
            retry_after=5,
        )


def _check_spending(connection: Connection, team: TeamRecord, new: NewJob, day: str) -> None:
    if team.gpu_seconds_per_day is not None:
        query = select(func.sum(team_days.c.reserved_seconds + team_days.c.used_seconds)).where(
            team_days.c.team_id == team.id, team_days.c.day == day
        )
        taken = float(connection.execute(query).scalar() or 0.0)
        if taken + new.reserved_seconds > team.gpu_seconds_per_day:
            raise QuotaExceeded(
                f"The team '{team.name}' has taken {taken:.1f} of its "
                f"{team.gpu_seconds_per_day:g} GPU-seconds a day, and this request needs about "
                f"{new.reserved_seconds:.1f}. The day ends at midnight UTC.",
                code="insufficient_quota",
            )
    if team.budget_per_month is not None:
        reserved = team_days.c.reserved_seconds * new.price
        query = select(func.sum(team_days.c.used_cost + reserved)).where(
            team_days.c.team_id == team.id, team_days.c.day.like(f"{day[:7]}-%")
        )
        spent = float(connection.execute(query).scalar() or 0.0)
        if spent + new.reserved_seconds * new.price > team.budget_per_month:
            raise QuotaExceeded(
                f"The team '{team.name}' has spent {spent:.2f} of its budget of "
                f"{team.budget_per_month:g} for this month. Ask the operator for more.",
                code="insufficient_quota",
            )


def locked_team(connection: Connection, team_id: str) -> TeamRecord:
    """The team, which nobody else changes until the transaction ends."""
    return TeamRecord(**connection.execute(_LOCKED_TEAM, {"team": team_id}).mappings().one())


def take_token(connection: Connection, team: TeamRecord, now: float) -> RateState | None:
    """Takes one of the team's requests a minute; None = it has no such limit.

    Raises:
        QuotaExceeded: none is left; says when one is.
    """
    limit = team.requests_per_minute
    if limit is None:
        return None
    tokens = _tokens(team, limit, now)
    if tokens < 1:
        wait = min(_LONGEST_WAIT, (1 - tokens) * 60 / limit) if limit else _LONGEST_WAIT
        raise QuotaExceeded(
            f"Rate limit reached: the team '{team.name}' may make {limit} requests a minute. "
            f"Try again in {math.ceil(wait)} s.",
            retry_after=wait,
        )
    connection.execute(
        update(teams).where(teams.c.id == team.id).values(bucket_tokens=tokens - 1, bucket_time=now)
    )
    return _state(limit, tokens - 1)


def _tokens(team: TeamRecord, limit: int, now: float) -> float:
    if team.bucket_tokens is None or team.bucket_time is None:
        return float(limit)
    # A clock that was set back takes nothing away and gives nothing.
    elapsed = max(0.0, now - team.bucket_time)
    return min(float(limit), team.bucket_tokens + elapsed * limit / 60)


def _state(limit: int, tokens: float) -> RateState:
    reset = (limit - tokens) * 60 / limit if limit else _LONGEST_WAIT
    return RateState(limit, int(tokens), reset)


def _add_to_day(
    connection: Connection,
    team_id: str,
    day: str,
    *,
    reserved: float = 0.0,
    used: float = 0.0,
    cost: float = 0.0,
) -> None:
    row = {
        "team_id": team_id,
        "day": day,
        "reserved_seconds": max(0.0, reserved),
        "used_seconds": used,
        "used_cost": cost,
    }
    insert: Any = (postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert)(
        team_days
    )
    columns = team_days.c
    connection.execute(
        insert.values(row).on_conflict_do_update(
            index_elements=[columns.team_id, columns.day],
            set_={
                "reserved_seconds": columns.reserved_seconds + reserved,
                "used_seconds": columns.used_seconds + used,
                "used_cost": columns.used_cost + cost,
            },
        )
    )
