"""The store of adapters: disk, CPU and device, budgets, revisions, pins."""

from __future__ import annotations

import hashlib
import pathlib
import threading

import numpy as np
import pytest

from calotype.serving.core.errors import AdapterLoadFailed, NotFound
from calotype.serving.core.request import AdapterRef
from calotype.serving.engine.lora import adapter_store
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.testing.models import save_random_lora

WAIT = 30.0


@pytest.fixture(scope="module")
def lora_files(model_folder, tmp_path_factory) -> dict[str, pathlib.Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {
        name: save_random_lora(model_folder, folder / f"{name}.safetensors", 4, seed=seed)
        for seed, name in enumerate(("one", "two", "three"))
    }


@pytest.fixture
def store(components, lora_files):
    store = AdapterStore(components.denoiser)
    store.load("one", lora_files["one"], wait=WAIT)
    yield store
    store.layers.remove()


def test_request_waits_for_an_adapter_that_is_being_read(
    new_engine, components, lora_files, make_request, monkeypatch
):
    gate = threading.Event()
    read = adapter_store.read_lora
    monkeypatch.setattr(
        adapter_store, "read_lora", lambda *a, **k: gate.wait(WAIT) and read(*a, **k)
    )
    store = AdapterStore(components.denoiser)
    store.load("slow", lora_files["one"])
    assert store.states() == {"slow": "loading"}
    engine = new_engine(adapters=store)
    engine.add(make_request("waits", adapters=(AdapterRef("slow"),)))
    engine.add(make_request("goes"))
    while engine.step() and not engine.drawn.floats:
        pass
    assert list(engine.drawn.floats) == [("goes", 0)]
    gate.set()
    engine.run().image("waits")
    store.layers.remove()


def test_new_revision_takes_over_when_it_is_ready_and_a_bad_one_does_not(
    new_engine, components, model_folder, tmp_path, make_request
):
    path = save_random_lora(model_folder, tmp_path / "a.safetensors", 4, seed=1)
    store = AdapterStore(components.denoiser)
    engine = new_engine(adapters=store)
    images = []
    for seed in (1, 5):
        save_random_lora(model_folder, path.with_suffix(".new"), 4, seed=seed).replace(path)
        store.load("a", path, wait=WAIT)
        engine.add(make_request(f"r{seed}", adapters=(AdapterRef("a"),)))
        images.append(engine.run().image(f"r{seed}"))
    assert np.abs(images[0] - images[1]).max() > 0.01
    path.write_bytes(b"damaged")
    with pytest.raises(AdapterLoadFailed):
        store.load("a", path, wait=WAIT)
    assert str(path) in store.states()["a"]
    engine.add(make_request("still", adapters=(AdapterRef("a"),)))
    assert np.array_equal(engine.run().image("still"), images[1])
    store.layers.remove()


def test_running_request_keeps_an_unloaded_adapter(new_engine, store, make_request):
    engine = new_engine(adapters=store)
    engine.add(make_request("first", adapters=(AdapterRef("one"),)))
    whole = engine.run().image("first")
    engine.add(make_request("second", adapters=(AdapterRef("one"),)))
    engine.step()
    store.unload("one")
    assert "one" not in store.states()
    assert np.array_equal(engine.run().image("second"), whole)
    with pytest.raises(NotFound):
        engine.add(make_request("third", adapters=(AdapterRef("one"),)))


def test_budget_drops_the_least_recently_used_and_reads_it_again(
    new_engine, components, model_folder, tmp_path, make_request
):
    sizes = AdapterStore(components.denoiser)
    paths = [
        save_random_lora(model_folder, tmp_path / f"{i}.safetensors", 4, seed=i) for i in range(3)
    ]
    sizes.load("0", paths[0], wait=WAIT)
    size = sizes.resident_bytes()
    store = AdapterStore(components.denoiser, budget_bytes=2 * size)
    for i, path in enumerate(paths):
        store.load(str(i), path, wait=WAIT)
    assert store.resident_bytes() == 2 * size
    assert set(store.states().values()) == {"ready"}
    engine = new_engine(adapters=store)
    for i in (0, 1, 2, 0):
        engine.add(make_request(f"r{i}", adapters=(AdapterRef(str(i)),)))
        engine.run().image(f"r{i}")
        engine.drawn.events.clear()
        assert store.resident_bytes() <= 2 * size
    store.layers.remove()


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that are read, as they are read."""
    read, seen = adapter_store.read_lora, []

    def noted(path, *more, **other):
        seen.append(path.stem)
        return read(path, *more, **other)

    monkeypatch.setattr(adapter_store, "read_lora", noted)
    return seen


def draw(engine, make_request, name):
    engine.drawn.events.clear()
    engine.add(make_request(name, adapters=(AdapterRef(name),)))
    return engine.run().image(name)


def tiers(store):
    return {name: place.tier for name, place in store.places().items()}


def test_adapters_go_down_and_up_the_tiers(
    new_engine, components, lora_files, make_request, store, reads
):
    size = store.places()["one"].bytes
    reads.clear()
    small = AdapterStore(components.denoiser, budget_bytes=size, cpu_budget_bytes=2 * size)
    for name, path in lora_files.items():
        small.load(name, path, wait=WAIT)
    assert tiers(small) == {"one": "disk", "two": "cpu", "three": "device"}
    assert set(small.states().values()) == {"ready"}
    engine = new_engine(adapters=small)
    before = draw(engine, make_request, "two")
    assert reads == ["one", "two", "three"], "it came from the CPU's memory"
    assert tiers(small) == {"one": "disk", "two": "device", "three": "cpu"}
    draw(engine, make_request, "one")
    assert reads == ["one", "two", "three", "one"]
    assert tiers(small)["one"] == "device"
    assert small.resident_bytes() == size
    assert np.array_equal(draw(engine, make_request, "two"), before)
    assert (
        small.places()["two"].digest == hashlib.sha256(lora_files["two"].read_bytes()).hexdigest()
    )
    small.layers.remove()


def test_used_adapters_stay_whatever_the_budget(
    new_engine, components, lora_files, make_request, store
):
    size = store.places()["one"].bytes
    small = AdapterStore(components.denoiser, budget_bytes=size)
    for name, path in lora_files.items():
        small.load(name, path, wait=WAIT)
    engine = new_engine(adapters=small)
    for name in lora_files:
        engine.add(make_request(name, adapters=(AdapterRef(name),)))
    together = engine.run()
    assert 3 in engine.batches, "all three were on the device at once"
    assert small.resident_bytes() <= size
    for name in lora_files:
        plain = new_engine(adapters=small)
        np.testing.assert_allclose(
            draw(plain, make_request, name), together.image(name), atol=1e-4, rtol=0
        )
    small.layers.remove()


def test_a_kept_adapter_never_leaves_the_device(
    new_engine, components, lora_files, make_request, store
):
    size = store.places()["one"].bytes
    small = AdapterStore(components.denoiser, budget_bytes=2 * size)
    small.load("one", lora_files["one"], keep=True, wait=WAIT)
    for name in ("two", "three"):
        small.load(name, lora_files[name], wait=WAIT)
    assert tiers(small) == {"one": "device", "two": "cpu", "three": "device"}
    engine = new_engine(adapters=small)
    for name in ("two", "three", "two"):
        draw(engine, make_request, name)
        assert tiers(small)["one"] == "device"
        assert small.resident_bytes() == 2 * size
    small.load("one", lora_files["one"], wait=WAIT)  # kept no more
    draw(engine, make_request, "three")
    assert tiers(small)["one"] == "cpu"
    small.load("one", lora_files["one"], keep=True, wait=WAIT)
    assert tiers(small)["one"] == "device"
    small.layers.remove()


def test_kept_adapters_that_do_not_fit_together_are_told_and_served_on_demand(
    new_engine, components, lora_files, make_request, store
):
    size = store.places()["one"].bytes
    small = AdapterStore(components.denoiser, budget_bytes=size)
    small.load("one", lora_files["one"], keep=True, wait=WAIT)
    with pytest.raises(AdapterLoadFailed, match="memoryBudget") as told:
        small.load("two", lora_files["two"], keep=True, wait=WAIT)
    assert f"{2 * size:,} bytes" in told.value.message
    assert tiers(small)["one"] == "device"
    draw(new_engine(adapters=small), make_request, "two")
    small.unload("one")
    small.load("two", lora_files["two"], keep=True, wait=WAIT)
    assert small.states() == {"two": "ready"}
    small.layers.remove()


def test_the_old_revision_outlives_a_bad_one_also_off_the_device(
    new_engine, components, model_folder, lora_files, make_request, tmp_path, store
):
    size = store.places()["one"].bytes
    small = AdapterStore(components.denoiser, budget_bytes=size, cpu_budget_bytes=size)
    path = tmp_path / "a.safetensors"
    path.write_bytes(lora_files["one"].read_bytes())
    small.load("a", path, wait=WAIT)
    engine = new_engine(adapters=small)
    before = draw(engine, make_request, "a")
    path.write_bytes(b"damaged")
    with pytest.raises(AdapterLoadFailed):
        small.load("a", path, wait=WAIT)
    for name in ("two", "three", "two"):
        small.load(name, lora_files[name], wait=WAIT)
        draw(engine, make_request, name)
    assert np.array_equal(draw(engine, make_request, "a"), before)
    assert "not a safetensors file" in small.states()["a"]
    path.write_bytes(lora_files["two"].read_bytes())
    small.load("a", path, wait=WAIT)
    assert small.states()["a"] == "ready"
    assert np.array_equal(draw(engine, make_request, "a"), draw(engine, make_request, "two"))
    small.layers.remove()


def test_a_running_request_ends_with_the_revision_it_began_with(
    new_engine, components, model_folder, make_request, tmp_path
):
    path = save_random_lora(model_folder, tmp_path / "a.safetensors", 4, seed=1)
    store = AdapterStore(components.denoiser)
    store.load("a", path, wait=WAIT)
    engine = new_engine(adapters=store)
    whole = draw(engine, make_request, "a")
    engine.drawn.events.clear()
    engine.add(make_request("runs", adapters=(AdapterRef("a"),)))
    engine.step()
    (old,) = engine._states["runs"].pinned
    save_random_lora(model_folder, tmp_path / "b", 4, seed=2).replace(path)
    store.load("a", path, wait=WAIT)
    engine.add(make_request("new", adapters=(AdapterRef("a"),)))
    drawn = engine.run()
    np.testing.assert_allclose(drawn.image("runs"), whole, atol=1e-4, rtol=0)
    assert np.abs(drawn.image("new") - whole).max() > 0.01
    assert old.layers is None, "its memory is free"
    store.layers.remove()


def test_joined_matrices_keep_to_their_memory(
    components, lora_files, store, new_engine, make_request
):
    for name in ("two", "three"):
        store.load(name, lora_files[name], wait=WAIT)
    engine = new_engine(adapters=store)
    pairs = [("one", "two"), ("two", "three"), ("one", "three")]
    joined = []
    for first, second in pairs:
        engine.drawn.events.clear()
        engine.add(make_request(adapters=(AdapterRef(first), AdapterRef(second))))
        engine.run()
        joined.append(store.layers.bank_bytes())
    assert joined == [joined[0], 2 * joined[0], 3 * joined[0]]
    store.layers._bank_bytes = joined[0]
    engine.drawn.events.clear()
    engine.add(make_request(adapters=tuple(AdapterRef(name) for name in lora_files)))
    engine.run()
    assert store.layers.bank_bytes() == pytest.approx(1.5 * joined[0])
    store.unload("one")
    assert store.layers.bank_bytes() == 0
