"""`calotype profile`: how many pictures should share a step on this machine."""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from calotype.serving.config import ImageModel
    from calotype.serving.core.request import ImageSize


@click.command()
@click.option("--model", default="shapes", show_default=True, help="shapes, or a FLUX.2 folder.")
@click.option(
    "--size", "sizes", multiple=True,
    help="WIDTHxHEIGHT to measure; may be repeated. Without it: the model's usual size, with half "
    "and double the sides.",
)  # fmt: skip
@click.option(
    "--rows", type=click.IntRange(1, 64), default=8, show_default=True,
    help="Most pictures that share a step.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["float32", "bfloat16", "int8"]),
    help="As the model is served; the model's own if not given.",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option(
    "--threads", type=click.IntRange(1, 256), default=1, show_default=True,
    help="Torch threads of one replica, as `calotype serve --threads`.",
)  # fmt: skip
@click.option(
    "--data-dir",
    type=click.Path(path_type=pathlib.Path, file_okay=False),
    default=pathlib.Path(os.environ.get("CALOTYPE_DATA_DIR", "calotype-data")),
    show_default=True,
    help="Folder that keeps the profile (or CALOTYPE_DATA_DIR).",
)
def profile(
    model: str,
    sizes: tuple[str, ...],
    rows: int,
    precision: Any,
    device: str,
    threads: int,
    data_dir: pathlib.Path,
) -> None:
    """Measure how many pictures should share a denoise step on this machine.

    The profile is kept in the data folder, and used by every replica that runs the same model in
    the same precision on the same kind of device. Measure on an idle machine, and again after an
    update.
    """
    from calotype.serving.config import local_model
    from calotype.serving.engine.execution.step_profile import make_profile
    from calotype.serving.worker.model_loader import load_parts

    resource = local_model(model)
    wanted = _sizes(resource, sizes)
    chosen = {"device": device, "precision": precision or resource.spec.precision}
    resource = resource.model_copy(update={"spec": resource.spec.model_copy(update=chosen)})
    found, path = make_profile(
        load_parts(resource, ("denoiser", "vae"), torch_threads=threads),
        data_dir,
        wanted,
        rows=sorted({rows, *(2**i for i in range(rows.bit_length()))}),
        on_time=lambda time: click.echo(
            f"{time.tokens} tokens, {time.rows} together: {time.seconds:.4f} s a step", err=True
        ),
    )
    for line in found.lines():
        click.echo(line)
    click.echo(f"Kept in {path}.", err=True)


def _sizes(model: ImageModel, given: tuple[str, ...]) -> list[ImageSize]:
    """Raises InvalidRequest: the model does not draw such a size."""
    from calotype.serving.core.errors import InvalidRequest
    from calotype.serving.core.request import ImageSize

    if given:
        asked = [ImageSize.parse(text, "--size") for text in given]
        return [model.spec.check_size(size, "--size") for size in asked]
    usual = model.spec.check_size(ImageSize.parse(model.spec.defaults.size), "--size")
    found = [usual]
    for size in (
        ImageSize(usual.width // 32 * 16, usual.height // 32 * 16),
        ImageSize(2 * usual.width, 2 * usual.height),
    ):
        try:
            found.append(model.spec.check_size(size, "--size"))
        except InvalidRequest:
            continue  # beyond the model's limits, so nobody draws it
    # A size that is drawn small and enlarged costs what the small one costs.
    return sorted(dict.fromkeys(found), key=lambda size: size.pixels)
