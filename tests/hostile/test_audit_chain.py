"""Whoever writes an audit log cannot make it say something else later, and without it nothing is
decided."""

from __future__ import annotations

import errno
import json
import os
import pathlib
from collections.abc import Callable, Iterator

import pytest
from click.testing import CliRunner, Result
from servers.gateway import Service, running
from sqlalchemy import delete, select, update

from calotype.moderation.errors import AuditError
from calotype.moderation.records import audit
from calotype.moderation.records.audit import GENESIS, AuditLog, line_hash, verify
from calotype.moderation.records.heads import Head, HeadKey
from calotype.serving.api.background.head_signer import (
    HeadSigner,
    head_key,
    object_key,
    stored_heads,
)
from calotype.serving.commands.cli import cli
from calotype.serving.database.connection import sqlite_url, writing
from calotype.serving.database.database import Database
from calotype.serving.database.schema.review_tables import audit_heads, people_log
from calotype.serving.database.schema.upgrade import upgrade_database
from calotype.serving.storage import HEADS_PREFIX, open_blobs

BLOCKED = {"id": "dec_1", "stage": "input", "verdict": "BLOCK"}
NAME = "audit-one.jsonl"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A database with tables; making them takes longer than any of these tests."""
    folder = tmp_path_factory.mktemp("template")
    upgrade_database(sqlite_url(folder))
    return folder / "calotype.db"


@pytest.fixture
def data_dir(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, template: pathlib.Path
) -> pathlib.Path:
    """A log of 23 decisions, of which the first 20 are signed, and four deeds of reviewers."""
    monkeypatch.setattr(audit, "HEAD_LINES", 10)
    (tmp_path / "calotype.db").write_bytes(template.read_bytes())
    (tmp_path / "assets").mkdir()
    database = Database.connect(sqlite_url(tmp_path))
    log = AuditLog(tmp_path / "audit" / NAME, database.audit_heads.note)
    for _ in range(20):
        log.append(BLOCKED)
    log.close()
    log = AuditLog(tmp_path / "audit" / NAME)
    for _ in range(3):
        log.append(BLOCKED)
    log.close()
    for number in range(4):
        database.reviewer_audit.record_action("key_1", "case.decided", f"case_{number}")
    key = head_key(tmp_path, {}, make=True)
    assert key is not None
    signer = HeadSigner(database, open_blobs((tmp_path / "assets").as_uri()), key)
    assert signer.sign_all() == 3
    assert signer.sign_all() == 0
    database.close()
    return tmp_path


def checked(data_dir: pathlib.Path, *words: str) -> Result:
    nothing = {"CALOTYPE_DATABASE_URL": "", "CALOTYPE_BLOB_URL": "", "CALOTYPE_AUDIT_KEY": ""}
    command = ["moderation", "audit", "verify", str(data_dir / "audit"), *words]
    return CliRunner().invoke(cli, command, env=nothing)


def problem(data_dir: pathlib.Path, *words: str) -> str:
    """What the command ends with; "" = it found nothing."""
    done = checked(data_dir, *words)
    return f"{done.stderr} {done.exception}" if done.exit_code else ""


def forget_in_database(data_dir: pathlib.Path) -> None:
    """As whoever has the database's password can."""
    database = Database.connect(sqlite_url(data_dir))
    with writing(database.engine) as connection:
        connection.execute(delete(audit_heads))
    database.close()


def forget_in_store(data_dir: pathlib.Path) -> None:
    for path in (data_dir / "assets" / HEADS_PREFIX).rglob("*.json"):
        path.unlink()


def chained(entries: list[dict[str, object]]) -> str:
    """A log that is whole in itself."""
    text, previous = "", GENESIS
    for entry in entries:
        entry = {**entry, "previous": previous}
        entry.pop("hash", None)
        previous = line_hash(entry)
        text += json.dumps({**entry, "hash": previous}, sort_keys=True) + "\n"
    return text


def cut(log: pathlib.Path) -> None:
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:19]))


def empty(log: pathlib.Path) -> None:
    log.write_text("")


