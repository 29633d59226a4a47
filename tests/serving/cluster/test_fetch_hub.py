"""Weights from a Hugging Face hub: pinned to a commit, resumed, verified, never half there."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from calotype.serving.weights.fetch import run_order
from calotype.serving.weights.sources import BUILT_IN
from calotype.serving.wire.fetch_faults import FetchFailed
from calotype.serving.wire.fetch_order import FetchOrder

pytestmark = pytest.mark.slow

Orders = Callable[..., FetchOrder]
Web = Any
"""conftest.Web"""
WEIGHTS = (BUILT_IN / "stripes.safetensors").read_bytes()
SOURCE = {"huggingFace": {"repo": "acme/sneaker"}}


def quiet(sentence: str) -> None:
    """Nobody listens."""


def refused(order: FetchOrder) -> FetchFailed:
    with pytest.raises(FetchFailed) as caught:
        run_order(order, quiet)
    return caught.value


def left(order: FetchOrder) -> list[str]:
    """What lies in the folder of the adapter, its lock aside."""
    return sorted(path.name for path in order.folder.iterdir() if path.name != ".lock")


def test_a_branch_becomes_a_commit_and_a_checked_file(hugging_face: Web, order: Orders) -> None:
    commit = hugging_face.publish("acme/sneaker", {"README.md": b"x", "a.safetensors": WEIGHTS})
    wanted = order(source=SOURCE)
    found = run_order(wanted, quiet)
    assert found.revision == commit
    assert found.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert found.size_bytes == len(WEIGHTS)
    assert found.path == wanted.folder / commit / "a.safetensors"
    assert found.path.read_bytes() == WEIGHTS
    assert found.rank == 8
    assert "transformer_blocks.*.attn.to_q" in found.target_modules
    assert left(wanted) == [commit]


def test_the_second_time_nothing_is_fetched(hugging_face: Web, order: Orders) -> None:
    commit = hugging_face.publish("acme/sneaker", {"a.safetensors": WEIGHTS})
    first = run_order(order(source=SOURCE), quiet)
    assert run_order(order(source=SOURCE), quiet) == first
    path = f"/acme/sneaker/resolve/{commit}/a.safetensors"
    assert len(hugging_face.requests(path)) == 1


def test_another_commit_lies_beside_the_first(hugging_face: Web, order: Orders) -> None:
    files = {"a.safetensors": WEIGHTS}
    commits = tuple(hugging_face.publish("acme/sneaker", files, name) for name in ("main", "v2"))
    old = run_order(order(source=SOURCE), quiet)
    source = {"huggingFace": {"repo": "acme/sneaker", "revision": "v2"}}
    new = run_order(order(source=source), quiet)
    assert (old.revision, new.revision) == commits
    assert commits[0] != commits[1]
    assert old.path.read_bytes() == new.path.read_bytes() == WEIGHTS


def test_a_broken_connection_is_resumed_where_it_broke(hugging_face: Web, order: Orders) -> None:
    commit = hugging_face.publish("acme/sneaker", {"a.safetensors": WEIGHTS})
    api = "/api/models/acme/sneaker/revision/main"
    hugging_face.cut_after = [len(hugging_face.files[api]), 1000, 500]
    found = run_order(order(source=SOURCE), quiet)
    assert found.path.read_bytes() == WEIGHTS
    asked = hugging_face.requests(f"/acme/sneaker/resolve/{commit}/a.safetensors")
    assert [headers.get("range") for headers in asked] == [None, "bytes=1000-", "bytes=1500-"]


def test_a_fetch_that_was_stopped_goes_on_later(hugging_face: Web, order: Orders) -> None:
    commit = hugging_face.publish("acme/sneaker", {"a.safetensors": WEIGHTS})
    api = len(hugging_face.files["/api/models/acme/sneaker/revision/main"])
    hugging_face.cut_after = [api, 1000, 0, 0, 0]
    assert refused(order(source=SOURCE)).code == "Unreachable"
    hugging_face.cut_after = []
    assert run_order(order(source=SOURCE), quiet).path.read_bytes() == WEIGHTS
    asked = hugging_face.requests(f"/acme/sneaker/resolve/{commit}/a.safetensors")
    assert asked[-1]["range"] == "bytes=1000-"


def test_what_was_kept_of_a_stopped_fetch_is_not_trusted(hugging_face: Web, order: Orders) -> None:
    hugging_face.publish("acme/sneaker", {"a.safetensors": WEIGHTS})
    api = len(hugging_face.files["/api/models/acme/sneaker/revision/main"])
    hugging_face.cut_after = [api, 1000, 0, 0, 0]
    wanted = order(source=SOURCE)
    refused(wanted)
    (part,) = wanted.folder.rglob(".a.safetensors.part")
    part.write_bytes(b"\0" * 1000)
    hugging_face.cut_after = []
    assert run_order(wanted, quiet).path.read_bytes() == WEIGHTS


def test_a_busy_hub_is_asked_again(hugging_face: Web, order: Orders) -> None:
    hugging_face.publish("acme/sneaker", {"a.safetensors": WEIGHTS})
    hugging_face.statuses = [503, 429]
    assert run_order(order(source=SOURCE), quiet).rank == 8


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [("http://127.0.0.1:9", "Unreachable"), ("ftp://127.0.0.1", "SourceInvalid")],
)
def test_a_hub_that_does_not_answer_is_named(
    order: Orders, monkeypatch: pytest.MonkeyPatch, endpoint: str, reason: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    error = refused(order(source=SOURCE))
    assert error.code == reason
    assert endpoint in error.message


def test_the_token_opens_the_hub_and_is_not_sent_elsewhere(
    hugging_face: Web,
    start_web: Callable[[], Web],
    order: Orders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commit = hugging_face.publish("acme/sneaker", {"a.safetensors": WEIGHTS})
    store = start_web()
    path = f"/acme/sneaker/resolve/{commit}/a.safetensors"
    store.files[path] = WEIGHTS
    # Another host name of the same machine, as a hub's object store has one.
    hugging_face.moved = store.url.replace("127.0.0.1", "localhost")
    hugging_face.token = "hf_secret"
    assert refused(order(source=SOURCE)).code == "CredentialsRejected"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "hf_wrong" not in refused(order(source=SOURCE)).message
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run_order(order(source=SOURCE), quiet)
    assert "authorization" in hugging_face.requests(path)[-1]
    assert "authorization" not in store.requests(path)[-1]


@pytest.mark.parametrize(
    ("files", "source", "reason", "says"),
    [
        ({}, {"repo": "acme/nothing"}, "CredentialsRejected", "acme/nothing"),
        ({"a.safetensors": WEIGHTS}, {"repo": "acme/sneaker", "revision": "v9"}, "NotFound", "v9"),
        ({"a.bin": b"x", "b.bin": b"y"}, {"repo": "acme/sneaker"}, "NotFound", "exactly one"),
        (
            {"a.safetensors": WEIGHTS, "b.safetensors": WEIGHTS},
            {"repo": "acme/sneaker"},
            "SourceInvalid",
            "a.safetensors, b.safetensors",
        ),
        (
            {"a.safetensors": WEIGHTS},
            {"repo": "acme/sneaker", "filename": "c.safetensors"},
            "NotFound",
            "a.safetensors",
        ),
    ],
)
def test_what_is_not_there_is_named(
    hugging_face: Web,
    order: Orders,
    files: dict[str, bytes],
    source: dict[str, str],
    reason: str,
    says: str,
) -> None:
    hugging_face.publish("acme/sneaker", files)
    if source["repo"] == "acme/nothing":
        hugging_face.statuses = [401]  # what the hub says to whoever shows no token
    error = refused(order(source={"huggingFace": source}))
    assert error.code == reason
    assert says in error.message


def test_the_named_file_of_several_is_fetched(hugging_face: Web, order: Orders) -> None:
    files = {"loras/a.safetensors": WEIGHTS, "b.safetensors": b"another"}
    hugging_face.publish("acme/sneaker", files)
    source = {"huggingFace": {"repo": "acme/sneaker", "filename": "loras/a.safetensors"}}
    assert run_order(order(source=source), quiet).path.name == "a.safetensors"


def test_a_file_that_is_not_what_the_hub_announced_is_refused(
    hugging_face: Web, order: Orders
) -> None:
    commit = hugging_face.publish("acme/sneaker", {"a.safetensors": WEIGHTS})
    path = f"/acme/sneaker/resolve/{commit}/a.safetensors"
    hugging_face.files[path] = WEIGHTS[:-1] + b"\1"
    wanted = order(source=SOURCE)
    assert refused(wanted).code == "ChecksumMismatch"
    assert left(wanted) == []


def test_a_pin_that_the_hub_contradicts_costs_no_download(hugging_face: Web, order: Orders) -> None:
    commit = hugging_face.publish("acme/sneaker", {"a.safetensors": WEIGHTS})
    assert refused(order(source=SOURCE, sha256="0" * 64)).code == "ChecksumMismatch"
    assert not hugging_face.requests(f"/acme/sneaker/resolve/{commit}/a.safetensors")


def test_a_file_above_the_limit_is_refused_before_it_is_fetched(
    hugging_face: Web, order: Orders
) -> None:
    commit = hugging_face.publish("acme/sneaker", {"a.safetensors": WEIGHTS})
    error = refused(order(source=SOURCE, maxBytes=1000))
    assert error.code == "TooLarge"
    assert "1,000" in error.message
    assert not hugging_face.requests(f"/acme/sneaker/resolve/{commit}/a.safetensors")


def model_files() -> dict[str, bytes]:
    folder = BUILT_IN / "shapes"
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def model_order(order: Orders, **fields: Any) -> FetchOrder:
    document = {"kind": "model", "name": "flux", "model": None, "maxBytes": None}
    return order(**document | {"source": {"huggingFace": {"repo": "acme/flux"}}} | fields)


def test_a_model_is_fetched_without_what_no_replica_reads(hugging_face: Web, order: Orders) -> None:
    extra = {"flux.safetensors": b"all in one", "vae/x.bin": b"pickle", "run.py": b"code"}
    hugging_face.publish("acme/flux", model_files() | extra)
    found = run_order(model_order(order), quiet)
    names = {str(p.relative_to(found.path)) for p in found.path.rglob("*") if p.is_file()}
    assert names - {".fetched.json"} == set(model_files())
    assert found.rank is None
    again = run_order(model_order(order), quiet)
    assert again == found
    assert run_order(model_order(order, sha256=found.sha256), quiet) == found


def test_a_stopped_fetch_of_a_model_keeps_its_whole_files(hugging_face: Web, order: Orders) -> None:
    commit = hugging_face.publish("acme/flux", model_files())
    last = f"/acme/flux/resolve/{commit}/vae/diffusion_pytorch_model.safetensors"
    hugging_face.failing = {last: 503}
    assert refused(model_order(order)).code == "Unreachable"
    before = {path for path, _ in hugging_face.seen}
    hugging_face.seen.clear()
    hugging_face.failing = {}
    assert run_order(model_order(order), quiet).revision == commit
    after = {path for path, _ in hugging_face.seen}
    assert {path for path in before & after if "/resolve/" in path} == {last}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", None, "missing"),
        ("vae/diffusion_pytorch_model.safetensors", b"\x10\0\0\0\0\0\0\0{}", "truncated"),
        ("tokenizer/tokenizer.json", None, "tokenizer.json"),
        ("model_index.json", b'{"_class_name": "StableDiffusionPipeline"}', "StableDiffusion"),
        ("transformer/config.json", b'{"num_layers": 3}', "does not hold what its config.json"),
    ],
)
def test_a_damaged_model_is_refused_by_file(
    hugging_face: Web, order: Orders, name: str, content: bytes | None, says: str
) -> None:
    files = model_files()
    if content is None:
        del files[name]
    else:
        files[name] = content
    hugging_face.publish("acme/flux", files)
    wanted = model_order(order)
    error = refused(wanted)
    assert error.code == "ModelIncomplete"
    assert says in error.message
    assert left(wanted) == []


def test_a_licence_must_be_accepted_and_the_right_one(hugging_face: Web, order: Orders) -> None:
    card = {"license": "other", "license_name": "flux-non-commercial"}
    hugging_face.publish("acme/flux", model_files(), gated="auto", cardData=card)
    declined = refused(model_order(order, licence={"accepted": False}))
    assert declined.code == "LicenceNotAllowed"
    assert "flux-non-commercial" in declined.message
    other = {"name": "apache-2.0", "accepted": True}
    assert "apache-2.0" in refused(model_order(order, licence=other)).message
    right = {"name": "flux-non-commercial", "accepted": True}
    assert run_order(model_order(order, licence=right), quiet).size_bytes > 1_000_000


def test_a_receipt_without_its_files_is_no_receipt(hugging_face: Web, order: Orders) -> None:
    hugging_face.publish("acme/sneaker", {"a.safetensors": WEIGHTS})
    first = run_order(order(source=SOURCE), quiet)
    first.path.write_bytes(WEIGHTS[:100])
    assert run_order(order(source=SOURCE), quiet).path.read_bytes() == WEIGHTS


def test_the_cache_is_where_the_contract_says(
    hugging_face: Web, order: Orders, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hugging_face.publish("acme/sneaker", {"a.safetensors": WEIGHTS})
    monkeypatch.setenv("CALOTYPE_DATA_DIR", str(tmp_path / "data"))
    found = run_order(order(source=SOURCE, cacheDir=None), quiet)
    folder = tmp_path / "data" / "cache" / "adapters" / "shoes" / "sneaker" / commit
    assert found.path.parent == folder
    assert json.loads((folder / ".fetched.json").read_text())[0]["name"] == "a.safetensors"
