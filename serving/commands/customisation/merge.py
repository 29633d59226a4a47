"""`calotype merge`: several models, or several adapters, as one."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import click

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.weights.merging.recipe import (
    ADAPTER_METHODS,
    MODEL_METHODS,
    MergeInput,
    MergeRecipe,
)


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="PATH[:WEIGHT]...")
@click.option("--method", type=click.Choice([*MODEL_METHODS, *ADAPTER_METHODS]), required=True)
@click.option("-o", "--output", type=click.Path(path_type=pathlib.Path), required=True)
@click.option("--base", help="Model that differences are from (task, ties, dare).")
@click.option("--density", default=0.5, show_default=True, help="Share that ties and dare keep.")
@click.option("--rank", default=32, show_default=True, help="Ranks of the result of svd.")
@click.option("--seed", default=0, show_default=True, help="Of the lots of dare.")
@click.option(
    "--block", "blocks", multiple=True, metavar="N:PATTERN=WEIGHT",
    help="Weight of input N (from 1) in layers of that name, as in 2:transformer_blocks.*=0.3.",
)  # fmt: skip
@click.option("--licence", help="Of the result, where you have it from the owners.")
@click.option("--commercial", is_flag=True, help="Refuse what may not be used commercially.")
@click.option("--json", "as_json", is_flag=True, help="Print the recipe that is kept, as JSON.")
def merge(
    inputs: tuple[str, ...],
    output: pathlib.Path,
    blocks: tuple[str, ...],
    base: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Merge model folders (linear, slerp, task, ties, dare) or adapter files (concat, svd).

    The recipe, the digests of the inputs and the licence are kept with the result, which is a
    model folder or an adapter as any other.
    """
    recipe = _recipe(inputs, base, blocks, options)
    if recipe.of_adapters:
        from calotype.serving.weights.merging.adapters import merge_adapters

        made = merge_adapters(recipe, output)
        if as_json:
            click.echo(json.dumps(made.recipe | {"sha256": made.sha256}, indent=2))
            return
        click.echo(f"{made.sha256}  {output}")
        lost = "nothing is left out" if not made.loss else f"at most {made.loss:.2%} is left out"
        click.echo(f"rank {made.rank}, {made.layers} layers; {lost}")
        return
    from calotype.serving.weights.merging.models import merge_models

    kept = merge_models(recipe, output, lambda sentence: click.echo(sentence, err=True))
    if as_json:
        click.echo(json.dumps(kept, indent=2))
        return
    click.echo(f"{output}: {kept['method']} of {', '.join(one['name'] for one in kept['inputs'])}")
    click.echo(f"licence: {kept['licence'] or 'no input says one'}")


def _recipe(
    inputs: tuple[str, ...], base: str | None, blocks: tuple[str, ...], options: dict[str, Any]
) -> MergeRecipe:
    weights: list[dict[str, float]] = [{} for _ in inputs]
    for text in blocks:
        place, _, rest = text.partition(":")
        pattern, _, weight = rest.rpartition("=")
        try:
            if int(place) < 1:
                raise IndexError
            weights[int(place) - 1][pattern] = float(weight)
        except (ValueError, IndexError):
            raise InvalidRequest(
                f"--block is N:PATTERN=WEIGHT with N from 1 to {len(inputs)}, for example "
                f"1:transformer_blocks.*=0.5; got {text!r}.",
                param="block",
            ) from None
    sources = tuple(_input(text, found) for text, found in zip(inputs, weights, strict=True))
    origin = None if base is None else MergeInput(pathlib.Path(base))
    return MergeRecipe(inputs=sources, base=origin, **options)


def _input(text: str, blocks: dict[str, float]) -> MergeInput:
    path, _, weight = text.rpartition(":")
    if path and not pathlib.Path(text).exists():
        try:
            return MergeInput(pathlib.Path(path), float(weight), blocks)
        except ValueError:
            pass
    return MergeInput(pathlib.Path(text), 1.0, blocks)
