"""`calotype plan`: what a model needs of a GPU's memory."""

from __future__ import annotations

from typing import Any

import click


@click.command()
@click.option("--model", default="flux-2-dev", show_default=True, help="flux-2-dev or a folder.")
@click.option("--gpu", required=True, help="For example a100-80gb, h100-80gb, l40s-48gb.")
@click.option("--precision", help="float32, bfloat16, int8; the best that fits if not given.")
@click.option("--size", default="1024x1024", show_default=True, help="Largest picture.")
@click.option(
    "--text-encoder", type=click.Choice(["same", "separate"]),
    help="On the denoiser's GPU, or on one of its own.",
)  # fmt: skip
def plan(model: str, gpu: str, precision: str | None, size: str, text_encoder: str | None) -> None:
    """Print what a model needs of a GPU's memory.

    What cannot fit is refused with a sentence that says what would.
    """
    from calotype.serving.core.request import ImageSize
    from calotype.serving.engine.sizing.memory_plan import plan_memory

    pixels = ImageSize.parse(size, "--size").pixels
    placed: Any = text_encoder  # click has checked the choice
    for line in plan_memory(model, gpu, precision, pixels, placed).lines():
        click.echo(line)
