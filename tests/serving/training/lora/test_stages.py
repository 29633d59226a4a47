"""From a folder of pictures to an adapter that the serving engine draws with."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from samples import framed

from calotype.serving.config import local_model
from calotype.serving.config.rights import Rights
from calotype.serving.core.errors import TrainingFailed
from calotype.serving.engine.lora.lora_file import linear_shapes, read_lora
from calotype.serving.engine.model.components import Components
from calotype.serving.engine.sizing.weight_header import read_header
from calotype.serving.training.dataset.captions import Wording
from calotype.serving.training.dataset.preparation import Options
from calotype.serving.training.lora.recipe import build_recipe
from calotype.serving.training.lora.reporting import EventLog, TensorBoardSink
from calotype.serving.training.lora.stages import Run, read_config, train_lora
from calotype.serving.training.lora.trainer import Price
from calotype.serving.wire.training_progress import read_events


@dataclass(frozen=True)
class Allowed:
    blocked: bool = False
    unavailable: bool = False
    reason: str | None = None
    categories: Sequence[str] = field(default_factory=tuple)


class AllowsAll:
    """A safety stage that has nothing against drawn shapes."""

    def check_prompt(self, text: str) -> Allowed:
        return Allowed()

    def check_image(self, pixels: object, *, prompt: str = "") -> Allowed:
        return Allowed()


def test_a_folder_becomes_an_adapter_with_samples_events_and_origins(
    components: Components, tmp_path: pathlib.Path
) -> None:
    framed.write_data_set(tmp_path / "pictures", count=6)
    model = local_model("shapes")
    recipe = build_recipe(
        read_config(model), side=128, serving_guidance=3.0, steps=3, batch=2, sample_every=2
    )
    work = tmp_path / "work"
    run = Run(
        model,
        str(tmp_path / "pictures"),
        Options(
            resolution=128,
            wording=Wording("zorbl", "simple"),
            rights=Rights(basis="own", holder="tests"),
        ),
        recipe,
        "zorbl",
        ("simple",),
        work,
        tmp_path / "zorbl.safetensors",
        prompts=("a red circle on a blue background, zorbl",),
    )
    board = TensorBoardSink(work)
    events = EventLog(work, (board,))
    made = train_lora(run, events, screen=AllowsAll(), price=Price(36.0))
    board.close()
    assert made == run.output
    read = read_lora(made, linear_shapes(components.denoiser), max_rank=8, dtype=torch.float32)
    assert len(read.layers) == 20, "12 of the double block and 2 of each of 4 single ones"
    metadata = json.loads(read_header(made, TrainingFailed).metadata["calotype"])
    assert metadata["triggerWord"] == "zorbl"
    assert metadata["recipe"]["rank"] == 8
    assert metadata["baseDigest"] == components.fingerprint
    told = list(read_events(work))
    assert [event.sequence for event in told] == list(range(1, len(told) + 1))
    kinds = [event.type for event in told]
    assert kinds[:3] == ["dataset_checked", "cache_written", "started"]
    assert kinds[-1] == "succeeded"
    (sample,) = [event for event in told if event.type == "sample_drawn"]
    assert (work / str(sample.file)).read_bytes().startswith(b"\x89PNG")
    (cost,) = {event.cost for event in told if event.type == "step"}
    assert cost is not None
    assert cost > 0
    assert list((work / "tensorboard").iterdir())
    assert train_lora(run, EventLog(work), screen=AllowsAll(), price=Price()) == made
    again = read_lora(made, linear_shapes(components.denoiser), max_rank=8, dtype=torch.float32)
    for name, layer in read.layers.items():
        assert torch.equal(again.layers[name].up, layer.up), "it is not trained again"
    assert [e.type for e in read_events(work, after=len(told))] == [
        "dataset_checked", "resumed", "succeeded"
    ]  # fmt: skip
