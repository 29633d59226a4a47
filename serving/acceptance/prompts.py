"""The prompts of an acceptance set: the manifest's own, else those of the package."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from calotype.serving.config.model.acceptance import TRIGGER, Acceptance
from calotype.serving.training.captions import POSITION_WORDS
from calotype.serving.training.scenes import COLOR_NAMES, SHAPES

SUBJECT_PROMPTS = (
    "a photo of {trigger} on a wooden table",
    "a photo of {trigger} in front of a brick wall",
    "a photo of {trigger} on green grass in the sun",
    "a photo of {trigger} on wet sand at the sea",
    "a photo of {trigger} in the snow",
    "a photo of {trigger} on a red carpet",
    "a photo of {trigger} on a marble counter next to a lemon",
    "a photo of {trigger} in a shop window at night",
    "a photo of {trigger} on a white background, seen from above",
    "a photo of {trigger} beside a blue ceramic cup",
    "a close-up photo of {trigger} with rain drops on it",
    "a photo of {trigger} in a forest in autumn",
    "a watercolour painting of {trigger}",
    "a pencil drawing of {trigger}",
    "a photo of {trigger} on a bookshelf",
    "a photo of {trigger} floating on a lake",
)
CLASS_PROMPTS = (
    "a photo of a wooden chair in an empty room",
    "a photo of two red apples on a plate",
    "a photo of a grey cat asleep on a sofa",
    "a photo of a city street at night in the rain",
    "a portrait of an old fisherman, studio light",
    "a photo of a mountain lake at sunrise",
    "a photo of a yellow taxi in front of a glass tower",
    "a watercolour painting of a sailing boat",
    "a photo of a stack of three books, the one on top is green",
    "a pencil drawing of a bicycle",
    "a photo of a bowl of noodles seen from above",
    "a photo of a white horse on a beach",
    "a photo of a blue door in a stone wall",
    "a photo of a glass of water on a black table",
    "an illustration of a lighthouse in a storm",
    "a photo of a field of sunflowers under a cloudy sky",
)


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts with and without the candidate's subject, as many of each as are drawn."""

    subject: tuple[str, ...]
    classes: tuple[str, ...]


def prompt_set(acceptance: Acceptance, trigger: str | None, *, flat_shapes: bool) -> PromptSet:
    """The prompts, repeated until there are ``acceptance.pictures`` of each kind.

    Args:
        trigger: None = there is no subject: a model, or an adapter without a trigger word.
        flat_shapes: the model is the embedded one, which knows flat shapes only.
    """
    count = acceptance.pictures
    subjects = acceptance.prompts or (_shapes(count, 1) if flat_shapes else SUBJECT_PROMPTS)
    classes = acceptance.class_prompts or (_shapes(count, 2) if flat_shapes else CLASS_PROMPTS)
    named = [] if trigger is None else [prompt.replace(TRIGGER, trigger) for prompt in subjects]
    rng = random.Random(acceptance.seed)
    plain = [prompt.replace(TRIGGER, rng.choice(SHAPES)) for prompt in classes]
    return PromptSet(_repeated(named, count), _repeated(plain, count))


def _repeated(prompts: Sequence[str], count: int) -> tuple[str, ...]:
    return tuple(prompts[i % len(prompts)] for i in range(count)) if prompts else ()


def _shapes(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    found: list[str] = []
    while len(found) < count:
        color, background = rng.sample(COLOR_NAMES, 2)
        size = rng.choice(("small", "medium", "large"))
        where = rng.choice(tuple(POSITION_WORDS.values()))[0]
        prompt = f"a {size} {color} {TRIGGER} on a {background} background, {where}"
        if prompt not in found:
            found.append(prompt)
    return found
