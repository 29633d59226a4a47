"""The packaged model draws what it is asked for, and its card's command says how well."""

from __future__ import annotations

import json
import pathlib

import pytest

from calotype.serving.training import shapes
from calotype.serving.training.shapes import MODELS, PACKAGED


@pytest.mark.slow
def test_held_out_captions_are_mostly_drawn_fully_right(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    shapes.main(["evaluate", "--captions", "75", "--json", "--sheet", str(tmp_path / "s.png")])
    found = json.loads(capsys.readouterr().out)
    # The card's figure is over 300 captions; this many tell a broken model from a whole one.
    assert found["scores"]["full"] >= 0.6
    assert found["scores"]["background"] >= 0.9
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_the_package_stays_small() -> None:
    files = [p for p in MODELS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 16_000_000
    assert not [p for p in files if p.stat().st_size > 5_000_000]
    assert (PACKAGED / "model_index.json").is_file()
