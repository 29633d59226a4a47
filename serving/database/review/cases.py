"""Cases for people: appeals, reports of misuse, held images, with a queue and a lease.

A case is open, leased to one reviewer for a while, and then decided once. A reviewer who goes away
loses the case to the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection, and_, func, insert, or_, select, update

from calotype.serving.core.errors import Conflict, NotFound
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import ColumnValues, Repository
from calotype.serving.database.schema.tables import cases
from calotype.serving.jobs.records import new_id

VERDICTS = {
    "appeal": ("upheld", "overturned"),
    "report": ("dismissed", "taken_down"),
    "review": ("approved", "rejected"),
}
"""How a case of a kind may end."""
LEASE_SECONDS = 1800.0


@dataclass(frozen=True, slots=True)
class CaseRecord:
    """A row of the table ``cases``."""

    id: str
    kind: str
    team_id: str
    subject: str
    """The decision that is appealed against, the asset that is reported, or that waits for it."""
    reason: str
    status: str
    created: float
    held_by: str | None = None
    held_until: float | None = None
    note: str | None = None
    decided: float | None = None


class Cases(Repository):
    """Appeals, reports and reviews, with a lease for the reviewer."""

    def open_case(self, kind: str, team_id: str, subject: str, reason: str) -> CaseRecord:
        """A new case, or the one that the team has about the same thing already."""
        same = and_(cases.c.kind == kind, cases.c.team_id == team_id, cases.c.subject == subject)
        with writing(self.engine) as connection:
            row = connection.execute(select(cases).where(same)).mappings().first()
            if row is None:
                values: ColumnValues = {
                    "id": new_id("case"),
                    "kind": kind,
                    "team_id": team_id,
                    "subject": subject,
                    "reason": reason,
                    "status": "open",
                    "created": self.clock.time(),
                }
                connection.execute(insert(cases).values(values))
                return CaseRecord(**values)
        return CaseRecord(**row)

    def get_case(self, case_id: str, team_id: str | None = None) -> CaseRecord:
        """Raises NotFound, also for another team's case."""
        query = select(cases).where(cases.c.id == case_id)
        if team_id is not None:
            query = query.where(cases.c.team_id == team_id)
        with reading(self.engine) as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            raise NotFound(f"There is no case '{case_id[:80]}'.")
        return CaseRecord(**row)

    def list_cases(self, status: str | None = "open", limit: int = 100) -> list[CaseRecord]:
        """The oldest first."""
        query = select(cases).order_by(cases.c.created, cases.c.id).limit(limit)
        if status is not None:
            query = query.where(cases.c.status == status)
        with reading(self.engine) as connection:
            return [CaseRecord(**row) for row in connection.execute(query).mappings()]

    def count_open_cases(self) -> dict[str, int]:
        """Kind -> cases that nobody has decided on."""
        query = select(cases.c.kind, func.count()).where(cases.c.status == "open")
        with reading(self.engine) as connection:
            found = connection.execute(query.group_by(cases.c.kind)).all()
        return dict.fromkeys(VERDICTS, 0) | {kind: count for kind, count in found}

    def take_case(self, reviewer: str, lease_seconds: float = LEASE_SECONDS) -> CaseRecord | None:
        """Leases the oldest free case to ``reviewer``; None = there is none."""
        now = self.clock.time()
        free = and_(
            cases.c.status == "open",
            or_(
                cases.c.held_until.is_(None),
                cases.c.held_until <= now,
                cases.c.held_by == reviewer,
            ),
        )
        lease: ColumnValues = {"held_by": reviewer, "held_until": now + lease_seconds}
        with writing(self.engine) as connection:
            while True:
                first = connection.execute(
                    select(cases.c.id).where(free).order_by(cases.c.created, cases.c.id).limit(1)
                ).scalar_one_or_none()
                if first is None:
                    return None
                taken = connection.execute(
                    update(cases).where(and_(cases.c.id == first, free)).values(lease)
                )
                if taken.rowcount:
                    break
        return self.get_case(first)

    def decide_case(
        self,
        case_id: str,
        reviewer: str,
        verdict: str,
        note: str,
        and_then: Callable[[Connection], None] | None = None,
    ) -> CaseRecord:
        """Ends a case that ``reviewer`` has leased.

        Args:
            and_then: what follows from it, in the same transaction.

        Raises:
            NotFound: there is no such case.
            Conflict: it is decided already, leased to another reviewer, or cannot end so.
        """
        case = self.get_case(case_id)
        if verdict not in VERDICTS[case.kind]:
            raise Conflict(
                f"A case of the kind {case.kind} ends as {' or '.join(VERDICTS[case.kind])}, "
                f"not as {verdict!r}.",
                code="case_conflict",
                param="verdict",
            )
        now = self.clock.time()
        mine = and_(
            cases.c.id == case_id,
            cases.c.status == "open",
            cases.c.held_by == reviewer,
            cases.c.held_until > now,
        )
        with writing(self.engine) as connection:
            done = connection.execute(
                update(cases).where(mine).values(status=verdict, note=note, decided=now)
            )
            if done.rowcount and and_then is not None:
                and_then(connection)
        if not done.rowcount:
            case = self.get_case(case_id)
            if case.status != "open":
                raise Conflict(
                    f"The case '{case_id}' is {case.status} already.", code="case_conflict"
                )
            raise Conflict(
                f"The case '{case_id}' is not held by {reviewer} (any more): take it first.",
                code="case_conflict",
            )
        return self.get_case(case_id)
