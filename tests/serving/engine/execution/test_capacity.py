"""Memory, deadlines, tenants and profiles, as the engine keeps to them."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from calotype.serving.core.errors import DeadlineExceeded, InvalidRequest, OutOfMemory
from calotype.serving.core.request import Finished, ImageSize
from calotype.serving.engine.execution.forward import Forward
from calotype.serving.engine.execution.step_profile import (
    Profile,
    StepTime,
    describe_machine,
    make_profile,
    profile_path,
)
from calotype.serving.engine.model.components import load_components
from calotype.serving.engine.model.decoder import Decoder
from calotype.serving.engine.model.latents import TokenGrid
from calotype.serving.engine.scheduling.scheduler import Bucket
from calotype.serving.engine.sizing.memory_plan import plan_memory
from calotype.serving.engine.sizing.model_sizes import TokenMemory, measure_model, weight_bytes
from calotype.serving.testing.in_memory import ManualClock
from calotype.serving.testing.models import save_tiny_flux2

pytestmark = pytest.mark.slow

CLOSE = {"atol": 1e-4, "rtol": 0}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, besides those that there were before."""

    def __init__(self, before):
        super().__init__()
        self.sizes = {t.untyped_storage()._cdata: 0 for t in before}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.freed, storage._cdata)
        return out

    def freed(self, key):
        self.now -= self.sizes.pop(key, 0)


def weights(module):
    """The tensors that really hold a module's weights; int8 weights have a scale each."""
    for tensor in [*module.parameters(), *module.buffers()]:
        yield from (tensor.qdata, tensor.scale) if hasattr(tensor, "qdata") else (tensor,)


@pytest.fixture(params=["float32", "bfloat16", "int8"])
def loaded(request, model_folder):
    return load_components(model_folder, precision=request.param)


def test_planned_weights_are_those_that_are_held(loaded, model_folder):
    sizes = measure_model(model_folder)
    for part, module in (
        ("denoiser", loaded.denoiser),
        ("text_encoder", loaded.text_encoder.model),
        ("vae", loaded.vae),
    ):
        held = sum(t.nbytes for t in weights(module)) - sum(b.nbytes for b in module.buffers())
        assert weight_bytes(getattr(sizes, part), loaded.precision) == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize("side", [8, 24])
def test_planned_activations_are_those_that_are_held(loaded, model_folder, side):
    sizes, bucket = measure_model(model_folder), Bucket(side, side, 32)
    config, pixels = loaded.denoiser.config, (16 * side) ** 2
    hidden = torch.randn(1, side * side, config.in_channels, dtype=loaded.dtype)
    embeds = torch.randn(1, 32, config.joint_attention_dim, dtype=loaded.dtype)
    forward = Forward(loaded.denoiser)
    gc.collect()
    with torch.no_grad(), LiveBytes(weights(loaded.denoiser)) as live:
        forward(hidden, torch.tensor([0.5]), torch.tensor([3.0]), embeds, bucket)
    planned = sizes.denoiser_activations(pixels, loaded.precision)
    assert planned == pytest.approx(live.peak, rel=0.1)
    with torch.no_grad(), LiveBytes(weights(loaded.vae)) as live:
        Decoder(loaded.vae).decode_float(hidden, TokenGrid(side, side))
    planned = sizes.vae_activations(pixels, loaded.precision)
    assert planned == pytest.approx(live.peak, rel=0.1)


def test_the_plan_is_the_sum_of_what_was_measured(model_folder):
    plan = plan_memory(model_folder, "l4-24gb", precision="bfloat16", max_pixels=256 * 256)
    sizes = measure_model(model_folder)
    parts = {item.name: item.bytes for item in plan.items}
    assert parts["denoiser"] == weight_bytes(sizes.denoiser, "bfloat16")
    assert parts["text encoder"] == weight_bytes(sizes.text_encoder, "bfloat16")
    assert parts["activations, 1 picture"] == sizes.vae_activations(256 * 256, "bfloat16")


def test_requests_wait_for_memory_and_all_are_drawn(components, new_engine, make_request):
    bucket = Bucket(4, 4, 32)
    token = TokenMemory.of(components.denoiser.config).bytes("float32")
    engine = new_engine(memory_bytes=2.5 * bucket.tokens * token)
    for i in range(4):
        engine.add(make_request(f"r{i}", n=2, seed=10 * i))
    drawn = engine.run()
    assert max(engine.batches) == 2, "no more fits into a step"
    alone = new_engine()
    alone.add(make_request("r3", n=2, seed=30))
    np.testing.assert_allclose(drawn.image("r3", 1), alone.run().image("r3", 1), **CLOSE)


