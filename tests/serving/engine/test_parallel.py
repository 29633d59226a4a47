"""One picture on two processes equals the same picture on one."""

from __future__ import annotations

import datetime
import io
import subprocess
import sys

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from calotype.serving.engine.adapters import AdapterStore
from calotype.serving.engine.components import load_components
from calotype.serving.engine.parallel import SequenceGroup, dismiss
from calotype.serving.errors import EngineError
from calotype.serving.request import AdapterRef, Failed
from calotype.serving.testing_models import save_random_lora

CLOSE = {"atol": 1e-4, "rtol": 0}

FOLLOWER = """
import datetime, sys, torch
import torch.distributed as dist
from calotype.serving.engine.components import load_components
from calotype.serving.engine.parallel import SequenceGroup, follow
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=sys.argv[1], rank=1, world_size=2,
                        timeout=datetime.timedelta(seconds=120))
follow(load_components(sys.argv[2], parts=("denoiser",)), SequenceGroup())
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def group(model_folder, tmp_path_factory):
    meeting = f"file://{tmp_path_factory.mktemp('group') / 'meeting'}"
    follower = subprocess.Popen([sys.executable, "-c", FOLLOWER, meeting, str(model_folder)])
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=2, timeout=limit)
    try:
        yield SequenceGroup()
        dismiss()
        assert follower.wait(timeout=60) == 0, "the follower did not end by itself"
    finally:
        follower.kill()
        dist.destroy_process_group()


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


def test_pictures_equal_those_of_one_process(two_and_one, make_request):
    asked = [
        make_request("plain"),
        make_request("uneven", size=(80, 48), steps=3),
        make_request("adapter", adapters=(AdapterRef("a", 0.7),), n=2),
        make_request("negative", negative_prompt="a star", sampler="flow-unipc"),
        make_request("reference", references=("p",), steps=2),
        make_request("tiny", size=(16, 16), steps=1),
    ]
    pictures = []
    for engine in two_and_one:
        for request in asked:
            engine.add(request, files={"p": png()})
        drawn = engine.run()
        pictures.append({r.id: drawn.image(r.id, r.n - 1) for r in asked})
    for request in asked:
        np.testing.assert_allclose(pictures[0][request.id], pictures[1][request.id], **CLOSE)
    assert pictures[0]["plain"].std() > 0.03


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


def test_heads_must_be_shared_out_evenly(group, components, new_engine):
    three = SequenceGroup()
    three.size = 3
    with pytest.raises(EngineError, match="3 devices cannot share 2 attention heads"):
        new_engine(components, group=three)
