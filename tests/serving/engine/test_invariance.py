"""An image is the same alone and in any company: properties over random traffic."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calotype.serving.core.errors import Cancelled
from calotype.serving.core.request import (
    SAMPLER_NAMES,
    AdapterRef,
    Checkpoint,
    Failed,
    GenerationRequest,
    ImageSize,
    SamplingParams,
)
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.engine.model.components import load_components
from calotype.serving.testing.models import save_random_lora

SIZES = [ImageSize(32, 32), ImageSize(48, 32), ImageSize(64, 64)]
STACKS = [
    (),
    (AdapterRef("one", 0.7),),
    (AdapterRef("two", 1.0),),
    (AdapterRef("one", 0.4), AdapterRef("two", -0.5)),
]


@st.composite
def requests(draw: st.DrawFn) -> GenerationRequest:
    size = draw(st.sampled_from(SIZES))
    return GenerationRequest(
        id="",
        prompt=draw(st.sampled_from(["a red circle", "a blue star on the left", ""])),
        size=size,
        rendered_size=size,
        sampling=SamplingParams(
            draw(st.integers(1, 4)),
            draw(st.sampled_from([1.0, 3.0, 4.5])),
            draw(st.sampled_from(SAMPLER_NAMES)),
        ),
        seed=draw(st.integers(0, 3)),
        n=draw(st.sampled_from([1, 1, 3])),
        adapters=draw(st.sampled_from(STACKS)),
        priority=draw(st.sampled_from([0, 0, 5])),
        negative_prompt=draw(st.sampled_from([None, None, "a green ring"])),
    )


@dataclasses.dataclass(frozen=True)
class Visit:
    """A request that arrives after some steps and may be aborted some steps later."""

    request: GenerationRequest
    arrives: int
    aborted_after: int | None


visits = st.builds(
    Visit, requests(), st.integers(0, 6), st.sampled_from([None, None, None, 0, 1, 2, 5])
)


@pytest.fixture(scope="module")
def store(components, model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    store = AdapterStore(components.denoiser)
    for seed, name in enumerate(("one", "two")):
        path = save_random_lora(model_folder, folder / f"{name}.safetensors", 4, seed=seed)
        store.load(name, path, wait=30)
    yield store
    store.layers.remove()


@pytest.fixture(scope="module")
def alone():
    """Images drawn alone, kept by what was asked for."""
    return {}


@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(traffic=st.lists(visits, min_size=1, max_size=6), max_batch_rows=st.integers(1, 6))
def test_company_does_not_change_an_image(new_engine, store, alone, traffic, max_batch_rows):
    crowd = new_engine(adapters=store, max_batch_rows=max_batch_rows)
    waiting = [
        dataclasses.replace(v, request=dataclasses.replace(v.request, id=f"r{i}"))
        for i, v in enumerate(traffic)
    ]
    step = 0
    while crowd.has_work or step <= max(v.arrives + (v.aborted_after or 0) for v in waiting):
        for visit in waiting:
            if visit.arrives == step:
                crowd.add(visit.request)
            if visit.aborted_after is not None and visit.arrives + visit.aborted_after == step:
                crowd.abort(visit.request.id)
        crowd.step()
        step += 1
    for visit in waiting:
        ending = crowd.drawn.ending(visit.request.id)
        if isinstance(ending, Failed):
            assert visit.aborted_after is not None and isinstance(ending.error, Cancelled)
            continue
        key = dataclasses.replace(visit.request, id="", priority=0)
        if key not in alone:
            single = new_engine(adapters=store)
            single.add(dataclasses.replace(key, id="r"))
            drawn = single.run()
            alone[key] = [drawn.image("r", i) for i in range(key.n)]
        for index, picture in enumerate(alone[key]):
            found = crowd.drawn.image(visit.request.id, index)
            np.testing.assert_array_equal(found, picture)
    assert not crowd._states and not crowd.has_work


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_goes_on_elsewhere_in_other_company_is_the_same_to_the_bit(
    new_engine, model_folder, make_request, precision
):
    parts = load_components(model_folder, precision=precision)
    asked = make_request("r", steps=6, guidance=2.0, sampler="flow-dpmpp-2m", checkpoint_every=3)
    alone = new_engine(parts)
    alone.add(asked)
    alone.run()
    first = new_engine(parts)
    first.add(asked)
    first.add(make_request("other", steps=2, seed=1))
    left = first.run().of(Checkpoint, "r")[0]
    second = new_engine(parts)
    for i in range(3):
        second.add(make_request(f"company {i}", steps=5, seed=10 + i))
    second.step()
    second.add(asked, checkpoint=left.data)
    second.run()
    assert left.step == 3
    assert torch.equal(second.drawn.latents["r", 0], alone.drawn.latents["r", 0])
    np.testing.assert_array_equal(second.drawn.image("r"), alone.drawn.image("r"))
