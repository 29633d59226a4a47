"""The log of what people do: chained, on both databases, whoever writes at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import delete, update

from calotype.moderation.errors import AuditError
from calotype.serving.database.database import Database
from calotype.serving.database.schema.review_tables import people_log


@pytest.fixture
def database(new_database: Callable[[], str]) -> Iterator[Database]:
    database = Database.open(new_database())
    yield database
    database.close()


def test_writers_at_the_same_time_make_one_chain(database: Database) -> None:
    with ThreadPoolExecutor(8) as pool:
        seals = list(
            pool.map(
                lambda n: database.reviewer_audit.record_action("key_1", "seen", f"case_{n}"),
                range(24),
            )
        )
    found = list(database.reviewer_audit.actions())
    assert [row["number"] for row in found] == list(range(1, 25))
    assert {row["hash"] for row in found} == set(seals)
    assert {row["subject"] for row in found} == {f"case_{n}" for n in range(24)}


def test_a_changed_or_missing_row_is_named(database: Database) -> None:
    for n in range(4):
        database.reviewer_audit.record_action(
            "key_1", "picture.revealed", f"case_{n}", {"asset_id": "a", "n": n / 3}
        )
    assert len(list(database.reviewer_audit.actions())) == 4
    with database.engine.begin() as connection:
        connection.execute(update(people_log).where(people_log.c.number == 3).values(actor="key_2"))
    with pytest.raises(AuditError, match="row 3"):
        list(database.reviewer_audit.actions())
    with database.engine.begin() as connection:
        connection.execute(delete(people_log).where(people_log.c.number == 2))
    with pytest.raises(AuditError, match="row 2"):
        list(database.reviewer_audit.actions())
