"""A bad adapter never reaches a GPU: the engine's checks, each with its word; and the command."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from calotype.serving.weights.fetch import Fetched, run_order
from calotype.serving.weights.report import failure, success
from calotype.serving.weights.sources import BUILT_IN
from calotype.serving.wire.fetch_faults import FetchFailed
from calotype.serving.wire.fetch_order import FetchOrder, read_order
from calotype.serving.wire.fetch_result import MAX_BYTES

Orders = Callable[..., FetchOrder]
WEIGHTS = (BUILT_IN / "stripes.safetensors").read_bytes()


def renamed(old: str, new: str) -> bytes:
    return save({name.replace(old, new): t for name, t in load(WEIGHTS).items()})


def with_dtype(dtype: torch.dtype) -> bytes:
    return save({name: tensor.to(dtype) for name, tensor in load(WEIGHTS).items()})


def wide() -> bytes:
    key = "transformer.transformer_blocks.0.attn.to_q"
    return save(
        {f"{key}.lora_A.weight": torch.ones(4, 999), f"{key}.lora_B.weight": torch.ones(999, 4)}
    )


def infinite() -> bytes:
    tensors = load(WEIGHTS)
    first = next(iter(tensors))
    tensors[first] = torch.full_like(tensors[first], float("inf"))
    return save(tensors)


BAD = {
    "a pickle": (b"\x80\x04\x95" + b"\x01" * 64, "NotSafetensors", "pickled"),
    "a web page": (b"<!DOCTYPE html><html>" + b" " * 100, "NotSafetensors", "not a safetensors"),
    "nothing": (b"", "NotSafetensors", "not a safetensors"),
    "cut short": (WEIGHTS[: len(WEIGHTS) // 2], "BadHeader", "truncated"),
    "longer": (WEIGHTS + b"\0" * 8, "BadHeader", "damaged"),
    "whole numbers": (with_dtype(torch.int32), "WrongDtype", "I32"),
    "foreign keys": (renamed("lora_A", "lora_C"), "UnknownKeys", "lora_C"),
    "half of it": (save({k: t for k, t in load(WEIGHTS).items() if "lora_B" not in k}),
                   "UnknownKeys", "missing"),
    "other layers": (renamed("transformer_blocks", "down_blocks"), "WrongBaseModel", "down_blocks"),
    "another width": (wide(), "WrongBaseModel", "999"),
    "infinity": (infinite(), "BadWeights", "infinity"),
}  # fmt: skip


def quiet(sentence: str) -> None:
    """Nobody listens."""


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_with_a_word_and_a_sentence(
    order: Orders, tmp_path: pathlib.Path, kind: str
) -> None:
    content, reason, says = BAD[kind]
    (tmp_path / "bad.safetensors").write_bytes(content)
    wanted = order(source={"path": str(tmp_path / "bad.safetensors")}, volumeDir=str(tmp_path))
    with pytest.raises(FetchFailed) as caught:
        run_order(wanted, quiet)
    assert (caught.value.code, says in caught.value.message) == (reason, True), caught.value
    assert "bad.safetensors" in caught.value.message
    assert str(tmp_path) not in caught.value.message
    assert [path.name for path in wanted.folder.iterdir()] == [".lock"]


def test_a_rank_above_the_limit_is_refused(order: Orders) -> None:
    source = {"builtIn": {"name": "stripes"}}
    with pytest.raises(FetchFailed, match="highest allowed is 4") as caught:
        run_order(order(source=source, maxRank=4), quiet)
    assert caught.value.code == "RankTooHigh"
    assert run_order(order(source=source, maxRank=8), quiet).rank == 8


def test_a_fetched_adapter_is_checked_again_for_a_changed_model(order: Orders) -> None:
    source = {"builtIn": {"name": "stripes"}}
    run_order(order(source=source), quiet)
    with pytest.raises(FetchFailed) as caught:
        run_order(order(source=source, maxRank=4), quiet)
    assert caught.value.code == "RankTooHigh"


def test_an_adapter_needs_its_model_but_none_of_its_weights(
    order: Orders, tmp_path: pathlib.Path
) -> None:
    source = {"builtIn": {"name": "stripes"}}
    base = order(source=source).payload()["model"]
    base["spec"]["source"] = {"path": str(tmp_path / "flux")}
    with pytest.raises(FetchFailed) as caught:
        run_order(order(source=source, model=base), quiet)
    assert caught.value.code == "BaseModelMissing"
    config = tmp_path / "flux" / "transformer" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_bytes((BUILT_IN / "shapes" / "transformer" / "config.json").read_bytes())
    assert run_order(order(source=source, model=base), quiet).rank == 8
    with pytest.raises(FetchFailed) as caught:
        run_order(order(source=source, model=None), quiet)
    assert caught.value.code == "OrderInvalid"


def test_a_full_volume_is_told_and_what_is_there_is_kept(
    order: Orders, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    wanted = order(source={"builtIn": {"name": "stripes"}})
    with pytest.raises(FetchFailed) as caught:
        run_order(wanted, quiet)
    assert caught.value.code == "VolumeFull"
    monkeypatch.undo()
    assert run_order(wanted, quiet).rank == 8


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ("", "not valid JSON"),
        ("[]", "valid dictionary"),
        ('{"kind": "adapter"}', "name"),
        ('{"kind": "model", "name": "a", "source": {"path": "x"}}', "a model, not of a adapter"),
        ('{"kind": "adapter", "name": "a", "source": {"path": "x", "s3": {"uri": "s3://bu/x"}}}',
         "exactly one"),
        ('{"kind": "adapter", "name": "../up", "source": {"path": "x"}}', "name"),
        ('{"kind": "adapter", "name": "a", "namespace": "../up", "source": {"path": "x"}}',
         "namespace"),
    ],
)  # fmt: skip
def test_a_wrong_order_is_refused(tmp_path: pathlib.Path, document: str, says: str) -> None:
    (tmp_path / "fetch.json").write_text(document)
    with pytest.raises(FetchFailed) as caught:
        read_order(tmp_path / "fetch.json", "adapter")
    assert caught.value.code == "OrderInvalid"
    assert says in caught.value.message


def test_a_report_fits_into_a_termination_message() -> None:
    modules = tuple(f"single_transformer_blocks.*.layer_{i}" for i in range(500))
    path = pathlib.Path("/var/lib/calotype/cache/adapters/a/b/c/d.safetensors")
    report = success(Fetched("1" * 40, "2" * 64, 3, path, 16, modules))
    assert len(report.encode()) <= MAX_BYTES
    assert len(json.loads(report)["targetModules"]) > 20
    report = failure(FetchFailed("ä" * 9000, code="BadHeader"))
    assert len(report.encode()) <= MAX_BYTES
    assert json.loads(report)["message"].startswith("ääää")


@pytest.mark.slow
def test_the_command_reports_as_the_operator_reads(order: Orders, tmp_path: pathlib.Path) -> None:
    def run(document: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        (tmp_path / "fetch.json").write_text(json.dumps(document))
        done = subprocess.run(
            [sys.executable, "-m", "calotype.serving", "fetch", "adapter",
             "--config", str(tmp_path / "fetch.json"), "--result", str(tmp_path / "result")],
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert json.loads(done.stdout) == json.loads((tmp_path / "result").read_text())
        return done.returncode, json.loads(done.stdout)

    wanted = order(source={"builtIn": {"name": "stripes"}})
    document = wanted.model_dump(mode="json", by_alias=True, exclude_none=True)
    code, report = run(document)
    assert code == 0
    assert report["ok"] is True
    assert report.keys() == {
        "version", "ok", "resolvedRevision", "sha256", "sizeBytes", "rank", "targetModules", "path"
    }  # fmt: skip
    assert pathlib.Path(report["path"]).read_bytes() == WEIGHTS
    code, report = run(document | {"maxBytes": 10})
    assert (code, report["ok"], report["reason"]) == (1, False, "TooLarge")
    assert report["message"]
