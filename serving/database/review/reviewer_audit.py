"""What people did in the safety stage's name: images seen unblurred, cases decided, takedowns.

Append-only. Every row holds the hash of the one before, as in the audit logs of the moderators
(`calotype.moderation.records.audit`), so that a row that is changed, removed or moved is noticed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from sqlalchemy import Connection, insert, select, text

from calotype.moderation.errors import AuditError
from calotype.moderation.records.audit import GENESIS, line_hash
from calotype.moderation.records.heads import Head
from calotype.serving.core.json_object import JsonObject
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import Repository
from calotype.serving.database.schema.review_tables import people_log

PEOPLE_LOG = "people_log"
"""What this log is called among audit logs."""
_PAGE = 500
_POSTGRES_LOCK = 0x63616C70
"""Any number that nobody else locks: who appends waits for who appends before."""


def append_action(
    connection: Connection,
    now: float,
    actor: str,
    action: str,
    subject: str,
    details: Mapping[str, object] | None = None,
) -> str:
    """Records what a reviewer did, in the transaction in which it is done; the row's hash.

    Args:
        now: seconds since the epoch.
        actor: the API key's id.
        action: ``image.revealed``, ``case.decided`` ...
        subject: what it was done to: the id of a case, an asset or a takedown.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_POSTGRES_LOCK})"))
    newest = select(people_log.c.number, people_log.c.hash)
    last = connection.execute(newest.order_by(people_log.c.number.desc()).limit(1)).first()
    row = {
        "number": 1 if last is None else last.number + 1,
        "time": round(now, 3),
        "actor": actor,
        "action": action,
        "subject": subject,
        "details": dict(details or {}),
        "previous": GENESIS if last is None else last.hash,
    }
    sealed = line_hash(row)
    connection.execute(insert(people_log).values(row | {"hash": sealed}))
    return sealed


class ReviewerAudit(Repository):
    """What reviewers did, in a hash chain."""

    def record_action(
        self, actor: str, action: str, subject: str, details: Mapping[str, object] | None = None
    ) -> str:
        """`append_action` in a transaction of its own."""
        with writing(self.engine, durable=True) as connection:
            return append_action(connection, self.clock.time(), actor, action, subject, details)

    def actions(self, heads: Iterable[Head] = ()) -> Iterator[JsonObject]:
        """Every row, the oldest first, each checked against the one before.

        Args:
            heads: signed ones, as `moderation.records.heads.trusted` gives them.

        Raises:
            AuditError: a row was changed, removed or moved; names it.
        """
        previous, number = GENESIS, 0
        witnessed = {head.lines: head.hash for head in heads if head.log == PEOPLE_LOG}
        while True:
            page = select(people_log).where(people_log.c.number > number)
            with reading(self.engine) as connection:
                query = page.order_by(people_log.c.number).limit(_PAGE)
                rows = [dict(row) for row in connection.execute(query).mappings()]
            for row in rows:
                claimed = row.pop("hash")
                if (
                    row["number"] != number + 1
                    or row["previous"] != previous
                    or line_hash(row) != claimed
                    or witnessed.get(number + 1, claimed) != claimed
                ):
                    raise AuditError(
                        f"people_log, row {number + 1}: the chain is broken; this row or the one "
                        "before it was changed, removed or moved."
                    )
                previous, number = claimed, row["number"]
                yield row | {"hash": claimed}
            if len(rows) < _PAGE:
                break
        if number < max(witnessed, default=0):
            raise AuditError(
                f"people_log: has {number} rows, but its head was signed when it had "
                f"{max(witnessed)}; the last ones were removed."
            )
