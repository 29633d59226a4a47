"""Cases for people: appeals, reports of misuse, held images, with a queue and a lease.

A case is open, leased to one reviewer for a while, and then decided once. A reviewer who goes away
loses the case to the next one. Nobody decides about requests and images of the own team.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection, and_, func, insert, or_, select, update

from calotype.serving.core.errors import Conflict, NotFound, PermissionDenied, QuotaExceeded
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import ColumnValues, Repository, upsert
from calotype.serving.database.review.reviewer_audit import append_action
from calotype.serving.database.schema.review_tables import cases, refusals
from calotype.serving.database.schema.tables import assets, teams
from calotype.serving.jobs.endings import Ending
from calotype.serving.jobs.records import new_id

VERDICTS = {
    "appeal": ("upheld", "overturned"),
    "report": ("dismissed", "taken_down"),
    "review": ("approved", "rejected"),
}
"""How a case of a kind may end."""
LEASE_SECONDS = 1800.0
MOST_OPEN = 50
"""Appeals, and reports, that one team may have open at once."""


@dataclass(frozen=True, slots=True)
class Reviewer:
    """Who decides."""

    key_id: str
    team_id: str


@dataclass(frozen=True, slots=True)
class CaseRecord:
    """A row of the table ``cases``."""

    id: str
    kind: str
    team_id: str
    subject: str
    """The decision that is appealed against, the asset that is reported, or that waits for it."""
    owner_team_id: str | None
    """Whose request or image it is about; None = unknown, because the image was gone."""
    reason: str
    status: str
    created: float
    held_by: str | None = None
    held_until: float | None = None
    note: str | None = None
    decided: float | None = None


def add_refusals(
    connection: Connection, team_id: str, job_id: str, ending: Ending, now: float
) -> None:
    """Notes the decisions for which a job's team does not get what it asked for."""
    told = ending.error.details.get("moderation", {}) if ending.error is not None else {}
    found = {told.get("decision_id")}
    if ending.moderation is not None:
        decisions = (ending.moderation.input, *ending.moderation.output)
        found |= {d.id for d in decisions if d is not None and d.blocked}
    names = {str(name) for name in found if name is not None}
    for name in sorted(names):
        row: ColumnValues = {
            "team_id": team_id,
            "decision_id": name,
            "job_id": job_id,
            "created": now,
        }
        upsert(connection, refusals, row, ["team_id", "decision_id"])


def check_reviewer(case: CaseRecord, reviewer: Reviewer) -> None:
    """Raises PermissionDenied: the case is about a request or an image of the reviewer's team."""
    if case.owner_team_id == reviewer.team_id:
        raise PermissionDenied(
            f"The case '{case.id}' is about your own team: a reviewer with a key of another team "
            "must decide it.",
            code="own_team",
        )


class Cases(Repository):
    """Appeals, reports and reviews, with a lease for the reviewer."""

    def open_appeal(self, team_id: str, decision_id: str, reason: str) -> CaseRecord:
        """The team's case about a decision that refused something of it.

        Raises:
            NotFound: no such decision refused anything of the team.
            QuotaExceeded: too many of its appeals are open.
        """
        refused = select(refusals.c.decision_id).where(
            refusals.c.team_id == team_id, refusals.c.decision_id == decision_id
        )
        with writing(self.engine, durable=True) as connection:
            if connection.execute(refused).first() is None:
                raise NotFound(
                    f"No decision '{decision_id[:80]}' refused a request of your team; send the "
                    "error.moderation.decision_id of a refusal.",
                    param="decision_id",
                )
            return self._open(connection, "appeal", team_id, decision_id, reason, team_id)

    def open_report(self, team_id: str, asset_id: str, reason: str) -> CaseRecord:
        """The team's case about an image, whoever drew it.

        Raises:
            NotFound: there is no such image.
            QuotaExceeded: too many of its reports are open.
        """
        owner = select(assets.c.team_id).where(assets.c.id == asset_id)
        with writing(self.engine, durable=True) as connection:
            owner_id = connection.execute(owner).scalar_one_or_none()
            if owner_id is None:
                raise NotFound(f"There is no asset '{asset_id[:80]}'.", param="asset_id")
            return self._open(connection, "report", team_id, asset_id, reason, owner_id)

    def _open(
        self,
        connection: Connection,
        kind: str,
        team_id: str,
        subject: str,
        reason: str,
        owner_id: str,
    ) -> CaseRecord:
        """A new case, or the one that the team has about the same thing already."""
        # The team's row is locked, so that two requests at once count one after the other.
        connection.execute(select(teams.c.id).where(teams.c.id == team_id).with_for_update())
        mine = and_(cases.c.kind == kind, cases.c.team_id == team_id)
        row = connection.execute(select(cases).where(mine, cases.c.subject == subject)).mappings()
        if (found := row.first()) is not None:
            return CaseRecord(**found)
        waiting = select(func.count()).select_from(cases).where(mine, cases.c.status == "open")
        if connection.execute(waiting).scalar_one() >= MOST_OPEN:
            raise QuotaExceeded(
                f"Your team has {MOST_OPEN} open {kind}s; send more once some are answered.",
                code="too_many_open_cases",
                retry_after=3600,
            )
        values: ColumnValues = {
            "id": new_id("case"),
            "kind": kind,
            "team_id": team_id,
            "subject": subject,
            "owner_team_id": owner_id,
            "reason": reason,
            "status": "open",
            "created": self.clock.time(),
        }
        connection.execute(insert(cases).values(values))
        return CaseRecord(**values)

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

    def take_case(
        self, reviewer: Reviewer, lease_seconds: float = LEASE_SECONDS
    ) -> CaseRecord | None:
        """Leases the oldest free case that is not about the reviewer's team; None = none is."""
        now = self.clock.time()
        free = and_(
            cases.c.status == "open",
            or_(cases.c.owner_team_id.is_(None), cases.c.owner_team_id != reviewer.team_id),
            or_(
                cases.c.held_until.is_(None),
                cases.c.held_until <= now,
                cases.c.held_by == reviewer.key_id,
            ),
        )
        lease: ColumnValues = {"held_by": reviewer.key_id, "held_until": now + lease_seconds}
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
        reviewer: Reviewer,
        verdict: str,
        note: str,
        and_then: Callable[[Connection], None] | None = None,
    ) -> CaseRecord:
        """Ends a case that ``reviewer`` has leased, and writes down who did, in one transaction.

        Args:
            and_then: what follows from it, in the same transaction.

        Raises:
            NotFound: there is no such case.
            PermissionDenied: it is about the reviewer's own team.
            Conflict: it is decided already, leased to another reviewer, or cannot end so.
        """
        case = self.get_case(case_id)
        check_reviewer(case, reviewer)
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
            cases.c.held_by == reviewer.key_id,
            cases.c.held_until > now,
        )
        with writing(self.engine, durable=True) as connection:
            done = connection.execute(
                update(cases).where(mine).values(status=verdict, note=note, decided=now)
            )
            if done.rowcount:
                if and_then is not None:
                    and_then(connection)
                details = {"verdict": verdict}
                append_action(connection, now, reviewer.key_id, "case.decided", case_id, details)
        if not done.rowcount:
            case = self.get_case(case_id)
            if case.status != "open":
                raise Conflict(
                    f"The case '{case_id}' is {case.status} already.", code="case_conflict"
                )
            raise Conflict(
                f"The case '{case_id}' is not held by {reviewer.key_id} (any more): take it first.",
                code="case_conflict",
            )
        return self.get_case(case_id)
