"""Control maps: files in, maps of the size that is drawn out. No torch.

A map is given as it is, or made of a picture by a preprocessor. `canny` is built in; installed
packages add others by the entry-point group ``calotype.preprocessors``: a name, and a callable that
makes of the pixels of a picture those of its map, both uint8 [height, width, 3]. ``depth``,
``pose`` and ``segmentation`` are usual names.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from calotype.serving.core.conditions import (
    GIVEN,
    MAP_PREFIX,
    PREPROCESSOR_ENTRY_POINTS,
    ControlRef,
    map_types,
)
from calotype.serving.core.errors import EngineError, InvalidRequest
from calotype.serving.core.request import GenerationRequest, ImageSize
from calotype.serving.engine.model.input_images import given_file, read_image

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels

Preprocessor = Callable[["Pixels"], "Pixels"]

_LOW, _HIGH = 100, 200
"""Canny's thresholds, the usual ones of ControlNet's tools."""
_PROPORTIONS = 0.005
"""What rounding to whole patches can do to an image's proportions."""


@dataclass(frozen=True, slots=True)
class UsedMap:
    """A map as it is used.

    Attributes:
        name: tells it from other maps: of its pixels.
        data: as PNG.
        fitted: the size that it was given in, where that is another one.
    """

    name: str
    data: bytes
    fitted: ImageSize | None


def use_maps(
    request: GenerationRequest, files: Mapping[str, bytes]
) -> tuple[GenerationRequest, dict[str, bytes], list[UsedMap]]:
    """Makes every map of a request: the request that names the maps, and their files beside the
    given ones.

    Raises:
        InvalidRequest: a picture is missing, cannot be read or does not fit; or nothing installed
            makes such maps.
        EngineError: a preprocessor failed.
    """
    controls: list[ControlRef] = []
    used: list[UsedMap] = []
    for place, control in enumerate(request.controls):
        pixels, fitted = read_map(control, files, request.rendered_size, place)
        data = _png(pixels)
        name = f"{MAP_PREFIX}{hashlib.sha256(data).hexdigest()}"
        used.append(UsedMap(name, data, fitted))
        controls.append(replace(control, image=name, type=GIVEN))
    maps = {one.name: one.data for one in used}
    return replace(request, controls=tuple(controls)), {**files, **maps}, used


def read_map(
    control: ControlRef, files: Mapping[str, bytes], size: ImageSize, place: int
) -> tuple[Pixels, ImageSize | None]:
    """A control's map at the size that is drawn, and the size it had if that is another one.

    Raises:
        InvalidRequest, EngineError: see `use_maps`.
    """
    where = f"controlnets[{place}]"
    param = f"{where}.image"
    pixels, fitted = _fitted(
        read_image(given_file(files, control.image, param), param), size, param
    )
    if control.type == GIVEN:
        return pixels, fitted
    made = preprocessor(control.type, f"{where}.type")
    try:
        found = np.ascontiguousarray(made(pixels))
    except Exception as error:  # code of somebody else's package
        raise EngineError(
            f"The preprocessor {control.type!r} failed: {type(error).__name__}: {error}. Give the "
            f"map itself with type {GIVEN!r}.",
            param=f"{where}.type",
        ) from error
    if found.shape != pixels.shape or found.dtype != np.uint8:
        raise EngineError(
            f"The preprocessor {control.type!r} made a map of {found.dtype} {list(found.shape)} "
            f"instead of uint8 {list(pixels.shape)}; ask its author, or give the map itself with "
            f"type {GIVEN!r}.",
            param=f"{where}.type",
        )
    return found, fitted


@functools.cache
def _installed(name: str) -> Preprocessor | None:
    for entry in importlib.metadata.entry_points(group=PREPROCESSOR_ENTRY_POINTS, name=name):
        loaded: Preprocessor = entry.load()
        return loaded
    return None


def preprocessor(name: str, param: str) -> Preprocessor:
    """The preprocessor of a name.

    Raises:
        InvalidRequest: there is none; says which there are.
    """
    if name == "canny":
        return canny
    found = _installed(name)
    if found is None:
        raise InvalidRequest(
            f"{param} is {name!r}, for which nothing is installed here; make the map yourself and "
            f"give it with type {GIVEN!r}, or install a package with an entry point {name!r} in "
            f"{PREPROCESSOR_ENTRY_POINTS}. Installed are {', '.join(map_types())}.",
            code="unsupported_value",
            param=param,
        )
    return found


def canny(pixels: Pixels) -> Pixels:
    """White edges on black, one pixel wide (OpenCV)."""
    import cv2

    edges = cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), _LOW, _HIGH)
    return np.repeat(np.asarray(edges, dtype=np.uint8)[:, :, None], 3, axis=2)


def _fitted(pixels: Pixels, size: ImageSize, param: str) -> tuple[Pixels, ImageSize | None]:
    height, width = pixels.shape[:2]
    if (width, height) == (size.width, size.height):
        return pixels, None
    if abs(width * size.height / (height * size.width) - 1) > _PROPORTIONS:
        raise InvalidRequest(
            f"{param} is {width}x{height}, but the picture is drawn at {size}; give a map of the "
            "same proportions, or ask for a size that has those of the map.",
            code="control_mismatch",
            param=param,
        )
    image = Image.fromarray(pixels).resize((size.width, size.height), Image.Resampling.LANCZOS)
    return np.asarray(image), ImageSize(width, height)


def _png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def read_maps(
    controls: Sequence[ControlRef], files: Mapping[str, bytes], size: ImageSize
) -> tuple[Pixels, ...]:
    """The maps of a request, in order; see `read_map`."""
    return tuple(read_map(c, files, size, place)[0] for place, c in enumerate(controls))
