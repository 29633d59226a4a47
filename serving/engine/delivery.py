"""Finished pictures and previews out of latents, where one that fails does not spoil others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from calotype.serving.engine.batch import DenoiseState, Row
from calotype.serving.engine.decoder import Decoder
from calotype.serving.engine.input_pictures import InputPictures, merge
from calotype.serving.engine.latents import TokenGrid
from calotype.serving.engine.step_runner import Stepped, is_out_of_memory

if TYPE_CHECKING:
    from calotype.serving.request import Pixels

logger = logging.getLogger(__name__)


class Delivery:
    """Decodes rows that are done.

    Args:
        preview_side: longest side of a preview in pixels; larger pictures are shown smaller.
    """

    def __init__(self, decoder: Decoder, preview_side: int) -> None:
        self._decoder = decoder
        self._preview_side = preview_side

    def preview(self, done: Stepped, grid: TokenGrid) -> Pixels | None:
        """The picture as far as it can be seen now; None if it cannot be shown.

        A preview is a kindness: that it fails is logged, and the picture goes on.
        """
        try:
            return self._decoder.preview(done.estimate(), grid, self._preview_side)
        except Exception as error:
            logger.warning("no preview of %s: %r", done.row.request_id, error)
            return None

    def finish(
        self, rows: Sequence[Row], states: Mapping[str, DenoiseState]
    ) -> list[tuple[Row, Exception]]:
        """Puts the pictures of finished rows of one size into their states.

        Returns the rows that failed.
        """
        failed: list[tuple[Row, Exception]] = []
        if rows:
            grid = states[rows[0].request_id].grid
            at_once = self._decoder.rows_at_once(grid)
            for begin in range(0, len(rows), at_once):
                self._decode(rows[begin : begin + at_once], grid, states, failed)
        return failed

    def _decode(
        self,
        rows: Sequence[Row],
        grid: TokenGrid,
        states: Mapping[str, DenoiseState],
        failed: list[tuple[Row, Exception]],
    ) -> None:
        latents = torch.stack([row.latents for row in rows if row.latents is not None])
        try:
            pictures = self._decoder.decode(latents, grid)
        except Exception as error:
            if len(rows) == 1:
                pictures = self._in_tiles(rows[0], latents, grid, error, failed)
                self._keep(rows, pictures, states)
                return
            logger.warning("decoding %d pictures failed, trying one by one: %r", len(rows), error)
            for row in rows:
                self._decode([row], grid, states, failed)
            return
        self._keep(rows, pictures, states)

    def _in_tiles(
        self,
        row: Row,
        latents: torch.Tensor,
        grid: TokenGrid,
        error: Exception,
        failed: list[tuple[Row, Exception]],
    ) -> list[Pixels]:
        """The picture of a row that could not be decoded at once; none if tiles do not help."""
        if is_out_of_memory(error):
            logger.warning("decoding %s in tiles: %r", row.request_id, error)
            try:
                return self._decoder.decode(latents, grid, tiles=True)
            except Exception as again:
                error = again
        failed.append((row, error))
        return []

    def _keep(
        self,
        rows: Sequence[Row],
        pictures: Sequence[Pixels],
        states: Mapping[str, DenoiseState],
    ) -> None:
        for row, pixels in zip(rows, pictures, strict=False):
            state = states[row.request_id]
            state.images[row.index] = _restored(pixels, state.inputs)


def _restored(pixels: Pixels, inputs: InputPictures) -> Pixels:
    """The picture with what was not to be drawn anew as it was given, to the bit."""
    if inputs.start is None or inputs.redraw is None or not inputs.exact:
        return pixels
    return merge(pixels, inputs.start, inputs.redraw)
