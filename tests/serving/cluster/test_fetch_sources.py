"""Weights from web servers, buckets, volumes and archives."""

from __future__ import annotations

import hashlib
import io
import os
import pathlib
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from pydantic import ValidationError

from calotype.serving.weights.fetch import run_order
from calotype.serving.weights.sources import BUILT_IN
from calotype.serving.wire.fetch_faults import FetchFailed
from calotype.serving.wire.fetch_order import FetchOrder

pytestmark = pytest.mark.slow

Orders = Callable[..., FetchOrder]
Web = Any
"""conftest.Web"""
WEIGHTS = (BUILT_IN / "stripes.safetensors").read_bytes()
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()


def quiet(sentence: str) -> None:
    """Nobody listens."""


def refused(order: FetchOrder) -> FetchFailed:
    with pytest.raises(FetchFailed) as caught:
        run_order(order, quiet)
    return caught.value


def model_files() -> dict[str, bytes]:
    folder = BUILT_IN / "shapes"
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def model_order(order: Orders, source: dict[str, Any], **fields: Any) -> FetchOrder:
    return order(**{"kind": "model", "model": None, "maxBytes": None, "source": source} | fields)


# -- web servers ---------------------------------------------------------------------------------


def test_a_pinned_file_of_a_web_server_is_named_by_its_digest(web: Web, order: Orders) -> None:
    web.files["/loras/a b.safetensors"] = WEIGHTS
    source = {"http": {"url": f"{web.url}/loras/a%20b.safetensors?key=1", "sha256": DIGEST}}
    found = run_order(order(source=source), quiet)
    assert (found.revision, found.sha256) == (DIGEST, DIGEST)
    assert found.path.name == "a-b.safetensors"
    assert run_order(order(source=source), quiet) == found
    assert len(web.seen) == 1, "what is pinned and there is not asked for again"


def test_an_unpinned_file_is_reported_and_follows_its_server(web: Web, order: Orders) -> None:
    web.files["/a.safetensors"] = WEIGHTS
    source = {"http": {"url": f"{web.url}/a.safetensors"}}
    assert run_order(order(source=source), quiet).revision == DIGEST
    assert refused(order(source=source, sha256="0" * 64)).code == "ChecksumMismatch"


@pytest.mark.parametrize(("ranges", "etags"), [(True, True), (False, True), (True, False)])
def test_a_server_that_breaks_off_is_asked_for_the_rest_or_for_all(
    web: Web, order: Orders, ranges: bool, etags: bool
) -> None:
    web.files["/a.safetensors"] = WEIGHTS
    web.ranges, web.etags, web.cut_after = ranges, etags, [1000]
    found = run_order(order(source={"http": {"url": f"{web.url}/a.safetensors"}}), quiet)
    assert found.path.read_bytes() == WEIGHTS
    _, second = web.requests("/a.safetensors")
    assert second.get("range") == ("bytes=1000-" if etags else None)
    assert ("if-range" in second) == etags


def test_a_body_without_an_end_is_cut_at_the_limit(web: Web, order: Orders) -> None:
    web.files["/a.safetensors"] = b"\0" * 300_000
    wanted = order(source={"http": {"url": f"{web.url}/a.safetensors"}}, maxBytes=100_000)
    assert refused(wanted).code == "TooLarge"
    assert not list(wanted.folder.rglob("*.part"))


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, "CredentialsRejected"),
        (403, "CredentialsRejected"),
        (404, "NotFound"),
        (410, "NotFound"),
        (418, "FetchFailed"),
        (503, "Unreachable"),
    ],
)
def test_what_a_server_refuses_has_a_word_for_it(
    web: Web, order: Orders, status: int, reason: str
) -> None:
    web.failing["/a.safetensors"] = status
    error = refused(order(source={"http": {"url": f"{web.url}/a.safetensors?token=secret"}}))
    assert error.code == reason
    assert "secret" not in error.message


def test_a_server_that_is_not_there_is_unreachable(order: Orders) -> None:
    error = refused(order(source={"http": {"url": "http://127.0.0.1:9/a.safetensors"}}))
    assert error.code == "Unreachable"


