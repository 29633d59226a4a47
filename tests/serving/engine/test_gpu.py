"""What can only be seen on a CUDA device: parity there, no waiting in the loop, and the benches."""

from __future__ import annotations

import importlib
import pathlib

import numpy as np
import pytest
import torch

from calotype.serving.core.request import AdapterRef, ImageSize
from calotype.serving.engine.execution.step_profile import make_profile
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.engine.model.components import load_components
from calotype.serving.engine.parallel.device_group import DeviceGroup
from calotype.serving.engine.sizing.model_sizes import measure_model, weight_bytes
from calotype.serving.testing.models import save_random_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none here"
    ),
]

CLOSE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(autouse=True)
def full_precision():
    # Convolutions round to TF32 by default, in which nothing is equal to 1e-4.
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def on_gpu(model_folder):
    return load_components(model_folder, device="cuda")


@pytest.fixture(scope="module")
def lora(model_folder, tmp_path_factory):
    return save_random_lora(model_folder, tmp_path_factory.mktemp("l") / "a.safetensors", 4)


@pytest.fixture(scope="module")
def store(on_gpu, lora):
    store = AdapterStore(on_gpu.denoiser)
    store.load("a", lora, wait=60)
    yield store
    store.layers.remove()


def test_images_equal_the_pipelines_on_the_device(
    on_gpu, load_oracle, model_folder, draw_with, new_engine, make_request
):
    theirs = draw_with(load_oracle(model_folder).to("cuda"))
    engine = new_engine(on_gpu)
    engine.add(make_request())
    np.testing.assert_allclose(engine.run().image("r"), theirs, **CLOSE)


def test_images_equal_those_of_the_cpu(on_gpu, new_engine, make_request, model_folder, store, lora):
    # The same noise: it is drawn on the CPU whatever the device.
    own = load_components(model_folder)
    here = AdapterStore(own.denoiser)
    here.load("a", lora, wait=60)
    asked = [
        make_request("plain", sampler="flow-dpmpp-2m"),
        make_request("adapter", adapters=(AdapterRef("a", 0.7),)),
        make_request("negative", negative_prompt="a star", n=2),
    ]
    engines = [new_engine(on_gpu, adapters=store), new_engine(own, adapters=here)]
    for engine in engines:
        for request in asked:
            engine.add(request)
    drawn, wanted = (engine.run() for engine in engines)
    for request in asked:
        last = request.n - 1
        ours, theirs = drawn.image(request.id, last), wanted.image(request.id, last)
        np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=0)


def test_the_loop_does_not_wait_for_the_device(on_gpu, new_engine, make_request, store):
    engine = new_engine(on_gpu, adapters=store)
    for i in range(3):
        engine.add(make_request(f"r{i}", steps=12, adapters=(AdapterRef("a", 0.5),) * (i == 1)))
    engine.add(make_request("two", steps=12, negative_prompt="a star", sampler="flow-unipc"))
    for _ in range(3):
        engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    engine.run().image("r1")


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_weights_take_what_the_plan_says(model_folder, precision):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    loaded = load_components(model_folder, device="cuda", precision=precision)
    held = torch.cuda.memory_allocated() - before
    sizes = measure_model(model_folder)
    parts = ("denoiser", "vae", "text_encoder")
    planned = sum(weight_bytes(getattr(sizes, part), precision) for part in parts)
    # The allocator hands out blocks of 512 bytes, of which a tiny model has many.
    tensors = sum(1 for part in (loaded.denoiser, loaded.vae) for _ in part.parameters())
    assert planned == pytest.approx(held, rel=0.1, abs=1024 * tensors)


def test_a_profile_of_the_device_is_made(model_folder, tmp_path):
    components = load_components(model_folder, parts=("denoiser", "vae"), device="cuda")
    profile, _ = make_profile(components, tmp_path, [ImageSize(64, 64)], rows=(1, 2))
    assert profile.machine["device"] == torch.cuda.get_device_name()
    assert [t.rows for t in profile.times] == [1, 2]


def test_compiled_images_are_the_same(on_gpu, new_engine, make_request):
    images = []
    for compiler in ("inductor", None):
        engine = new_engine(on_gpu, compiler=compiler)
        engine.add(make_request(steps=2))
        images.append(engine.run().image("r"))
    np.testing.assert_allclose(*images, atol=1e-3, rtol=0)


def test_a_step_cache_skips_steps(on_gpu, new_engine, make_request):
    engine = new_engine(on_gpu)
    engine.add(make_request(steps=12, step_cache=0.5))
    assert engine.run().ending("r").skipped > 0


@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices, and torch sees fewer"
)
def test_two_devices_draw_what_one_draws(new_engine, make_request, model_folder, lora):
    pair = DeviceGroup(model_folder, 2, device="cuda")
    try:
        own = load_components(model_folder, device="cuda")
        shared = AdapterStore(own.denoiser)
        shared.load("a", lora, wait=60)
        asked = [
            make_request("plain"),
            make_request("adapter", adapters=(AdapterRef("a", 0.7),), n=2),
            make_request("uneven", size=(80, 48)),
        ]
        engines = [new_engine(own, adapters=shared, group=pair.join())]
        alone = load_components(model_folder, device="cuda")
        store = AdapterStore(alone.denoiser)
        store.load("a", lora, wait=60)
        engines.append(new_engine(alone, adapters=store))
        for engine in engines:
            for request in asked:
                engine.add(request)
        together, single = (engine.run() for engine in engines)
        for request in asked:
            last = request.n - 1
            ours, theirs = together.image(request.id, last), single.image(request.id, last)
            np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=0)
    finally:
        pair.close()


@pytest.mark.slow
def test_the_benches_run(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[2] / "bench"))
    rows = importlib.import_module("engine").measure(rounds=3, device="cuda")
    assert rows["abort to freed"]["value"] <= 1
    endings = [row for name, row in rows.items() if name.endswith("without exactly one ending")]
    assert [row["value"] for row in endings] == [0]
    assert all(np.isfinite(row["value"]) for row in rows.values())
