"""What an adapter's file is, read from its head: spelling, ranks, alphas, layers, words, licence.

Imports no torch and reads no weight, so it answers at once for a file of any size; only the digest
reads the whole file.
"""

from __future__ import annotations

import json
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from calotype.serving.core.errors import AdapterLoadFailed
from calotype.serving.core.json_object import JsonObject
from calotype.serving.engine.lora.key_layouts import read_keys
from calotype.serving.engine.lora.layer_names import block_of
from calotype.serving.engine.lora.layer_plan import LayerPlan, plan_layers
from calotype.serving.engine.lora.model_fit import (
    Coverage,
    LinearShapes,
    check_fit,
    coverage,
    guess_base,
)
from calotype.serving.engine.sizing.weight_header import WeightHeader, file_digest, read_header

_TRIGGERS = (
    "calotype.trigger_words",
    "modelspec.trigger_phrase",
    "ss_trigger_words",
    "trigger_words",
    "trigger_word",
    "trigger_phrase",
    "instance_prompt",
)
_LICENCES = ("calotype.licence", "modelspec.license", "license", "licence", "ss_license")
_BASES = (
    "calotype.base",
    "modelspec.architecture",
    "base_model",
    "ss_base_model_version",
    "ss_sd_model_name",
)


@dataclass(frozen=True, slots=True)
class AdapterCard:
    """One adapter file.

    Attributes:
        kinds: of its layers, such as lora; "dora" is added where magnitudes are learned.
        ranks: lowest and highest; of LoKr and LoHa those of the LoRA that they equal.
        alphas: lowest and highest; None where no layer says one, which means the rank.
        blocks: block -> linear layers of the model that it changes there.
        base: what the file says that it was made for.
        base_by_shape: the published model that has its layers, if it is one only.
        coverage: of the model that was asked about.
    """

    file: str
    size_bytes: int
    sha256: str
    layout: str
    kinds: tuple[str, ...]
    ranks: tuple[int, int]
    alphas: tuple[float, float] | None
    dtypes: tuple[str, ...]
    tensors: int
    layers: int
    blocks: dict[str, int]
    base: str | None
    base_by_shape: str | None
    trigger_words: tuple[str, ...]
    licence: str | None
    coverage: Coverage | None = None

    def to_json(self) -> JsonObject:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.file}: {', '.join(self.kinds)} in the layout of {self.layout}"
        yield f"sha256         {self.sha256}"
        yield f"size           {self.size_bytes:,} bytes, {self.tensors} tensors of {self._dtypes}"
        yield f"rank           {_span(self.ranks)}"
        alphas = "not said, which means the rank" if self.alphas is None else _span(self.alphas)
        yield f"alpha          {alphas}"
        blocks = len([block for block in self.blocks if "blocks." in block])
        yield f"layers         {self.layers} linear layers, in {blocks} blocks"
        if self.coverage is not None:
            yield f"of the model   {self.coverage}"
            for part in self.coverage.blocks:
                yield f"  {part.block:<32} {part.matched} of {part.total}"
        yield f"base           {self.base or 'not said'}{self._shape}"
        yield f"trigger words  {', '.join(self.trigger_words) or 'not said'}"
        yield f"licence        {self.licence or 'not said'}"

    @property
    def _dtypes(self) -> str:
        return ", ".join(self.dtypes)

    @property
    def _shape(self) -> str:
        return (
            "" if self.base_by_shape is None else f" (its layers are those of {self.base_by_shape})"
        )


def read_card(path: pathlib.Path, model: LinearShapes | None = None) -> AdapterCard:
    """Args:
        model: layers of a model that the adapter must fit; None asks about none.

    Raises:
        AdapterLoadFailed: the file is no adapter of FLUX.2, or not one of the model.
    """
    header = read_header(path, AdapterLoadFailed)
    keys = read_keys(header)
    plans = plan_layers(header, keys)
    modules = [module for plan in plans for module in plan.layer.target.modules]
    if model is not None:
        for plan in plans:
            check_fit(path, plan, model, max_rank=max(plan.rank, 1))
    ranks = [plan.rank for plan in plans]
    alphas = [plan.alpha for plan in plans if plan.alpha is not None]
    return AdapterCard(
        str(path),
        path.stat().st_size,
        file_digest(path),
        keys.layout.value,
        _kinds(plans),
        (min(ranks), max(ranks)),
        (min(alphas), max(alphas)) if alphas else None,
        tuple(sorted({info.dtype for info in header.tensors.values()})),
        len(header.tensors),
        len(modules),
        dict(Counter(block_of(module) for module in modules)),
        _stated(header.metadata, _BASES) or _trained(header.metadata, "baseDigest"),
        guess_base(plans),
        _words(header),
        _stated(header.metadata, _LICENCES),
        None if model is None else coverage(modules, model),
    )


def _kinds(plans: list[LayerPlan]) -> tuple[str, ...]:
    kinds = {plan.layer.kind.value for plan in plans}
    if any(plan.per_row is not None for plan in plans):
        kinds.add("dora")
    return tuple(sorted(kinds))


def _stated(metadata: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((metadata[name] for name in names if metadata.get(name, "").strip()), None)


def _trained(metadata: Mapping[str, str], entry: str) -> str | None:
    """What calotype's own trainer says in the entry ``calotype``."""
    try:
        found = json.loads(metadata.get("calotype", "{}")).get(entry)
    except (ValueError, AttributeError):
        return None
    return str(found) if found else None


def _words(header: WeightHeader) -> tuple[str, ...]:
    own = _trained(header.metadata, "triggerWord")
    if own is not None:
        return (own,)
    raw = _stated(header.metadata, _TRIGGERS)
    if raw is None:
        return ()
    try:
        found = json.loads(raw)
    except ValueError:
        found = raw.split(",")
    words = found if isinstance(found, list) else [found]
    return tuple(str(word).strip() for word in words if str(word).strip())


def _span(pair: tuple[float, float]) -> str:
    low, high = pair
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
