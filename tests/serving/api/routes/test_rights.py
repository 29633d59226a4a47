"""Consent that is taken back reaches every adapter and every picture drawn with it."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner, Result
from samples.training_pictures import RIGHTS, encoded, photo

from calotype.serving.commands.cli import cli
from calotype.serving.config import BUILT_IN_ADAPTER, BUILT_IN_MODEL
from calotype.serving.config.sources import Source
from calotype.serving.engine.sizing.adapter_origins import Origins, merged, read_origins
from calotype.serving.weights.sources import BUILT_IN

PICTURE, OTHER = hashlib.sha256(b"one").hexdigest(), hashlib.sha256(b"two").hexdigest()
COMMAND = "calotype train lora toys --trigger zorbl -o toy.safetensors"
WEIGHTS = {"weight": np.zeros(2, np.float32)}
Run = Callable[..., Result]


@pytest.fixture
def adapter_file(tmp_path: pathlib.Path) -> pathlib.Path:
    """An adapter that learnt from two pictures; the painter does not read its weights."""
    path = tmp_path / "toy.safetensors"
    origins = Origins("d" * 64, ((PICTURE, RIGHTS), (OTHER, None)), COMMAND)
    safetensors.numpy.save_file(WEIGHTS, path, metadata=origins.to_metadata())
    return path


@pytest.fixture
def with_toy(service: Any, adapter_file: pathlib.Path) -> Any:
    """The service with that file as adapter ``toy`` beside ``stripes``."""
    spec = BUILT_IN_ADAPTER.spec.model_copy(update={"source": Source(path=str(adapter_file))})
    metadata = BUILT_IN_ADAPTER.metadata.model_copy(update={"name": "toy"})
    toy = BUILT_IN_ADAPTER.model_copy(update={"spec": spec, "metadata": metadata})
    service.catalog.replace([BUILT_IN_MODEL], [BUILT_IN_ADAPTER, toy])
    return service


@pytest.fixture
def run(service: Any) -> Run:
    key = service.database.api_keys.create(team="safety", scopes=("moderation",))[0]
    environment = {"CALOTYPE_URL": service.url, "CALOTYPE_API_KEY": key}
    return lambda *words: CliRunner().invoke(cli, ["rights", *words], env=environment)


def draw(service: Any, *adapters: str) -> tuple[str, str]:
    """A picture by address: its id and its address."""
    loras = [{"id": name} for name in adapters]
    answer = service.generate(prompt="a fox", loras=loras, response_format="url", seed=1)
    assert answer.status_code == 200, answer.text
    url = str(answer.json()["data"][0]["url"])
    return url.split("/assets/")[1].split("/")[0], url


def test_a_revocation_quarantines_adapters_and_pictures(with_toy: Any, run: Run) -> None:
    service = with_toy
    mine, url = draw(service, "toy")
    other, other_url = draw(service, "stripes")
    assert service.fetch(url).status_code == 200

    listed = run("revoke", "--picture", PICTURE)
    assert listed.exit_code == 0, listed.output
    assert "toy" in listed.output and mine in listed.output and other not in listed.output
    assert "by own Ada" in listed.output
    assert service.fetch(url).status_code == 200, "it was only listed"

    done = run("revoke", "--picture", PICTURE, "--reason", "asked by mail", "--yes")
    assert done.exit_code == 0, done.output
    assert "1 adapters and 1 pictures are quarantined" in done.output
    assert f"{COMMAND} --without {PICTURE} --work without-{PICTURE[:8]}.training" in done.output

    gone = service.fetch(url)
    assert gone.status_code == 451
    assert gone.json()["error"]["code"] == "picture_quarantined"
    assert service.http().get(f"/v1/assets/{mine}").status_code == 451
    assert service.fetch(other_url).status_code == 200
    refused = service.generate(prompt="a fox", loras=[{"id": "toy"}])
    assert refused.status_code == 403
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("rights_revoked", "loras")
    assert "'toy'" in error["message"]
    draw(service, "stripes")

    assert "asked by mail" in run("revoke", "--list").output
    assert run("revoke", "--picture", PICTURE, "--restore").exit_code == 0
    assert service.fetch(url).status_code == 200
    draw(service, "toy")


def test_an_answer_that_is_asked_for_again_shows_nothing(with_toy: Any, run: Run) -> None:
    service = with_toy
    body = {"prompt": "a fox", "loras": [{"id": "toy"}], "response_format": "b64_json"}
    headers = {"Idempotency-Key": "once"}
    client = service.http()
    first = client.post("/v1/images/generations", json=body, headers=headers)
    assert first.status_code == 200
    run("revoke", "--picture", OTHER, "--reason", "asked", "--yes")
    again = client.post("/v1/images/generations", json=body, headers=headers)
    assert again.status_code == 451, again.text


def test_the_file_itself_names_the_picture(service: Any, run: Run, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(encoded(photo(1)))
    done = run("revoke", "--file", str(file), "--json")
    assert json.loads(done.stdout)["id"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert run("revoke", "--picture", "abc").exit_code != 0
    assert run("revoke").exit_code == 2


def test_a_service_is_told_what_an_adapter_learnt_from(
    service: Any, run: Run, adapter_file: pathlib.Path
) -> None:
    done = run("record", str(adapter_file))
    assert done.exit_code == 0, done.output
    digest = "sha256:" + hashlib.sha256(adapter_file.read_bytes()).hexdigest()
    keeper = service.http(service.database.api_keys.create(scopes=("moderation",))[0])
    found = keeper.get(f"/v1/rights/adapters/{digest}").json()
    assert found["command"] == COMMAND
    rows = {one["sha256"]: one["rights"] for one in found["pictures"]}
    assert rows == {PICTURE: RIGHTS, OTHER: None}
    assert keeper.get("/v1/rights/adapters/sha256:0").status_code == 404
    wrong = {"digest": "d", "name": "n", "dataset_digest": "", "pictures": [{"sha256": "x"}]}
    assert keeper.post("/v1/rights/adapters", json=wrong).status_code == 400
    bare = run("record", str(BUILT_IN / "stripes.safetensors"))
    assert "does not say what it learnt from" in bare.output


def test_only_who_takes_pictures_down_takes_consent_back(shared_service: Any) -> None:
    drawing = shared_service.http(shared_service.database.api_keys.create(scopes=("images",))[0])
    body = {"picture_sha256": PICTURE, "reason": "asked"}
    assert drawing.post("/v1/rights/revocations", json=body).status_code == 403
    assert drawing.get("/v1/rights/revocations").status_code == 403


def test_metadata_of_a_file_goes_both_ways(
    adapter_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    found = read_origins(adapter_file)
    assert found is not None
    assert found.pictures == ((PICTURE, RIGHTS), (OTHER, None))
    assert (found.dataset_digest, found.command) == ("d" * 64, COMMAND)
    both = merged([found, None, Origins("e" * 64, (("f" * 64, None),))])
    assert both is not None and merged([None]) is None
    assert {sha256 for sha256, _ in both.pictures} == {PICTURE, OTHER, "f" * 64}
    assert read_origins(tmp_path / "nowhere") is None
    (tmp_path / "text").write_text("no safetensors")
    assert read_origins(tmp_path / "text") is None


def test_an_adapter_whose_origins_cannot_be_read_draws_nothing(
    with_toy: Any, adapter_file: pathlib.Path
) -> None:
    damaged = {"calotype.origins": '{"pictures": [["x", 0]], "rights": [null]}'}
    safetensors.numpy.save_file(WEIGHTS, adapter_file, metadata=damaged)
    refused = with_toy.generate(prompt="a fox", loras=[{"id": "toy"}])
    assert refused.status_code == 400
    assert "calotype.origins" in refused.json()["error"]["message"]
