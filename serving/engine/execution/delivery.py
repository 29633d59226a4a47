"""Finished images and previews out of latents, where one that fails does not spoil others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from calotype.serving.engine.execution.batch import DenoiseState, Row
from calotype.serving.engine.execution.step_runner import Stepped, is_out_of_memory
from calotype.serving.engine.model.decoder import Decoder
from calotype.serving.engine.model.input_images import InputImages, merge
from calotype.serving.engine.model.latents import TokenGrid

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels

logger = logging.getLogger(__name__)


class Delivery:
    """Decodes rows that are done.

    Args:
        preview_side: longest side of a preview in pixels; larger images are shown smaller.
    """

    def __init__(self, decoder: Decoder, preview_side: int) -> None:
        self._decoder = decoder
        self._preview_side = preview_side

    def preview(self, done: Stepped, grid: TokenGrid) -> Pixels | None:
        """The image as far as it can be seen now; None if it cannot be shown.

        A preview is a kindness: that it fails is logged, and the image goes on.
        """
        try:
            return self._decoder.preview(done.estimate(), grid, self._preview_side)
        except Exception as error:
            logger.warning("no preview of %s: %r", done.row.request_id, error)
            return None

    def finish(
        self, rows: Sequence[Row], states: Mapping[str, DenoiseState]
    ) -> list[tuple[Row, Exception]]:
        """Puts the images of finished rows into their states; returns the rows that failed.

        They are decoded one by one: convolutions choose their kernel by the size of the batch, and
        the same image alone and in company would part in the last bit. From 256x256 pixels on
        it is also the faster way on a CPU.
        """
        failed: list[tuple[Row, Exception]] = []
        for row in rows:
            state = states[row.request_id]
            try:
                pixels = self._decoded(row, state.grid)
            except Exception as error:
                failed.append((row, error))
            else:
                state.images[row.index] = _restored(pixels, state.inputs)
        return failed

    def _decoded(self, row: Row, grid: TokenGrid) -> Pixels:
        if row.latents is None:
            raise ValueError("a row that was never started cannot be decoded")
        latents = row.latents.unsqueeze(0)
        try:
            return self._decoder.decode(latents, grid)[0]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("decoding %s in tiles: %r", row.request_id, error)
            return self._decoder.decode(latents, grid, tiles=True)[0]


def _restored(pixels: Pixels, inputs: InputImages) -> Pixels:
    """The image with what was not to be drawn anew as it was given, to the bit."""
    if inputs.start is None or inputs.redraw is None or not inputs.exact:
        return pixels
    return merge(pixels, inputs.start, inputs.redraw)
