"""What is written into the log: readable by machines, without secrets."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.observability import tracing
from calotype.serving.observability.logs import set_up_logs, without_secrets


@pytest.fixture(autouse=True)
def root_logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The root logger is as before afterwards."""
    root = logging.getLogger()
    monkeypatch.delenv("CALOTYPE_LOG_FORMAT", raising=False)
    level = root.level
    yield
    for handler in [h for h in root.handlers if h.get_name() == "calotype"]:
        root.removeHandler(handler)
    root.setLevel(level)


Written = pytest.CaptureFixture[str]


def test_a_line_is_one_json_object_with_the_trace_of_its_request(capsys: Written) -> None:
    set_up_logs("json")
    set_up_logs("json")
    with tracing.span("request"):
        wanted = tracing.trace_id()
        logging.getLogger("some.place").warning("line one\nline %d", 2)
    logging.getLogger("some.place").info("outside")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert len(lines) == 2, "two set-ups, one handler"
    assert lines[0] | {"time": ""} == {
        "time": "",
        "level": "warning",
        "logger": "some.place",
        "message": "line one\nline 2",
        "trace_id": wanted,
    }
    assert lines[0]["time"].endswith("+00:00")
    assert "trace_id" not in lines[1]


def test_a_warning_that_comes_every_half_second_is_written_once_a_minute(
    capsys: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up_logs("json")
    now = 1000.0
    monkeypatch.setattr("time.time", lambda: now)
    monkeypatch.setattr("time.time_ns", lambda: int(now * 1e9))
    for _ in range(300):
        logging.getLogger("some.place").warning("%s is away", "the store")
        logging.getLogger("some.place").info("a look")
        now += 0.5
    logging.getLogger("some.place").warning("%s is away", "the database")
    told = [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()]
    assert told.count("a look") == 300
    away = [message for message in told if "away" in message]
    assert away == [
        "the store is away",
        "the store is away (119 times more since the last line)",
        "the store is away (119 times more since the last line)",
        "the database is away",
    ]


def test_an_exception_is_part_of_its_line(capsys: Written) -> None:
    set_up_logs("json")
    try:
        raise ValueError("no route for Bearer ct_live_abcdefgh")
    except ValueError:
        logging.getLogger("some.place").exception("it failed")
    written = capsys.readouterr().err
    assert "ValueError: no route" in json.loads(written)["exception"]
    assert "abcdefgh" not in written


def test_text_is_for_people_and_keeps_secrets_too(
    capsys: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALOTYPE_LOG_FORMAT", "text")
    set_up_logs("json")
    logging.getLogger("some.place").warning("the key %s is odd", "ct_live_abcdefgh")
    wanted = "WARNING some.place: the key ct_live_[hidden] is odd\n"
    assert capsys.readouterr().err.endswith(wanted)


def test_an_unknown_format_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALOTYPE_LOG_FORMAT", "yaml")
    with pytest.raises(InvalidRequest, match="json or text, not 'yaml'"):
        set_up_logs()


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("key ct_live_JqejB21gn4auDBAv2bo6I49HA37q6fGO", "JqejB21gn4"),
        ("secret whsec_QUFBQUFBQUFBQUFB+/==", "QUFBQUFB"),
        ("Authorization: Bearer abc.def-ghi", "abc.def-ghi"),
        ("Authorization: Basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
        ("postgresql+psycopg://calotype:p4ss!word@db:5432/x", "p4ss!word"),
        ("GET /v1/assets/a/content?expires=1&signature=0a1b2c3d4e", "0a1b2c3d4e"),
        ("token hf_AbCdEfGhIjKlMnOpQrStUvWx", "AbCdEfGhIj"),
        ("https://b.s3.example/k?X-Amz-Signature=00ff00ff00ff", "00ff00ff"),
    ],
)
def test_secrets_are_blotted_out_wherever_they_stand(text: str, secret: str) -> None:
    plain = without_secrets(f"before {text} after")
    assert secret not in plain
    assert plain.startswith("before ") and plain.endswith(" after") and "[hidden]" in plain


@pytest.mark.parametrize(
    "text", ["http://127.0.0.1:8000/v1", "a red fox: at 10:30", "asset_123", "hf_home is a folder"]
)
def test_ordinary_words_stay(text: str) -> None:
    assert without_secrets(text) == text
