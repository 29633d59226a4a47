"""The parts of a policy: thresholds, terms, judges, shadows, presets, privacy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from calotype.moderation.policy.categories import Category, Verdict

Score = Annotated[float, Field(ge=0.0, le=1.0)]
Action = Literal["block", "review", "blur", "flag"]
EFFECTS: tuple[Action, ...] = ("block", "review", "blur", "flag")
"""Most severe first; each is as good as a less severe one."""
MODALITIES = ("text", "image", "tile", "judge")
"""The fields of `CategoryRules`."""
VALIDATIONS = "x-kubernetes-validations"
"""Key of a schema for rules in CEL: the API server refuses with the same words as this file."""


class PolicyModel(BaseModel):
    """camelCase in YAML, nothing unknown, nothing changeable."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )


_FLAG_ABOVE_BLOCK = "flag must not be above block: it would never be seen"


class Rule(PolicyModel):
    """Thresholds of one category in one modality; a score at or above one has its effect."""

    model_config = ConfigDict(
        json_schema_extra={
            VALIDATIONS: [
                {
                    "rule": "!has(self.flag) || !has(self.block) || self.flag <= self.block",
                    "message": _FLAG_ABOVE_BLOCK,
                }
            ]
        }
    )

    block: Score | None = Field(None, description="At or above: refused. Default: nothing is.")
    review: Score | None = Field(
        None, description="At or above: held for a person, not served. Default: nothing is."
    )
    blur: Score | None = Field(
        None, description="At or above: held, to be shown blurred only. Default: nothing is."
    )
    flag: Score | None = Field(
        None, description="At or above: served, and marked in the answer. Default: nothing is."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Rule:
        if self.flag is not None and self.block is not None and self.flag > self.block:
            raise ValueError(_FLAG_ABOVE_BLOCK)
        return self

    def verdict(self, score: float) -> tuple[Verdict, float] | None:
        """The most severe effect of a score, and the threshold that it reached."""
        for name in EFFECTS:
            threshold: float | None = getattr(self, name)
            if threshold is not None and score >= threshold:
                return Verdict[name.upper()], threshold
        return None


class CategoryRules(PolicyModel):
    """One category: its thresholds for prompts, whole pictures and tiles of pictures."""

    text: Rule = Field(Rule(), description="Thresholds for prompts, scores from 0 to 1.")
    image: Rule = Field(Rule(), description="Thresholds for whole pictures, scores from 0 to 1.")
    tile: Rule = Field(Rule(), description="Thresholds for parts of pictures, scores from 0 to 1.")
    judge: Rule = Field(
        Rule(), description="Thresholds for prompts by the policy's judge, scores from 0 to 1."
    )


class Terms(PolicyModel):
    """Terms of the policy's owner: brand names, project names, local slang."""

    category: Category = Field(description="Category that a prompt with one of the terms gets.")
    action: Action = Field("block", description="What happens to such a prompt.")
    terms: tuple[Annotated[str, Field(min_length=2, max_length=200)], ...] = Field(
        min_length=1,
        max_length=1000,
        description="Words and phrases, in any spelling that reads alike; * stands for any ending.",
    )


class JudgeRules(PolicyModel):
    """A guard model that is asked as well, and when."""

    format: Literal["qwen3guard", "llama-guard", "gpt-oss-safeguard", "shieldgemma", "yes-no"] = (
        Field(description="How the model is asked; yes-no asks any chat model.")
    )
    model: str = Field(
        min_length=1, max_length=1000, description="Folder of the model where prompts are checked."
    )
    when: Literal["uncertain", "always"] = Field(
        "uncertain",
        description="For every prompt, or for those that another classifier finds suspicious or "
        "that read like no language. Default: uncertain.",
    )
    above: Score = Field(
        0.2, description="A score from here on is suspicious, if it does not block. Default: 0.2."
    )
    temperature: float = Field(
        1.0, gt=0.0, le=100.0, description="Calibration: above 1 makes the judge less sure."
    )
    bias: float = Field(
        0.0, ge=-20.0, le=20.0, description="Calibration: added to the log odds of a violation."
    )


class ShadowRules(PolicyModel):
    """A classifier on trial: it is asked beside the others, and decides nothing."""

    classifier: Literal[
        "qwen3guard",
        "llama-guard",
        "gpt-oss-safeguard",
        "shieldgemma",
        "yes-no",
        "falconsai",
        "sd-safety-checker",
        "shieldgemma-2",
    ] = Field(description="A format of judge, which reads prompts, or a classifier of pictures.")
    model: str = Field(
        min_length=1, max_length=1000, description="Folder of the model where it is asked."
    )
    sample: float = Field(
        0.1, gt=0.0, le=1.0, description="Share of the decisions that it is asked about too."
    )


class Preset(PolicyModel):
    """Thresholds that callers may ask for instead of the policy's own."""

    tolerances: tuple[Annotated[int, Field(ge=0, le=6)], ...] = Field(
        (),
        max_length=7,
        description="The values of safety_tolerance that stand for it; 2 is the policy itself.",
    )
    categories: dict[Category, CategoryRules] = Field(
        min_length=1,
        description="The thresholds that differ from the policy's, category by category.",
    )


class Presets(PolicyModel):
    """What callers may ask for by safety_tolerance and moderation, and how far they may go."""

    strictest: Preset | None = Field(None, description="Stricter than the policy.")
    strict: Preset | None = Field(None, description="Stricter than the policy.")
    low: Preset | None = Field(
        None, description="Laxer than the policy; moderation: low stands for it too."
    )
    lowest: Preset | None = Field(None, description="Laxer than the policy.")


class Privacy(PolicyModel):
    """What is kept of a prompt beside its decision."""

    prompts: Literal["none", "digest", "encrypted"] = Field(
        "digest",
        description="none, a keyed digest (the same prompt is found again), or the digest and an "
        "encrypted copy that reviewers can open. Default: digest.",
    )
    days: int = Field(
        30, ge=1, le=3650, description="Days that encrypted copies can be opened. Default: 30."
    )
