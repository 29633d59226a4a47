"""LoRA files of every trainer: read as diffusers reads them, or refused by name."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from calotype.serving.core.errors import AdapterLoadFailed
from calotype.serving.core.request import AdapterRef
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.engine.lora.lora_file import read_lora
from calotype.serving.engine.model.components import load_components
from calotype.serving.engine.sizing.configs import TransformerConfig
from calotype.serving.engine.sizing.linear_layers import linear_layers
from calotype.serving.engine.sizing.model_sizes import KNOWN_MODELS
from calotype.serving.testing.models import save_random_lora, save_tiny_flux2

CLOSE = {"atol": 1e-4, "rtol": 0}
WAIT = 30.0
Q = "transformer.transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def lora_file(model_folder, tmp_path_factory):
    return save_random_lora(
        model_folder, tmp_path_factory.mktemp("l") / "one.safetensors", 4, seed=1
    )


@pytest.fixture
def store(components, lora_file):
    store = AdapterStore(components.denoiser)
    store.load("one", lora_file, wait=WAIT)
    yield store
    store.layers.remove()


def write(path: pathlib.Path, tensors: dict[str, torch.Tensor]) -> pathlib.Path:
    save_file({k: v.clone() for k, v in tensors.items()}, str(path))
    return path


def renamed(rename):
    return lambda tensors: {rename(k): v for k, v in tensors.items()}


def bfl(tensors):
    """Black Forest Labs' names, with fused query, key and value, of a few layers."""
    q, single = Q, "transformer.single_transformer_blocks.1.attn.to_out"
    qkv = torch.cat([tensors[f"{q}.lora_B.weight"], torch.zeros(128, 4)])
    return {
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": tensors[f"{q}.lora_A.weight"],
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": qkv,
        "diffusion_model.single_blocks.1.linear2.lora_A.weight": tensors[f"{single}.lora_A.weight"],
        "diffusion_model.single_blocks.1.linear2.lora_B.weight": tensors[f"{single}.lora_B.weight"],
    }


def fal(tensors):
    """BFL's names behind PEFT's prefix, with the guidance layers that its trainer writes."""
    extra = {
        "base_model.model.guidance_in.in_layer.lora_A.weight": torch.zeros(4, 32),
        "base_model.model.guidance_in.in_layer.lora_B.weight": torch.zeros(64, 4),
    }
    return extra | {
        key.replace("diffusion_model.", "base_model.model."): value
        for key, value in bfl(tensors).items()
    }


def expanded(tensors):
    """ai-toolkit's prefix before diffusers' names, some of them cut short."""
    block = "transformer_blocks.0.attn.to_q"
    return {
        f"diffusion_model.sformer_blocks{block.removeprefix('transformer_blocks')}.{end}": tensors[
            f"transformer.{block}.{end}"
        ]
        for end in ("lora_A.weight", "lora_B.weight")
    }


def kohya(tensors):
    names = {
        "lora_unet_single_blocks_1_linear2": "transformer.single_transformer_blocks.1.attn.to_out",
        "lora_unet_double_blocks_0_img_mlp_0": "transformer.transformer_blocks.0.ff.linear_in",
    }
    return {
        key: value
        for new, old in names.items()
        for key, value in {
            f"{new}.lora_down.weight": tensors[f"{old}.lora_A.weight"],
            f"{new}.lora_up.weight": tensors[f"{old}.lora_B.weight"],
            f"{new}.alpha": torch.tensor(2.0),
        }.items()
    }


def with_alphas(tensors):
    modules = {k.removesuffix(".lora_A.weight") for k in tensors if k.endswith("lora_A.weight")}
    return tensors | {f"{module}.alpha": torch.tensor(2.0) for module in modules}


@pytest.mark.parametrize("form", [bfl, fal, expanded, kohya], ids=lambda f: f.__name__)
def test_other_trainers_files_equal_diffusers_reading_of_them(
    model_folder, lora_file, tmp_path, load_oracle, draw_with, new_engine, make_request, form
):
    path = write(tmp_path / "other.safetensors", form(load_file(str(lora_file))))
    pipeline = load_oracle(model_folder)
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name="other")
    engine = new_engine()
    engine.adapters.load("other", path, wait=WAIT)
    engine.add(make_request(adapters=(AdapterRef("other"),)))
    engine.add(make_request("plain"))
    drawn = engine.run()
    np.testing.assert_allclose(drawn.image("r"), draw_with(pipeline), **CLOSE)
    assert np.abs(drawn.image("r") - drawn.image("plain")).max() > 1e-3
    engine.adapters.layers.remove()


