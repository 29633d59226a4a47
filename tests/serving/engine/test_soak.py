"""Hundreds of mixed requests: exactly one ending each, and memory that does not grow."""

from __future__ import annotations

import importlib
import pathlib

import pytest

BENCHES = pathlib.Path(__file__).parents[2] / "bench"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_request_ends_once_and_memory_stays(components, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHES))
    rows = importlib.import_module("engine_soak").soak(components, tmp_path, requests=400)
    memory = rows["memory growth over 400 requests with aborts"]["value"]
    (wrong,) = [row["value"] for name, row in rows.items() if "exactly one ending" in name]
    assert wrong == 0
    assert memory < 5.0
