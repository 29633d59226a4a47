"""What people did in the safety stage's name: images seen unblurred, cases decided, takedowns.

Append-only. Every row holds the hash of the one before, as in the audit logs of the moderators
(`calotype.moderation.records.audit`), so that a row that is changed, removed or moved is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError

from calotype.moderation.errors import AuditError
from calotype.moderation.records.audit import GENESIS, line_hash
from calotype.serving.core.errors import StorageFailed
from calotype.serving.core.json_object import JsonObject
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import Repository
from calotype.serving.database.schema.tables import people_log

_TRIES = 20
_PAGE = 500


class ReviewerAudit(Repository):
    """What reviewers did, in a hash chain."""

    def record_action(
        self, actor: str, action: str, subject: str, details: Mapping[str, object] | None = None
    ) -> str:
        """Records what a reviewer did; the row's hash.

        Args:
            actor: the API key's id.
            action: ``image.revealed``, ``case.decided`` ...
            subject: what it was done to: the id of a case, an asset or a takedown.
        """
        for _ in range(_TRIES):
            try:
                with writing(self.engine) as connection:
                    newest = select(people_log.c.number, people_log.c.hash)
                    last = connection.execute(
                        newest.order_by(people_log.c.number.desc()).limit(1)
                    ).first()
                    row = {
                        "number": 1 if last is None else last.number + 1,
                        "time": round(self.clock.time(), 3),
                        "actor": actor,
                        "action": action,
                        "subject": subject,
                        "details": dict(details or {}),
                        "previous": GENESIS if last is None else last.hash,
                    }
                    sealed = line_hash(row)
                    connection.execute(insert(people_log).values(row | {"hash": sealed}))
                    return sealed
            except IntegrityError:
                continue  # another gateway wrote this number: PostgreSQL lets both read the last
        raise StorageFailed("The log of what people do cannot be written.", retry_after=1)

    def actions(self) -> Iterator[JsonObject]:
        """Every row, the oldest first, each checked against the one before.

        Raises:
            AuditError: a row was changed, removed or moved; names it.
        """
        previous, number = GENESIS, 0
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
                ):
                    raise AuditError(
                        f"people_log, row {number + 1}: the chain is broken; this row or the one "
                        "before it was changed, removed or moved."
                    )
                previous, number = claimed, row["number"]
                yield row | {"hash": claimed}
            if len(rows) < _PAGE:
                return
