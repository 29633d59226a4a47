"""The GPUs of one machine, shared out by `calotype serve`."""

from __future__ import annotations

import pytest

from calotype.serving.core.errors import ModelLoadFailed
from calotype.serving.deployments.gpu_shares import GpuShares, local_shares


@pytest.mark.parametrize(
    ("device", "devices", "present", "generator", "encoder"),
    [
        ("auto", 1, 0, 0, 0),
        ("auto", 2, 0, 0, 0),
        ("cpu", 2, 8, 0, 0),
        ("auto", 1, 1, 0.75, 0.25),
        ("cuda", 1, 2, 1, 1),
        ("auto", 7, 8, 7, 1),
    ],
)
def test_generator_and_text_encoder_have_room(
    device: str, devices: int, present: int, generator: float, encoder: float
) -> None:
    found = local_shares(device, devices, present)
    assert found == GpuShares(generator, encoder)
    assert found.generator + found.encoder <= present


@pytest.mark.parametrize(
    ("device", "devices", "present", "says"),
    [
        ("cuda", 1, 0, "Ray sees no GPU"),
        ("auto", 8, 8, "has 8 GPUs, and the text encoder takes one: write 7 at most"),
        ("cuda", 2, 1, "has 1 GPU, and the text encoder takes one: write 1 at most"),
    ],
)
def test_what_does_not_fit_is_told(device: str, devices: int, present: int, says: str) -> None:
    with pytest.raises(ModelLoadFailed, match=says):
        local_shares(device, devices, present)
