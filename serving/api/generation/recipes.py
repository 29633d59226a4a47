"""Recipes: the digests that name the weights, and a recipe given in place of parameters."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from calotype.serving.api.generation.files import keep_same
from calotype.serving.api.generation.uploads import GivenControl, Images
from calotype.serving.api.http.body_parts import ControlNet
from calotype.serving.api.http.schemas import parse
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.config import ImageModel, LoRAAdapter
from calotype.serving.core.conditions import ReferenceUse
from calotype.serving.core.errors import InvalidRequest, NotFound
from calotype.serving.core.json_object import JsonObject
from calotype.serving.jobs.recipe import parameters_of

# What may stand beside a recipe: it says how to deliver, not what to draw.
BESIDE = frozenset(
    {
        *("response_format", "stream", "partial_images", "user", "safety_identifier", "metadata"),
        *("priority", "deadline_seconds", "moderation", "background"),
    }
)

ANNOTATION = "calotype.dev/weights-digest"
"""Of a manifest: the digest, where somebody who has the files knows it."""
_WHOLE_BYTES = 256 * 1024 * 1024
_SAMPLE_BYTES = 1024 * 1024
_SAMPLES = 8
_MODELS = pathlib.Path(__file__).parents[2] / "weights" / "embedded"


def expand_recipe(raw: JsonObject) -> tuple[JsonObject, JsonObject | None]:
    """The parameters that a body asks for, and its recipe if it has one.

    Raises:
        InvalidRequest: the recipe cannot be read, or other parameters of the picture stand beside
            it.
    """
    recipe = raw.get("recipe")
    if recipe is None:
        return dict(raw), None
    if not isinstance(recipe, dict):
        raise InvalidRequest("recipe must be an object.", code="invalid_type", param="recipe")
    wanted = parameters_of(recipe)
    for name, value in raw.items():
        if name == "recipe" or value is None:
            continue
        if name == "prompt" and "prompt" not in wanted:
            wanted["prompt"] = value  # it was left out of the file
        elif name in BESIDE:
            wanted[name] = value
        else:
            raise InvalidRequest(
                f"{name} cannot stand beside recipe, which says everything about the picture.",
                param=name,
            )
    if "prompt" not in wanted and recipe.get("operation") != "variation":
        raise InvalidRequest(
            "The recipe has no prompt: its team keeps prompts out of files. Add it as prompt.",
            code="missing_required_parameter",
            param="prompt",
        )
    return wanted, recipe


async def recipe_images(
    gateway: Gateway, team_id: str, recipe: JsonObject | None, kept_seconds: float
) -> Images | None:
    """The stored pictures that a recipe names by digest, kept for as long as its job.

    Raises:
        NotFound: one of them is not kept any more.
    """
    if recipe is None:
        return None

    async def find(part: Any, param: str) -> str | None:
        if part is None:
            return None
        digest = part.get("sha256") if isinstance(part, Mapping) else None
        found = None
        if isinstance(digest, str):
            found = await asyncio.to_thread(keep_same, gateway, team_id, digest, kept_seconds)
        if found is None:
            raise NotFound(
                f"The picture that {param} names is not kept any more; send it again.", param=param
            )
        return found.blob_key

    references, controls = _list(recipe, "references"), _list(recipe, "controls")
    found = [await find(part, f"recipe.references[{i}]") for i, part in enumerate(references)]
    maps = [await find(part, f"recipe.controls[{i}]") for i, part in enumerate(controls)]
    uses = tuple(ReferenceUse.from_payload(part) for part in references)
    return Images(
        await find(recipe.get("image"), "recipe.image"),
        await find(recipe.get("mask"), "recipe.mask"),
        tuple(key for key in found if key),
        uses=uses if any(use != ReferenceUse() for use in uses) else (),
        controls=tuple(
            _control(part, key, f"recipe.controls[{i}]")
            for i, (part, key) in enumerate(zip(controls, maps, strict=True))
            if key
        ),
    )


def _list(recipe: JsonObject, name: str) -> list[Any]:
    found = recipe.get(name) or []
    if not isinstance(found, list):
        raise InvalidRequest(
            f"recipe.{name} must be a list.", code="invalid_type", param=f"recipe.{name}"
        )
    return found


def _control(part: Mapping[str, Any], key: str, param: str) -> GivenControl:
    # Through the parameter's own schema, which says what is wrong with a value.
    fields = {k: v for k, v in part.items() if k in ("type", "scale", "start", "end")}
    try:
        control = parse(ControlNet, {"id": part.get("name"), "image": key, **fields})
    except InvalidRequest as error:
        raise InvalidRequest(error.message, error.code, f"{param}.{error.param}") from None
    return GivenControl(control.id, key, control.type, control.scale, control.start, control.end)


def model_digest(model: ImageModel) -> str:
    """``sha256:...`` of all files; ``sampled:...`` of large ones; else what the source is called.

    A file that is changed in place changes it.
    """
    noted = resolved_digest(model)
    if noted is not None:
        return noted
    source = model.spec.source
    if source.built_in is not None:
        return _digest_of_package(source.built_in.name)
    if source.path is not None and pathlib.Path(source.path).exists():
        return _digest_of(pathlib.Path(source.path))
    if source.hugging_face is not None:
        return f"huggingface:{source.hugging_face.repo}@{source.hugging_face.revision}"
    if source.merge is not None:
        return f"merge:{hashlib.sha256(source.merge.model_dump_json().encode()).hexdigest()}"
    return "unknown"


def adapter_digest(adapter: LoRAAdapter) -> str:
    """Like `model_digest`; the manifest's own ``sha256`` if it states one."""
    if adapter.spec.sha256 is not None:
        return f"sha256:{adapter.spec.sha256}"
    noted = resolved_digest(adapter)
    if noted is not None:
        return noted
    source = adapter.spec.source
    if source.built_in is not None:
        return _digest_of_package(f"{source.built_in.name}.safetensors")
    if source.path is not None and pathlib.Path(source.path).exists():
        return _digest_of(pathlib.Path(source.path))
    if source.hugging_face is not None:
        return f"huggingface:{source.hugging_face.repo}@{source.hugging_face.revision}"
    return "unknown"


