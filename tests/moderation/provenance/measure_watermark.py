"""Prints the table of docs/provenance.md.

PYTHONPATH=tests python tests/moderation/provenance/measure_watermark.py
"""

from __future__ import annotations

import numpy as np
from samples.images import CHANGES, Pixels, families, psnr

from calotype.moderation.provenance import watermark

KEY = b"a key of the measurements only.."
OTHER_KEYS = 20


def photographs() -> list[Pixels]:
    """The two of scikit-learn, in three sizes."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    return [
        np.asarray(Image.fromarray(load_sample_image(name)).resize((side, side)))
        for name in ("china.jpg", "flower.jpg")
        for side in (256, 400, 512)
    ]


def main() -> None:
    print(f"| pictures | n | PSNR dB (least) | {' | '.join(CHANGES)} |")
    print("|---|---|---|" + "---|" * len(CHANGES))
    unmarked: list[Pixels] = []
    for name, images in [*families(), ("photographs", photographs())]:
        unmarked += images
        marked = []
        for pixels in images:
            payload = watermark.payload_of(pixels, KEY)
            marked.append((payload.hex(), watermark.embed(pixels, KEY, payload)))
        quality = [psnr(pixels, mark) for pixels, (_, mark) in zip(images, marked, strict=True)]
        cells = []
        for change in CHANGES.values():
            found = [(text, watermark.detect(change(mark), KEY)) for text, mark in marked]
            right = sum(got is not None and got.payload == text for text, got in found)
            cells.append(f"{100 * right / len(found):.0f} %")
        print(
            f"| {name} | {len(images)} | {np.mean(quality):.1f} ({min(quality):.1f}) |"
            f" {' | '.join(cells)} |",
            flush=True,
        )
    keys = [bytes([number]) * 32 for number in range(OTHER_KEYS)]
    false = sum(watermark.detect(pixels, key) is not None for pixels in unmarked for key in keys)
    print(f"\nfound in {false} of {len(unmarked) * len(keys)} unmarked pictures", flush=True)


if __name__ == "__main__":
    main()
