"""The engine on its thread: events reach their coroutine, and who stops listening stops drawing."""

from __future__ import annotations

import asyncio
import io

import pytest
from PIL import Image

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.request import (
    Failed,
    Finished,
    GenerationRequest,
    ImageSize,
    Progress,
    SamplingParams,
)
from calotype.serving.engine.engine import Engine
from calotype.serving.engine.model.components import load_components
from calotype.serving.testing.models import save_tiny_flux2
from calotype.serving.worker.engine_thread import EngineInputs, EngineThread

SIZE = ImageSize(64, 64)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine(load_components(save_tiny_flux2(tmp_path_factory.mktemp("tiny") / "model")))


@pytest.fixture
def thread(engine):
    thread = EngineThread(engine)
    yield thread
    thread.close()
    assert not thread.alive


def request(name, steps=3, **more):
    return GenerationRequest(name, "a red star", SIZE, SIZE, SamplingParams(steps, 3.0), 1, **more)


def image():
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return file.getvalue()


async def drawn(thread, asked, **more):
    return [event async for event in thread.draw(asked, EngineInputs(**more))]


async def idle(engine):
    for _ in range(3000):
        if not engine.has_work:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the engine still draws")


async def test_each_caller_gets_the_events_of_its_request(thread):
    found = await asyncio.gather(
        drawn(thread, request("plain")),
        drawn(thread, request("edit", image="p", strength=0.9), files={"p": image()}),
        drawn(thread, request("negative", negative_prompt="a ring")),
    )
    for events, name in zip(found, ("plain", "edit", "negative"), strict=True):
        assert {event.request_id for event in events} == {name}
        assert [type(event) for event in events] == [Progress] * 3 + [Finished]


async def test_refused_requests_end_with_one_failure(thread):
    (event,) = await drawn(thread, request("bad", image="p"), files={"p": b"no picture"})
    assert isinstance(event, Failed) and isinstance(event.error, InvalidRequest)
    assert event.error.param == "image"
    (event,) = await drawn(thread, request("gone", references=("p",)))
    assert event.error.param == "references[0]"


@pytest.mark.parametrize("files", [{}, {"p": image()}], ids=["plain", "with a picture"])
async def test_a_cancelled_caller_leaves_nothing_behind(thread, engine, files):
    for name, pause in (("at once", 0.0), ("later", 0.05)):
        asked = request(name, steps=500, image="p" if files else None)
        task = asyncio.create_task(drawn(thread, asked, files=files))
        await asyncio.sleep(pause)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await idle(engine)
    assert len(await drawn(thread, request("next"))) == 4


async def test_who_stopped_may_ask_for_the_same_again_at_once(thread):
    for _ in range(20):
        listening = asyncio.create_task(drawn(thread, request("same", steps=40)))
        await asyncio.sleep(0.02)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
    events = await drawn(thread, request("same"))
    assert [type(event) for event in events] == [Progress] * 3 + [Finished]
