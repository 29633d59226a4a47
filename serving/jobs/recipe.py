"""The recipe of an image: everything that decides its bytes, and nothing else.

    {"version": 1, "operation": "generate", "build": "0.1.0+5be1...", "prompt": "a red fox",
     "size": "128x128", "seed": 7, "n": 1, "steps": 20, ...,
     "model": {"name": "shapes", "digest": "sha256:..."},
     "adapters": [{"name": "stripes", "digest": "sha256:...", "scale": 0.8}],
     "references": [{"sha256": "..."}], "controls": [{"name": "layout", "sha256": "...", ...}],
     "output": {"format": "png", "compression": 100}}

It is stored with the job, told in every answer, carried by the image file, and may be posted
again. Its hash is the sha256 of its canonical JSON: sorted names, no spaces, UTF-8. What a request
leaves at "none" does not appear, so that a later parameter does not change the hash of recipes
that do not use it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from calotype.serving.core.conditions import ReferenceUse
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.json_object import JsonObject

VERSION = 1
MAX_BYTES = 60_000
"""Of a recipe in a file: a JPEG comment holds no more."""

MOST_CHANGES = 100
_LEVELS = 3
"""Of names in a recipe that are told apart: ``adapters[0].scale``."""
_NAME_CHARS = 64

# Of `GenerationRequest.to_payload`: what says who draws and when, but not what.
_NOT_THE_IMAGE = frozenset(
    {
        *("id", "priority", "preview_every", "tenant", "weight", "deadline_seconds"),
        *("checkpoint_every", "loras", "image", "mask", "references", "reference_uses"),
        "controls",
    }
)
_PLAIN = ("prompt", "size", "seed", "n", "steps", "guidance_scale", "sampler")
_EMPTY: tuple[Any, ...] = (None, [], {}, "", 0.0)


def make_recipe(
    request: JsonObject,
    *,
    operation: str,
    model: Mapping[str, str],
    adapter_digests: Mapping[str, str],
    output: JsonObject,
) -> JsonObject:
    """The recipe of a `GenerationRequest` payload.

    Args:
        operation: ``generate``, ``edit`` or ``variation``.
        model: its ``name`` and the ``digest`` of its weights.
        adapter_digests: adapter name -> digest of its file.
        output: ``format`` and ``compression`` of the files.
    """
    recipe: JsonObject = {
        "version": VERSION,
        "operation": operation,
        "build": engine_build(),
        "model": dict(model),
        "output": dict(output),
    }
    for name, value in request.items():
        if name in _PLAIN or (name not in _NOT_THE_IMAGE and value not in _EMPTY):
            recipe[name] = value
    # An adapter at scale 0 changes nothing, so it is not part of the image.
    adapters = [
        {"name": lora["id"], "digest": adapter_digests.get(lora["id"], ""), "scale": lora["scale"]}
        for lora in request.get("loras", [])
        if lora["scale"]
    ]
    if adapters:
        recipe["adapters"] = adapters
    for name in ("image", "mask"):
        if request.get(name):
            recipe[name] = {"sha256": digest_of_key(request[name])}
    if request.get("references"):
        uses = request.get("reference_uses") or [{}] * len(request["references"])
        recipe["references"] = [
            {"sha256": digest_of_key(key)} | _unusual(use)
            for key, use in zip(request["references"], uses, strict=True)
        ]
    if request.get("controls"):
        recipe["controls"] = [
            {
                "name": control["id"],
                "digest": adapter_digests.get(control["id"], ""),
                "sha256": digest_of_key(control["image"]),
                **{name: control[name] for name in ("type", "scale", "start", "end")},
            }
            for control in request["controls"]
        ]
    return recipe


def _unusual(use: JsonObject) -> JsonObject:
    """What of a reference's use is not as usual."""
    usual = ReferenceUse().to_payload()
    return {name: value for name, value in use.items() if value != usual[name]}


def digest_of_key(key: str) -> str:
    """The sha256 in the name of a blob (`storage.new_key`)."""
    return key.rpartition("/")[2].partition(".")[0].partition("-")[0]


