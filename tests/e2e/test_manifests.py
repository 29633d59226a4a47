"""`calotype serve -f`: models, adapters and policies from files, also changed while it runs."""

from __future__ import annotations

import io
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from e2e.conftest import ModelFile
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = pathlib.Path(__file__).parents[2]
ADAPTER = ROOT / "serving" / "weights" / "embedded" / "stripes.safetensors"

WRONG = """\
apiVersion: calotype.dev/v1alpha1
kind: ImageModel
metadata: {name: house-style}
spec:
  source: {builtIn: {name: shapes}}
  precison: float32
"""

LORA = """\
apiVersion: calotype.dev/v1alpha1
kind: LoRAAdapter
metadata: {name: NAME}
spec:
  modelRef: {name: shapes}
  source: {path: FILE}
"""

BLOCK_EVERY_IMAGE = """\
apiVersion: calotype.dev/v1alpha1
kind: ModerationPolicy
metadata: {name: nothing-passes}
spec:
  version: 1
  categories:
    sexual: {image: {block: 0.0}, tile: {block: 0.0}}
"""


@pytest.fixture(scope="module")
def folder(shapes: ModelFile) -> pathlib.Path:
    return shapes.folder


@pytest.fixture(scope="module")
def house(service: Any, folder: pathlib.Path, shapes: ModelFile) -> Iterator[Any]:
    """The shared service with one more adapter, from a file."""
    shutil.copy(ADAPTER, folder / "good.bin.safetensors")
    (folder / "good.yaml").write_text(
        LORA.replace("NAME", "good").replace("FILE", "good.bin.safetensors")
    )
    service.wait_for(
        lambda: service.status()["adapters"].get("good") == "ready", "the adapter is loaded"
    )
    yield service
    shapes.clear()
    service.wait_for(lambda: set(service.status()["adapters"]) == {"stripes"}, "it is gone")


def pixels(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


def test_an_adapter_changes_the_picture_as_far_as_its_scale_says(house: Any) -> None:
    def draw(scale: float | None) -> Any:
        loras = [] if scale is None else [{"id": "good", "scale": scale}]
        return pixels(house.draw("a large red square on a white background", loras=loras))

    none, off, half, full = draw(None), draw(0.0), draw(0.5), draw(1.0)
    assert np.array_equal(none, off)
    changed_half, changed_full = abs(half - none).mean(), abs(full - none).mean()
    assert 0 < changed_half < changed_full
    assert (abs(full - none).max(axis=2) > 60).mean() > 0.02, "the change can be seen"


def test_a_changed_adapter_file_is_loaded_beside_the_old_one(
    house: Any, folder: pathlib.Path
) -> None:
    from safetensors.torch import load, save

    prompt = "a large red square on a white background"

    # Pixels, because the file tells its recipe too: the digests of what was asked for.
    def draw(**loras: Any) -> bytes:
        return bytes(pixels(house.draw(prompt, **loras)).tobytes())

    def adapted() -> bytes:
        return draw(loras=[{"id": "good", "scale": 1.0}])

    file = folder / "good.bin.safetensors"
    before, plain, whole = adapted(), draw(), file.read_bytes()
    replace(file, whole[:100])
    house.wait_for(lambda: house.status()["adapters"]["good"] != "ready", "the fault is told")
    assert adapted() == before, "a failing new revision leaves the old one serving"
    replace(file, save({name: 0 * tensor for name, tensor in load(whole).items()}))
    house.wait_for(lambda: adapted() == plain, "an adapter of zeros changes nothing")
    replace(file, whole)
    house.wait_for(lambda: adapted() == before, "the first revision is back")


def replace(file: pathlib.Path, data: bytes) -> None:
    """As careful tools do: the new file appears whole."""
    fresh = file.with_suffix(".new")
    fresh.write_bytes(data)
    fresh.replace(file)


def test_damaged_adapters_are_refused_by_name_and_the_service_goes_on(
    house: Any, folder: pathlib.Path
) -> None:
    whole = ADAPTER.read_bytes()
    bad = {
        "pickled": b"\x80\x04\x95" + b"\x00" * 64,
        "truncated": whole[: len(whole) // 2],
        "foreign": foreign_adapter(),
    }
    for name, data in bad.items():
        (folder / f"{name}.weights").write_bytes(data)
        (folder / f"{name}.yaml").write_text(
            LORA.replace("NAME", name).replace("FILE", f"{name}.weights")
        )
    house.wait_for(
        lambda: all(house.status()["adapters"].get(n, "loading") != "loading" for n in bad),
        "every adapter was looked at",
    )
    for name in bad:
        assert f"{name}.weights" in house.status()["adapters"][name]
        with house.http() as client:
            answer = client.post(
                "/v1/images/generations",
                json={"prompt": "a red circle", "loras": [{"id": name}]},
            )
        assert answer.status_code >= 400
        assert name in answer.json()["error"]["message"]
    assert house.draw(loras=[{"id": "good", "scale": 1}]).startswith(b"\x89PNG")
    for name in bad:
        (folder / f"{name}.yaml").unlink()
    house.wait_for(lambda: set(house.status()["adapters"]) == {"good", "stripes"}, "they are gone")


def test_a_picture_that_the_filter_blocks_exists_nowhere(house: Any, folder: pathlib.Path) -> None:
    policy = folder / "policy.yaml"
    policy.write_text(BLOCK_EVERY_IMAGE)
    reached: list[openai.BadRequestError] = []
    before: set[pathlib.Path] = set()

    def refused() -> bool:
        nonlocal before
        before = house.images()
        try:
            house.sdk().images.generate(model="dall-e-3", prompt="a red circle")
        except openai.BadRequestError as error:
            reached.append(error)
        return bool(reached)

    house.wait_for(refused, "the policy reached the moderator")
    body: Any = reached[0].body
    assert reached[0].code == "moderation_blocked"
    assert body["moderation_details"] == {"moderation_stage": "output", "categories": ["sexual"]}
    assert body["moderation"]["policy"] == "nothing-passes@1"
    assert house.images() == before
    policy.unlink()
    house.wait_for(lambda: not _refuses(house), "the default policy is back")


def test_a_wrong_manifest_changes_nothing_and_is_named(house: Any, folder: pathlib.Path) -> None:
    wrong = folder / "wrong.yaml"
    wrong.write_text(WRONG)
    house.wait_for(lambda: "precison" in house.log.read_text(), "the fault is told")
    assert "wrong.yaml" in house.log.read_text()
    assert house.draw().startswith(b"\x89PNG")
    wrong.unlink()


def _refuses(house: Any) -> bool:
    with house.http() as client:
        answer = client.post("/v1/images/generations", json={"prompt": "a red circle"})
    return bool(answer.status_code == 400)


def foreign_adapter() -> bytes:
    """A whole LoRA file for a model of another width."""
    import torch
    from safetensors.torch import save

    key = "transformer.transformer_blocks.0.attn.to_q"
    return save(
        {f"{key}.lora_A.weight": torch.ones(4, 999), f"{key}.lora_B.weight": torch.ones(999, 4)}
    )
