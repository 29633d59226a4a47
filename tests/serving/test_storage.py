"""Blobs are whole or absent, and stay inside their folder."""

from __future__ import annotations

import errno
import os
import pathlib

import pytest

from calotype.serving.errors import InvalidRequest, NotFound, StorageFailed
from calotype.serving.protocols import BlobStore
from calotype.serving.storage import FolderBlobStore
from calotype.serving.testing import MemoryBlobStore


@pytest.fixture(params=["folder", "memory"])
def blobs(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> BlobStore:
    return FolderBlobStore(tmp_path / "blobs") if request.param == "folder" else MemoryBlobStore()


def test_what_was_put_is_got_until_it_is_deleted(blobs: BlobStore) -> None:
    blobs.put("2026/11/asset_1.png", b"one")
    blobs.put("2026/11/asset_1.png", b"two")
    assert blobs.get("2026/11/asset_1.png") == b"two"
    blobs.delete("2026/11/asset_1.png")
    blobs.delete("2026/11/asset_1.png")
    with pytest.raises(NotFound):
        blobs.get("2026/11/asset_1.png")


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", ".hidden", "a/.part", "a\0b", "a\\b",
     "a b", "ü", "x" * 513],
)  # fmt: skip
def test_a_key_that_leads_elsewhere_is_refused(blobs: BlobStore, key: str) -> None:
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
