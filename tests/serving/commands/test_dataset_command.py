"""`calotype dataset check`: what it prints, and the page that it writes."""

from __future__ import annotations

import json
import pathlib
import re

import pytest
from click.testing import CliRunner, Result
from samples.training_pictures import encoded, photo

from calotype.serving.commands.cli import cli

RIGHTS = ("--rights", "own", "--holder", "Ada")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Six pictures, a copy, and a file that is none."""
    path = tmp_path_factory.mktemp("pictures")
    for number in range(6):
        (path / f"{number}.png").write_bytes(encoded(photo(number)))
        (path / f"{number}.txt").write_text("a toy <b>on</b> a table")
    (path / "copy.jpg").write_bytes(encoded(photo(2), "JPEG"))
    (path / "broken.png").write_bytes(b"nothing")
    return path


def check(folder: pathlib.Path, *arguments: str) -> Result:
    return CliRunner().invoke(
        cli, ["dataset", "check", str(folder), "--resolution", "96", *arguments]
    )


def test_it_says_what_becomes_of_every_file(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    page = tmp_path / "out" / "report.html"
    done = check(folder, "--trigger", "zorbl", *RIGHTS, "--html", str(page))
    assert "8 pictures, 6 used (1 held out), 1 refused, 1 duplicates" in done.output
    assert re.search(r"refused +broken\.png +image_unreadable", done.output)
    assert re.search(r"duplicate +copy\.jpg of 2\.png|duplicate +2\.png of copy\.jpg", done.output)
    # More than one in twenty is unreadable.
    assert "1 of 8 pictures cannot be read" in str(done.exception)
    html = page.read_text()
    assert html.count("data:image/jpeg;base64,") == 6
    assert "broken.png" in html and "copy.jpg" in html
    assert "zorbl, a toy &lt;b&gt;on&lt;/b&gt; a table" in html


def test_json_is_the_whole_report(folder: pathlib.Path) -> None:
    done = check(folder, "--json", "--holdout", "0")
    report = json.loads(done.stdout)
    assert report["ok"] is False and report["held_out"] == 0
    assert {one["code"] for one in report["problems"]} >= {"rights_missing", "image_unreadable"}
    assert [one["file"] for one in report["refused"] if one["code"] == "image_unreadable"] == [
        "broken.png"
    ]


def test_wrong_rights_name_the_field(folder: pathlib.Path) -> None:
    done = check(folder, "--rights", "consent", "--holder", "Ada")
    assert "--rights: rights: basis 'consent' needs evidence" in str(done.exception)
    done = check(folder, *RIGHTS, "--expires", "soon")
    assert "rights.expires" in str(done.exception)


def test_a_blind_text_encoder_is_said(folder: pathlib.Path) -> None:
    from calotype.serving.weights.sources import BUILT_IN

    done = check(folder, *RIGHTS, "--captions-by", str(BUILT_IN / "shapes"))
    assert "too few to see" in done.output
