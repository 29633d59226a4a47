"""Model folders: what is refused by name, and that only the parts asked for are loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file

from calotype.serving.core.errors import ModelLoadFailed
from calotype.serving.engine.model.components import load_components
from calotype.serving.engine.model.tokenizer import load_tokenizer
from calotype.serving.engine.sizing.configs import TextModelConfig


def load_file(path):
    # Not safetensors' load_file, which maps the file: these tests write over what they read.
    return load(path.read_bytes())


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def edited(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut(name, left):
    def change(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:left])

    return change


def pickled_in_its_place(folder):
    torch.save(load_file(folder / WEIGHTS), folder / WEIGHTS)


def pickled_beside(folder):
    torch.save({}, folder / "vae" / "diffusion_pytorch_model.bin")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()


def without_one_tensor(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["proj_out.weight"]
    save_file(tensors, folder / WEIGHTS)


def with_one_more(folder):
    save_file(load_file(folder / WEIGHTS) | {"extra.weight": torch.zeros(2)}, folder / WEIGHTS)


def of_another_shape(folder):
    edited(folder / "transformer" / "config.json", joint_attention_dim=100)


def shard_outside(folder):
    index = {"weight_map": {"proj_out.weight": "../../secret.safetensors"}}
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


FAULTS = {
    "no index": (remove("model_index.json"), "model_index.json is missing"),
    "no weights": (remove(WEIGHTS), f"{WEIGHTS} is missing"),
    "no config": (remove("vae/config.json"), "vae/config.json is missing"),
    "no tokenizer": (remove("tokenizer/tokenizer.json"), "tokenizer.json is missing"),
    "no template": (remove("tokenizer/chat_template.jinja"), "no chat template"),
    "truncated": (cut(WEIGHTS, -100), f"{WEIGHTS} is truncated"),
    "truncated header": (cut(WEIGHTS, 300), f"{WEIGHTS} is truncated"),
    "empty": (cut(WEIGHTS, 0), f"{WEIGHTS} is not a safetensors file"),
    "truncated encoder": (cut("text_encoder/model.safetensors", -1), "model.safetensors is trunc"),
    "pickled": (pickled_in_its_place, f"{WEIGHTS} is a pickled file"),
    "pickled beside": (pickled_beside, "diffusion_pytorch_model.bin is a pickled file"),
    "tensor missing": (without_one_tensor, "lacks 1 tensors of the model: 'proj_out.weight'"),
    "tensor unknown": (with_one_more, "'extra.weight', which the model does not have"),
    "wrong shape": (of_another_shape, "context_embedder.weight.*config.json says"),
    "shard outside": (shard_outside, "no safetensors file beside it"),
    "damaged json": (cut("vae/config.json", 20), "vae/config.json is not valid JSON"),
    "another pipeline": (
        lambda f: edited(f / "model_index.json", _class_name="FluxPipeline"),
        "names the pipeline 'FluxPipeline'",
    ),
    "another denoiser": (
        lambda f: edited(f / "transformer" / "config.json", _class_name="FluxTransformer2DModel"),
        "names 'FluxTransformer2DModel'",
    ),
    "quantised": (
        lambda f: edited(f / "transformer" / "config.json", quantization_config={"bits": 4}),
        "is quantised",
    ),
    "layer too high": (
        lambda f: edited(f / "calotype.json", text_encoder_out_layers=[10, 20, 30]),
        "has 4 layers, but layer 30",
    ),
    "stochastic": (
        lambda f: edited(f / "scheduler" / "scheduler_config.json", stochastic_sampling=True),
        "stochastic_sampling is not supported",
    ),
    "silly length": (
        lambda f: edited(f / "calotype.json", max_sequence_length="many"),
        "max_sequence_length must be",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_bad_folder_is_refused_by_name(model_folder, tmp_path, name):
    change, message = FAULTS[name]
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    change(folder)
    with pytest.raises(ModelLoadFailed, match=message) as caught:
        load_components(folder)
    assert str(folder) in str(caught.value)
    assert str(caught.value).endswith(".")


def test_missing_folder_and_unknown_precision(tmp_path, model_folder):
    with pytest.raises(ModelLoadFailed, match="is no folder"):
        load_components(tmp_path / "nowhere")
    with pytest.raises(ModelLoadFailed, match="float32, bfloat16 or int8, got 'fp8'"):
        load_components(model_folder, precision="fp8")


def test_int8_says_what_to_install(model_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ModelLoadFailed, match="pip install torchao"):
        load_components(model_folder, parts=("denoiser",), precision="int8")


def test_damage_in_parts_that_are_not_asked_for_does_not_matter(model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / WEIGHTS).unlink()
    loaded = load_components(folder, parts=("text_encoder",))
    for part in ("denoiser", "vae"):
        with pytest.raises(ValueError, match="was not loaded"):
            getattr(loaded, part)
    assert loaded.text_encoder.encode(["a red circle"])[0].token_count > 3


def test_sharded_weights_give_the_same_model(model_folder, tmp_path, components):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    half = len(names) // 2
    shards = {"a-00001.safetensors": names[:half], "a-00002.safetensors": names[half:]}
    for shard, keys in shards.items():
        save_file({k: tensors[k] for k in keys}, folder / "transformer" / shard)
    (folder / WEIGHTS).unlink()
    places = {k: shard for shard, keys in shards.items() for k in keys}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))
    loaded = load_components(folder, parts=("denoiser",)).denoiser.state_dict()
    for name, tensor in components.denoiser.state_dict().items():
        assert torch.equal(loaded[name], tensor)
    (folder / "transformer" / "a-00002.safetensors").unlink()
    with pytest.raises(ModelLoadFailed, match=r"a-00002.safetensors is missing"):
        load_components(folder, parts=("denoiser",))


def test_layers_above_the_last_one_read_are_not_loaded(components, model_folder):
    config = json.loads((model_folder / "text_encoder" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 4
    assert len(components.text_encoder.model.layers) == 3


@pytest.mark.parametrize("left", [False, True], ids=["pad right", "pad left"])
@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["cut", "to the last layer"])
def test_text_model_equals_transformers(model_folder, tmp_path, left, whole):
    from transformers import Mistral3ForConditionalGeneration, PreTrainedTokenizerFast

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    edited(folder / "tokenizer" / "tokenizer_config.json", padding_side="left" if left else "right")
    layers = [0, 2, 4] if whole else [1, 2, 3]
    edited(folder / "calotype.json", text_encoder_out_layers=layers)
    (ours,) = load_components(folder, parts=("text_encoder",)).text_encoder.encode(["a red star"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    assert tokenizer.padding_side == ("left" if left else "right")
    theirs = Mistral3ForConditionalGeneration.from_pretrained(folder / "text_encoder")
    text = load_tokenizer(folder / "tokenizer").render(
        [
            {"role": "system", "content": [{"text": "You are an AI"}]},
            {"role": "user", "content": [{"text": "a red star"}]},
        ]
    )
    inputs = tokenizer(
        text, add_special_tokens=False, padding="max_length", max_length=32, return_tensors="pt"
    )
    with torch.no_grad():
        states = theirs(
            **{k: inputs[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True
        ).hidden_states
    wanted = torch.cat([states[k][0] for k in layers], dim=-1)
    real = inputs["attention_mask"][0].bool()
    np.testing.assert_allclose(ours.embeds[real], wanted[real], atol=1e-5, rtol=0)
    np.testing.assert_allclose(ours.embeds, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"sliding_window": 128}, "sliding"),
        ({"attention_bias": True}, "biases"),
    ],
)
def test_language_models_that_compute_something_else_are_refused(model_folder, change, message):
    config = json.loads((model_folder / "text_encoder" / "config.json").read_text())["text_config"]
    with pytest.raises(ValueError, match=message):
        TextModelConfig.from_json(config | change, "mistral3")


def in_a_fresh_process(code):
    """What the code prints, in a process that has imported nothing."""
    head = "import sys, torch\ntorch.set_num_threads(1)\n"
    tail = "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", head + code + tail],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    return done.stdout.splitlines()


UNUSED = {"diffusers", "transformers", "sympy", "scipy", "peft", "accelerate"}


@pytest.mark.slow
def test_text_encoder_process_imports_no_model_library(model_folder):
    (modules,) = in_a_fresh_process(
        "from calotype.serving.engine.model.components import load_components\n"
        f"loaded = load_components({str(model_folder)!r}, parts=('text_encoder',))\n"
        "loaded.text_encoder.encode(['a red circle'])\n"
    )
    assert "tokenizers" in modules.split()
    assert not set(modules.split()) & UNUSED


def test_generator_process_imports_no_model_library_and_draws_the_same(
    model_folder, engine, make_request
):
    request = make_request()
    digest, modules = in_a_fresh_process(
        "import hashlib, numpy\n"
        "from calotype.serving.engine.model.components import load_components\n"
        "from calotype.serving.engine.engine import Engine\n"
        "from calotype.serving.core.request import GenerationRequest\n"
        f"components = load_components({str(model_folder)!r})\n"
        "engine = Engine(components)\n"
        f"engine.add(GenerationRequest.from_payload({request.to_payload()!r}))\n"
        "while engine.has_work: events = engine.step()\n"
        "print(hashlib.sha256(events[-1].images[0].tobytes()).hexdigest())\n"
    )
    assert not set(modules.split()) & UNUSED
    engine.add(request)
    (pixels,) = engine.run().ending("r").images
    assert digest == hashlib.sha256(pixels.tobytes()).hexdigest()
