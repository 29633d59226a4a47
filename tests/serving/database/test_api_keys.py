"""API keys: shown once, stored hashed, refused when wrong or revoked."""

from __future__ import annotations

import pathlib

import pytest

from calotype.serving.core.errors import InvalidRequest, Unauthenticated
from calotype.serving.database.accounts.api_keys import (
    KEY_PREFIX,
    SCOPES,
    make_key,
)
from calotype.serving.database.database import Database


def database_bytes(folder: pathlib.Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.glob("calotype.db*")))


def test_keys_are_long_and_different() -> None:
    keys = {make_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith(KEY_PREFIX) and len(key) == len(KEY_PREFIX) + 43 for key in keys)


def test_a_key_opens_and_stands_nowhere_in_the_database(
    file_database: Database, tmp_path: pathlib.Path
) -> None:
    database = file_database
    plain, record = database.api_keys.create(name="ci", scopes=["images"])
    found = database.api_keys.authenticate(plain)
    assert found == record
    assert found.scopes == ["images"]
    secret = plain.removeprefix(KEY_PREFIX)
    stored = database_bytes(tmp_path)
    assert record.digest.encode() in stored
    assert secret.encode() not in stored
    assert secret[5:].encode() not in stored


@pytest.mark.parametrize("wrong", ["", "ct_live_", "x" * 10_000, "ct_live_\udcff", "schlüssel"])
def test_a_wrong_key_is_refused(database: Database, wrong: str) -> None:
    database.api_keys.create()
    with pytest.raises(Unauthenticated):
        database.api_keys.authenticate(wrong)


def test_a_revoked_key_is_refused(database: Database) -> None:
    plain, record = database.api_keys.create()
    assert database.api_keys.revoke_key(record.id)
    assert not database.api_keys.revoke_key(record.id)
    with pytest.raises(Unauthenticated, match="revoked"):
        database.api_keys.authenticate(plain)


def test_the_first_key_is_made_and_told_once(database: Database) -> None:
    plain = database.api_keys.ensure_first()
    assert plain is not None
    assert database.api_keys.authenticate(plain).scopes == list(SCOPES)
    assert database.api_keys.ensure_first() is None
    assert len(database.api_keys.list_keys()) == 1


def test_the_environments_key_is_taken_and_never_told(
    file_database: Database, tmp_path: pathlib.Path
) -> None:
    database = file_database
    given = "chosen-by-the-operator"
    assert database.api_keys.ensure_first(given) is None
    assert database.api_keys.ensure_first(given) is None
    database.api_keys.authenticate(given)
    assert len(database.api_keys.list_keys()) == 1
    assert given.encode() not in database_bytes(tmp_path)
    assert b"chosen-by" not in database_bytes(tmp_path)


def test_an_unknown_scope_or_a_short_key_is_refused(database: Database) -> None:
    with pytest.raises(InvalidRequest, match="Unknown scope 'pictures'"):
        database.api_keys.create(scopes=["pictures"])
    with pytest.raises(InvalidRequest, match="has 3"):
        database.api_keys.create(key="abc")
    database.api_keys.create(key="long enough")
    with pytest.raises(InvalidRequest, match="exists already"):
        database.api_keys.create(key="long enough")
