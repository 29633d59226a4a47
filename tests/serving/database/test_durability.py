"""What a client was promised survives a power cut: the embedded database flushes before it tells.

The disk is played by copies: of the log as it was when it was last flushed, and of the database as
it is, which SQLite writes to only behind flushes of its own.
"""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
import threading
from collections.abc import Callable
from typing import Any

import pytest

from calotype.serving.core.errors import StorageFailed
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.jobs.endings import Ending
from calotype.serving.jobs.records import JobRecord

AddJob = Callable[..., JobRecord]


@pytest.fixture
def database(sqlite_database: str, clock: Any) -> Any:
    database = Database.connect(sqlite_database, clock)
    yield database
    database.close()


class Disk:
    """Notes what reached the disk, and can be cut off or held up."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.image = folder, folder / "after the power cut"
        self.flushes = 0
        self.broken = False
        self.open = threading.Event()
        self.open.set()
        self._fsync = os.fsync

    def fsync(self, handle: int) -> None:
        file = pathlib.Path(os.readlink(f"/proc/self/fd/{handle}"))
        if file.name == "calotype.db-wal":
            assert self.open.wait(600)
            self.flushes += 1
            if self.broken:
                raise OSError(errno.EIO, "Input/output error")
            self.image.mkdir(exist_ok=True)
            shutil.copy(file, self.image / file.name)
        self._fsync(handle)

    def after_the_power_cut(self) -> Database:
        shutil.copy(self.folder / "calotype.db", self.image)
        return Database.connect(sqlite_url(self.image))


@pytest.fixture
def disk(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk(tmp_path)
    monkeypatch.setattr(os, "fsync", disk.fsync)
    return disk


def test_an_accepted_job_and_its_end_survive_a_power_cut(
    database: Database, add_job: AddJob, disk: Disk
) -> None:
    first, second = add_job(), add_job()
    assert database.jobs.finish_job(first.id, Ending("canceled")) is not None
    _, key = database.api_keys.create(team="a")
    left = disk.after_the_power_cut()
    found = {
        job.id: job.status
        for job in (left.jobs.get_job(first.id), left.jobs.get_job(second.id))
        if job
    }
    assert found == {first.id: "canceled", second.id: "queued"}
    assert left.api_keys.find_key(key.digest) is not None
    left.close()


def test_many_at_once_share_a_flush_and_nobody_is_told_before_it(
    database: Database, add_job: AddJob, disk: Disk
) -> None:
    told: list[str] = []
    disk.open.clear()
    threads = [threading.Thread(target=lambda: told.append(add_job().id)) for _ in range(8)]
    for thread in threads:
        thread.start()
    while sum(database.jobs.count_jobs().values()) < 8:
        assert any(thread.is_alive() for thread in threads)
    assert told == []
    disk.open.set()
    for thread in threads:
        thread.join(600)
    assert len(set(told)) == 8
    assert disk.flushes <= 3, "one that had begun, and one for all who came meanwhile"


def test_a_disk_that_does_not_take_it_is_a_typed_fault(
    database: Database, add_job: AddJob, disk: Disk
) -> None:
    disk.broken = True
    with pytest.raises(StorageFailed, match="Input/output error"):
        add_job()
    disk.broken = False
    assert add_job().status == "queued"


def test_who_repeats_a_request_is_not_told_before_the_first_is_safe(
    database: Database, add_job: AddJob, disk: Disk
) -> None:
    first = add_job(idempotency="key")
    told = disk.flushes
    assert add_job(idempotency="key").id == first.id
    assert disk.flushes > told
