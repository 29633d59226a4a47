"""Heads of audit logs, as their writers hand them over and the gateway signs them."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import func, insert, select, update
from sqlalchemy.exc import IntegrityError

from calotype.moderation.records.heads import Head, SignedHead
from calotype.serving.core.errors import PermissionDenied
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import Repository
from calotype.serving.database.review.reviewer_audit import PEOPLE_LOG
from calotype.serving.database.schema.review_tables import audit_heads, people_log

_PAGE = 500


class AuditHeads(Repository):
    """One row for each head; none is ever changed once it is signed, or deleted."""

    def note(self, head: Head, model: str | None = None) -> None:
        """Keeps a head until it is signed; one of the same length stays as it is.

        Args:
            model: whose moderators hand it over; None = the service's own process.

        Raises:
            PermissionDenied: the log is another model's.
        """
        row = {"log": head.log, "lines": head.lines, "hash": head.hash, "time": head.time}
        mine = select(audit_heads.c.model).where(audit_heads.c.log == head.log).limit(1)
        try:
            with writing(self.engine, durable=True) as connection:
                first = connection.execute(mine).first()
                if first is not None and first.model != model:
                    raise PermissionDenied(f"The log {head.log[:80]!r} is another model's.")
                connection.execute(insert(audit_heads).values(row | {"model": model}))
        except IntegrityError:
            return

    def note_people_log(self) -> None:
        """Keeps the head of the log of what reviewers did, if there is anything new in it."""
        newest = select(people_log.c.number, people_log.c.hash, people_log.c.time)
        with reading(self.engine) as connection:
            last = connection.execute(newest.order_by(people_log.c.number.desc()).limit(1)).first()
            mine = select(func.max(audit_heads.c.lines)).where(audit_heads.c.log == PEOPLE_LOG)
            known = connection.execute(mine).scalar_one_or_none() or 0
        if last is not None and last.number > known:
            self.note(Head(PEOPLE_LOG, last.number, last.hash, last.time))

    def unsigned(self, limit: int = _PAGE) -> list[Head]:
        query = select(audit_heads).where(audit_heads.c.signature.is_(None))
        order = query.order_by(audit_heads.c.log, audit_heads.c.lines).limit(limit)
        with reading(self.engine) as connection:
            return [
                Head(row["log"], row["lines"], row["hash"], row["time"])
                for row in connection.execute(order).mappings()
            ]

    def record(self, signed: SignedHead) -> None:
        """Writes down a signature. A head that is signed already keeps its own."""
        head = signed.head
        mine = (audit_heads.c.log == head.log, audit_heads.c.lines == head.lines)
        with writing(self.engine, durable=True) as connection:
            connection.execute(
                update(audit_heads)
                .where(*mine, audit_heads.c.signature.is_(None))
                .values(signature=signed.signature, key=signed.key)
            )

    def signed(self) -> Iterator[SignedHead]:
        """Every signed head, log after log."""
        log, lines = "", 0
        while True:
            later = (audit_heads.c.log > log) | (
                (audit_heads.c.log == log) & (audit_heads.c.lines > lines)
            )
            query = select(audit_heads).where(audit_heads.c.signature.is_not(None), later)
            order = query.order_by(audit_heads.c.log, audit_heads.c.lines).limit(_PAGE)
            with reading(self.engine) as connection:
                rows = connection.execute(order).mappings().all()
            for row in rows:
                log, lines = row["log"], row["lines"]
                head = Head(log, lines, row["hash"], row["time"])
                yield SignedHead(head, row["signature"], row["key"])
            if len(rows) < _PAGE:
                return
