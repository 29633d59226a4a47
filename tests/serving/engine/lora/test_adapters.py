"""LoRA adapters: parity with diffusers, rows with different stacks, and the store."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from calotype.serving.core.errors import AdapterLoadFailed, InvalidRequest, NotFound
from calotype.serving.core.request import AdapterRef, Failed
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.testing.models import LORA_TARGETS, save_random_lora

CLOSE = {"atol": 1e-4, "rtol": 0}
WAIT = 30.0


@pytest.fixture(scope="module")
def lora_files(model_folder, tmp_path_factory) -> dict[str, pathlib.Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {
        "one": save_random_lora(model_folder, folder / "one.safetensors", 4, seed=1),
        "two": save_random_lora(
            model_folder, folder / "two.safetensors", 2, seed=2, targets=LORA_TARGETS[2:], alpha=3.0
        ),
    }


@pytest.fixture(scope="module")
def lora_oracle(model_folder, load_oracle, lora_files):
    pipeline = load_oracle(model_folder)
    for name, path in lora_files.items():
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    return pipeline


@pytest.fixture
def store(components, lora_files):
    store = AdapterStore(components.denoiser)
    for name, path in lora_files.items():
        store.load(name, path, wait=WAIT)
    yield store
    store.layers.remove()


@pytest.mark.parametrize(
    "stack",
    [
        (("one", 0.0),),
        (("one", 0.5),),
        (("one", 1.0),),
        (("two", 1.0),),
        (("one", 0.7), ("two", -0.4)),
    ],
    ids=str,
)
def test_equals_load_lora_weights_and_set_adapters(
    new_engine, store, lora_oracle, draw_with, make_request, stack
):
    lora_oracle.set_adapters([name for name, _ in stack], [scale for _, scale in stack])
    theirs = draw_with(lora_oracle)
    engine = new_engine(adapters=store)
    engine.add(make_request(adapters=tuple(AdapterRef(*pair) for pair in stack)))
    engine.add(make_request("plain"))
    drawn = engine.run()
    np.testing.assert_allclose(drawn.image("r"), theirs, **CLOSE)
    if any(scale for _, scale in stack):
        assert np.abs(drawn.image("r") - drawn.image("plain")).max() > 0.01


def test_scale_zero_equals_none_bit_for_bit(new_engine, store, make_request):
    images = []
    for adapters in ((), (AdapterRef("one", 0.0),)):
        engine = new_engine(adapters=store)
        engine.add(make_request(adapters=adapters))
        images.append(engine.run().image("r"))
    assert np.array_equal(*images)


def test_installed_adapters_change_no_other_row(components, new_engine, store, make_request):
    before = new_engine(adapters=AdapterStore(components.denoiser))
    before.add(make_request())
    alone = before.run().image("r")
    engine = new_engine(adapters=store)
    engine.add(make_request("with", adapters=(AdapterRef("one"),)))
    engine.run()
    engine.add(make_request("after"))
    assert np.array_equal(engine.run().image("after"), alone)


def test_one_batch_holds_rows_with_different_stacks(new_engine, store, make_request):
    stacks = {
        "none": (),
        "one": (AdapterRef("one", 0.8),),
        "both": (AdapterRef("one", 0.5), AdapterRef("two", 1.0)),
        "two": (AdapterRef("two", -1.0),),
        "twice": (AdapterRef("one", 0.4), AdapterRef("one", 0.4)),
    }
    together = new_engine(adapters=store)
    for name, stack in stacks.items():
        together.add(make_request(name, adapters=stack))
    drawn = together.run()
    assert set(together.batches) == {5}, "they must share every step"
    for name, stack in stacks.items():
        alone = new_engine(adapters=store)
        alone.add(make_request(name, adapters=stack))
        np.testing.assert_allclose(drawn.image(name), alone.run().image(name), **CLOSE)
    np.testing.assert_allclose(drawn.image("twice"), drawn.image("one"), **CLOSE)
    assert np.abs(drawn.image("one") - drawn.image("none")).max() > 0.01
    assert np.abs(drawn.image("both") - drawn.image("one")).max() > 0.01


def write(path: pathlib.Path, tensors: dict[str, torch.Tensor]) -> pathlib.Path:
    save_file({k: v.clone() for k, v in tensors.items()}, str(path))
    return path


Q = "transformer.transformer_blocks.0.attn.to_q"


def without_b(good, bad):
    write(bad, {k: v for k, v in good.items() if not k.endswith("to_q.lora_B.weight")})


def without_a(good, bad):
    write(bad, {k: v for k, v in good.items() if not k.endswith("to_q.lora_A.weight")})


def truncated(good, bad):
    write(bad, good)
    bad.write_bytes(bad.read_bytes()[:-10])


def pickled(good, bad):
    torch.save(good, bad)


def old_pickle(good, bad):
    torch.save(good, bad, _use_new_zipfile_serialization=False)


def text(good, bad):
    bad.write_text("<html>404: not found</html>" * 40)


def empty_file(good, bad):
    bad.write_bytes(b"")


def foreign_module(good, bad):
    write(bad, good | {k.replace(".to_q.", ".to_x."): v for k, v in good.items() if ".to_q." in k})


def foreign_size(good, bad):
    write(bad, good | {f"{Q}.lora_B.weight": torch.zeros(128, 4)})


def unfitting_factors(good, bad):
    write(bad, good | {f"{Q}.lora_B.weight": torch.zeros(64, 3)})


def unknown_key(good, bad):
    write(bad, good | {"transformer.guide.weight": torch.zeros(1)})


def rank_too_high(good, bad):
    factors = {"lora_A": torch.zeros(257, 64), "lora_B": torch.zeros(64, 257)}
    write(bad, good | {f"{Q}.{name}.weight": factor for name, factor in factors.items()})


def not_a_number(good, bad):
    weight = good[f"{Q}.lora_A.weight"].clone()
    weight[1, 2] = float("nan")
    write(bad, good | {f"{Q}.lora_A.weight": weight})


def infinite_eighth(good, bad):
    weight = torch.full_like(good[f"{Q}.lora_A.weight"], float("inf")).to(torch.float8_e5m2)
    write(bad, good | {f"{Q}.lora_A.weight": weight})


def infinite_alpha(good, bad):
    write(bad, good | {f"{Q}.alpha": torch.tensor(float("inf"))})


def no_alpha(good, bad):
    write(bad, good | {f"{Q}.alpha": torch.tensor(0)})


def many_alphas(good, bad):
    write(bad, good | {f"{Q}.alpha": torch.ones(2)})


def whole_numbers(good, bad):
    write(bad, {k: v.to(torch.int8) for k, v in good.items()})


def dora(good, bad):
    write(bad, good | {f"{Q}.lora_magnitude_vector": torch.zeros(63)})


def dora_without_magnitudes(good, bad):
    metadata = {"lora_adapter_metadata": '{"transformer.use_dora": true}'}
    save_file({k: v.clone() for k, v in good.items()}, str(bad), metadata)


def twice(good, bad):
    write(bad, good | {f"{Q}.lora_down.weight": torch.zeros(4, 64)})


def twice_in_other_words(good, bad):
    joint = "diffusion_model.double_blocks.0.img_attn.qkv"
    factors = {"lora_A": torch.zeros(4, 64), "lora_B": torch.zeros(192, 4)}
    write(bad, good | {f"{joint}.{name}.weight": factor for name, factor in factors.items()})


def two_kinds(good, bad):
    write(bad, good | {f"{Q}.lokr_w1": torch.zeros(4, 4)})


def flux_1(good, bad):
    write(bad, {"lora_unet_double_blocks_0_img_mod_lin.lora_down.weight": torch.zeros(4, 64)})


def missing(good, bad):
    pass


FAULTS = {
    without_b: r"attn.to_q has .*lora_A.weight', but its lora_B \(lora_up\) is missing",
    without_a: r"attn.to_q has .*lora_B.weight', but its lora_A \(lora_down\) is missing",
    truncated: "truncated",
    pickled: "pickled file",
    old_pickle: "pickled file",
    text: "not a safetensors file",
    empty_file: "not a safetensors file",
    foreign_module: "another model: FLUX.2 has no linear layer 'transformer_blocks.0.attn.to_x'",
    flux_1: "another model, FLUX.1, as 'lora_unet_double_blocks_0_img_mod_lin.lora_down",
    foreign_size: "another model: for transformer_blocks.0.attn.to_q it has 128x64.* 64x64",
    unfitting_factors: "do not fit together",
    unknown_key: "unknown key 'transformer.guide.weight'",
    rank_too_high: "its rank is 257 at .*to_q.* highest allowed is 256: raise spec.ad",
    not_a_number: "to_q.lora_A.weight holds NaN",
    infinite_eighth: "to_q.lora_A.weight holds NaN or infinity",
    infinite_alpha: "alpha of .*to_q.* is NaN or infinity",
    no_alpha: "alpha of .*to_q.* is 0, which changes nothing",
    many_alphas: "to_q.alpha must be one number",
    whole_numbers: "type I8",
    dora: r"lora_magnitude_vector is \[63\]; the magnitudes of a 64x64 layer are \[64\]",
    dora_without_magnitudes: "says that it is a DoRA adapter, but it holds no magnitudes",
    twice: "lora_A.weight'.* are the same weights of .*to_q; keep one",
    twice_in_other_words: "both change transformer_blocks.0.attn.to_q; keep one",
    two_kinds: "of another kind than the layer's other weights",
    missing: "is missing",
    lambda good, bad: write(bad, {}): "no tensors",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_bad_file_is_refused_by_name_and_nothing_else_suffers(
    new_engine, store, lora_files, make_request, tmp_path, fault
):
    bad = tmp_path / "bad.safetensors"
    fault(load_file(str(lora_files["one"])), bad)
    with pytest.raises(AdapterLoadFailed, match=FAULTS[fault]) as caught:
        store.load("bad", bad, wait=WAIT)
    assert str(bad) in str(caught.value)
    states = store.states()
    assert states["bad"] == str(caught.value)
    assert states["one"] == states["two"] == "ready"
    engine = new_engine(adapters=store)
    engine.add(make_request("bad", adapters=(AdapterRef("bad"),)))
    engine.add(make_request("good", adapters=(AdapterRef("one"),)))
    drawn = engine.run()
    ending = drawn.ending("bad")
    assert isinstance(ending, Failed) and isinstance(ending.error, AdapterLoadFailed)
    drawn.image("good")


def test_unknown_adapter_and_wild_scale_are_refused_at_once(new_engine, store, make_request):
    engine = new_engine(adapters=store)
    with pytest.raises(NotFound, match="'nope'"):
        engine.add(make_request(adapters=(AdapterRef("nope"),)))
    with pytest.raises(InvalidRequest, match="finite"):
        engine.add(make_request(adapters=(AdapterRef("one", float("nan")),)))
    assert not engine.has_work
