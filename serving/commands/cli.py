"""The command `calotype`.

Thin: each command reads its options, calls one function and prints. Heavy libraries are imported
inside the commands that need them, so that ``calotype --help`` answers at once.
"""

from __future__ import annotations

import os
import pathlib
import secrets
import sys
import time
from typing import Any

import click

from calotype.serving.commands.cluster import gateway, model_app
from calotype.serving.commands.fetch import fetch
from calotype.serving.commands.jobs import jobs
from calotype.serving.commands.keys import keys
from calotype.serving.commands.moderation import moderate, moderation
from calotype.serving.commands.profiling import profile
from calotype.serving.commands.provenance import provenance
from calotype.serving.core.errors import CalotypeError, InvalidRequest

DATA_DIR = pathlib.Path(os.environ.get("CALOTYPE_DATA_DIR", "calotype-data"))
data_dir_option = click.option(
    "--data-dir",
    type=click.Path(path_type=pathlib.Path, file_okay=False),
    default=DATA_DIR,
    show_default=True,
    help="Folder of the job database and the pictures (or CALOTYPE_DATA_DIR).",
)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Try: calotype generate 'a red circle on a blue background' -o circle.png",
)
@click.version_option(package_name="calotype")
def cli() -> None:
    """Image generation with FLUX.2 that you run yourself, behind the API of OpenAI's SDKs."""


cli.add_command(gateway)
cli.add_command(model_app)
cli.add_command(fetch)
cli.add_command(jobs)
cli.add_command(keys)
cli.add_command(moderate)
cli.add_command(moderation)
cli.add_command(profile)
cli.add_command(provenance)


@cli.command()
@click.option(
    "-f",
    "--manifests",
    multiple=True,
    type=click.Path(path_type=pathlib.Path),
    help="A manifest or a folder of them; may be repeated. Without it: the built-in model.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option(
    "--threads", type=click.IntRange(1, 256), default=1, show_default=True,
    help="Torch threads of one replica.",
)  # fmt: skip
@data_dir_option
def serve(
    manifests: tuple[pathlib.Path, ...],
    host: str,
    port: int,
    threads: int,
    data_dir: pathlib.Path,
) -> None:
    """Serve the API on this machine; Ctrl-C drains and ends it.

    The first API key is taken from CALOTYPE_API_KEY, or made and printed once. Changed manifests
    are picked up while the service runs.
    """
    from calotype.serving.deployments.ray_environment import prepare_ray

    prepare_ray()
    from calotype.serving.deployments.service import ServeOptions, run_service

    # The processes of replicas inherit it: they look there for the machine's profile.
    os.environ["CALOTYPE_DATA_DIR"] = str(data_dir.resolve())
    run_service(
        ServeOptions(
            host,
            port,
            data_dir,
            manifests,
            threads,
            os.environ.get("CALOTYPE_API_KEY") or None,
            say=lambda sentence: click.echo(sentence),
        )
    )


@cli.command()
@click.argument("prompt")
@click.option(
    "-o", "--output", type=click.Path(path_type=pathlib.Path, dir_okay=False),
    default=pathlib.Path("out.png"), show_default=True,
    help="File to write: .png, .jpg or .webp. Further pictures are named out-2.png, out-3.png ...",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), help="Picture i is drawn with seed + i.")