def resolved_digest(resource: ImageModel | LoRAAdapter) -> str | None:
    """The digest that whoever fetched the weights noted in the manifest."""
    noted = (resource.metadata.model_extra or {}).get("annotations")
    found = noted.get(ANNOTATION) if isinstance(noted, dict) else None
    return str(found) if found else None


@functools.cache
def _digest_of_package(name: str) -> str:
    """Looked at once: the files of the package do not change under a process."""
    return _digest_of(_MODELS / name)


def _digest_of(place: pathlib.Path) -> str:
    files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
    signature = []
    for file in files:
        try:
            stat = file.stat()
        except OSError:
            continue  # removed between the listing and now; the next look has another signature
        signature.append((str(file), stat.st_size, stat.st_mtime_ns))
    return _digest(str(place), tuple(signature))


@functools.lru_cache(maxsize=256)
def _digest(place: str, signature: tuple[tuple[str, int, int], ...]) -> str:
    whole = sum(size for _, size, _ in signature) <= _WHOLE_BYTES
    digest = hashlib.sha256()
    for name, size, _ in signature:
        file = pathlib.Path(name)
        inside = file.name if name == place else file.relative_to(place).as_posix()
        digest.update(f"{inside}\0{size}\0".encode())
        with file.open("rb") as handle:
            if whole:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
                continue
            # Hashing a hundred gigabytes takes minutes: the safetensors header and samples do.
            for part in range(_SAMPLES):
                handle.seek(max(0, size - _SAMPLE_BYTES) * part // max(1, _SAMPLES - 1))
                digest.update(handle.read(_SAMPLE_BYTES))
    return f"{'sha256' if whole else 'sampled'}:{digest.hexdigest()}"
