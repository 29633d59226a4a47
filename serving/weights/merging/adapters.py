"""Several adapters as one file.

``concat`` lays the factors of all beside each other: the sum of what they do, exactly, with the sum
of their ranks. ``svd`` keeps the best approximation of that sum by fewer ranks, and says what is
left out.
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass

import torch

from calotype.serving.core.errors import AdapterLoadFailed, InvalidRequest
from calotype.serving.core.json_object import JsonObject
from calotype.serving.engine.lora.adapter_card import AdapterCard, read_card
from calotype.serving.engine.lora.adapter_export import export_tensors, write_adapter
from calotype.serving.engine.lora.key_layouts import read_keys
from calotype.serving.engine.lora.layer_plan import plan_layers
from calotype.serving.engine.lora.lora_file import read_layers
from calotype.serving.engine.lora.low_rank import LoraLayer, reduce_rank
from calotype.serving.engine.lora.model_fit import MAX_RANK
from calotype.serving.engine.sizing.adapter_origins import merged as merged_origins
from calotype.serving.engine.sizing.adapter_origins import read_origins
from calotype.serving.engine.sizing.weight_header import read_header
from calotype.serving.weights.merging.licences import merged_licence
from calotype.serving.weights.merging.recipe import MergeInput, MergeRecipe


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """What came of a merge.

    Attributes:
        loss: largest share of one layer's change that ``svd`` left out; 0 is exact.
    """

    sha256: str
    rank: int
    layers: int
    loss: float
    recipe: JsonObject


def merge_adapters(recipe: MergeRecipe, output: pathlib.Path) -> MergedAdapter:
    """Writes an adapter in diffusers' layout.

    Raises:
        InvalidRequest: the inputs are of different models or licences, have magnitudes (DoRA), or
            the output is there.
        AdapterLoadFailed: an input is no adapter.
        StorageFailed: the disk is full or read-only.
    """
    if output.exists():
        raise InvalidRequest(f"{output} is there already; name another file.", param="output")
    cards = [read_card(one.path) for one in recipe.inputs]
    _check_bases(cards)
    pairs = list(zip(recipe.inputs, cards, strict=True))
    licence = recipe.licence or merged_licence(
        {str(one.path): one.licence or card.licence for one, card in pairs},
        commercial=recipe.commercial,
    )
    joined = _joined([(one, _read(one)) for one in recipe.inputs])
    merged, loss = joined, 0.0
    if recipe.method == "svd":
        merged, loss = _reduced(joined, recipe.rank)
    digests = {str(one.path): f"sha256:{card.sha256}" for one, card in pairs}
    kept = recipe.to_json(digests) | {"licence": licence}
    words = [word for card in cards for word in card.trigger_words]
    said = {
        "calotype.merge": json.dumps(kept, sort_keys=True),
        "calotype.trigger_words": json.dumps(list(dict.fromkeys(words))),
        "calotype.licence": licence,
        "calotype.base": cards[0].base,
    }
    metadata = {key: value for key, value in said.items() if value}
    origins = merged_origins(read_origins(one.path) for one in recipe.inputs)
    if origins is not None:
        metadata |= origins.to_metadata()
    digest = write_adapter(output, export_tensors(merged, "diffusers", str(output)), metadata)
    rank = max(layer.rank for layer in merged.values())
    return MergedAdapter(digest, rank, len(merged), loss, kept)


def _read(source: MergeInput) -> dict[str, LoraLayer]:
    header = read_header(source.path, AdapterLoadFailed)
    found: dict[str, LoraLayer] = {}
    for plan, parts in read_layers(header, plan_layers(header, read_keys(header)), MAX_RANK):
        if plan.per_row is not None:
            raise InvalidRequest(
                f"{source.path} is a DoRA ({plan.layer.keys['magnitude']!r}): its magnitudes hold "
                "for the model with this adapter alone. Use several adapters in a request instead.",
                param="inputs",
            )
        found |= parts
    return found


def _joined(sources: list[tuple[MergeInput, dict[str, LoraLayer]]]) -> dict[str, LoraLayer]:
    """Factors beside each other, each input's second one times its weight there."""
    names = dict.fromkeys(name for _, layers in sources for name in layers)
    found: dict[str, LoraLayer] = {}
    for name in names:
        here = [
            (layers[name], weight)
            for source, layers in sources
            if name in layers and (weight := source.weight_of(name))
        ]
        if not here:
            continue
        shapes = {(layer.up.shape[0], layer.down.shape[1]) for layer, _ in here}
        if len(shapes) > 1:
            raise _other_base(f"{name} is {' and '.join(f'{a}x{b}' for a, b in sorted(shapes))}")
        found[name] = LoraLayer(
            torch.cat([layer.down for layer, _ in here]),
            torch.cat([layer.up * weight for layer, weight in here], dim=1),
        )
    if not found:
        raise InvalidRequest("All weights of the merge are 0: nothing is left.", param="weight")
    return found


def _reduced(layers: dict[str, LoraLayer], rank: int) -> tuple[dict[str, LoraLayer], float]:
    found: dict[str, LoraLayer] = {}
    losses = [0.0]
    for name, layer in layers.items():
        reduced = reduce_rank(layer.up, layer.down, rank)
        found[name] = LoraLayer(reduced.down, reduced.up)
        losses.append(reduced.loss)
    return found, max(losses)


def _check_bases(cards: list[AdapterCard]) -> None:
    for told in ("base", "base_by_shape"):
        bases = {card.file: getattr(card, told) for card in cards if getattr(card, told)}
        if len(set(bases.values())) > 1:
            raise _other_base(", ".join(f"{file} is for {base}" for file, base in bases.items()))


def _other_base(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"These adapters are of different models: {why}. Merge adapters of one model.",
        code="adapter_incompatible",
        param="inputs",
    )