@click.option("--steps", type=click.IntRange(1), help="Denoise steps.")
@click.option("--size", help="WIDTHxHEIGHT, multiples of 16.")
@click.option("-n", "--n", "count", type=click.IntRange(1, 10), default=1, help="Pictures.")
@click.option("--guidance", type=float, help="How closely the prompt is followed.")
@click.option(
    "--lora", "loras", multiple=True, metavar="FILE[:SCALE]",
    help="A LoRA adapter and its scale; may be repeated.",
)  # fmt: skip
@click.option("--model", default="shapes", show_default=True, help="shapes, or a FLUX.2 folder.")
@click.option("--threads", type=click.IntRange(1, 256), help="Torch threads.")
def generate(
    prompt: str,
    output: pathlib.Path,
    seed: int | None,
    steps: int | None,
    size: str | None,
    count: int,
    guidance: float | None,
    loras: tuple[str, ...],
    model: str,
    threads: int | None,
) -> None:
    """Draw PROMPT here, without a server.

    The prompt and every picture pass the same safety stage as in the service.
    """
    from calotype.moderation.moderator import Moderator
    from calotype.serving.config import local_model
    from calotype.serving.core.request import (
        AdapterRef,
        GenerationRequest,
        ImageSize,
        SamplingParams,
    )
    from calotype.serving.deployments.local import LocalPipeline
    from calotype.serving.images.encode import encode_image

    kind = _image_format(output)
    resource = local_model(model)
    spec = resource.spec
    wanted = ImageSize.parse(size or spec.defaults.size, "--size")
    adapters = [_lora(text) for text in loras]
    if steps is not None and steps > spec.limits.max_steps:
        raise InvalidRequest(f"--steps is {steps}; {model} takes at most {spec.limits.max_steps}.")
    if not prompt.strip():
        raise InvalidRequest("PROMPT must not be empty.")
    request = GenerationRequest(
        id=secrets.token_hex(8),
        prompt=prompt,
        size=wanted,
        rendered_size=spec.check_size(wanted, "--size"),
        sampling=SamplingParams(
            steps or spec.defaults.steps,
            spec.defaults.guidance_scale if guidance is None else guidance,
            spec.defaults.sampler,
        ),
        seed=secrets.randbelow(2**32) if seed is None else seed,
        n=count,
        adapters=tuple(AdapterRef(name, scale) for name, (_, scale) in _named(adapters).items()),
    )
    click.echo(f"Loading {model} ...", err=True)
    paths = {name: path for name, (path, _) in _named(adapters).items()}
    studio = LocalPipeline(resource, paths, Moderator.load(), threads)
    started = time.monotonic()
    with click.progressbar(
        length=request.sampling.steps, label="Drawing", file=sys.stderr, show_eta=True
    ) as bar:
        drawn, refused = studio.draw(request, lambda step, _: bar.update(step - bar.pos))
    for image in drawn:
        name = output if image.index == 0 else _numbered(output, image.index + 1)
        _write(name, encode_image(image.pixels, kind, None))
        click.echo(f"{name}  seed {image.seed}")
    if refused:
        click.echo(f"{refused} of {count} pictures were blocked by the safety stage.", err=True)
    click.echo(f"{time.monotonic() - started:.1f} s", err=True)


@cli.command()
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


def _image_format(path: pathlib.Path) -> str:
    kinds = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise InvalidRequest(f"--output {path} must end in .png, .jpg or .webp.")
    return kind


def _numbered(path: pathlib.Path, number: int) -> pathlib.Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _write(path: pathlib.Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}.") from None


def _lora(text: str) -> tuple[pathlib.Path, float]:
    """``FILE`` or ``FILE:SCALE``."""
    name, colon, scale = text.rpartition(":")
    if not colon or "/" in scale:
        return pathlib.Path(text), 1.0
    try:
        return pathlib.Path(name), float(scale)
    except ValueError:
        raise InvalidRequest(f"--lora {text!r}: the scale {scale!r} is no number.") from None


def _named(
    adapters: list[tuple[pathlib.Path, float]],
) -> dict[str, tuple[pathlib.Path, float]]:
    """Adapters under names that tell them apart, also when two files share one."""
    return {f"{path.name}-{i}" if i else path.name: (path, scale)
            for i, (path, scale) in enumerate(adapters)}  # fmt: skip


def main() -> None:
    """Runs the command; an error is one sentence and exit code 2, an interrupt 130."""
    from calotype.moderation.errors import ModerationError

    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (CalotypeError, ModerationError) as error:
        click.echo(f"calotype: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        sys.exit(130)
