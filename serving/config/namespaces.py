"""From which namespaces a model takes LoRA adapters; as in the Gateway API."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from calotype.serving.config.base import Matches, Rule, Spec

LabelKey = Annotated[
    str,
    Field(min_length=1, max_length=317),
    Matches(
        r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?",
        "a label's key is NAME or PREFIX/NAME, for example 'team' or 'kubernetes.io/metadata.name'",
    ),
]
LabelValue = Annotated[
    str,
    Field(max_length=63),
    Matches(
        r"([A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?)?",
        "a label's value has letters, digits, '-', '_' and '.', and begins and ends with a letter "
        "or digit",
    ),
]


class LabelRequirement(Spec):
    """One condition on a label."""

    rules = (
        Rule(
            lambda s: bool(s.values) == (s.operator in ("In", "NotIn")),
            "(self.values.size() > 0) == (self.operator in ['In', 'NotIn'])",
            "values are given for the operators In and NotIn, and for no other",
        ),
    )

    key: LabelKey = Field(description="Key of the label.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"] = Field(
        description="How the label's value relates to values."
    )
    values: list[LabelValue] = Field(
        default_factory=list, max_length=32, description="Values, for In and NotIn."
    )


class LabelSelector(Spec):
    """metav1.LabelSelector: both parts must hold."""

    rules = (
        Rule(
            lambda s: bool(s.match_labels or s.match_expressions),
            "self.matchLabels.size() > 0 || self.matchExpressions.size() > 0",
            "an empty selector would choose every namespace: give matchLabels or "
            "matchExpressions, or set from: All",
        ),
    )

    match_labels: dict[str, LabelValue] = Field(
        default_factory=dict,
        max_length=16,
        description="Labels that a namespace must have, key to value.",
    )
    match_expressions: list[LabelRequirement] = Field(
        default_factory=list, max_length=16, description="Conditions that must hold."
    )

    def matches(self, labels: dict[str, str]) -> bool:
        """Whether a namespace with these labels is chosen."""
        if any(labels.get(key) != value for key, value in self.match_labels.items()):
            return False
        return all(_holds(condition, labels) for condition in self.match_expressions)


def _holds(condition: LabelRequirement, labels: dict[str, str]) -> bool:
    value = labels.get(condition.key)
    if condition.operator == "Exists":
        return value is not None
    if condition.operator == "DoesNotExist":
        return value is None
    return (value in condition.values) == (condition.operator == "In")


class AdapterNamespaces(Spec):
    """From which namespaces LoRAAdapters may name a model."""

    rules = (
        Rule(
            lambda s: (s.from_ == "Selector") == (s.selector is not None),
            "(self.from == 'Selector') == has(self.selector)",
            "selector is given with from: Selector, and only then",
        ),
    )

    from_: Literal["Same", "All", "Selector"] = Field(
        "Same",
        alias="from",
        description="Same: only the model's own namespace. All: every namespace that the operator "
        "watches. Selector: those whose labels the selector chooses.",
    )
    selector: LabelSelector | None = Field(None, description="Labels of the namespaces.")
