"""An invisible watermark: 48 bits under a secret key, detectable in changed copies.

A pattern of 64x64 pixels is repeated over the brightness of the image, so that a crop is only a
shift of it. The pattern is made of waves of 4 to 20 pixels: long enough for JPEG and for half the
size. A third of the waves is the same in every image of a key and tells size, shift and flip;
the others carry 48 bits and 24 check bits in a convolutional code. Embedding looks at what the
detector will see of this very image and strengthens what would be misread (informed embedding;
Cox, Miller, Bloom, Digital Watermarking, chapter 5). Nothing in it is random: the same pixels and
the same key give the same marked pixels.

Without the key the mark can be neither read nor told from noise. It tells nothing about who asked
for the image.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calotype.moderation.provenance import convolution

TILE = 64
"""Period of the pattern in pixels; smaller images are not marked."""
PAYLOAD_BITS = 48
CHECK_BITS = 24
"""Of noise one reading in 2**24 passes for a mark."""
PSNR_DB = 40.5
"""How near the marked image is to the unmarked one."""
FAINT_DB = 43.5
"""The same where less is enough: the mark repeats often, or nothing in the image speaks against
it. There the eye would also see it first."""
FAINT_FROM = 64
"""Repetitions of the pattern."""
FLAT_SHARE = 0.6
"""Part of the pixels that are as bright as what is around them; photographs have up to 0.5."""

Pixels = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]
Spectrum = NDArray[np.complexfloating[Any, Any]]

_LONGEST, _SHORTEST = 3.2, 16.0
"""Waves per tile, lowest and highest."""
_SYNC_EVERY = 3
_SYNC_PEAK = 4.0
"""Standard deviations by which the best shift must stand out to be read at all."""
_BLUR = 4
"""Pixels to each side that a pixel is compared with; `_nine` knows it."""
_LIMIT = 4.0
"""Least height of an edge, in levels, at which it counts no more."""
_TRIES, _STEP, _MARGIN, _SYNC_MARGIN = 16, 0.5, 0.4, 0.7
_CODED = convolution.coded_length(PAYLOAD_BITS + CHECK_BITS)
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_MAX_PIXELS = 16_000_000
_SCALES = (1.0, 0.5, 0.75, 2 / 3, 2.0, 0.25, 1.5, 0.9, 0.8, 0.6, 1 / 3, 1.25, 4 / 3)
_SIDES = (128, 256, 512, 768, 1024, 1536, 1792, 2048)
"""Sides that images are made with; a copy of any size is tried at these too."""


@dataclass(frozen=True, slots=True)
class Found:
    """A mark that was found."""

    payload: str
    """48 bits in hexadecimal."""
    agreement: float
    """The part of the coded bits that were read as they were written, 0.5 to 1."""
    scale: float
    """Size of the image in relation to the marked one."""
    turned: str
    """"" or how the image was turned: ``flipped``, ``rotated 90`` ..."""


@dataclass(frozen=True, slots=True)
class _Waves:
    """The carriers of one key."""

    rows: NDArray[np.intp]
    """Where they stand in `numpy.fft.rfft2` of a tile."""
    columns: NDArray[np.intp]
    waves_down: NDArray[np.intp]
    """What `rows` stand for: waves per tile, negative ones too."""
    phases: NDArray[np.complex64]
    """What each carrier is multiplied with, of size 1."""
    sync: NDArray[np.intp]
    """Which carriers are the same in every image."""
    data: NDArray[np.intp]
    bits: NDArray[np.intp]
    """[len(data)] the coded bit of each of them."""


@functools.lru_cache(maxsize=16)
def _waves(key: bytes) -> _Waves:
    rows, columns = np.meshgrid(np.fft.fftfreq(TILE, 1 / TILE), np.arange(TILE // 2), indexing="ij")
    radius = np.hypot(rows, columns)
    # Of a wave and its mirror image only one is free: the spectrum of a real image.
    half = (columns > 0) | (rows > 0)
    row, column = np.nonzero((radius >= _LONGEST) & (radius <= _SHORTEST) & half)
    seed = hashlib.blake2b(b"waves", key=key, digest_size=32).digest()
    # A generator of its own: numpy does not promise the same permutation in every version.
    stream = np.frombuffer(hashlib.shake_256(seed).digest(8 * len(row)), dtype=np.uint32)
    order = np.argsort(stream[: len(row)], kind="stable")
    angles = stream[len(row) :] * (2 * np.pi / 2**32)
    sync, data = order[::_SYNC_EVERY], np.delete(order, np.s_[::_SYNC_EVERY])
    return _Waves(
        row,
        column,
        rows[row, column].astype(np.intp),
        np.exp(1j * angles).astype(np.complex64),
        sync,
        data,
        np.arange(len(data)) % _CODED,
    )


def payload_of(pixels: Pixels, key: bytes) -> bytes:
    """48 bits that follow from the image, so that the same image gets the same mark."""
    digest = hashlib.blake2b(digest_size=PAYLOAD_BITS // 8, key=key, person=b"calotype payload")
    digest.update(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


def embed(pixels: Pixels, key: bytes, payload: bytes, *, strong: bool = False) -> Pixels:
    """The marked image; the image itself if it is smaller than a tile.

    Args:
        pixels: uint8 [height, width, 3].
        key: up to 64 secret bytes.
        payload: 6 bytes.
        strong: never fainter than `PSNR_DB`.
    """
    height, width = pixels.shape[:2]
    if min(height, width) < TILE:
        return pixels
    waves, coded = _waves(key), _coded(payload, key)
    signs = np.ones(len(waves.rows), dtype=np.float32)
    signs[waves.data] = coded[waves.bits]
    wanted = waves.phases * signs
    level = 255 * 10 ** (-(PSNR_DB if strong or not _may_be_faint(pixels) else FAINT_DB) / 20)
    # Marked evenly first, to see what the image itself says against it and how much gets through.
    host, _ = _along(pixels, waves, wanted)
    even = _change(wanted, height, width, waves, level)
    evenly, divisor = _along(_added(pixels, even), waves, wanted)
    gain = float((evenly - host).mean())
    strength = _strengths(host / divisor, gain / divisor, coded, waves)
    return _added(pixels, _change(wanted * strength, height, width, waves, level))


def _may_be_faint(pixels: Pixels) -> bool:
    """Whether a fainter mark is found again as well."""
    height, width = pixels.shape[:2]
    if height * width >= FAINT_FROM * TILE * TILE:
        return True
    luma = _luma(pixels)
    return float(np.mean(np.abs(luma - _blurred(luma)) < 0.5)) >= FLAT_SHARE


def _strengths(host: Floats, gain: Floats, coded: Floats, waves: _Waves) -> Floats:
    """How strong each carrier must be for the decoder to prefer these bits by a margin.

    Args:
        host: per carrier, how much the image itself says what is wanted.
        gain: what a carrier of strength 1 adds to that.
    """
    strength = np.ones(len(host), dtype=np.float32)
    enough = float(gain.mean())
    for _ in range(_TRIES):
        along = host + gain * strength
        soft = np.bincount(waves.bits, along[waves.data] - _MARGIN * enough, _CODED)
        bits = convolution.decode(soft * coded, PAYLOAD_BITS + CHECK_BITS)
        wrong = convolution.encode(bits) != coded
        weak = float(along[waves.sync].mean()) < _SYNC_MARGIN * enough
        if not wrong.any() and not weak:
            break
        strength[waves.data[wrong[waves.bits]]] += _STEP
        if weak:
            strength[waves.sync] += _STEP
        strength /= np.sqrt(np.mean(strength * strength))
    return strength


def _along(pixels: Pixels, waves: _Waves, wanted: Spectrum) -> tuple[Floats, Floats]:
    """Per carrier: how much an image says what is wanted, and what the detector divides it by."""
    spectrum = np.fft.rfft2(_folded(_luma(pixels)))
    divisor = _divisor(spectrum)[waves.rows, waves.columns]
    return (spectrum[waves.rows, waves.columns] * np.conj(wanted)).real, divisor


def _change(spectrum: Spectrum, height: int, width: int, waves: _Waves, level: float) -> Floats:
    """The change of brightness [height, width] that these carriers make, of deviation ``level``."""
    plane = np.zeros((TILE, TILE // 2 + 1), dtype=np.complex64)
    plane[waves.rows, waves.columns] = spectrum
    tile = np.fft.irfft2(plane, (TILE, TILE)).astype(np.float32)
    tile *= level / float(np.sqrt(np.mean(tile * tile)))
    return np.tile(tile, (-(-height // TILE), -(-width // TILE)))[:height, :width]


def _added(pixels: Pixels, change: Floats) -> Pixels:
    marked = pixels.astype(np.int16) + np.rint(change).astype(np.int16)[:, :, None]
    clipped: Pixels = np.clip(marked, 0, 255).astype(np.uint8)
    return clipped


def _coded(payload: bytes, key: bytes) -> Floats:
    check = hashlib.blake2b(payload, key=key, digest_size=CHECK_BITS // 8).digest()
    bits = np.unpackbits(np.frombuffer(payload + check, dtype=np.uint8))
    return convolution.encode(bits).astype(np.float32)


def _luma(pixels: Pixels) -> Floats:
    # Pillow's own conversion rounds to whole numbers, and the mark is about as small.
    luma: Floats = pixels @ _LUMA
    return luma


def _blurred(plane: Floats) -> Floats:
    """Mean of the 9x9 pixels around each."""
    padded = np.pad(plane, _BLUR, mode="edge")
    rows = _nine(padded)
    return _nine(rows.T).T / 81


def _nine(plane: Floats) -> Floats:
    """Sums of nine rows that follow each other."""
    two = plane[:-1] + plane[1:]
    four = two[:-2] + two[2:]
    return four[:-5] + four[4:-1] + plane[8:]


def _folded(luma: Floats) -> Floats:
    """The mean tile of a plane, after what the image itself shows has been damped."""
    residual = luma - _blurred(luma)
    limit = max(_LIMIT, 1.5 * float(np.median(np.abs(residual[::3, ::3]))))
    np.clip(residual, -limit, limit, out=residual)
    height, width = residual.shape
    down, across = -(-height // TILE), -(-width // TILE)
    padded = np.zeros((down * TILE, across * TILE), dtype=np.float32)
    padded[:height, :width] = residual
    total = padded.reshape(down, TILE, across, TILE).sum(axis=(0, 2))
    mean: Floats = total / (_counts(height, down)[:, None] * _counts(width, across)[None])
    return mean


def _counts(length: int, tiles: int) -> Floats:
    inside = (np.arange(tiles * TILE) < length).reshape(tiles, TILE)
    counts: Floats = inside.sum(axis=0).astype(np.float32)
    return counts


def _divisor(spectrum: Spectrum) -> Floats:
    """What makes strong and weak waves of an image count about alike."""
    size: Floats = np.abs(spectrum)
    return size + float(np.median(size)) + 1e-9


def detect(pixels: Pixels, key: bytes, *, as_made: bool = False) -> Found | None:
    """The mark of this key in an image, also a resized, cropped, flipped or rotated one.

    Args:
        pixels: uint8 [height, width, 3].
        as_made: the image is as it was made, or cropped: nothing else is tried, which takes a
            hundredth of the time where there is no mark.
    """
    waves = _waves(key)
    first = 1 if as_made else None
    for scale, plane in islice(_planes(_luma(pixels)), first):
        for turned, tile in islice(_turns(_folded(plane)), first):
            spectrum = np.fft.rfft2(tile)
            spectrum /= _divisor(spectrum)
            read = _read(spectrum[waves.rows, waves.columns] * np.conj(waves.phases), waves, key)
            if read is not None:
                payload, agreement = read
                return Found(payload.hex(), agreement, scale, turned)
    return None


def _read(seen: Spectrum, waves: _Waves, key: bytes) -> tuple[bytes, float] | None:
    """Payload and agreement of a tile, at the shift at which it fits best.

    Args:
        seen: per carrier, turned back by its phase.
    """
    # Twice as fine as pixels: an image that was made smaller has its grid between them.
    fine = 2 * TILE
    plane = np.zeros((fine, TILE + 1), dtype=np.complex64)
    plane[waves.waves_down[waves.sync], waves.columns[waves.sync]] = seen[waves.sync]
    fits = np.fft.irfft2(plane, (fine, fine))
    best = int(fits.argmax())
    if fits.flat[best] < _SYNC_PEAK * (float(fits.std()) + 1e-12):
        return None
    down, across = divmod(best, fine)
    angle = 2 * np.pi / fine * (waves.waves_down * down + waves.columns * across)
    along = (seen * np.exp(1j * angle)).real[waves.data]
    soft = np.bincount(waves.bits, along, _CODED).astype(np.float64)
    bits = convolution.decode(soft, PAYLOAD_BITS + CHECK_BITS)
    payload = np.packbits(bits)[: PAYLOAD_BITS // 8].tobytes()
    coded = _coded(payload, key)
    if not np.array_equal(convolution.encode(bits), coded):
        return None
    return payload, float(np.mean(np.sign(soft) == coded))


def _turns(tile: Floats) -> Iterator[tuple[str, Floats]]:
    """The eight ways in which an image may have been turned."""
    for flipped in ("", "flipped"):
        for degrees in (0, 90, 180, 270):
            turned = np.rot90(tile[:, ::-1] if flipped else tile, degrees // 90)
            yield " ".join(filter(None, (flipped, f"rotated {degrees}" if degrees else ""))), turned


def _planes(luma: Floats) -> Iterator[tuple[float, Floats]]:
    """The image at the sizes that it may have been marked at, the likely ones first.

    A wave fits as long as it is out of step by less than half of itself at the far side.
    """
    height, width = luma.shape
    tried: list[float] = []
    for scale in (
        *_SCALES,
        *(width / side for side in _SIDES),
        *(height / side for side in _SIDES),
    ):
        size = round(width / scale), round(height / scale)
        if not 0.24 < scale < 4.1 or min(size) < TILE or size[0] * size[1] > _MAX_PIXELS:
            continue
        if any(abs(scale / other - 1) < 0.5 / max(size) for other in tried):
            continue
        tried.append(scale)
        if size == (width, height):
            yield scale, luma
        else:
            image = Image.fromarray(luma).resize(size, Image.Resampling.BICUBIC)
            yield scale, np.asarray(image)
