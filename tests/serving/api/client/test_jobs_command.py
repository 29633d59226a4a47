"""`calotype jobs` against a real gateway, and `calotype keys`."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result

from calotype.serving.commands.cli import cli
from calotype.serving.testing.painter import PainterSettings

Run = Callable[..., Result]


@pytest.fixture
def run(shared_service: Any) -> Run:
    return runner_of(shared_service)


def runner_of(service: Any) -> Run:
    environment = {"CALOTYPE_URL": service.url, "CALOTYPE_API_KEY": service.key}

    def run(*words: str, **more: str) -> Result:
        return CliRunner().invoke(cli, ["jobs", *words], env=environment | more)

    return run


def test_a_job_is_submitted_watched_and_fetched(run: Run, tmp_path: pathlib.Path) -> None:
    target = tmp_path / "new" / "fox.png"
    done = run(
        *("submit", "a red fox", "--seed", "7", "-n", "2", "--steps", "3", "-o", str(target)),
        *("--lora", "stripes:0.5", "--set", "guidance_scale=2.5", "--metadata", "ticket=A-1"),
    )
    assert done.exit_code == 0, done.output
    job_id, *files = done.stdout.splitlines()
    assert files == [f"{target}  seed 7", f"{target.with_name('fox-2.png')}  seed 8"]
    assert target.read_bytes().startswith(b"\x89PNG")
    shown = json.loads(run("get", job_id, "--json").stdout)
    assert shown["input"]["loras"] == [{"id": "stripes", "scale": 0.5}]
    assert shown["input"]["guidance_scale"] == 2.5
    assert shown["metadata"] == {"ticket": "A-1"}
    assert run("get", job_id).stdout.startswith(f"{job_id}  succeeded")
    listed = run("list", "--metadata", "ticket=A-1", "--limit", "1").stdout
    assert listed.startswith(f"{job_id}  succeeded")


def test_without_watching_only_the_id_is_printed(run: Run) -> None:
    job_id = run("submit", "a fox").stdout.strip()
    assert job_id.startswith("job_") and "\n" not in job_id
    watched = run("watch", job_id)
    assert watched.exit_code == 0 and "succeeded" in watched.stdout


def test_json_alone_is_on_standard_output(run: Run, tmp_path: pathlib.Path) -> None:
    done = run("submit", "a fox", "--json", "-o", str(tmp_path / "fox.png"))
    assert json.loads(done.stdout)["status"] == "succeeded"


def test_a_job_is_canceled(start_service: Callable[..., Any]) -> None:
    run = runner_of(start_service(painter=PainterSettings(seconds_per_step=0.1)))
    job_id = run("submit", "a fox", "--steps", "50").stdout.strip()
    assert run("cancel", job_id).stdout.startswith(f"{job_id}  canceled")
    watched = run("watch", job_id)
    assert watched.exit_code == 1 and "canceled" in watched.stderr


def test_a_blocked_prompt_ends_with_1_and_its_reason(run: Run) -> None:
    done = run("submit", "something forbidden", "--watch")
    assert done.exit_code == 1
    assert "safety system" in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("submit", "a fox", "--size", "1x1"), "size"),
        (("submit", "a fox", "--set", "stepz=4"), "Did you mean 'steps'"),
        (("submit", "a fox", "--set", "steps"), "NAME=VALUE"),
        (("submit", "a fox", "--lora", "stripes:much"), "no number"),
        (("get", "job_unknown"), "job_unknown"),
        (("watch", "job_unknown"), "job_unknown"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(run: Run, words: tuple[str, ...], told: str) -> None:
    done = run(*words)
    assert done.exit_code == 2
    assert told in done.stderr and "Traceback" not in done.output


def test_a_service_that_is_away_and_a_missing_key_are_named(
    run: Run, tmp_path: pathlib.Path
) -> None:
    away = run("list", CALOTYPE_URL="http://127.0.0.1:9")
    assert away.exit_code == 2 and "--url" in away.stderr
    keyless = run("list", CALOTYPE_API_KEY="")
    assert keyless.exit_code == 2 and "CALOTYPE_API_KEY" in keyless.stderr
    wrong = run("list", CALOTYPE_API_KEY="ct_live_wrong")
    assert wrong.exit_code == 2 and "API key" in wrong.stderr
    file = tmp_path / "key"
    file.write_text("ct_live_also_wrong\n")
    named = CliRunner().invoke(cli, ["jobs", "--key-file", str(tmp_path / "none"), "list"])
    assert named.exit_code == 2 and "cannot be read" in named.stderr


def test_keys_are_made_listed_rotated_and_revoked(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CALOTYPE_DATABASE_URL", raising=False)

    def keys(*words: str) -> Result:
        return CliRunner().invoke(cli, ["keys", "--data-dir", str(tmp_path), *words])

    made = keys("create", "--team", "shop", "--scope", "images", "--name", "web")
    plain = made.stdout.strip()
    assert plain.startswith("ct_live_")
    listed = json.loads(keys("list", "--json").stdout)
    assert (listed["team"], listed["state"], listed["scopes"]) == ("shop", "valid", ["images"])
    assert plain not in keys("list").stdout
    rotated = keys("rotate", listed["id"], "--overlap-seconds", "0")
    assert rotated.stdout.strip() not in ("", plain)
    states = [json.loads(line)["state"] for line in keys("list", "--json").stdout.splitlines()]
    assert sorted(states) == ["ended", "valid"]
    assert keys("revoke", listed["id"]).exit_code == 0
    unknown = keys("revoke", "key_unknown")
    assert unknown.exit_code != 0 and "key_unknown" in str(unknown.exception)
    scope = keys("create", "--scope", "everything")
    assert scope.exit_code != 0 and "everything" in str(scope.exception)
