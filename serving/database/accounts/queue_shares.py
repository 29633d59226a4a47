"""How the queue of a model is shared out between teams.

While it has room anybody may add to it. When it is full a team may still have its share of open
jobs, by its weight among the teams that have any: so the first request of an idle team is always
taken, and a team that fills the queue takes room from nobody but itself. The queue grows beyond its
bound by what such teams add.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, func, select

from calotype.serving.core.errors import Overloaded
from calotype.serving.database.schema.tables import jobs, teams
from calotype.serving.jobs.lifecycle import OPEN
from calotype.serving.jobs.records import NewJob

_OPEN_BY_TEAM = (
    select(jobs.c.team_id, teams.c.weight, func.count())
    .join_from(jobs, teams, teams.c.id == jobs.c.team_id)
    .where(jobs.c.status.in_(sorted(OPEN)), jobs.c.model == bindparam("of_model"))
    .group_by(jobs.c.team_id, teams.c.weight)
)


@dataclass(frozen=True, slots=True)
class QueueBound:
    jobs: int
    """Open jobs of one model."""
    retry_after: float = 30.0
    """Seconds after which a refused client may find room."""


def check_queue(connection: Connection, new: NewJob, bound: QueueBound) -> None:
    """Raises Overloaded where the queue of the model has no room for this team's job."""
    rows = connection.execute(_OPEN_BY_TEAM, {"of_model": new.model})
    found = {team: (weight, count) for team, weight, count in rows}
    total = sum(count for _, count in found.values())
    if total < bound.jobs or new.team_id not in found:
        return
    weight, mine = found[new.team_id]
    share = max(1.0, bound.jobs * weight / max(1e-6, sum(w for w, _ in found.values())))
    if mine < share:
        return
    raise Overloaded(
        f"The queue of the model '{new.model}' is full, and {mine} of its {total} jobs are yours "
        f"(your share of it is {share:.0f}). Try again later.",
        code="queue_full",
        retry_after=bound.retry_after,
    )
