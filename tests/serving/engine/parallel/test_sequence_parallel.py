"""One image on two processes equals the same image on one."""

from __future__ import annotations

import io

import numpy as np
import psutil
import pytest
from PIL import Image

from calotype.serving.core.errors import InvalidRequest, ModelLoadFailed
from calotype.serving.core.request import AdapterRef, Failed, Preview
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.engine.model.components import load_components
from calotype.serving.engine.parallel.device_group import DeviceGroup
from calotype.serving.testing.models import save_random_lora

pytestmark = pytest.mark.slow
CLOSE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def group(model_folder):
    started = DeviceGroup(model_folder, 2, torch_threads=1)
    processes = [psutil.Process(pid) for pid in started.pids]
    try:
        yield started.join()
        assert not started.lost
    finally:
        started.close()
    assert not any(process.is_running() for process in processes)


@pytest.fixture(scope="module")
def lora(model_folder, tmp_path_factory):
    return save_random_lora(model_folder, tmp_path_factory.mktemp("l") / "a.safetensors", 4)


def png():
    file = io.BytesIO()
    Image.radial_gradient("L").resize((70, 66)).convert("RGB").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def two_and_one(group, model_folder, components, new_engine, lora):
    """An engine on both processes, and one on this process alone."""
    engines = []
    for own, shared in ((load_components(model_folder), group), (components, None)):
        store = AdapterStore(own.denoiser)
        store.load("a", lora, wait=30)
        engines.append(new_engine(own, adapters=store, group=shared))
    yield engines
    for engine in engines:
        engine.adapters.layers.remove()


def test_images_equal_those_of_one_process(two_and_one, make_request):
    asked = [
        make_request("plain"),
        make_request("uneven", size=(80, 48), steps=3),
        make_request("adapter", adapters=(AdapterRef("a", 0.7),), n=2),
        make_request("negative", negative_prompt="a star", sampler="flow-unipc"),
        make_request("reference", references=("p",), steps=2),
        make_request("tiny", size=(16, 16), steps=1),
    ]
    images = []
    for engine in two_and_one:
        for request in asked:
            engine.add(request, files={"p": png()})
        drawn = engine.run()
        images.append({r.id: drawn.image(r.id, r.n - 1) for r in asked})
    for request in asked:
        np.testing.assert_allclose(images[0][request.id], images[1][request.id], **CLOSE)
    assert images[0]["plain"].std() > 0.03


def test_a_request_fails_alone_if_a_follower_lacks_its_adapter(
    two_and_one, make_request, model_folder, tmp_path
):
    shared, alone = two_and_one
    path = save_random_lora(model_folder, tmp_path / "gone.safetensors", 4, seed=9)
    shared.adapters.load("gone", path, wait=30)
    path.unlink()
    shared.add(make_request("lost", adapters=(AdapterRef("gone"),)))
    shared.add(make_request("fine", steps=2))
    drawn = shared.run()
    ending = drawn.ending("lost")
    assert isinstance(ending, Failed) and "could not load an adapter" in ending.error.message
    alone.add(make_request("fine", steps=2))
    np.testing.assert_allclose(drawn.image("fine"), alone.run().image("fine"), **CLOSE)


def test_previews_are_shown_and_an_abort_ends_within_a_step(two_and_one, make_request):
    shared, _ = two_and_one
    shared.add(make_request("shown", steps=4, preview_every=2))
    shared.add(make_request("long", steps=50, seed=1))
    events = []
    while not any(isinstance(event, Preview) for event in events):
        events += shared.step()
    shared.abort("long")
    after = shared.step()
    assert [e.error.code for e in after if isinstance(e, Failed)] == ["canceled"]
    assert shared.run().image("shown").std() > 0.03


def test_heads_must_be_shared_out_evenly(group, components, new_engine, monkeypatch):
    monkeypatch.setattr(group, "size", 3)
    with pytest.raises(ModelLoadFailed, match="3 devices cannot share 2 attention heads"):
        new_engine(components, group=group)


def test_what_several_devices_cannot_do_is_refused(
    group, components, two_and_one, new_engine, make_request
):
    with pytest.raises(InvalidRequest, match="2 devices draw each picture") as caught:
        two_and_one[0].add(make_request(step_cache=0.1))
    assert caught.value.param == "step_cache"
    with pytest.raises(ModelLoadFailed, match="devicesPerPicture to 1 or compile to false"):
        new_engine(components, group=group, compiler="inductor")
