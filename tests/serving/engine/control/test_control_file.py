"""Files of control adapters: exactly the keys of FLUX.2-dev-Fun-Controlnet-Union, or a reason."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from calotype.serving.core.errors import AdapterLoadFailed, NotFound
from calotype.serving.engine.control.branch import ControlBranch, control_channels, control_layers
from calotype.serving.engine.control.control_file import check_branch, read_branch
from calotype.serving.engine.control.control_store import ControlStore
from calotype.serving.engine.sizing.configs import TransformerConfig

DEV = TransformerConfig()
ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def fun_shapes(width=6144, hidden=18432, head=128, channels=260, blocks=4):
    """The keys of the published file, from VideoX-Fun's class and its flux2_control.yaml."""
    found = {"control_img_in.weight": (width, channels), "control_img_in.bias": (width,)}
    for i in range(blocks):
        at = f"control_transformer_blocks.{i}"
        found |= {f"{at}.attn.{name}.weight": (width, width) for name in ATTENTION}
        found |= {f"{at}.attn.{name}.weight": (head,) for name in NORMS}
        for part in ("ff", "ff_context"):
            found[f"{at}.{part}.linear_in.weight"] = (2 * hidden, width)
            found[f"{at}.{part}.linear_out.weight"] = (width, hidden)
        for name in ("before_proj", "after_proj") if i == 0 else ("after_proj",):
            found |= {f"{at}.{name}.weight": (width, width), f"{at}.{name}.bias": (width,)}
    return found


def write_header(path, shapes, dtype="BF16", size=2):
    """A file with a whole header whose tensors are a hole in the disk."""
    header, place = {}, 0
    for name, shape in shapes.items():
        length = size * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + length]}
        place += length
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + place)
    return path


def test_the_full_key_set_fits_dev_and_nothing_else_is_left_over(tmp_path):
    shapes = fun_shapes()
    assert control_layers(DEV) == (0, 2, 4, 6) and control_channels(DEV) == 260
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == pytest.approx(
        4.12e9, rel=2e-3
    )
    with torch.device("meta"):
        branch = ControlBranch(DEV)
        state = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    found = branch.load_state_dict(state, strict=True, assign=True)
    assert not found.missing_keys and not found.unexpected_keys
    header = check_branch(write_header(tmp_path / "fun.safetensors", shapes), DEV)
    assert set(header.tensors) == set(branch.state_dict())


@pytest.mark.parametrize(
    "name", ["control_img_in.bias", "control_transformer_blocks.2.ff.linear_in.weight"]
)
def test_a_missing_key_fails_by_name(tmp_path, name):
    shapes = fun_shapes()
    del shapes[name]
    with pytest.raises(AdapterLoadFailed, match=f"lacks '{name}'") as caught:
        check_branch(write_header(tmp_path / "fun.safetensors", shapes), DEV)
    assert caught.value.code == "control_mismatch"


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (fun_shapes(blocks=5), "no place for 'control_transformer_blocks.4.*more keys.*0, 2, 4, 6"),
        (fun_shapes(channels=64), "reads 64 channels.*has 260: 128 of the map, 4 of the mask"),
        (fun_shapes(width=3072, hidden=9216), r"control_img_in.weight is \[3072, 260\].*\[6144"),
        ({"controlnet_x_embedder.weight": (3072, 64)}, "ControlNet of FLUX.1.*64-channel"),
        ({"controlnet_blocks.0.weight": (8, 8)}, "Fun-Controlnet-Union"),
        ({"input_hint_block.0.weight": (8, 8)}, "ControlNet of FLUX.1"),
        ({"ip_adapter.0.to_k_ip.weight": (8, 8)}, "IP-Adapter.*reference_images"),
        ({"image_proj.norm.weight": (8,)}, "reference_images"),
        ({"redux_up.weight": (8, 8)}, "Redux of FLUX.1"),
        ({"transformer.a.lora_A.weight": (8, 8)}, "it is a LoRA.*type: lora"),
        ({}, "no tensors"),
    ],
    ids=["5 blocks", "64", "narrow", "x", "instantx", "xlabs", "ip", "proj", "redux", "lora", "0"],
)
def test_files_of_other_models_and_kinds_are_refused_by_name(tmp_path, shapes, words):
    with pytest.raises(AdapterLoadFailed, match=words) as caught:
        check_branch(write_header(tmp_path / "x.safetensors", shapes), DEV)
    assert caught.value.code == "control_mismatch"


def test_a_file_of_integers_or_with_nan_is_refused(components, tmp_path):
    config = components.denoiser.config
    branch = ControlBranch(config)
    shapes = {name: tuple(t.shape) for name, t in branch.state_dict().items()}
    path = write_header(tmp_path / "int.safetensors", shapes, "I8", 1)
    with pytest.raises(AdapterLoadFailed, match="of type I8"):
        read_branch(path, config, dtype=torch.float32)
    with torch.no_grad():
        branch.control_img_in.bias[3] = float("nan")
    save_file(branch.state_dict(), tmp_path / "nan.safetensors")
    with pytest.raises(AdapterLoadFailed, match=r"control_img_in\.bias holds NaN"):
        read_branch(tmp_path / "nan.safetensors", config, dtype=torch.float32)


def test_a_new_revision_serves_when_it_is_ready_and_the_old_one_if_it_is_damaged(
    components, tmp_path
):
    config = components.denoiser.config
    path = tmp_path / "branch.safetensors"
    store = ControlStore(components.denoiser)
    save_file(ControlBranch(config).state_dict(), path)
    store.load("b", path, wait=60)
    first = store.acquire("b")
    assert first is not None and store.states() == {"b": "ready"}
    path.write_bytes(b"damaged in the meantime")
    with pytest.raises(AdapterLoadFailed, match="not a safetensors file"):
        store.load("b", path, wait=60)
    assert store.acquire("b") is first
    save_file(ControlBranch(config).state_dict(), path)
    store.load("b", path, wait=60)
    assert store.acquire("b") not in (None, first)
    store.unload("b")
    with pytest.raises(NotFound):
        store.acquire("b")


def test_the_store_keeps_to_its_budget_and_brings_back_what_is_asked_for(components, tmp_path):
    config = components.denoiser.config
    names = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in names:
        save_file(ControlBranch(config).state_dict(), path)
    size = sum(p.numel() * 4 for p in ControlBranch(config).parameters())
    store = ControlStore(components.denoiser, budget_bytes=size)
    for path in names:
        store.load(path.stem, path, wait=60)
    assert store.resident_bytes() == size
    assert store.acquire("1") is not None
    for _ in range(600):
        if store.acquire("0") is not None:
            break
        store.wait_for_change(0.1)
    assert store.acquire("0") is not None and store.resident_bytes() == size
