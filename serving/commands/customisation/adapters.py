"""`calotype adapters`: look at adapter files, and write them for other tools."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING

import click

from calotype.serving.commands.customisation.acceptance import accept, rollback
from calotype.serving.core.errors import InvalidRequest

if TYPE_CHECKING:
    from calotype.serving.engine.lora.adapter_export import ExportLayout
    from calotype.serving.engine.lora.model_fit import LinearShapes

_FILE = click.Path(path_type=pathlib.Path, dir_okay=False)


@click.group()
def adapters() -> None:
    """Look at LoRA, DoRA, LoKr and LoHa files, write them for other tools, and accept them."""


adapters.add_command(accept)
adapters.add_command(rollback)


@adapters.command()
@click.argument("file", type=_FILE)
@click.option("--model", help="Does it fit this one? shapes, flux-2-dev or a folder.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(file: pathlib.Path, model: str | None, as_json: bool) -> None:
    """Print what FILE is: layout, rank, alpha, layers, base, trigger words, licence, digest.

    Every key must be known; a file that a service would not load is refused with the reason. Its
    numbers are not looked at.
    """
    from calotype.serving.engine.lora.adapter_card import read_card

    card = read_card(file, None if model is None else _layers_of(model))
    if as_json:
        click.echo(json.dumps(card.to_json(), indent=2))
        return
    for line in card.lines():
        click.echo(line)


@adapters.command()
@click.argument("file", type=_FILE)
@click.option(
    "--to", type=click.Choice(["diffusers", "comfy", "kohya"]), required=True, help="Whose layout."
)
@click.option("-o", "--output", type=_FILE, help="Default: FILE with the layout in its name.")
@click.option("--max-rank", default=256, show_default=True, help="Most ranks of LoKr and LoHa.")
@click.option("--force", is_flag=True, help="Replace the output if it is there.")
def convert(
    file: pathlib.Path, to: ExportLayout, output: pathlib.Path | None, max_rank: int, force: bool
) -> None:
    """Write FILE in the layout of another tool, and print the digest of the result.

    The result does exactly what FILE does. LoKr and LoHa become the LoRA that they equal, or are
    refused with what would be lost.
    """
    from calotype.serving.engine.lora.adapter_export import convert_adapter

    target = output or file.with_name(f"{file.stem}.{to}.safetensors")
    if target.exists() and not force:
        raise InvalidRequest(
            f"{target} is there already; name another file with -o, or replace it with --force.",
            param=str(target),
        )
    digest = convert_adapter(file, target, to, max_rank=max_rank)
    click.echo(f"{digest}  {target}")


def _layers_of(name: str) -> LinearShapes:
    from calotype.serving.config.built_in import local_model
    from calotype.serving.engine.sizing.configs import TransformerConfig
    from calotype.serving.engine.sizing.linear_layers import linear_layers
    from calotype.serving.engine.sizing.model_sizes import KNOWN_MODELS
    from calotype.serving.engine.sizing.settings import read_json
    from calotype.serving.weights.sources import model_folder

    if name in KNOWN_MODELS:
        config = KNOWN_MODELS[name].denoiser
    else:
        config = read_json(model_folder(local_model(name)) / "transformer" / "config.json")
    return linear_layers(TransformerConfig.from_json(config))