def test_redirects_end_somewhere(web: Web, order: Orders) -> None:
    web.files["/a.safetensors"] = WEIGHTS
    web.moved = web.url
    error = refused(order(source={"http": {"url": f"{web.url}/a.safetensors"}}))
    assert (error.code, len(web.seen)) == ("FetchFailed", 6)


def test_the_authorization_of_the_secret_is_sent(
    web: Web, order: Orders, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.files["/a.safetensors"], web.token = WEIGHTS, "house"
    source = {"http": {"url": f"{web.url}/a.safetensors"}}
    assert refused(order(source=source)).code == "CredentialsRejected"
    monkeypatch.setenv("HTTP_AUTHORIZATION", "Bearer house")
    assert run_order(order(source=source), quiet).sha256 == DIGEST


# -- archives ------------------------------------------------------------------------------------


def packed(entries: dict[str, bytes], *links: tarfile.TarInfo) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for link in links:
            tar.addfile(link)
    return file.getvalue()


@pytest.mark.parametrize("prefix", ["", "./", "flux/", "./flux/"])
def test_a_model_comes_out_of_an_archive(web: Web, order: Orders, prefix: str) -> None:
    web.files["/flux.tar.gz"] = packed({f"{prefix}{n}": c for n, c in model_files().items()})
    found = run_order(model_order(order, {"http": {"url": f"{web.url}/flux.tar.gz"}}), quiet)
    names = {str(p.relative_to(found.path)) for p in found.path.rglob("*") if p.is_file()}
    assert names - {".fetched.json"} == set(model_files())
    assert found.revision == hashlib.sha256(web.files["/flux.tar.gz"]).hexdigest()


def test_an_archive_writes_nothing_outside_and_nothing_unknown(
    web: Web, order: Orders, tmp_path: pathlib.Path
) -> None:
    link = tarfile.TarInfo("vae/link.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    bad = {"../../evil.json": b"{}", "/evil.json": b"{}", "transformer/run.py": b"code"}
    web.files["/flux.tar"] = packed(model_files() | bad, link)
    found = run_order(model_order(order, {"http": {"url": f"{web.url}/flux.tar"}}), quiet)
    names = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert not names & {"evil.json", "run.py", "link.json"}
    assert found.path.is_relative_to(tmp_path / "cache")


def test_an_archive_that_swells_is_stopped(web: Web, order: Orders) -> None:
    bomb = model_files() | {"transformer/big.safetensors": b"\0" * 50_000_000}
    web.files["/flux.tar"] = packed(bomb)
    wanted = model_order(order, {"http": {"url": f"{web.url}/flux.tar"}}, maxBytes=20_000_000)
    assert len(web.files["/flux.tar"]) < 20_000_000
    assert refused(wanted).code == "TooLarge"
    assert [path.name for path in wanted.folder.iterdir()] == [".lock"]


def test_what_is_no_archive_is_refused(web: Web, order: Orders) -> None:
    web.files["/flux.tar"] = b"<html>not found</html>" * 100
    wanted = model_order(order, {"http": {"url": f"{web.url}/flux.tar"}})
    assert refused(wanted).code == "SourceInvalid"
    web.files["/flux.tar"] = packed({"readme.md": b"hello"})
    assert refused(wanted).code == "ModelIncomplete"


# -- buckets -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """An S3 server that checks who asks, and its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(moto: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of a bucket named models; its credentials are those of the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    client = boto3.client("s3", endpoint_url=moto, region_name="us-east-1")
    client.create_bucket(Bucket="models")
    yield client
    for found in client.list_objects_v2(Bucket="models").get("Contents", []):
        client.delete_object(Bucket="models", Key=found["Key"])
    client.delete_bucket(Bucket="models")


def s3(moto: str, uri: str) -> dict[str, Any]:
    return {"s3": {"uri": uri, "endpoint": moto}}


def test_an_object_is_fetched_and_named_by_its_version(
    moto: str, bucket: Any, order: Orders
) -> None:
    bucket.put_object(Bucket="models", Key="loras/a.safetensors", Body=WEIGHTS)
    wanted = order(source=s3(moto, "s3://models/loras/a.safetensors"))
    first = run_order(wanted, quiet)
    assert first.path.read_bytes() == WEIGHTS
    assert run_order(wanted, quiet) == first
    pinned = wanted.model_copy(update={"sha256": "0" * 64})
    assert refused(pinned).code == "ChecksumMismatch"
    changed = bytearray(WEIGHTS)
    changed[-1] ^= 1
    bucket.put_object(Bucket="models", Key="loras/a.safetensors", Body=bytes(changed))
    second = run_order(wanted, quiet)
    assert second.revision != first.revision
    assert (first.path.read_bytes(), second.path.read_bytes()) == (WEIGHTS, bytes(changed))


def test_a_prefix_holds_one_adapter_or_a_model(moto: str, bucket: Any, order: Orders) -> None:
    bucket.put_object(Bucket="models", Key="one/a.safetensors", Body=WEIGHTS)
    bucket.put_object(Bucket="models", Key="one/README.md", Body=b"x")
    assert run_order(order(source=s3(moto, "s3://models/one/")), quiet).sha256 == DIGEST
    for name, content in model_files().items():
        bucket.put_object(Bucket="models", Key=f"flux/{name}", Body=content)
    found = run_order(model_order(order, s3(moto, "s3://models/flux")), quiet)
    assert (found.path / "model_index.json").is_file()


@pytest.mark.parametrize("uri", ["s3://models/none/", "s3://models/none.safetensors"])
def test_an_empty_place_is_not_found(moto: str, bucket: Any, order: Orders, uri: str) -> None:
    error = refused(order(source=s3(moto, uri)))
    assert error.code == "NotFound"
    assert uri in error.message


def test_a_bucket_that_is_not_there_is_not_found(moto: str, bucket: Any, order: Orders) -> None:
    assert refused(order(source=s3(moto, "s3://elsewhere/a.safetensors"))).code == "NotFound"


def test_a_store_that_is_not_there_is_unreachable(order: Orders) -> None:
    wanted = order(source=s3("http://127.0.0.1:9", "s3://models/a.safetensors"))
    assert refused(wanted).code == "Unreachable"


def test_an_object_above_the_limit_is_refused(moto: str, bucket: Any, order: Orders) -> None:
    bucket.put_object(Bucket="models", Key="a.safetensors", Body=WEIGHTS)
    wanted = order(source=s3(moto, "s3://models/a.safetensors"), maxBytes=1000)
    assert refused(wanted).code == "TooLarge"


# -- volumes -------------------------------------------------------------------------------------


def test_a_file_of_a_claim_is_copied_to_the_cache(order: Orders, tmp_path: pathlib.Path) -> None:
    volume = tmp_path / "volume"
    (volume / "loras").mkdir(parents=True)
    (volume / "loras" / "a.safetensors").write_bytes(WEIGHTS)
    source = {"persistentVolumeClaim": {"claimName": "weights", "path": "loras/a.safetensors"}}
    found = run_order(order(source=source, volumeDir=str(volume)), quiet)
    (volume / "loras" / "a.safetensors").write_bytes(b"gone")
    assert found.path.read_bytes() == WEIGHTS
    missing = {"persistentVolumeClaim": {"claimName": "weights", "path": "b.safetensors"}}
    assert refused(order(source=missing, volumeDir=str(volume))).code == "NotFound"
    assert refused(order(source=source)).code == "OrderInvalid"


def test_a_link_or_a_path_out_of_a_claim_is_refused(order: Orders, tmp_path: pathlib.Path) -> None:
    volume, outside = tmp_path / "volume", tmp_path / "secret.safetensors"
    volume.mkdir()
    outside.write_bytes(WEIGHTS)
    (volume / "a.safetensors").symlink_to(outside)
    source = {"persistentVolumeClaim": {"claimName": "weights", "path": "a.safetensors"}}
    error = refused(order(source=source, volumeDir=str(volume)))
    assert error.code == "SourceInvalid"
    source["persistentVolumeClaim"]["path"] = "../secret.safetensors"
    with pytest.raises(ValidationError, match="must not have the part"):
        order(source=source, volumeDir=str(volume))


def test_a_local_file_and_a_built_in_one_are_checked_too(
    order: Orders, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "a.safetensors").write_bytes(WEIGHTS)
    local = run_order(
        order(source={"path": str(tmp_path / "a.safetensors")}, volumeDir=str(tmp_path)), quiet
    )
    packaged = run_order(order(source={"builtIn": {"name": "stripes"}}), quiet)
    assert local.sha256 == packaged.sha256 == DIGEST