@pytest.mark.parametrize(
    ("form", "scale"),
    [
        (renamed(lambda k: k.replace("transformer.", "base_model.model.", 1)), 1.0),
        (renamed(lambda k: k.replace(".weight", ".default.weight")), 1.0),
        (with_alphas, 0.5),
    ],
    ids=["peft", "peft-live", "alpha"],
)
def test_spellings_of_peft_keys(lora_file, tmp_path, new_engine, store, make_request, form, scale):
    tensors = load_file(str(lora_file))
    store.load("other", write(tmp_path / "other.safetensors", form(tensors)), wait=WAIT)
    engine = new_engine(adapters=store)
    engine.add(make_request("a", adapters=(AdapterRef("one", scale),)))
    engine.add(make_request("b", adapters=(AdapterRef("other", 1.0),)))
    drawn = engine.run()
    np.testing.assert_allclose(drawn.image("a"), drawn.image("b"), atol=1e-5, rtol=0)


def alphas_of_bfl(tensors):
    found = bfl(tensors)
    modules = {k.removesuffix(".lora_A.weight") for k in found if k.endswith("lora_A.weight")}
    return found | {f"{module}.alpha": torch.tensor(2.0) for module in modules}


@pytest.mark.parametrize(
    ("form", "scale"),
    [
        (lambda t: {k.removeprefix("diffusion_model."): v for k, v in bfl(t).items()}, 1.0),
        (
            lambda t: {
                k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): v
                for k, v in bfl(t).items()
            },
            1.0,
        ),
        (alphas_of_bfl, 0.5),
    ],
    ids=["no prefix", "down and up", "alpha"],
)
def test_spellings_that_diffusers_does_not_read(
    lora_file, tmp_path, new_engine, components, make_request, form, scale
):
    """diffusers 0.42 refuses alpha here, and reads none of the other two without a word."""
    tensors = load_file(str(lora_file))
    store = AdapterStore(components.denoiser)
    store.load("known", write(tmp_path / "known.safetensors", bfl(tensors)), wait=WAIT)
    store.load("other", write(tmp_path / "other.safetensors", form(tensors)), wait=WAIT)
    engine = new_engine(adapters=store)
    engine.add(make_request("a", adapters=(AdapterRef("known", scale),)))
    engine.add(make_request("b", adapters=(AdapterRef("other", 1.0),)))
    drawn = engine.run()
    np.testing.assert_allclose(drawn.image("a"), drawn.image("b"), atol=1e-5, rtol=0)
    store.layers.remove()


def test_guidance_layers_that_do_nothing_are_left_out_for_a_model_that_takes_none(
    tmp_path, lora_file, new_engine, make_request
):
    model = load_components(save_tiny_flux2(tmp_path / "klein", klein=True))
    tensors = load_file(str(lora_file))
    engine = new_engine(model)
    for name, form in (("fal", fal), ("bfl", bfl)):
        path = write(tmp_path / f"{name}.safetensors", form(tensors))
        engine.adapters.load(name, path, wait=WAIT)
        engine.add(make_request(name, adapters=(AdapterRef(name),)))
    drawn = engine.run()
    assert np.array_equal(drawn.image("fal"), drawn.image("bfl"))
    trained = {key: value + 1 for key, value in fal(tensors).items()}
    path = write(tmp_path / "trained.safetensors", trained)
    with pytest.raises(AdapterLoadFailed, match="no linear layer 'time_guidance_embed"):
        engine.adapters.load("trained", path, wait=WAIT)


def test_the_last_modulation_is_turned_as_the_models_own_converter_turns_it(
    model_folder, tmp_path, load_oracle, draw_with, new_engine, make_request
):
    """Compared with a model into which the adapter was merged under Black Forest Labs' names."""
    from diffusers.loaders.single_file_utils import (
        convert_flux2_transformer_checkpoint_to_diffusers,
    )

    pipeline, layer = load_oracle(model_folder), "final_layer.adaLN_modulation.1"
    generator = torch.Generator().manual_seed(1)
    down, up = (torch.randn(s, generator=generator) * 0.3 for s in ((4, 64), (128, 4)))
    state = pipeline.transformer.state_dict()
    scale, shift = state["norm_out.linear.weight"].chunk(2)
    merged = {f"{layer}.weight": torch.cat([shift, scale]) + up @ down}
    converted = convert_flux2_transformer_checkpoint_to_diffusers(merged)
    pipeline.transformer.load_state_dict(state | converted)
    factors = {f"diffusion_model.{layer}.lora_A.weight": down}
    path = write(
        tmp_path / "a.safetensors", factors | {f"diffusion_model.{layer}.lora_B.weight": up}
    )
    engine = new_engine()
    engine.adapters.load("a", path, wait=WAIT)
    engine.add(make_request(adapters=(AdapterRef("a"),)))
    engine.add(make_request("plain"))
    drawn = engine.run()
    engine.adapters.layers.remove()
    np.testing.assert_allclose(drawn.image("r"), draw_with(pipeline), **CLOSE)
    assert np.abs(drawn.image("r") - drawn.image("plain")).max() > 1e-3


