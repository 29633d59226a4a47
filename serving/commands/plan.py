"""`calotype plan`: what a model, or a training on it, needs of a GPU."""

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
@click.option(
    "--train", type=click.Choice(["lora"]),
    help="Plan a training instead: memory, time and price of each preset.",
)  # fmt: skip
@click.option(
    "--preset", type=click.Choice(["fast", "balanced", "quality"]), help="One preset of --train."
)
@click.option("--rank", type=int, default=16, show_default=True, help="LoRA rank of --train.")
@click.option(
    "--price-per-hour", "hourly", type=click.FloatRange(0), help="Of the GPU in USD, for --train."
)
def plan(
    model: str,
    gpu: str,
    precision: str | None,
    size: str,
    text_encoder: str | None,
    train: str | None,
    preset: Any,
    rank: int,
    hourly: float | None,
) -> None:
    """Print what a model needs of a GPU's memory, or what a training on it takes.

    What cannot fit is refused with a sentence that says what would.
    """
    if train is not None:
        from calotype.serving.engine.sizing.training_plan import PRESETS, plan_lines, plan_training

        wanted: Any = precision  # a name that is none is refused by the plan
        presets = PRESETS if preset is None else (preset,)
        found = plan_training(
            model, gpu, precision=wanted, rank=rank, hourly=hourly, presets=presets
        )
        for line in plan_lines(model, found):
            click.echo(line)
        return
    from calotype.serving.core.request import ImageSize
    from calotype.serving.engine.sizing.memory_plan import plan_memory

    pixels = ImageSize.parse(size, "--size").pixels
    placed: Any = text_encoder  # click has checked the choice
    for line in plan_memory(model, gpu, precision, pixels, placed).lines():
        click.echo(line)