def canonical(recipe: Mapping[str, object]) -> str:
    """The one JSON text of a recipe."""
    return json.dumps(
        recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def recipe_hash(recipe: Mapping[str, object]) -> str:
    return hashlib.sha256(canonical(recipe).encode("utf-8")).hexdigest()


def image_recipe(recipe: JsonObject, index: int, with_prompt: bool) -> JsonObject:
    """The recipe of one image of a batch, as its file carries it.

    A prompt that the team keeps to itself, or that is too long, is left out; the hash of the whole
    recipe is given instead.
    """
    whole = {**recipe, "seed": int(recipe["seed"]) + index, "n": 1}
    if with_prompt and len(canonical(whole).encode("utf-8")) <= MAX_BYTES:
        return whole
    public = {k: v for k, v in whole.items() if k not in ("prompt", "negative_prompt")}
    return public | {"recipe_hash": recipe_hash(whole)}


def changes(given: Mapping[str, object], made: Mapping[str, object]) -> list[JsonObject]:
    """What is not as a recipe says: ``{"field", "was", "is"}`` by name, such as ``model.digest``.

    A field that this version does not know is a change to None. At most `MOST_CHANGES`.
    """
    before, after = _flat(given), _flat(made)
    names = sorted((set(before) | set(after)) - {"recipe_hash"})
    different = (name for name in names if before.get(name) != after.get(name))
    return [
        {"field": name, "was": before.get(name), "is": after.get(name)}
        for name in itertools.islice(different, MOST_CHANGES)
    ]


def parameters_of(recipe: Mapping[str, object]) -> JsonObject:
    """The request parameters that ask for the image of a recipe.

    Raises:
        InvalidRequest: it is no recipe of a version that this service reads.
    """
    if recipe.get("version") != VERSION:
        raise InvalidRequest(
            f"recipe.version must be {VERSION}, got {recipe.get('version')!r}: this is no recipe "
            "that this service can read.",
            param="recipe.version",
        )
    model, output = recipe.get("model"), recipe.get("output")
    adapters = recipe.get("adapters", [])
    whole = isinstance(model, Mapping) and isinstance(output, Mapping)
    if not whole or not isinstance(adapters, Sequence) or isinstance(adapters, str):
        raise InvalidRequest(
            "recipe must have model, output and, where there are any, adapters, as an answer of "
            "this service gives them.",
            code="invalid_type",
            param="recipe",
        )
    assert isinstance(model, Mapping) and isinstance(output, Mapping)
    found: JsonObject = {
        "model": model.get("name"),
        "output_format": output.get("format"),
        "output_compression": output.get("compression"),
        # Left out where it is 0, and then the model's own must not take its place.
        "step_cache": 0.0,
    }
    own = ("version", "operation", "build", "model", "output", "adapters", "rendered_size")
    names = ("image", "mask", "references", "controls", "recipe_hash")
    found |= {k: v for k, v in recipe.items() if k not in (*own, *names)}
    found["loras"] = [
        {"id": item.get("name"), "scale": item.get("scale")} if isinstance(item, Mapping) else item
        for item in adapters
    ]
    return {name: value for name, value in found.items() if value is not None}


@functools.cache
def engine_build() -> str:
    """Names the code that draws: the package's version and a digest of the drawing sources."""
    serving = pathlib.Path(__file__).parents[1]
    engine = sorted((serving / "engine").rglob("*.py"))
    files = [*engine, serving / "worker" / "generation.py", serving / "images" / "encode.py"]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return f"{importlib.metadata.version('calotype')}+{digest.hexdigest()[:12]}"


def _flat(value: Any, name: str = "", level: int = 0) -> JsonObject:
    if isinstance(value, Mapping) and level < _LEVELS:
        cut = ((str(key)[:_NAME_CHARS], item) for key, item in value.items())
        parts = [(f"{name}.{key}" if name else key, item) for key, item in cut]
    elif isinstance(value, list) and level < _LEVELS:
        parts = [(f"{name}[{index}]", item) for index, item in enumerate(value)]
    else:
        return {name: value}
    return {k: leaf for where, item in parts for k, leaf in _flat(item, where, level + 1).items()}
