"""`calotype moderation appeal|report|review` against a real gateway: who may see what."""

from __future__ import annotations

import io
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import openai
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from calotype.serving.client import ApiError, Reviewer
from calotype.serving.commands.cli import cli

Run = Callable[..., Result]


@pytest.fixture
def run(service: Any) -> Run:
    """`calotype moderation ...` as a team that draws."""
    return runner(service, service.database.api_keys.create(team="shop", scopes=("images",))[0])


@pytest.fixture
def desk(service: Any) -> Run:
    """The same as a reviewer."""
    return runner(
        service, service.database.api_keys.create(team="safety", scopes=("moderation",))[0]
    )


def runner(service: Any, key: str) -> Run:
    environment = {"CALOTYPE_URL": service.url, "CALOTYPE_API_KEY": key}
    return lambda *words: CliRunner().invoke(cli, ["moderation", *words], env=environment)


def drawn(service: Any) -> str:
    """The id of a stored picture."""
    answer = service.generate(prompt="a red circle", response_format="url").json()
    return str(answer["data"][0]["url"].split("/assets/")[1].split("/")[0])


def refused(service: Any) -> str:
    key = service.database.api_keys.create(team="shop")[0]
    with pytest.raises(openai.BadRequestError) as caught:
        service.sdk(key).images.generate(model="shapes", prompt="a forbidden thing")
    body: Any = caught.value.body
    return str(body["moderation"]["decision_id"])


def test_an_appeal_from_the_terminal_is_answered_at_the_terminal(
    service: Any, run: Run, desk: Run
) -> None:
    made = run("appeal", refused(service), "--reason", "It is our product.", "--json")
    assert made.exit_code == 0, made.output
    case = json.loads(made.stdout)
    assert case["status"] == "open"
    listed = desk("review", "list")
    assert listed.stdout.startswith(f"{case['id']}  appeal  open")
    assert "It is our product." in listed.stdout
    assert desk("review", "take").stdout.startswith(case["id"])
    done = desk("review", "decide", case["id"], "overturned", "--note", "Sorry.")
    assert "overturned" in done.stdout and "Sorry." in done.stdout
    assert desk("review", "list").stdout == ""
    assert desk("review", "list", "--status", "overturned").stdout.startswith(case["id"])
    empty = desk("review", "take")
    assert empty.exit_code == 1 and "No case waits" in empty.stderr
    none = desk("review", "picture", case["id"], "-o", "none.png")
    assert none.exit_code == 2 and "about a prompt" in none.stderr


def test_a_reported_picture_is_blurred_until_it_is_revealed_on_record(
    service: Any, run: Run, desk: Run, tmp_path: pathlib.Path
) -> None:
    asset_id = drawn(service)
    case_id = run("report", asset_id, "--reason", "That is me.").stdout.split()[0]
    seen, whole = tmp_path / "new" / "seen.png", tmp_path / "whole.png"
    assert desk("review", "picture", case_id, "-o", str(seen)).exit_code == 0
    stored = service.blobs.get(service.database.files.get_asset(asset_id).blob_key)
    assert seen.read_bytes() != stored
    untaken = desk("review", "picture", case_id, "-o", str(whole), "--reveal")
    assert untaken.exit_code == 2 and "take it first" in untaken.stderr
    assert not whole.exists()
    assert list(service.database.reviewer_audit.actions()) == [], "nobody saw it"
    desk("review", "take")
    assert desk("review", "picture", case_id, "-o", str(whole), "--reveal").exit_code == 0
    assert whole.read_bytes() == stored
    assert desk("review", "decide", case_id, "taken_down").exit_code == 0
    (revealed, *done) = service.database.reviewer_audit.actions()
    decided, taken = sorted(done, key=lambda row: str(row["action"]))
    assert (revealed["action"], revealed["subject"]) == ("picture.revealed", case_id)
    assert revealed["details"] == {"asset_id": asset_id}
    assert (taken["action"], taken["details"]["assets"]) == ("takedown.made", [asset_id])
    assert (decided["action"], decided["details"]) == ("case.decided", {"verdict": "taken_down"})
    assert decided["actor"] == revealed["actor"] and decided["actor"].startswith("key_")
    gone = desk("review", "picture", case_id, "-o", str(whole))
    assert gone.exit_code == 2 and "gone" in gone.stderr


def test_a_blurred_picture_tells_no_details(service: Any, run: Run, desk: Run) -> None:
    """Fine stripes in the stored file are none in what a reviewer is shown."""
    asset_id = drawn(service)
    stripes = np.zeros((512, 512, 3), dtype=np.uint8)
    stripes[:, ::4] = 255
    file = io.BytesIO()
    Image.fromarray(stripes).save(file, "PNG")
    service.blobs.put(service.database.files.get_asset(asset_id).blob_key, file.getvalue())
    case_id = run("report", asset_id, "--reason", "r").stdout.split()[0]
    key = service.database.api_keys.create(team="safety", scopes=("moderation",))[0]
    with Reviewer(service.url, key) as reviewer:
        shown = np.asarray(Image.open(io.BytesIO(reviewer.image(case_id))), dtype=np.int16)
        assert max(shown.shape[:2]) <= 256
        assert int(np.abs(np.diff(shown, axis=1)).max()) <= 3, "no stripe is left"
        with pytest.raises(ApiError) as caught:
            reviewer.image("case_none")
    assert caught.value.status == 404


def test_who_draws_may_not_look_at_the_queue(service: Any, run: Run) -> None:
    case_id = run("report", drawn(service), "--reason", "r").stdout.split()[0]
    assert run("review", "show", case_id).stdout.startswith(case_id), "one's own"
    for words in (("list",), ("take",), ("picture", case_id, "-o", "x.png")):
        done = run("review", *words)
        assert done.exit_code == 2 and "moderation" in done.stderr
    wrong = run("appeal", "42", "--reason", "r")
    assert wrong.exit_code == 2 and "dec_" in wrong.stderr
    away = CliRunner().invoke(
        cli, ["moderation", "review", "--url", "http://127.0.0.1:9", "list"],
        env={"CALOTYPE_API_KEY": "ct_live_none"},
    )  # fmt: skip
    assert away.exit_code == 2 and "--url" in away.stderr