def test_a_dora_of_peft_is_applied_as_peft_applies_it(
    model_folder, lora_file, tmp_path, load_oracle, draw_with, new_engine, make_request
):
    tensors = load_file(str(lora_file))
    generator = torch.Generator().manual_seed(1)
    magnitudes = {
        f"{key.removesuffix('.lora_B.weight')}.lora_magnitude_vector": 0.5
        + torch.rand(len(value), generator=generator)
        for key, value in tensors.items()
        if key.endswith("lora_B.weight")
    }
    path = write(tmp_path / "dora.safetensors", tensors | magnitudes)
    pipeline = load_oracle(model_folder)
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name="dora")
    engine = new_engine()
    engine.adapters.load("dora", path, wait=WAIT)
    engine.add(make_request(adapters=(AdapterRef("dora"),)))
    engine.add(make_request("plain"))
    drawn = engine.run()
    engine.adapters.layers.remove()
    np.testing.assert_allclose(drawn.image("r"), draw_with(pipeline), **CLOSE)
    assert np.abs(drawn.image("r") - drawn.image("plain")).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "known"),
    [("flux-2-klein-4b", "3072x3072.*6144x6144"), ("flux-2-klein-9b", "4096x4096.*6144x6144")],
)
def test_an_adapter_of_klein_on_dev_names_both_widths(tmp_path, name, known):
    config = TransformerConfig.from_json(KNOWN_MODELS[name].denoiser)
    dev = linear_layers(TransformerConfig())
    tensors = {}
    rows, columns = linear_layers(config)["transformer_blocks.0.attn.to_q"]
    tensors[f"{Q}.lora_A.weight"] = torch.zeros(2, columns)
    tensors[f"{Q}.lora_B.weight"] = torch.zeros(rows, 2)
    path = write(tmp_path / "klein.safetensors", tensors)
    with pytest.raises(AdapterLoadFailed, match=f"another model .*{name}.*{known}") as caught:
        read_lora(path, dev, max_rank=256, dtype=torch.float32)
    assert caught.value.details == {"fault": "wrong_base", "key": f"{Q}.lora_A.weight"}


def one_more(form, **keys):
    def change(tensors):
        extra = {k.replace("__", "."): torch.zeros(shape) for k, shape in keys.items()}
        return form(tensors) | extra

    return change


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            one_more(bfl, diffusion_model__double_blocks__0__img_x__lora_A__weight=(4, 64)),
            "no linear layer 'double_blocks.0.img_x' .key 'diffusion_model.double_blocks.0.img_x.",
        ),
        (
            one_more(kohya, lora_unet_double_blocks_0_img_x__lora_down__weight=(4, 64)),
            "no linear layer 'double_blocks_0_img_x' .key 'lora_unet_double_blocks_0_img_x.lora_do",
        ),
        (
            one_more(bfl, diffusion_model__double_blocks__0__img_mlp__0__alpha=(1,)),
            "img_mlp.0.alpha belongs to no weights",
        ),
        (one_more(bfl, diffusion_model__img_in__lokr_w1=(2, 2)), "its lokr_w2_a is missing"),
        (one_more(bfl, diffusion_model__img_in__hada_w1_a=(2, 2)), "its hada_w1_b is missing"),
        (one_more(bfl, diffusion_model__img_in__lokr_t2=(2, 2)), "an adapter of convolutions"),
        (one_more(bfl, diffusion_model__img_in__oft_blocks=(2, 2)), "it is an OFT adapter"),
        (one_more(bfl, diffusion_model__img_in__diff=(64, 64)), "holds whole weights"),
        (one_more(bfl, diffusion_model__img_in__lora_B__bias=(64,)), "changes biases"),
        (one_more(bfl, lora_te1_text_model__lora_A__weight=(2, 2)), "of the text encoder"),
        (one_more(kohya, lora_unet_single_blocks_1_linear2__dora_scale=(2,)), "magnitudes"),
        (
            one_more(bfl, diffusion_model__double_blocks__7__img_attn__proj__lora_A__weight=(4, 64),
                     diffusion_model__double_blocks__7__img_attn__proj__lora_B__weight=(64, 4)),
            "another model: the denoiser has no linear layer 'transformer_blocks.7.attn.to_out.0'",
        ),
    ],
)  # fmt: skip
def test_keys_that_would_be_lost_are_refused_by_name(store, lora_file, tmp_path, form, message):
    path = write(tmp_path / "bad.safetensors", form(load_file(str(lora_file))))
    with pytest.raises(AdapterLoadFailed, match=message):
        store.load("bad", path, wait=WAIT)


def test_nothing_of_a_wrong_file_is_read(store, lora_file, tmp_path, monkeypatch):
    from calotype.serving.engine.lora import lora_file as reading

    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(reading, "read_tensors", read)
    wide = {
        k: torch.cat([v, v]) if "lora_B" in k else v for k, v in load_file(str(lora_file)).items()
    }
    path = write(tmp_path / "bad.safetensors", wide)
    with pytest.raises(AdapterLoadFailed, match="made for another model"):
        store.load("bad", path, wait=WAIT)
