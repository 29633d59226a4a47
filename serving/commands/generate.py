"""`calotype generate`: draw on this machine, without a server."""

from __future__ import annotations

import pathlib
import secrets
import sys
import time
from collections.abc import Sequence

import click

from calotype.serving.core.conditions import GIVEN, ControlRef
from calotype.serving.core.errors import InvalidRequest

_BRANCH = "control"


@click.command()
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
@click.option(
    "--control", "controls", multiple=True, metavar="[TYPE=]IMAGE[:SCALE]",
    help="A map that the picture follows; with a type such as canny, a picture that the map is "
    "made of, which is then written beside the output. May be repeated.",
)  # fmt: skip
@click.option(
    "--control-adapter", type=click.Path(path_type=pathlib.Path, dir_okay=False),
    help="The control adapter's safetensors file; the model shapes has one of its own.",
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
    controls: tuple[str, ...],
    control_adapter: pathlib.Path | None,
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
    from calotype.serving.engine.control.preprocessors import use_maps
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
        controls=tuple(_control(text) for text in controls),
    )
    branches: dict[str, pathlib.Path] = {}
    if controls:
        branches[_BRANCH] = control_adapter or _own_branch(model)
    request, files, maps = use_maps(request, _read(request.controls))
    click.echo(f"Loading {model} ...", err=True)
    paths = {name: path for name, (path, _) in _named(adapters).items()}
    studio = LocalPipeline(resource, paths, Moderator.load(), threads, branches)
    started = time.monotonic()
    with click.progressbar(
        length=request.sampling.steps, label="Drawing", file=sys.stderr, show_eta=True
    ) as bar:
        drawn, refused = studio.draw(request, lambda step, _: bar.update(step - bar.pos), files)
    for place, (text, used) in enumerate(zip(controls, maps, strict=True), 1):
        if used.fitted is not None:
            click.echo(f"--control {text}: fitted, {used.fitted} to {wanted}", err=True)
        if "=" in text:
            name = output.with_name(f"{output.stem}-map-{place}.png")
            _write(name, used.data)
            click.echo(f"{name}  the map of {text}")
    for image in drawn:
        name = output if image.index == 0 else _numbered(output, image.index + 1)
        _write(name, encode_image(image.pixels, kind, None))
        click.echo(f"{name}  seed {image.seed}")
    if refused:
        click.echo(f"{refused} of {count} pictures were blocked by the safety stage.", err=True)
    click.echo(f"{time.monotonic() - started:.1f} s", err=True)


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
    return _scaled(text, "--lora")


def _scaled(text: str, option: str) -> tuple[pathlib.Path, float]:
    """``FILE`` or ``FILE:SCALE``."""
    name, colon, scale = text.rpartition(":")
    if not colon or "/" in scale:
        return pathlib.Path(text), 1.0
    try:
        return pathlib.Path(name), float(scale)
    except ValueError:
        raise InvalidRequest(f"{option} {text!r}: the scale {scale!r} is no number.") from None


def _control(text: str) -> ControlRef:
    """``[TYPE=]IMAGE[:SCALE]``."""
    kind, equals, rest = text.partition("=")
    path, scale = _scaled(rest if equals else text, "--control")
    return ControlRef(_BRANCH, str(path), kind if equals else GIVEN, scale)


def _read(controls: Sequence[ControlRef]) -> dict[str, bytes]:
    try:
        return {control.image: pathlib.Path(control.image).read_bytes() for control in controls}
    except OSError as error:
        raise InvalidRequest(
            f"--control {error.filename} cannot be read: {error.strerror}."
        ) from None


def _own_branch(model: str) -> pathlib.Path:
    from calotype.serving.config import BUILT_IN_CONTROL, BUILT_IN_MODEL
    from calotype.serving.weights.sources import adapter_file

    if model != BUILT_IN_MODEL.name:
        raise InvalidRequest(
            f"--control needs a control adapter made for {model}: give --control-adapter FILE."
        )
    return adapter_file(BUILT_IN_CONTROL)


def _named(
    adapters: list[tuple[pathlib.Path, float]],
) -> dict[str, tuple[pathlib.Path, float]]:
    """Adapters under names that tell them apart, also when two files share one."""
    return {f"{path.name}-{i}" if i else path.name: (path, scale)
            for i, (path, scale) in enumerate(adapters)}  # fmt: skip
