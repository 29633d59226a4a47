"""Which model has a name or an alias that several ask for. Pure.

Requests know a model by one name over all namespaces. The administrator's list decides
(``modelNames``); of names that are not in it, a model of the release's own namespace has them
first, then the oldest one. Aliases are names that clients wrote for another service, such as
dall-e-3: outside of the release's namespace only the list gives them.
"""

from __future__ import annotations

from collections.abc import Mapping

from calotype.operator.api.conditions import Reason
from calotype.operator.kube.objects import Address, shown
from calotype.operator.planning.refusal import Refusal
from calotype.operator.settings import OperatorSettings
from calotype.serving.config import ImageModel


def names_of(model: ImageModel) -> tuple[str, ...]:
    """Its own name first."""
    return (model.name, *model.spec.aliases)


def name_refusal(
    model: ImageModel, address: Address, taken: Mapping[str, Address], settings: OperatorSettings
) -> Refusal | None:
    """Why a model must not have its names; None = it may.

    Args:
        taken: the names of the models that come before it.
    """
    for name in names_of(model):
        what = "name" if name == model.name else "alias"
        listed = settings.model_names.get(name)
        if listed == shown(address):
            continue
        if listed is not None:
            return Refusal(
                Reason.NAME_CONFLICT,
                f"The administrator gives the {what} {name!r} to ImageModel {listed} (modelNames "
                "of operator.settings): give this one another.",
            )
        if name in taken:
            return Refusal(
                Reason.NAME_CONFLICT,
                f"The {what} {name!r} belongs to ImageModel {shown(taken[name])} already, and "
                "requests know a model by one name: give this one another, delete the other "
                "model, or have an administrator decide (modelNames of operator.settings).",
            )
        if what == "alias" and address[0] != settings.operator_namespace:
            return Refusal(
                Reason.NAME_NOT_GRANTED,
                f"The alias {name!r} is not given to a model of namespace {address[0]}: leave it "
                f"out, or have an administrator write {name}: {shown(address)} into modelNames of "
                "operator.settings.",
            )
    return None


def rivals_of(
    models: Mapping[Address, ImageModel], refused: Mapping[Address, Refusal]
) -> dict[Address, str]:
    """Address of a model that has a contested name -> a sentence that says who else asks for it."""
    owners: dict[str, Address] = {}
    losers: list[Address] = []
    for address, model in sorted(models.items()):
        refusal = refused.get(address)
        if refusal is None or refusal.reason not in (Reason.NAME_CONFLICT, Reason.NAME_NOT_GRANTED):
            owners |= dict.fromkeys(names_of(model), address)
        elif refusal.reason == Reason.NAME_CONFLICT:
            losers.append(address)
    found: dict[Address, list[str]] = {}
    for address in losers:
        for name in names_of(models[address]):
            if name in owners:
                text = f"ImageModel {shown(address)} asks for {name!r} too"
                found.setdefault(owners[name], []).append(text)
    return {address: "; ".join(texts) for address, texts in found.items()}
