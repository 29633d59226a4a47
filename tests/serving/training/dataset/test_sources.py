"""Archives and buckets hold what a folder holds; what is malicious in them is refused."""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import shutil
import tarfile
import zipfile
from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer
from samples.training_pictures import RIGHTS, encoded, photo

from calotype.moderation.moderator import Moderator
from calotype.serving.core.errors import DatasetRefused, InvalidRequest, NotFound
from calotype.serving.training.dataset.captions import Wording
from calotype.serving.training.dataset.opening import open_source
from calotype.serving.training.dataset.preparation import Options, prepare
from calotype.serving.training.dataset.report import DatasetReport
from calotype.serving.training.dataset.sources import Limits

SMALL = Options(resolution=96, wording=Wording(trigger="zorbl"))


@pytest.fixture
def few(tmp_path: pathlib.Path) -> pathlib.Path:
    """Six pictures."""
    folder = tmp_path / "few"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.png").write_bytes(encoded(photo(number)))
        (folder / f"{number}.txt").write_text("a [trigger]")
    (folder / "rights.json").write_text(json.dumps(RIGHTS))
    return folder


def report_of(place: str | pathlib.Path, screen: Moderator) -> DatasetReport:
    with open_source(place) as source:
        prepared = prepare(source, SMALL, screen=screen)
        assert len(list(prepared.samples("all"))) == len(prepared.report.used)
        return prepared.report


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar", "bztar", "xztar"])
@pytest.mark.parametrize("inside", [None, "few"])
def test_an_archive_holds_what_the_folder_holds(
    few: pathlib.Path, screen: Moderator, tmp_path: pathlib.Path, kind: str, inside: str | None
) -> None:
    root = few if inside is None else few.parent
    made = shutil.make_archive(str(tmp_path / "set"), kind, root, inside)
    report = report_of(pathlib.Path(made), screen)
    assert report.problems == ()
    assert report.digest == report_of(few, screen).digest


def test_a_webdataset_shard_has_its_captions_in_json(
    few: pathlib.Path, screen: Moderator, tmp_path: pathlib.Path
) -> None:
    shard = tmp_path / "000000.tar"
    with tarfile.open(shard, "w") as tar:
        for number in range(6):
            said = json.dumps({"text": f"sample {number}", "rights": RIGHTS}).encode()
            for name, data in (
                (f"{number:06}.png", (few / f"{number}.png").read_bytes()),
                (f"{number:06}.json", said),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    report = report_of(shard, screen)
    assert report.problems == ()
    assert [one.caption for one in report.used][:2] == ["zorbl, sample 0", "zorbl, sample 1"]


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: pathlib.Path) -> None:
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        zeros = bytes(10 * 2**20)
        for number in range(10):
            archive.writestr(f"{number}.png", zeros)
    assert bomb.stat().st_size < 2**18
    with pytest.raises(DatasetRefused, match="200 times its size") as refused:
        open_source(bomb)
    assert (refused.value.code, refused.value.param) == ("archive_unsafe", "bomb.zip")
    tarred = tmp_path / "bomb.tar.gz"
    with tarfile.open(tarred, "w:gz") as tar:
        member = tarfile.TarInfo("0.png")
        member.size = 100 * 2**20
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(DatasetRefused, match="200 times its size"):
        open_source(tarred)


