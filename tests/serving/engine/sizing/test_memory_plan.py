"""Memory plans of the full-size models, and that they count what the modules have."""

from __future__ import annotations

import pytest

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.engine.model.autoencoder import Autoencoder
from calotype.serving.engine.model.components import load_components
from calotype.serving.engine.model.quantization import is_quantised
from calotype.serving.engine.model.text_model import TextModel
from calotype.serving.engine.model.transformer import Transformer
from calotype.serving.engine.model.weight_files import unfilled
from calotype.serving.engine.sizing.configs import (
    AutoencoderConfig,
    TextModelConfig,
    TransformerConfig,
)
from calotype.serving.engine.sizing.memory_plan import GPUS, plan_memory
from calotype.serving.engine.sizing.model_sizes import KNOWN_MODELS, measure_model
from calotype.serving.engine.sizing.parameters import PartSize
from calotype.serving.testing.models import save_tiny_flux2


def test_flux2_dev_has_its_published_size():
    sizes = measure_model("flux-2-dev")
    assert sizes.denoiser.parameters == pytest.approx(32.22e9, rel=1e-3)
    # 30 of 40 layers of a 23.6 B language model, without its head.
    assert sizes.text_encoder.parameters == pytest.approx(17.3e9, rel=0.01)
    assert sizes.vae.parameters == pytest.approx(84e6, rel=0.01)


@pytest.mark.parametrize(
    ("name", "billions"), [("flux-2-klein-9b", 9.08), ("flux-2-klein-4b", 3.88)]
)
def test_klein_sizes(name, billions):
    assert measure_model(name).denoiser.parameters == pytest.approx(billions * 1e9, rel=0.01)


def test_dev_on_an_80_gb_gpu_puts_the_text_encoder_apart():
    plan = plan_memory("flux-2-dev", "a100-80gb")
    assert (plan.precision, plan.text_encoder) == ("bfloat16", "separate")
    assert plan.used("denoiser GPU") == pytest.approx(68e9, rel=0.05)
    assert 0 < plan.headroom < 20e9
    lines = plan.lines()
    assert any("denoiser" in line and "32.22 B" in line and "64.4" in line for line in lines)
    assert any("text encoder GPU" in line for line in lines)


@pytest.mark.parametrize(
    ("gpu", "precision", "place"),
    [
        ("h200-141gb", "bfloat16", "same"),
        ("a100-40gb", "int8", "separate"),
        ("b200-192gb", "bfloat16", "same"),
    ],
)
def test_the_best_that_fits_is_chosen(gpu, precision, place):
    plan = plan_memory("flux-2-dev", gpu)
    assert (plan.precision, plan.text_encoder) == (precision, place)
    assert plan.headroom >= 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"gpu": "a100-80gb", "precision": "bfloat16", "text_encoder": "same"},
            "102.4 GB .* but the a100-80gb has 84.9 GB; it fits with the text encoder as its own",
        ),
        ({"gpu": "a100-40gb", "precision": "bfloat16"}, "it fits with precision int8"),
        ({"gpu": "rtx-4090-24gb"}, "it fits on the a100-40gb"),
        ({"gpu": "a100-80gb", "precision": "fp8"}, "fp8 needs tensor cores that the a100-80gb"),
        ({"gpu": "a100-80gb", "precision": "nvfp4"}, "use int8"),
        ({"gpu": "h100-80gb", "precision": "fp8"}, "not among the precisions"),
        ({"gpu": "a100-80gb", "precision": "half"}, "must be one of float32, bfloat16, int8"),
        ({"gpu": "tpu-v5"}, "gpu must be one of .*a100-80gb"),
        ({"gpu": "a100-80gb", "max_pixels": 10**9}, "no known GPU holds it"),
        ({"gpu": "a100-80gb", "text_encoder": "elsewhere"}, "'same' or 'separate'"),
    ],
)
def test_what_cannot_be_is_refused_with_what_would(arguments, sentence):
    with pytest.raises(InvalidRequest, match=sentence) as caught:
        plan_memory("flux-2-dev", **arguments)
    assert str(caught.value).count(". ") == 0, "one sentence"


def test_unknown_model():
    with pytest.raises(InvalidRequest, match=r"flux-2-dev.*or a folder; got 'flux-3'"):
        plan_memory("flux-3", "a100-80gb")


@pytest.mark.parametrize("klein", [False, True])
def test_local_folder_is_counted_as_it_is_loaded(tmp_path, klein):
    folder = save_tiny_flux2(tmp_path / "model", klein=klein)
    sizes, loaded = measure_model(folder), load_components(folder)
    for counted, module in (
        (sizes.denoiser, loaded.denoiser),
        (sizes.vae, loaded.vae),
        (sizes.text_encoder, loaded.text_encoder.model),
    ):
        assert counted.parameters == sum(p.numel() for p in module.parameters())
    assert plan_memory(folder, "l4-24gb").text_encoder == "same"


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_known_models_are_counted_as_their_modules_are_built(name):
    known, sizes = KNOWN_MODELS[name], measure_model(name)
    text = TextModelConfig.from_json(known.text, known.text_kind)
    with unfilled():
        denoiser = Transformer(TransformerConfig.from_json(known.denoiser))
        text_encoder = TextModel(text, known.out_layers[-1])
        vae = Autoencoder(AutoencoderConfig())
    assert sizes.vae == PartSize(sum(p.numel() for p in vae.parameters()))
    for counted, module in ((sizes.denoiser, denoiser), (sizes.text_encoder, text_encoder)):
        weights = [m.weight for n, m in module.named_modules() if is_quantised(m, n)]
        assert counted == PartSize(
            sum(p.numel() for p in module.parameters()),
            sum(w.numel() for w in weights),
            sum(w.shape[0] for w in weights),
        )


def test_larger_pictures_need_more_memory():
    small = plan_memory("flux-2-dev", "h200-141gb", max_pixels=512 * 512)
    large = plan_memory("flux-2-dev", "h200-141gb", max_pixels=2048 * 2048)
    assert large.headroom < small.headroom - 5e9


def test_gpus_hold_a_little_less_than_their_names_say():
    for name, gpu in GPUS.items():
        said = float(name.rsplit("-", 1)[1].removesuffix("gb"))
        assert 0.85 * said * 1024**3 < gpu.memory <= said * 1.08e9
