"""Harmless pictures for tests: flat drawings like the embedded model's, and photo-like textures."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Pixels = NDArray[np.uint8]

TONES = ["#dc2828", "#28aa3c", "#2850dc", "#f0d228", "#8c32b4", "#f58c1e", "#ffffff", "#101010"]
SHAPES = ("circle", "square", "triangle", "stripes", "ring")


def drawing(number: int, side: int = 128) -> Pixels:
    """A shape of one tone on a ground of another."""
    fill, ground = TONES[number % 8], TONES[(number + 1 + number // 8) % 8]
    image = Image.new("RGB", (4 * side, 4 * side), ground)
    draw = ImageDraw.Draw(image)
    rng = np.random.default_rng(number)
    x, y = rng.uniform(1.2 * side, 2.8 * side, 2).tolist()
    radius = float(rng.uniform(0.4 * side, 1.1 * side))
    box = (x - radius, y - radius, x + radius, y + radius)
    match SHAPES[number % len(SHAPES)]:
        case "circle":
            draw.ellipse(box, fill=fill)
        case "square":
            draw.rectangle(box, fill=fill)
        case "triangle":
            draw.polygon(
                [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill
            )
        case "stripes":
            for left in range(0, 4 * side, side // 2):
                draw.rectangle((left, 0, left + side // 4, 4 * side), fill=fill)
        case _:
            draw.ellipse(box, outline=fill, width=side // 4)
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))


def texture(number: int, side: int = 256, steepness: float = 1.3) -> Pixels:
    """Noise whose waves weaken with their frequency, as those of photographs do."""
    rng = np.random.default_rng(number)
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    radius[0, 0] = 1.0
    common = rng.normal(size=(side, side))
    bands = []
    for _ in range(3):
        mixed = common + 0.4 * rng.normal(size=(side, side))
        plane = np.fft.ifft2(np.fft.fft2(mixed) / radius**steepness).real
        bands.append(128 + 45 * (plane - plane.mean()) / plane.std())
    return np.clip(np.stack(bands, axis=2), 0, 255).astype(np.uint8)


def face(side: int = 256, ground: str = "#7896b4") -> Pixels:
    """A drawn face: nobody's, and enough of one for a detector."""
    unit = 4 * side / 256
    image = Image.new("RGB", (4 * side, 4 * side), ground)
    draw = ImageDraw.Draw(image)

    def ellipse(x: int, y: int, across: int, down: int, colour: str) -> None:
        box = (x - across, y - down, x + across, y + down)
        draw.ellipse(tuple(part * unit for part in box), fill=colour)

    ellipse(128, 115, 62, 80, "#3c281e")
    ellipse(128, 130, 52, 68, "#e0b496")
    for x in (106, 150):
        ellipse(x, 118, 11, 6, "#fafafa")
        ellipse(x, 118, 5, 5, "#321e14")
        brow = [(x - 13) * unit, 105 * unit, x * unit, 101 * unit, (x + 13) * unit, 105 * unit]
        draw.line(brow, fill="#3c281e", width=round(4 * unit))
    draw.polygon(
        [128 * unit, 120 * unit, 120 * unit, 148 * unit, 136 * unit, 148 * unit], "#cd9b7d"
    )
    ellipse(128, 167, 19, 6, "#b44646")
    draw.rectangle((100 * unit, 195 * unit, 156 * unit, 256 * unit), fill="#d6aa8c")
    small = image.resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small.filter(ImageFilter.GaussianBlur(1)))


def saved(pixels: Pixels, kind: str, **options: object) -> Pixels:
    """The picture after it was written to a file and read again."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return np.asarray(Image.open(file).convert("RGB"))


def pixels_of(file: bytes | str) -> Pixels:
    """The pixels of a file, or of its base64."""
    data = base64.b64decode(file) if isinstance(file, str) else file
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def same_pixels(*files: bytes | str) -> bool:
    """Whether files show the same image; signed files of one image differ in their bytes."""
    first, *others = map(pixels_of, files)
    return all(np.array_equal(first, other) for other in others)


def resized(pixels: Pixels, factor: float) -> Pixels:
    height, width = pixels.shape[:2]
    size = round(width * factor), round(height * factor)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def cropped(pixels: Pixels, part: float) -> Pixels:
    """Without ``part`` of its width and of its height, more on one side than on the other."""
    height, width = pixels.shape[:2]
    top, left = int(height * part * 0.7), int(width * part * 0.4)
    return np.ascontiguousarray(
        pixels[top : top + round(height * (1 - part)), left : left + round(width * (1 - part))]
    )


CHANGES: dict[str, Callable[[Pixels], Pixels]] = {
    "none": lambda pixels: pixels,
    "jpeg 80": lambda pixels: saved(pixels, "JPEG", quality=80),
    "half size": lambda pixels: resized(pixels, 0.5),
    "crop 10 %": lambda pixels: cropped(pixels, 0.1),
    "crop 10 %, jpeg 80": lambda pixels: saved(cropped(pixels, 0.1), "JPEG", quality=80),
    "webp 80": lambda pixels: saved(pixels, "WEBP", quality=80),
    "jpeg 60": lambda pixels: saved(pixels, "JPEG", quality=60),
    "half size, jpeg 80": lambda pixels: saved(resized(pixels, 0.5), "JPEG", quality=80),
    "double size": lambda pixels: resized(pixels, 2.0),
    "flipped": lambda pixels: np.ascontiguousarray(pixels[:, ::-1]),
}


def psnr(first: Pixels, second: Pixels) -> float:
    """Peak signal to noise in decibels."""
    error = float(np.mean((first.astype(np.float64) - second) ** 2))
    return float(10 * np.log10(255**2 / error))


def families() -> Iterator[tuple[str, list[Pixels]]]:
    """What the measurements are made on."""
    for side in (128, 256, 512):
        yield f"drawings {side}", [drawing(number, side) for number in range(40)]
    for side in (128, 256, 512):
        yield f"textures {side}", [texture(number, side) for number in range(12)]


def plain_file(colour: str = "red", size: tuple[int, int] = (64, 64), kind: str = "PNG") -> bytes:
    """A picture of one colour, as a file."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind, compress_level=1)
    return file.getvalue()


def half_mask(size: tuple[int, int] = (64, 64), alpha: int = 0) -> bytes:
    """OpenAI's mask of the left half, as a PNG file."""
    file = io.BytesIO()
    whole = Image.new("RGBA", size, (0, 0, 0, 255))
    whole.paste((0, 0, 0, alpha), (0, 0, size[0] // 2, size[1]))
    whole.save(file, "PNG")
    return file.getvalue()
