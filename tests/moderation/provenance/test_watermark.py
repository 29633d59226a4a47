"""The invisible mark: found again in changed copies, nowhere else, and always the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples.images import CHANGES, Pixels, drawing, psnr, texture

from calotype.moderation.provenance import convolution, watermark

KEY, OTHER = b"k" * 32, b"o" * 32
SURVIVED = ("none", "jpeg 80", "half size", "crop 10 %", "crop 10 %, jpeg 80", "flipped")
IMAGES = {
    **{f"drawing {number}": drawing(number) for number in range(8)},
    "drawing 256": drawing(3, 256),
    "texture": texture(0),
    "texture 384": texture(1, 384),
    "white": np.full((128, 128, 3), 255, np.uint8),
    "black": np.zeros((128, 192, 3), np.uint8),
}


def marked(pixels: Pixels, key: bytes = KEY) -> tuple[str, Pixels]:
    payload = watermark.payload_of(pixels, key)
    return payload.hex(), watermark.embed(pixels, key, payload)


@pytest.mark.parametrize("name", IMAGES)
def test_the_mark_survives_what_people_do_to_images(name: str) -> None:
    payload, image = marked(IMAGES[name])
    for change in SURVIVED:
        found = watermark.detect(CHANGES[change](image), KEY)
        assert found is not None and found.payload == payload, change
        assert found.agreement > 0.6


def test_size_and_turn_of_a_copy_are_told() -> None:
    _, image = marked(drawing(1, 256))
    found = watermark.detect(CHANGES["half size"](image), KEY)
    assert found is not None and found.scale == 0.5 and found.turned == ""
    found = watermark.detect(np.rot90(image), KEY)
    assert found is not None and found.scale == 1.0 and "rotated" in found.turned


FAINT = {
    "white": np.full((128, 128, 3), 255, np.uint8),
    "drawing": drawing(0),
    "drawing 512": drawing(4, 512),
    "texture 512": texture(5, 512),
}


@pytest.mark.parametrize("name", FAINT)
def test_the_mark_is_fainter_where_that_is_enough(name: str) -> None:
    pixels = FAINT[name]
    payload = watermark.payload_of(pixels, KEY)
    faint = watermark.embed(pixels, KEY, payload)
    strong = watermark.embed(pixels, KEY, payload, strong=True)
    assert psnr(pixels, faint) > 43.2 and psnr(pixels, strong) < psnr(pixels, faint) - 2.5
    for change in SURVIVED:
        found = watermark.detect(CHANGES[change](faint), KEY)
        assert found is not None and found.payload == payload.hex(), change


@pytest.mark.parametrize("name", IMAGES)
def test_the_mark_is_not_seen(name: str) -> None:
    _, image = marked(IMAGES[name])
    assert psnr(IMAGES[name], image) >= 40.0
    assert np.abs(IMAGES[name].astype(int) - image).max() <= 16


def test_the_same_image_and_key_give_the_same_bytes() -> None:
    pixels = texture(2, 192)
    assert np.array_equal(marked(pixels)[1], marked(pixels.copy())[1])
    assert not np.array_equal(marked(pixels)[1], marked(pixels, OTHER)[1])
    changed = pixels.copy()
    changed[0, 0, 0] ^= 1
    assert marked(changed)[0] != marked(pixels)[0]


@pytest.mark.slow
def test_no_mark_is_found_where_there_is_none() -> None:
    for name, pixels in IMAGES.items():
        assert watermark.detect(pixels, KEY) is None, name
        assert watermark.detect(marked(pixels)[1], OTHER) is None, name


def test_a_image_too_small_for_the_pattern_is_left_as_it_is() -> None:
    pixels = texture(3, 48)
    assert marked(pixels)[1] is pixels
    assert watermark.detect(pixels, KEY) is None
    assert watermark.detect(np.zeros((1, 5000, 3), np.uint8), KEY) is None


@settings(max_examples=60, deadline=None)
@given(bits=st.lists(st.integers(0, 1), min_size=1, max_size=80), seed=st.integers(0, 2**32 - 1))
def test_the_code_corrects_one_coded_bit_in_twenty(bits: list[int], seed: int) -> None:
    given_bits = np.array(bits, dtype=np.uint8)
    soft = convolution.encode(given_bits)
    assert len(soft) == convolution.coded_length(len(bits))
    flips = np.random.default_rng(seed).permutation(len(soft))[: min(7, len(soft) // 20)]
    soft[flips] *= -1
    assert convolution.decode(soft, len(bits)).tolist() == bits


def test_the_payload_follows_from_key_and_image_only() -> None:
    pixels = drawing(5)
    again = watermark.payload_of(np.asfortranarray(pixels), KEY)
    assert watermark.payload_of(pixels, KEY) == again
    assert len(again) == watermark.PAYLOAD_BITS // 8
    assert again != watermark.payload_of(pixels, OTHER)
