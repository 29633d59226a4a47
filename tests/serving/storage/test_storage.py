"""Blobs are whole or absent, and stay inside their folder."""

from __future__ import annotations

import errno
import hashlib
import os
import pathlib
import stat
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from moto.server import DomainDispatcherApplication, ThreadedMotoServer, create_backend_app
from werkzeug.serving import make_server

from calotype.serving.core.errors import InvalidRequest, NotFound, StorageFailed
from calotype.serving.core.protocols import PART_BYTES, ListedBlobStore
from calotype.serving.jobs.recipe import digest_of_key
from calotype.serving.storage import FolderBlobStore, new_key, open_blobs
from calotype.serving.testing.in_memory import MemoryBlobStore


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """A server that speaks S3's protocol, with the bucket `pictures`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    made = httpx.put(
        f"{endpoint}/pictures",
        headers={"authorization": "AWS4-HMAC-SHA256 Credential=key/20261123/us-east-1/s3/x"},
        timeout=600,
    )
    assert made.status_code == 200, made.text
    yield endpoint
    server.stop()


@pytest.fixture
def s3_url(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-store")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return f"s3://pictures/some/prefix?endpoint={s3_endpoint}"


@pytest.fixture(scope="module")
def gs_endpoint() -> Iterator[str]:
    """A server that speaks the protocol of Google's XML API, with the bucket `drawings`.

    Its requests and answers are those of S3; moto only wants to be told so in a header.
    """
    moto = DomainDispatcherApplication(create_backend_app)

    def as_s3(environ: dict[str, Any], start: Any) -> Any:
        assert environ.get("HTTP_AUTHORIZATION", "Bearer ").strip() == "Bearer", "a credential left"
        signed = "AWS4-HMAC-SHA256 Credential=key/20261123/us-east-1/s3/x"
        return moto(environ | {"HTTP_AUTHORIZATION": signed}, start)

    server = make_server("127.0.0.1", 0, as_s3, threaded=True)
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    endpoint = f"127.0.0.1:{server.server_port}"
    assert httpx.put(f"http://{endpoint}/drawings", timeout=600).status_code == 200
    yield endpoint
    server.shutdown()
    serving.join(600)
    server.server_close()


@pytest.fixture
def gs_url(gs_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gs_endpoint)
    return "gs://drawings/some/prefix"


@pytest.fixture(params=["folder", "memory", "s3", "gs"])
def blobs(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> ListedBlobStore:
    if request.param == "folder":
        return open_blobs((tmp_path / "blobs").as_uri())
    if request.param in ("s3", "gs"):
        return open_blobs(request.getfixturevalue(f"{request.param}_url"))
    return MemoryBlobStore()


def test_what_was_put_is_got_until_it_is_deleted(blobs: ListedBlobStore) -> None:
    blobs.put("2026/11/asset_1.png", b"one")
    blobs.put("2026/11/asset_1.png", b"two")
    assert blobs.get("2026/11/asset_1.png") == b"two"
    blobs.delete("2026/11/asset_1.png")
    blobs.delete("2026/11/asset_1.png")
    with pytest.raises(NotFound):
        blobs.get("2026/11/asset_1.png")


def test_a_file_is_written_and_read_in_parts(blobs: ListedBlobStore) -> None:
    parts = [bytes([number]) * 900_000 for number in range(12)]
    asked: list[int] = []

    def written() -> Iterator[bytes]:
        for number, part in enumerate(parts):
            asked.append(number)
            yield part

    blobs.put_parts("a/long.jsonl", written())
    assert asked == list(range(12))
    found = blobs.open("a/long.jsonl")
    read = list(found.parts)
    assert found.size == sum(map(len, parts)) and b"".join(read) == b"".join(parts)
    assert {len(part) for part in read[:-1]} == {PART_BYTES}
    blobs.put_parts("a/empty", iter(()))
    assert list(blobs.open("a/empty").parts) == []
    with pytest.raises(NotFound):
        blobs.open("a/nothing")


def test_of_a_file_that_broke_off_nothing_is_seen(blobs: ListedBlobStore) -> None:
    def broken() -> Iterator[bytes]:
        yield b"x" * 9_000_000
        raise NotFound("One of the pictures is gone.")

    with pytest.raises((NotFound, StorageFailed)):
        blobs.put_parts("a/broken", broken())
    with pytest.raises(NotFound):
        blobs.open("a/broken")
    assert "a/broken" not in dict(blobs.entries())


def test_what_a_killed_writer_left_is_not_listed(tmp_path: pathlib.Path) -> None:
    blobs = open_blobs(tmp_path.as_uri())
    blobs.put("team_1/first.png", b"1")
    (tmp_path / "team_1" / ".left.part").write_bytes(b"half")
    assert list(dict(blobs.entries())) == ["team_1/first.png"]


def test_a_blob_and_its_name_are_on_the_disk(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file before it has its name, and then the folder that holds the name."""
    done: list[str] = []
    flush, rename = os.fsync, os.replace

    def fsync(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        flush(handle)

    def replace(old: str, new: str) -> None:
        done.append("name")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    open_blobs(tmp_path.as_uri()).put("first.png", b"1")
    assert done == ["file", "name", "folder"]


def test_every_blob_is_listed_with_its_time(blobs: ListedBlobStore) -> None:
    begun = time.time() - 60  # stores have clocks of their own
    blobs.put("team_1/ab/first.png", b"1")
    blobs.put("team_2/second.png", b"2")
    listed = dict(blobs.entries())
    assert {"team_1/ab/first.png", "team_2/second.png"} <= set(listed)
    assert all(begun <= moment <= time.time() + 60 for moment in listed.values())
    blobs.delete("team_2/second.png")
    assert "team_2/second.png" not in dict(blobs.entries())


def test_no_key_is_given_out_twice() -> None:
    keys = {new_key("team_1", b"x", "png") for _ in range(100)}
    assert len(keys) == 100
    assert {digest_of_key(key) for key in keys} == {hashlib.sha256(b"x").hexdigest()}


def test_a_bucket_that_is_not_there_or_a_store_that_is_away_is_a_typed_error(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = open_blobs(s3_url.replace("pictures", "nosuchbucket"))
    for call in (lambda: missing.put("a", b""), lambda: list(missing.entries())):
        with pytest.raises(StorageFailed) as caught:
            call()
        assert "nosuchbucket" in str(caught.value) and "secret-of-the-store" not in str(
            caught.value
        )
    away = open_blobs("s3://pictures/p?endpoint=http://127.0.0.1:1&region=us-east-1")
    with pytest.raises(StorageFailed, match="could not be read"):
        away.get("a")


@pytest.mark.parametrize(
    "url",
    ["", "nonsense", "http://example.com/x", "file://otherhost/x", "file:///", "s3://",
     "s3://bucket/x?colour=red", "s3://key:secret@bucket/x"],
)  # fmt: skip
def test_a_place_that_is_none_is_refused_by_name(url: str) -> None:
    with pytest.raises(InvalidRequest, match="blob URL") as caught:
        open_blobs(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", ".hidden", "a/.part", "a\0b", "a\\b",
     "a b", "ü", "x" * 513],
)  # fmt: skip
def test_a_key_that_leads_elsewhere_is_refused(blobs: ListedBlobStore, key: str) -> None:
    for call in (lambda: blobs.put(key, b""), lambda: blobs.get(key), lambda: blobs.delete(key)):
        with pytest.raises(InvalidRequest, match="blob key"):
            call()


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_fault_of_the_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, fault: int, call: str
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(fault, os.strerror(fault))

    blobs = FolderBlobStore(tmp_path)
    blobs.put("a/old", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StorageFailed, match=os.strerror(fault)) as caught:
            blobs.put("a/old", b"new")
    assert str(caught.value).count(".") >= 1 and "\n" not in str(caught.value)
    assert blobs.get("a/old") == b"old"
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["old"]


def test_a_really_full_disk_is_a_typed_error() -> None:
    full = pathlib.Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(StorageFailed):
        FolderBlobStore(full).put("a", b"x")


def test_a_folder_in_place_of_a_file_is_not_found(tmp_path: pathlib.Path) -> None:
    blobs = FolderBlobStore(tmp_path)
    blobs.put("a/b", b"x")
    for key in ("a", "a/b/c"):
        with pytest.raises(NotFound):
            blobs.get(key)
