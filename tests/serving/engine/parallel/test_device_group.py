"""Processes that draw together: how they come up, and what happens when one of them dies."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading

import numpy as np
import psutil
import pytest
import torch

from calotype.serving.core.errors import GroupLost, ModelLoadFailed
from calotype.serving.core.request import Progress
from calotype.serving.engine.model.components import load_components
from calotype.serving.engine.parallel.device_group import DeviceGroup
from calotype.serving.worker.engine_thread import EngineInputs, EngineThread

pytestmark = pytest.mark.slow
PARENT = """
import sys, time
from calotype.serving.engine.parallel.device_group import DeviceGroup
group = DeviceGroup(sys.argv[1], 2, torch_threads=1)
group.join()
print(group.pids[0], flush=True)
time.sleep(600)
"""


class Loss:
    """What `on_lost` was told."""

    def __init__(self):
        self.reasons = []
        self.came = threading.Event()

    def __call__(self, reason):
        self.reasons.append(reason)
        self.came.set()


@pytest.fixture
def loss():
    return Loss()


@pytest.fixture
def pair(model_folder, loss):
    started = DeviceGroup(model_folder, 2, torch_threads=1, on_lost=loss)
    yield started
    started.close()


def test_a_rank_that_dies_ends_the_engine_and_fails_no_request(
    pair, loss, model_folder, new_engine, make_request
):
    engine = new_engine(load_components(model_folder), group=pair.join())
    engine.add(make_request(steps=50))
    engine.step()
    psutil.Process(pair.pids[0]).kill()
    with pytest.raises(GroupLost):
        for _ in range(50):
            engine.step()
    assert loss.came.wait(600)
    assert len(loss.reasons) == 1 and pair.lost
    # Neither finished nor failed: whoever gave the job gives it to another replica.
    assert {type(event) for event in engine.drawn.events} == {Progress}


def test_a_fault_in_the_middle_of_a_step_ends_the_group(
    pair, loss, model_folder, new_engine, make_request
):
    """The others are left at another place than rank 0: what they computed next would be wrong."""
    components = load_components(model_folder)
    engine = new_engine(components, group=pair.join())

    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    components.denoiser.single_transformer_blocks[0].register_forward_hook(fail)
    engine.add(make_request())
    with pytest.raises(GroupLost, match="no memory"):
        engine.step()
    assert "no memory" in loss.reasons[0]


async def test_the_thread_of_an_engine_that_lost_its_group_is_dead(
    pair, loss, model_folder, new_engine, make_request
):
    thread = EngineThread(new_engine(load_components(model_folder), group=pair.join()))
    drawing = thread.draw(make_request(steps=200), EngineInputs())
    async for event in drawing:
        if isinstance(event, Progress) and event.step == 2:
            psutil.Process(pair.pids[0]).kill()
            break
    assert loss.came.wait(600)
    thread._thread.join(600)
    assert not thread.alive
    await drawing.aclose()


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_narrow_numbers_are_shared_too(model_folder, new_engine, make_request, precision):
    pair = DeviceGroup(model_folder, 2, precision=precision, torch_threads=1)
    try:
        images = []
        for group in (pair.join(), None):
            own = load_components(model_folder, precision=precision)
            engine = new_engine(own, group=group)
            engine.add(make_request())
            images.append(engine.run().image("r"))
    finally:
        pair.close()
    # One in 256 is what bfloat16 tells apart near 1.
    np.testing.assert_allclose(*images, atol=0.03, rtol=0)
    assert images[0].std() > 0.03


def test_a_rank_that_cannot_load_the_model_is_told(model_folder, tmp_path, loss):
    broken = tmp_path / "model"
    shutil.copytree(model_folder, broken)
    next((broken / "transformer").glob("*.safetensors")).write_bytes(b"no weights")
    group = DeviceGroup(broken, 2, torch_threads=1, on_lost=loss)
    with pytest.raises(ModelLoadFailed, match=r"Device 2 of 2 cannot be used: .*transformer"):
        group.join()
    group.close()
    assert not loss.reasons


def test_more_devices_than_there_are_are_refused(model_folder):
    wanted = torch.cuda.device_count() + 1
    with pytest.raises(ModelLoadFailed, match=f"devicesPerPicture is {wanted}, but this replica"):
        DeviceGroup(model_folder, wanted, device="cuda")


def test_ranks_end_when_their_engine_is_killed(model_folder):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(model_folder)], stdout=subprocess.PIPE
    )
    follower = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    follower.wait(600)