def remove(log: pathlib.Path) -> None:
    log.unlink()


def rewrite(log: pathlib.Path) -> None:
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    entries[4]["decision"]["verdict"] = "ALLOW"
    log.write_text(chained(entries))


def test_an_untouched_log_fits_its_signed_heads(data_dir: pathlib.Path) -> None:
    done = checked(data_dir)
    assert done.exit_code == 0, done.output
    assert "23 decisions" in done.stdout and "first 20 are as they were signed" in done.stdout
    assert "4 deeds" in done.stdout and "first 4 are as they were signed" in done.stdout


@pytest.mark.parametrize("forget", [lambda folder: None, forget_in_database, forget_in_store])
@pytest.mark.parametrize(
    ("harm", "told"),
    [(cut, "20 were cut off"), (empty, "1 to 20 were cut off"), (remove, "missing"),
     (rewrite, "written anew")],
)  # fmt: skip
def test_what_the_writer_of_a_log_does_to_it_later_is_noticed(
    data_dir: pathlib.Path,
    harm: Callable[[pathlib.Path], None],
    told: str,
    forget: Callable[[pathlib.Path], None],
) -> None:
    """Also where one of the two places of its heads was emptied, too."""
    harm(data_dir / "audit" / NAME)
    forget(data_dir)
    assert told in problem(data_dir)


def test_a_log_that_goes_on_behind_a_cut_is_noticed(data_dir: pathlib.Path) -> None:
    """A new writer of the same file, long after."""
    log = data_dir / "audit" / NAME
    cut(log)
    again = AuditLog(log)
    for _ in range(10):
        again.append(BLOCKED)
    again.close()
    assert verify(log) == 29, "whole in itself"
    assert "written anew" in problem(data_dir)


@pytest.mark.parametrize("rewritten", [False, True])
def test_the_log_of_what_reviewers_did_is_witnessed_too(
    data_dir: pathlib.Path, rewritten: bool
) -> None:
    database = Database.connect(sqlite_url(data_dir))
    with writing(database.engine) as connection:
        rows = [dict(row) for row in connection.execute(select(people_log)).mappings()]
        if rewritten:
            rows[1]["actor"], previous = "key_2", GENESIS
            for row in rows:
                row |= {"previous": previous}
                row.pop("hash")
                row["hash"] = previous = line_hash(row)
                mine = people_log.c.number == row["number"]
                connection.execute(update(people_log).where(mine).values(row))
        else:
            connection.execute(delete(people_log).where(people_log.c.number > 2))
    if not rewritten:
        assert len(list(database.reviewer_audit.actions())) == 2, "whole in itself"
    database.close()
    assert "people_log" in problem(data_dir)


def test_a_head_of_another_key_proves_nothing(data_dir: pathlib.Path) -> None:
    log = data_dir / "audit" / NAME
    rewrite(log)
    forget_in_database(data_dir)
    last = json.loads(log.read_text().splitlines()[19])
    forged = HeadKey(bytes(32)).sign(Head(NAME, 20, last["hash"], 1.0))
    blobs = open_blobs((data_dir / "assets").as_uri())
    blobs.put(object_key(forged), forged.to_bytes())
    assert "do not trust" in problem(data_dir)
    own = head_key(data_dir, {})
    assert own is not None
    lied = {**json.loads(forged.to_bytes()), "key": own.public}
    blobs.put(object_key(forged), json.dumps(lied).encode())
    assert "changed after it was signed" in problem(data_dir)


def test_a_signed_head_is_never_taken_back(data_dir: pathlib.Path) -> None:
    database = Database.connect(sqlite_url(data_dir))
    before = list(database.audit_heads.signed())
    database.audit_heads.note(Head(NAME, 20, "f" * 64, 1.0))
    key = head_key(data_dir, {})
    assert key is not None
    assert HeadSigner(database, open_blobs((data_dir / "assets").as_uri()), key).sign_all() == 0
    assert list(database.audit_heads.signed()) == before
    database.close()


