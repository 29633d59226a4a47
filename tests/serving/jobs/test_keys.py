"""API keys: shown once, stored hashed, refused when wrong or revoked."""

from __future__ import annotations

import pathlib

import pytest

from calotype.serving.core.errors import InvalidRequest, Unauthenticated
from calotype.serving.database.accounts.api_keys import (
    KEY_PREFIX,
    SCOPES,
    authenticate,
    create_key,
    ensure_first_key,
    make_key,
)
from calotype.serving.database.jobs import JobStore


def database_bytes(folder: pathlib.Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.glob("calotype.db*")))


def test_keys_are_long_and_different() -> None:
    keys = {make_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith(KEY_PREFIX) and len(key) == len(KEY_PREFIX) + 43 for key in keys)


def test_a_key_opens_and_stands_nowhere_in_the_database(
    file_store: JobStore, tmp_path: pathlib.Path
) -> None:
    store = file_store
    plain, record = create_key(store, name="ci", scopes=["images"])
    found = authenticate(store, plain)
    assert found == record
    assert found.scopes == ["images"]
    secret = plain.removeprefix(KEY_PREFIX)
    stored = database_bytes(tmp_path)
    assert record.digest.encode() in stored
    assert secret.encode() not in stored
    assert secret[5:].encode() not in stored


@pytest.mark.parametrize("wrong", ["", "ct_live_", "x" * 10_000, "ct_live_\udcff", "schlüssel"])
def test_a_wrong_key_is_refused(store: JobStore, wrong: str) -> None:
    create_key(store)
    with pytest.raises(Unauthenticated):
        authenticate(store, wrong)


def test_a_revoked_key_is_refused(store: JobStore) -> None:
    plain, record = create_key(store)
    assert store.revoke_key(record.id)
    assert not store.revoke_key(record.id)
    with pytest.raises(Unauthenticated, match="revoked"):
        authenticate(store, plain)


def test_the_first_key_is_made_and_told_once(store: JobStore) -> None:
    plain = ensure_first_key(store)
    assert plain is not None
    assert authenticate(store, plain).scopes == list(SCOPES)
    assert ensure_first_key(store) is None
    assert len(store.list_keys()) == 1


def test_the_environments_key_is_taken_and_never_told(
    file_store: JobStore, tmp_path: pathlib.Path
) -> None:
    store = file_store
    given = "chosen-by-the-operator"
    assert ensure_first_key(store, given) is None
    assert ensure_first_key(store, given) is None
    authenticate(store, given)
    assert len(store.list_keys()) == 1
    assert given.encode() not in database_bytes(tmp_path)
    assert b"chosen-by" not in database_bytes(tmp_path)


def test_an_unknown_scope_or_a_short_key_is_refused(store: JobStore) -> None:
    with pytest.raises(InvalidRequest, match="Unknown scope 'pictures'"):
        create_key(store, scopes=["pictures"])
    with pytest.raises(InvalidRequest, match="has 3"):
        create_key(store, key="abc")
    create_key(store, key="long enough")
    with pytest.raises(InvalidRequest, match="exists already"):
        create_key(store, key="long enough")
