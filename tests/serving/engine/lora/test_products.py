"""LoKr, LoHa and DoRA draw what a model with their changed weights draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from calotype.serving.core.errors import AdapterLoadFailed
from calotype.serving.core.request import AdapterRef
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.engine.lora.dora import with_gains
from calotype.serving.engine.lora.lora_file import linear_shapes, read_lora
from calotype.serving.engine.lora.low_rank import reduce_rank
from calotype.serving.engine.model.components import load_components

WAIT = 30.0
Q, K, V = (f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv")
OUT = "single_transformer_blocks.1.attn.to_out"
LAYERS = {  # how a file names them: (prefix and name, modules, rows, columns)
    "lycoris": ("lycoris_single_transformer_blocks_1_attn_to_out", (OUT,), 64, 256),
    "ai-toolkit": ("diffusion_model.single_blocks.1.linear2", (OUT,), 64, 256),
    "joint": ("diffusion_model.double_blocks.0.img_attn.qkv", (Q, K, V), 192, 64),
    "kohya": ("lora_unet_double_blocks_0_img_attn_qkv", (Q, K, V), 192, 64),
}


def draw(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) * 0.3 for shape in shapes]


def lokr(rows, columns, form):
    """Tensors of a LoKr of a layer, and its change by definition."""
    w1, w2 = (4, 4), (rows // 4, columns // 4)
    (whole1, a1, b1), (whole2, a2, b2) = (
        draw(seed, shape, (shape[0], 2), (2, shape[1])) for seed, shape in enumerate((w1, w2))
    )
    tensors = {"alpha": torch.tensor(8.0)}
    tensors |= {"lokr_w1_a": a1, "lokr_w1_b": b1} if form == "both low" else {"lokr_w1": whole1}
    if form.startswith("whole"):
        tensors |= {"lokr_w2": whole2}
    else:
        tensors |= {"lokr_w2_a": a2, "lokr_w2_b": b2}
    first = a1 @ b1 if form == "both low" else whole1
    scale = {"whole": 1.0, "whole, musubi": 8 / max(w2)}.get(form, 4.0)
    second = whole2 if form.startswith("whole") else a2 @ b2
    return tensors, torch.kron(first, second) * scale


def loha(rows, columns, form):
    a1, b1, a2, b2 = draw(5, (rows, 3), (3, columns), (rows, 3), (3, columns))
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    return tensors | {"alpha": torch.tensor(6)}, (a1 @ b1) * (a2 @ b2) * 2


def lora(rows, columns, form):
    up, down = draw(6, (rows, 4), (4, columns))
    return {"lora_up.weight": up, "lora_down.weight": down}, up @ down


FORMS = [
    (lokr, "low"),
    (lokr, "both low"),
    (lokr, "whole"),
    (lokr, "whole, musubi"),
    (loha, ""),
]


def save(path, layer, tensors, more=()):
    content = {f"{layer}.{key}": value.contiguous() for key, value in tensors.items()}
    save_file(content | dict(more), str(path))
    return path


@pytest.fixture
def picture_of(model_folder, new_engine, make_request):
    """The picture of a model whose weights are changed: module -> its new weights."""

    def draw_changed(weights):
        model = load_components(model_folder)
        for module, weight in weights.items():
            model.denoiser.get_submodule(module).weight.data.copy_(weight)
        engine = new_engine(model)
        engine.add(make_request())
        return engine.run().image("r")

    return draw_changed


def weights_of(components, modules):
    return torch.cat([components.denoiser.get_submodule(m).weight.detach() for m in modules])


@pytest.fixture
def check_weights(components):
    def compare(path, modules, changed):
        """The file makes the changed weights [all rows of the modules, columns]."""
        shapes = linear_shapes(components.denoiser)
        layers = read_lora(path, shapes, max_rank=256, dtype=torch.float32).layers
        layers = with_gains(layers, lambda name: weights_of(components, (name,)))
        for module, expected in zip(modules, changed.chunk(len(modules)), strict=True):
            layer, weight = layers[module], weights_of(components, (module,))
            found = weight + layer.up @ layer.down
            if layer.gain is not None:
                values = layer.gain.values
                found += weight * (values[:, None] if layer.gain.per_row else values)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    return compare


@pytest.fixture
def check_picture(components, new_engine, make_request, picture_of):
    def compare(path, modules, changed):
        """The file draws as the changed weights [all rows of the modules, columns] do."""
        store = AdapterStore(components.denoiser)
        store.load("a", path, wait=WAIT)
        engine = new_engine(adapters=store)
        engine.add(make_request(adapters=(AdapterRef("a"),)))
        engine.add(make_request("plain"))
        drawn = engine.run()
        store.layers.remove()
        expected = picture_of(dict(zip(modules, changed.chunk(len(modules)), strict=True)))
        np.testing.assert_allclose(drawn.image("r"), expected, atol=1e-4, rtol=0)
        assert np.abs(drawn.image("r") - drawn.image("plain")).max() > 1e-3

    return compare


@pytest.mark.parametrize(("make", "form"), FORMS, ids=["low", "both", "whole", "musubi", "loha"])
def test_a_product_draws_as_the_model_with_its_weights(
    components, tmp_path, check_weights, check_picture, make, form
):
    for name, modules, rows, columns in LAYERS.values():
        tensors, change = make(rows, columns, form)
        more = {"lokr_factor": torch.tensor(4)} if form.endswith("musubi") else {}
        path = save(tmp_path / "a.safetensors", name, tensors, more)
        changed = weights_of(components, modules) + change
        check_weights(path, modules, changed)
    check_picture(path, modules, changed)


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_magnitudes_are_those_of_the_changed_weights(
    components, tmp_path, check_weights, check_picture, axis
):
    """LyCORIS' and OneTrainer's formula: of a joint layer all rows are normed together."""
    for make in (lora, lokr, loha):
        for name, modules, rows, columns in LAYERS.values():
            tensors, change = make(rows, columns, "low")
            shape = (rows, 1) if axis == "rows" else (1, columns)
            magnitude = 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(8))
            changed = weights_of(components, modules) + change
            norm = changed.norm(dim=1 if axis == "rows" else 0, keepdim=True)
            path = save(tmp_path / "a.safetensors", name, tensors | {"dora_scale": magnitude})
            check_weights(path, modules, changed * magnitude / norm)
    check_picture(path, modules, changed * magnitude / norm)


def test_the_scale_of_a_dora_leads_in_a_straight_line(
    components, tmp_path, new_engine, make_request, picture_of
):
    name, modules, rows, columns = LAYERS["joint"]
    tensors, change = lora(rows, columns, "")
    base = weights_of(components, modules)
    magnitude = 2 * base.norm(dim=1)
    path = save(tmp_path / "a.safetensors", name, tensors | {"dora_scale": magnitude})
    changed = (base + change) * (magnitude / (base + change).norm(dim=1))[:, None]
    store = AdapterStore(components.denoiser)
    store.load("a", path, wait=WAIT)
    engine = new_engine(adapters=store)
    for scale in (0.0, 0.25):
        engine.add(make_request(str(scale), adapters=(AdapterRef("a", scale),)))
    engine.add(make_request("plain"))
    drawn = engine.run()
    store.layers.remove()
    quarter = (base + 0.25 * (changed - base)).chunk(3)
    expected = picture_of(dict(zip(modules, quarter, strict=True)))
    np.testing.assert_allclose(drawn.image("0.25"), expected, atol=1e-4, rtol=0)
    assert np.array_equal(drawn.image("0.0"), drawn.image("plain"))


def test_two_doras_and_a_lora_beside_rows_without(components, tmp_path, new_engine, make_request):
    """Rows of a batch do not mix: each is what it is alone."""
    name, _, rows, columns = LAYERS["lycoris"]
    tensors, _ = lora(rows, columns, "")
    paths = {
        "one": save(tmp_path / "1.safetensors", name, tensors | {"dora_scale": torch.ones(64, 1)}),
        "two": save(tmp_path / "2.safetensors", name, tensors | {"dora_scale": torch.ones(1, 256)}),
        "lora": save(tmp_path / "3.safetensors", name, tensors),
    }
    store = AdapterStore(components.denoiser)
    stacks = [(), ("one",), ("two",), ("lora",), ("one", "two"), ("two", "lora")]
    for adapter, path in paths.items():
        store.load(adapter, path, wait=WAIT)
    together = new_engine(adapters=store)
    requests = [make_request(str(s), adapters=tuple(AdapterRef(a, 0.6) for a in s)) for s in stacks]
    for request in requests:
        together.add(request)
    drawn = together.run()
    for request in requests:
        alone = new_engine(adapters=store)
        alone.add(request)
        difference = np.abs(alone.run().image(request.id) - drawn.image(request.id)).max()
        assert difference < 1e-5, request.id
    store.layers.remove()


@pytest.mark.parametrize(("make", "form"), [(lokr, "whole"), (loha, "")], ids=["lokr", "loha"])
def test_what_fewer_ranks_would_lose_is_said_in_percent(components, tmp_path, make, form):
    name, _, rows, columns = LAYERS["lycoris"]
    tensors, change = make(rows, columns, form)
    path = save(tmp_path / "a.safetensors", name, tensors)
    shapes = linear_shapes(components.denoiser)
    values = torch.linalg.svdvals(change.double())
    needed = int((values > values[0] * 1e-5).sum())
    left_out = float((values[6:] ** 2).sum() / (values**2).sum()) ** 0.5
    with pytest.raises(AdapterLoadFailed) as caught:
        read_lora(path, shapes, max_rank=6, dtype=torch.float32)
    assert f"needs rank {needed}" in caught.value.message
    assert f"leave out {left_out:.2%}" in caught.value.message
    assert "spec.adapters.maxRank of the ImageModel" in caught.value.message
    assert caught.value.details["fault"] == "rank_too_high"
    layers = read_lora(path, shapes, max_rank=needed, dtype=torch.float32).layers
    torch.testing.assert_close(layers[OUT].up @ layers[OUT].down, change, atol=1e-5, rtol=0)


def test_a_product_of_more_pairs_than_ranks_is_loaded_where_its_rank_is_low(components, tmp_path):
    """Trained ranks may be empty: what counts is the rank of the product."""
    name, _, rows, columns = LAYERS["lycoris"]
    tensors, change = loha(rows, columns, "")
    tensors["hada_w2_a"][:, 1:] = 0
    change = (tensors["hada_w1_a"] @ tensors["hada_w1_b"]) * 2
    change = change * (tensors["hada_w2_a"] @ tensors["hada_w2_b"])
    path = save(tmp_path / "a.safetensors", name, tensors)
    shapes = linear_shapes(components.denoiser)
    layer = read_lora(path, shapes, max_rank=3, dtype=torch.float32).layers[OUT]
    assert layer.rank == 3
    torch.testing.assert_close(layer.up @ layer.down, change, atol=1e-5, rtol=0)


def test_reduced_rank_is_the_best_there_is():
    up, down = draw(1, (40, 12), (12, 30))
    reduced = reduce_rank(up, down, 5)
    u, s, v = torch.linalg.svd(up @ down)
    best = (u[:, :5] * s[:5]) @ v[:5]
    torch.testing.assert_close(reduced.up @ reduced.down, best, atol=1e-5, rtol=0)
    assert reduced.loss == pytest.approx(float((up @ down - best).norm() / (up @ down).norm()))
    assert reduced.rank_needed == 12


def test_a_layer_without_magnitude_keeps_its_factors(components):
    shapes = {OUT: (64, 256)}
    up, down = draw(2, (64, 4), (4, 256))
    from calotype.serving.engine.lora.low_rank import LoraLayer

    layers = {OUT: LoraLayer(down, up)}
    assert with_gains(layers, lambda name: torch.zeros(shapes[name]))[OUT] is layers[OUT]