def test_odd_names_of_logs_stop_no_signature(data_dir: pathlib.Path) -> None:
    """Writers name their logs; a hostile one keeps no head of others from being signed."""
    database = Database.connect(sqlite_url(data_dir))
    for number, name in enumerate(("../../x", "..", "", "a/b#c d", "\u00e9" * 200, "audit-two")):
        database.audit_heads.note(Head(name, number + 1, "f" * 64, 1.0))
    key, blobs = head_key(data_dir, {}), open_blobs((data_dir / "assets").as_uri())
    assert key is not None
    assert HeadSigner(database, blobs, key).sign_all() == 6
    assert set(stored_heads(blobs)) == set(database.audit_heads.signed())
    database.close()


def test_logs_lie_in_several_folders_and_old_ones_are_removed(data_dir: pathlib.Path) -> None:
    log, other = data_dir / "audit" / NAME, data_dir / "other"
    other.mkdir()
    log.rename(other / NAME)
    assert "missing" in problem(data_dir)
    assert problem(data_dir, str(other)) == ""
    (other / NAME).unlink()
    assert "missing" in problem(data_dir, str(other))
    assert problem(data_dir, "--since", "2099-01-01") == ""


def test_the_sweeper_leaves_heads_alone(tmp_path: pathlib.Path) -> None:
    from calotype.serving.api.background.tasks import Sweeper

    with running(tmp_path) as service:
        assert isinstance(service, Service)
        service.blobs.put(f"{HEADS_PREFIX}{NAME}/000000000010.json", b"{}")
        assert Sweeper(service.gateway()).note_orphans(service.clock.time() + 1e7) == 0
        assert service.blobs.blobs


# -- writing -------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: pathlib.Path) -> Iterator[AuditLog]:
    log = AuditLog(tmp_path / NAME)
    log.append(BLOCKED)
    yield log
    log.close()


@pytest.mark.parametrize("fault", ["write", "fsync"])
def test_a_full_disk_leaves_the_chain_whole(
    log: AuditLog, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    write = os.write

    def half(file: int, data: bytes) -> int:
        if len(data) > 60:
            return write(file, data[:60])
        raise OSError(errno.ENOSPC, "No space left on device")

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(audit.os, "write" if fault == "write" else "fsync",
                      half if fault == "write" else full)  # fmt: skip
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                log.append(BLOCKED)
        assert verify(log.path) == 1
    log.append(BLOCKED)
    assert verify(log.path) == 2


def test_two_writers_do_not_share_a_file(log: AuditLog) -> None:
    with pytest.raises(AuditError, match="another process writes"):
        AuditLog(log.path)
    log.append(BLOCKED)
    assert verify(log.path) == 2


@pytest.mark.parametrize("harm", ["written", "cut", "replaced", "removed"])
def test_nothing_is_decided_once_somebody_else_touched_the_file(log: AuditLog, harm: str) -> None:
    match harm:
        case "written":
            with log.path.open("a") as file:
                file.write(log.path.read_text())
        case "cut":
            log.path.write_text("")
        case "replaced":
            copy = log.path.with_name("copy")
            copy.write_bytes(log.path.read_bytes())
            copy.replace(log.path)
        case "removed":
            log.path.unlink()
    for _ in range(2):
        with pytest.raises(OSError):
            log.append(BLOCKED)


def test_nothing_is_decided_for_long_without_a_witness(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "HEAD_LINES", 2)
    monkeypatch.setattr(audit, "MOST_UNWITNESSED", 5)
    kept: list[Head] = []
    away = True

    def witness(head: Head) -> None:
        if away:
            raise ConnectionError("the database is away")
        kept.append(head)

    log = AuditLog(tmp_path / NAME, witness)
    for _ in range(5):
        log.append(BLOCKED)
    with pytest.raises(OSError, match="nobody keeps the heads"):
        log.append(BLOCKED)
    away = False
    log.append(BLOCKED)
    assert [head.lines for head in kept] == [5]
    log.close()
    assert [head.lines for head in kept] == [5, 6] and verify(tmp_path / NAME, kept) == 6