def test_what_never_fits_is_refused_at_once(components, new_engine, make_request):
    token = TokenMemory.of(components.denoiser.config).bytes("float32")
    engine = new_engine(memory_bytes=100 * token)
    with pytest.raises(OutOfMemory, match="memory for a picture of 160x160") as caught:
        engine.add(make_request(size=(160, 160)))
    assert caught.value.param == "size" and not engine.has_work
    engine.add(make_request())
    engine.run().image("r")


def test_a_deadline_that_cannot_be_kept_ends_early_and_others_go_on(new_engine, make_request):
    clock = ManualClock()
    engine = new_engine(clock=clock.monotonic, max_batch_rows=1)
    engine.add(make_request("late", steps=50, deadline_seconds=10.0))
    engine.add(make_request("fine", steps=3, deadline_seconds=1000.0))
    while engine.has_work:
        engine.step()
        clock.advance(4.0)
    ending = engine.drawn.ending("late")
    assert isinstance(ending.error, DeadlineExceeded)
    assert "within 10 seconds" in ending.error.message
    assert ending.error.param == "deadline_seconds"
    assert isinstance(engine.drawn.ending("fine"), Finished)
    assert len(engine.batches) < 12, "it was given up early"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"deadline_seconds": 0.0}, "deadline_seconds"),
        ({"deadline_seconds": float("nan")}, "deadline_seconds"),
        ({"weight": 0.0}, "weight"),
        ({"weight": float("inf")}, "weight"),
        ({"step_cache": 1.0}, "step_cache"),
        ({"step_cache": -0.1}, "step_cache"),
    ],
)
def test_bad_numbers_are_refused_by_field(engine, make_request, change, field):
    with pytest.raises(InvalidRequest) as caught:
        engine.add(make_request(**change))
    assert caught.value.param == field


def test_tenants_share_the_engine(new_engine, make_request):
    engine = new_engine(max_batch_rows=1)
    for i in range(6):
        engine.add(make_request(f"many{i}", steps=4, tenant="many"))
    engine.step()
    engine.add(make_request("few", steps=4, tenant="few"))
    drawn = engine.run()
    order = [e.request_id for e in drawn.events if isinstance(e, Finished)]
    assert order.index("few") <= 2, "it waits for its share, not for all that were there before"


def test_a_profile_is_measured_kept_and_followed(components, new_engine, make_request, tmp_path):
    seen = []
    sizes = [ImageSize(32, 32), ImageSize(64, 64)]
    profile, path = make_profile(components, tmp_path, sizes, rows=(1, 2), on_time=seen.append)
    assert [(t.tokens, t.rows) for t in profile.times] == [(36, 1), (36, 2), (48, 1), (48, 2)]
    assert list(profile.times) == seen and all(t.seconds > 0 for t in seen)
    assert path == profile_path(tmp_path, components)
    assert Profile.load(path) == profile == Profile.find(tmp_path, components)
    assert "tokens" in "\n".join(profile.lines())
    path.write_text(path.read_text().replace(torch.__version__, "0.1"))
    assert Profile.find(tmp_path, components) is None, "made with another version"
    assert Profile.find(tmp_path / "elsewhere", components) is None
    # 64x64 alone keeps the device busy, 32x32 does not.
    times = [(36, 1, 1.0), (36, 2, 1.1), (36, 4, 1.2), (48, 1, 1.0), (48, 2, 2.0)]
    steps = tuple(StepTime(*t) for t in times)
    engine = new_engine(profile=Profile(describe_machine(components), steps))
    for i in range(5):
        engine.add(make_request(f"small{i}", size=(32, 32), steps=1))
        engine.add(make_request(f"large{i}", size=(64, 64), steps=1))
    engine.run()
    assert sorted(engine.batches) == [1, 1, 1, 1, 1, 1, 4]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"machine": {}, "times": []}', '{"machine": {}, "times": [{}]}']
)
def test_a_damaged_profile_is_told(tmp_path, text):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match="calotype profile") as caught:
        Profile.load(path)
    assert str(path) in str(caught.value)


def test_the_same_weights_have_the_same_fingerprint(components, model_folder, tmp_path):
    other = load_components(model_folder, parts=("denoiser",), precision="bfloat16")
    assert other.fingerprint == components.fingerprint != ""
    assert load_components(model_folder, parts=("vae",)).fingerprint == ""
    folder = save_tiny_flux2(tmp_path / "other", seed=1)
    assert load_components(folder, parts=("denoiser",)).fingerprint != components.fingerprint
