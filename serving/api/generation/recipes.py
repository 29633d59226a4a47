"""A recipe in place of parameters: what was drawn once is asked for again."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from calotype.serving.api.generation.planning import Images
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.errors import InvalidRequest, NotFound
from calotype.serving.jobs.recipe import parameters_of

# What may stand beside a recipe: it says how to deliver, not what to draw.
BESIDE = frozenset(
    {
        *("response_format", "stream", "partial_images", "user", "safety_identifier", "metadata"),
        *("priority", "deadline_seconds", "moderation", "background"),
    }
)


def expand_recipe(raw: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """The parameters that a body asks for, and its recipe if it has one.

    Raises:
        InvalidRequest: the recipe cannot be read, or other parameters of the picture stand beside
            it.
    """
    recipe = raw.get("recipe")
    if recipe is None:
        return dict(raw), None
    if not isinstance(recipe, Mapping):
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
    gateway: Gateway, team_id: str, recipe: Mapping[str, Any] | None
) -> Images | None:
    """The stored pictures that a recipe names by digest.

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
            found = await asyncio.to_thread(gateway.database.files.find_blob, team_id, digest)
        if found is None:
            raise NotFound(
                f"The picture that {param} names is not kept any more; send it again.", param=param
            )
        return found

    references = recipe.get("references") or []
    if not isinstance(references, list):
        raise InvalidRequest(
            "recipe.references must be a list.", code="invalid_type", param="recipe.references"
        )
    found = [await find(part, f"recipe.references[{i}]") for i, part in enumerate(references)]
    return Images(
        await find(recipe.get("image"), "recipe.image"),
        await find(recipe.get("mask"), "recipe.mask"),
        tuple(key for key in found if key),
    )
