"""Folders laid out as FLUX.2 [dev] and [klein] are published: loaded, like diffusers, served."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from e2e.conftest import Running
from PIL import Image
from samples.images import same_pixels

from calotype.serving.engine.model.components import load_components
from calotype.serving.testing.full_models import save_full_flux2

pytestmark = pytest.mark.slow
KINDS = ("dev", "klein")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("full")
    return {kind: save_full_flux2(place / kind, klein=kind == "klein") for kind in KINDS}


def pipeline_of(folder):
    """As a user of diffusers gets it: everything, the tokenizer too, read by diffusers."""
    from diffusers import Flux2KleinPipeline, Flux2Pipeline

    kind = Flux2KleinPipeline if folder.name == "klein" else Flux2Pipeline
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_layout_draws_what_diffusers_draws(folders, kind, new_engine, make_request):
    folder = folders[kind]
    for part in ("transformer", "text_encoder"):
        assert len(list((folder / part).glob("*-of-*.safetensors"))) > 5, "it is sharded"
    assert not (folder / "calotype.json").exists()
    components = load_components(folder)
    assert components.settings.max_sequence_length == 512
    # FLUX.2 reads three hidden states of its text encoder; what lies behind them is not loaded.
    read = {"dev": (10, 20, 30), "klein": (9, 18, 27)}[kind]
    assert components.settings.text_encoder_out_layers == read
    assert len(components.text_encoder.model.layers) == read[-1]
    engine = new_engine(components)
    engine.add(make_request(prompt="a red circle", steps=2))
    theirs = pipeline_of(folder)(
        prompt="a red circle",
        width=64,
        height=64,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="np",
    ).images[0]
    np.testing.assert_allclose(engine.run().image("r"), theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 0.03


def test_published_layouts_are_served(folders, tmp_path):
    manifests = tmp_path / "models"
    manifests.mkdir()
    for kind, precision in zip(KINDS, ("bfloat16", "int8"), strict=True):
        (manifests / f"{kind}.yaml").write_text(
            f"""
apiVersion: calotype.dev/v1alpha1
kind: ImageModel
metadata: {{name: {kind}}}
spec:
  source: {{path: {folders[kind]}}}
  precision: {precision}
  device: cpu
  defaults: {{steps: 2, guidanceScale: 3.0, size: 64x64}}
"""
        )
    with Running(tmp_path, ["-f", str(manifests)]).served() as running:
        for kind in KINDS:
            file = running.draw("a red circle", model=kind)
            assert same_pixels(running.draw("a red circle", model=kind), file)
            pixels = np.asarray(Image.open(io.BytesIO(file)))
            assert pixels.shape == (64, 64, 3) and pixels.std() > 5
