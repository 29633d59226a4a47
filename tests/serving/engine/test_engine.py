"""The engine's promises: batch invariance, aborts, isolation, exactly one terminal event."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch

from calotype.serving.core.errors import (
    Cancelled,
    EngineError,
    InvalidRequest,
    NonFiniteLatents,
    OutOfMemory,
)
from calotype.serving.core.request import AdapterRef, Failed, Finished, Preview, Progress
from calotype.serving.engine.engine import Engine
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.engine.model.components import load_components
from calotype.serving.testing.models import save_random_lora

CLOSE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def lora_file(model_folder, tmp_path_factory):
    return save_random_lora(model_folder, tmp_path_factory.mktemp("l") / "one.safetensors")


def test_images_are_the_same_alone_and_among_late_joiners_and_aborts(
    components, new_engine, make_request, lora_file
):
    store = AdapterStore(components.denoiser)
    store.load("one", lora_file, wait=30)
    rng = random.Random(3)
    requests = [
        make_request(
            f"r{i}",
            prompt=rng.choice(["a red circle", "a blue star on the left", ""]),
            size=rng.choice([(64, 64), (96, 64)]),
            steps=rng.choice([2, 3, 6]),
            guidance=rng.choice([1.0, 3.0, 4.5]),
            seed=rng.randrange(1000),
            n=rng.choice([1, 1, 3]),
            adapters=rng.choice([(), (AdapterRef("one", 0.6),)]),
            priority=rng.choice([0, 0, 5]),
        )
        for i in range(10)
    ]
    crowd = new_engine(adapters=store, max_batch_rows=4)
    aborted = {"r3", "r8"}
    for request in requests:
        crowd.add(request)
        crowd.step()
        if request.id == "r4":
            crowd.abort("r3")
    crowd.abort("r8")
    drawn = crowd.run()
    assert max(crowd.batches) == 4, "rows must share steps"
    for request in requests:
        ending = drawn.ending(request.id)
        if request.id in aborted and isinstance(ending, Failed):
            continue
        alone = new_engine(adapters=store)
        alone.add(request)
        alone.run()
        for i in range(request.n):
            np.testing.assert_allclose(
                drawn.image(request.id, i), alone.drawn.image(request.id, i), **CLOSE
            )
    store.layers.remove()


def test_requests_share_every_step(engine, make_request):
    for i in range(5):
        engine.add(make_request(f"r{i}", seed=i, guidance=float(i)))
    engine.run()
    assert engine.batches == [5, 5, 5, 5]


def test_events_of_one_request(engine, make_request):
    engine.add(make_request(n=2, steps=4, preview_every=2))
    drawn = engine.run()
    assert [e.step for e in drawn.of(Progress, "r")] == [1, 2, 3, 4]
    assert {e.steps for e in drawn.of(Progress, "r")} == {4}
    previews = drawn.of(Preview, "r")
    assert [(e.index, e.step) for e in previews] == [(0, 2), (1, 2)]
    finished = drawn.ending("r")
    assert previews[0].pixels.shape == finished.images[0].shape == (64, 64, 3)
    assert drawn.events[-1] is finished
    assert 0 < finished.denoise_seconds < 60


def test_preview_of_the_last_but_one_step_is_near_the_image(engine, make_request):
    engine.add(make_request(steps=8, preview_every=1))
    drawn = engine.run()
    image = drawn.ending("r").images[0].astype(float)
    errors = [np.abs(e.pixels - image).mean() for e in drawn.of(Preview, "r")]
    assert len(errors) == 7
    assert errors[-1] < errors[0]
    assert errors[-1] < 10


def test_abort_ends_before_the_next_step_without_a_decode(engine, make_request):
    engine.add(make_request("stays", steps=4))
    engine.add(make_request("goes", steps=4))
    engine.step()
    engine.abort("goes")
    events = engine.step()
    failed = [e for e in events if isinstance(e, Failed)]
    assert [e.request_id for e in failed] == ["goes"]
    assert isinstance(failed[0].error, Cancelled)
    assert engine.batches == [2, 1]
    drawn = engine.run()
    assert ("goes", 0) not in drawn.floats
    drawn.image("stays")


def test_abort_during_the_last_step_saves_the_decode(engine, make_request, monkeypatch):
    engine.add(make_request(steps=1))
    run = engine._denoiser.run

    def aborted_meanwhile(*batch):
        engine.abort("r")
        return run(*batch)

    monkeypatch.setattr(engine._denoiser, "run", aborted_meanwhile)
    drawn = engine.run()
    assert isinstance(drawn.ending("r").error, Cancelled)
    assert drawn.floats == {}


def test_abort_before_the_first_step_and_of_unknown_requests(engine, make_request):
    engine.add(make_request())
    engine.abort("r")
    engine.abort("nobody")
    assert engine.has_work
    drawn = engine.run()
    assert isinstance(drawn.ending("r").error, Cancelled)
    assert engine.batches == []
    engine.abort("r")
    assert engine.step() == [] and not engine.has_work


def poisoned(engine, seed, fault):
    """Makes the denoiser fail whenever a row of this seed is in its batch."""
    run = engine._denoiser.run

    def run_or_fail(rows, *more):
        hit = [i for i, row in enumerate(rows) if row.seed == seed and row.sampler.done == 1]
        if hit and isinstance(fault, BaseException):
            raise fault
        velocity, latents = run(rows, *more)
        for i in hit:
            velocity[i, 0, 0] = fault
        return velocity, latents

    engine._denoiser.run = run_or_fail


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (float("nan"), NonFiniteLatents),
        (float("inf"), NonFiniteLatents),
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemory),
        (MemoryError(), OutOfMemory),
        (RuntimeError("cuBLAS is unhappy"), EngineError),
        (IndexError("bug"), EngineError),
    ],
    ids=repr,
)
def test_only_the_culprit_fails(engine, new_engine, make_request, fault, expected):
    healthy = new_engine()
    healthy.add(make_request("a", seed=1))
    alone = healthy.run().image("a")
    for name, seed in (("a", 1), ("culprit", 2), ("b", 3)):
        engine.add(make_request(name, seed=seed))
    poisoned(engine, 2, fault)
    drawn = engine.run()
    failed = drawn.ending("culprit")
    assert isinstance(failed, Failed) and type(failed.error) is expected
    np.testing.assert_allclose(drawn.image("a"), alone, **CLOSE)
    drawn.image("b")
    engine.add(make_request("next", seed=1))
    np.testing.assert_allclose(engine.run().image("next"), alone, **CLOSE)


def test_one_bad_image_fails_its_whole_request_once(engine, make_request):
    engine.add(make_request(n=3, seed=1))
    poisoned(engine, 2, float("nan"))
    assert isinstance(engine.run().ending("r").error, NonFiniteLatents)


def test_decoder_failure_fails_only_its_request(engine, make_request, monkeypatch):
    engine.add(make_request("a", seed=1))
    engine.add(make_request("b", seed=2))
    decode = engine._decoder.decode
    calls = []

    def fail_first(tokens, grid, **more):
        calls.append(len(tokens))
        if len(calls) == 1:
            raise RuntimeError("cuDNN is unhappy")
        return decode(tokens, grid, **more)

    monkeypatch.setattr(engine._decoder, "decode", fail_first)
    drawn = engine.run()
    assert calls == [1, 1]
    assert type(drawn.ending("a").error) is EngineError
    assert isinstance(drawn.ending("b"), Finished)


def test_memory_runs_out_once_and_later_batches_are_smaller(engine, make_request, monkeypatch):
    run = engine._denoiser.run

    def two_at_most(rows, *more):
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(rows, *more)

    monkeypatch.setattr(engine._denoiser, "run", two_at_most)
    for i in range(4):
        engine.add(make_request(f"r{i}", seed=i))
    drawn = engine.run()
    assert engine.batches.count(4) == 1 and engine.batches.count(2) == 6
    for i in range(4):
        drawn.image(f"r{i}")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"size": (100, 64)}, "size"),
        ({"size": (0, 64)}, "size"),
        ({"steps": 0}, "steps"),
        ({"n": 0}, "n"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"sampler": "magic"}, "sampler"),
        ({"guidance": float("nan")}, "guidance_scale"),
    ],
)
def test_bad_request_is_refused_and_the_next_one_works(engine, make_request, change, field):
    with pytest.raises(InvalidRequest) as caught:
        engine.add(make_request(**change))
    assert caught.value.param == field
    assert not engine.has_work
    engine.add(make_request(steps=1))
    engine.run().image("r")


def test_the_same_id_twice_is_refused_while_it_runs(engine, make_request):
    engine.add(make_request())
    with pytest.raises(InvalidRequest, match="already running"):
        engine.add(make_request())
    engine.run().image("r")
    engine.add(make_request())
    assert engine.has_work


def test_embeddings_from_elsewhere(components, model_folder, new_engine, make_request):
    without = load_components(model_folder, parts=("denoiser", "vae"))
    assert without.text_encoder is None
    engine = new_engine(without)
    with pytest.raises(InvalidRequest, match="no text encoder"):
        engine.add(make_request())
    (embeds,) = components.text_encoder.encode([make_request().prompt])
    array = embeds.embeds.numpy()
    array.setflags(write=False)
    with pytest.raises(InvalidRequest, match="shape"):
        engine.add(make_request(), array[:-1])
    engine.add(make_request("array"), array)
    engine.add(make_request("tensor"), embeds)
    drawn = engine.run()
    whole = new_engine()
    whole.add(make_request())
    for name in ("array", "tensor"):
        np.testing.assert_allclose(drawn.image(name), whole.run().image("r"), **CLOSE)


def test_adds_and_aborts_from_other_threads_end_every_request_once(components, make_request):
    engine = Engine(components, max_batch_rows=4)
    events, stop = [], threading.Event()

    def drive():
        while not stop.is_set() or engine.has_work:
            events.extend(engine.step())

    driver = threading.Thread(target=drive)
    driver.start()

    def ask(who):
        rng = random.Random(who)
        for i in range(15):
            engine.add(make_request(f"{who}-{i}", size=(32, 32), steps=2, seed=i, n=1 + i % 2))
            if rng.random() < 0.4:
                engine.abort(f"{who}-{rng.randrange(i + 1)}")

    askers = [threading.Thread(target=ask, args=(who,)) for who in range(3)]
    for thread in askers:
        thread.start()
    for thread in askers:
        thread.join()
    stop.set()
    driver.join(600)
    assert not driver.is_alive()
    ends = [e.request_id for e in events if isinstance(e, Finished | Failed)]
    assert sorted(ends) == sorted(f"{who}-{i}" for who in range(3) for i in range(15))
    assert not engine._states and len(engine._scheduler) == 0 and not engine._aborted