def test_a_zip_whose_sizes_lie_is_not_believed(
    few: pathlib.Path, screen: Moderator, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "lies.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(few.iterdir()):
            archive.write(file, file.name)
        archive.writestr("6.png", bytes(2**20))
    data = path.read_bytes()
    lied = data.replace((2**20).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    assert lied != data
    path.write_bytes(lied)
    report = report_of(path, screen)
    assert [(one.file, one.code) for one in report.refused] == [("6.png", "image_unreadable")]
    assert len(report.used) == 6


@pytest.mark.parametrize("name", ["../out.png", "/etc/out.png", "a/../../out.png", "C:\\out.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_path_that_leads_out_is_refused(tmp_path: pathlib.Path, name: str, kind: str) -> None:
    path, data = tmp_path / f"escape.{kind}", encoded(photo(0))
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, data)
    else:
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(DatasetRefused, match="leads out of the archive") as refused:
        open_source(path)
    assert (refused.value.code, refused.value.param) == ("archive_unsafe", name)


def test_links_and_archives_inside_are_refused_one_by_one(
    few: pathlib.Path, screen: Moderator, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        for file in sorted(few.iterdir()):
            tar.add(file, file.name)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        inner = tarfile.TarInfo("more.zip")
        inner.size = 4
        tar.addfile(inner, io.BytesIO(b"PK\3\4"))
        device = tarfile.TarInfo("zero.png")
        device.type = tarfile.CHRTYPE
        tar.addfile(device)
    report = report_of(path, screen)
    assert {one.file: one.code for one in report.refused} == dict.fromkeys(
        ("link.png", "more.zip", "zero.png"), "file_refused"
    )
    assert len(report.used) == 6


@pytest.mark.parametrize("data", [b"", b"no archive at all", b"PK\3\4 cut off", b"\x1f\x8b\x08cut"])
def test_what_is_no_archive_is_named(tmp_path: pathlib.Path, data: bytes) -> None:
    path = tmp_path / "set.zip"
    path.write_bytes(data)
    with pytest.raises(DatasetRefused, match="no zip or tar archive") as refused:
        open_source(path)
    assert (refused.value.code, refused.value.param) == ("archive_unreadable", "set.zip")


def test_a_cut_off_archive_is_refused(few: pathlib.Path, tmp_path: pathlib.Path) -> None:
    whole = pathlib.Path(shutil.make_archive(str(tmp_path / "set"), "gztar", few))
    whole.write_bytes(whole.read_bytes()[:-2000])
    with pytest.raises(DatasetRefused, match="damaged"):
        open_source(whole)


def test_too_many_files_and_bytes_are_too_many(few: pathlib.Path, screen: Moderator) -> None:
    with pytest.raises(DatasetRefused, match="more than 5 files") as refused:
        open_source(few, Limits(entries=5)).entries()
    assert refused.value.code == "dataset_too_large"
    with pytest.raises(DatasetRefused, match="bytes") as refused:
        open_source(few, Limits(total_bytes=1000)).entries()
    assert refused.value.code == "dataset_too_large"
    options = Options(resolution=96, limits=Limits(pictures=5))
    with pytest.raises(DatasetRefused, match="6 pictures; at most 5"):
        prepare(open_source(few), options, screen=screen)


def test_a_place_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(InvalidRequest, match="ftp://x"):
        open_source("ftp://x/y")


@pytest.fixture
def bucket(few: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """The six pictures below ``s3://pictures/some/few/``."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=f"http://{host}:{port}")
    with contextlib.closing(client):
        client.create_bucket(Bucket="pictures")
        for file in few.iterdir():
            client.put_object(
                Bucket="pictures", Key=f"some/few/{file.name}", Body=file.read_bytes()
            )
        yield client
    server.stop()


@pytest.mark.slow
def test_a_prefix_of_a_bucket_holds_what_the_folder_holds(
    few: pathlib.Path, screen: Moderator, bucket: object
) -> None:
    with open_source("s3://pictures/some/few/") as source:
        prepared = prepare(source, SMALL, screen=screen)
        assert prepared.report.digest == report_of(few, screen).digest
        put = bucket.put_object  # type: ignore[attr-defined]
        put(Bucket="pictures", Key="some/few/3.png", Body=encoded(photo(40)))
        assert prepared[2].file == "2.png"
        with pytest.raises(DatasetRefused, match=r"3\.png has changed"):
            prepared[3]
    with pytest.raises(NotFound, match="nothing"):
        open_source("s3://pictures/elsewhere/").entries()
