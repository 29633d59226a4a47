"""The models and adapters that are on offer now, and what may be asked of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from calotype.serving.config import ImageModel, LoRAAdapter
from calotype.serving.core.errors import InvalidRequest, NotFound
from calotype.serving.core.request import AdapterRef
from calotype.serving.jobs.records import TeamRecord


def is_open(adapter: LoRAAdapter, team: TeamRecord | None) -> bool:
    """Whether the team may name the adapter; one that names no teams is open to all."""
    teams = adapter.spec.access.teams
    return not teams or (team is not None and team.name in teams)


def may_use(model: str, team: TeamRecord | None) -> bool:
    """Whether the team may draw with the model; a team that names no models has all of them."""
    return team is None or team.allowed_models is None or model in team.allowed_models


FIRST = ""
"""As a default model: the first one."""


@dataclass(frozen=True, slots=True)
class _Offer:
    models: dict[str, ImageModel]
    names: dict[str, str]
    """Every name and alias -> the model's name."""
    adapters: dict[str, dict[str, LoRAAdapter]]
    """Model -> adapter name -> adapter."""
    default: str | None = FIRST


class Catalog:
    """What the manifests declare. `replace` swaps all of it at once, also from another thread."""

    def __init__(self, models: Sequence[ImageModel], adapters: Sequence[LoRAAdapter] = ()) -> None:
        self._offer = _read(models, adapters)
        self._closed: Mapping[str, str] = {}

    def replace(
        self,
        models: Sequence[ImageModel],
        adapters: Sequence[LoRAAdapter] = (),
        default: str | None = FIRST,
    ) -> None:
        """Takes new manifests; requests that are being read keep what they saw.

        Args:
            default: model of requests that name none; None = they must name one, where there are
                several.

        Raises:
            InvalidRequest: two models claim one name; the catalog stays as it was.
        """
        self._offer = replace(_read(models, adapters), default=default)

    def close(self, teams: Mapping[str, str]) -> None:
        """Lets these teams not draw, and all others.

        Args:
            teams: name -> a sentence that says why.
        """
        self._closed = dict(teams)

    def models(self, team: TeamRecord | None = None) -> list[ImageModel]:
        """All of them, or those that a team may draw with."""
        return [model for model in self._offer.models.values() if may_use(model.name, team)]

    def adapters(self, model: str) -> list[LoRAAdapter]:
        return list(self._offer.adapters.get(model, {}).values())

    def closed(self, team: str) -> str | None:
        """Why a team may not draw at the moment; None = it may."""
        return self._closed.get(team)

    def model(self, name: str | None, team: TeamRecord | None = None) -> ImageModel:
        """The model of that name or alias; without a name, the default one.

        Raises:
            NotFound: no such model, or it is closed to the team: the answer is the same, and names
                only those that the team may use.
        """
        offered = self.models(team)
        if not offered:
            raise NotFound(
                "This service offers your team no model at the moment.",
                code="model_not_found",
                param="model",
            )
        if name is None:
            return self._default(offered)
        found = self._offer.names.get(name)
        if found is None or not may_use(found, team):
            raise NotFound(
                f"The model '{name[:80]}' does not exist or is not open to your team. This "
                f"service offers: {', '.join(model.name for model in offered)}.",
                code="model_not_found",
                param="model",
            )
        return self._offer.models[found]

    def _default(self, offered: Sequence[ImageModel]) -> ImageModel:
        default = self._offer.default
        if default == FIRST or len(offered) == 1:
            return offered[0]
        for model in offered:
            if model.name == default:
                return model
        raise NotFound(
            "This service has no default model for your team: name one of "
            f"{', '.join(model.name for model in offered)}.",
            code="model_not_found",
            param="model",
        )

    def adapter_refs(
        self,
        model: ImageModel,
        wanted: Sequence[tuple[str, float | None]],
        team: TeamRecord | None = None,
    ) -> tuple[AdapterRef, ...]:
        """Checks adapters ``(name, scale or None)`` for a model.

        Raises:
            NotFound: the model has no such adapter, or it is for other teams: the answer is the
                same, and names only those that are open to the team.
            InvalidRequest: too many, one twice, or a scale out of the adapter's range.
        """
        most = model.spec.limits.max_adapters
        if len(wanted) > most:
            raise InvalidRequest(
                f"loras has {len(wanted)} entries; {model.name} takes at most {most}.",
                param="loras",
            )
        refs: list[AdapterRef] = []
        for index, (name, scale) in enumerate(wanted):
            where = f"loras[{index}]"
            strength = self._strength(model, name, scale, "lora", where, team)
            if any(ref.name == name for ref in refs):
                raise InvalidRequest(f"loras names '{name}' twice.", param=f"{where}.id")
            refs.append(AdapterRef(name, strength))
        return tuple(refs)

    def control_scale(
        self,
        model: ImageModel,
        name: str,
        scale: float | None,
        where: str,
        team: TeamRecord | None = None,
    ) -> float:
        """The scale of a control adapter of a model, its default where none is given.

        Raises:
            NotFound, InvalidRequest: as `adapter_refs`.
        """
        return self._strength(model, name, scale, "control", where, team)

    def _strength(
        self,
        model: ImageModel,
        name: str,
        scale: float | None,
        kind: str,
        where: str,
        team: TeamRecord | None,
    ) -> float:
        offered = self._offer.adapters.get(model.name, {})
        known = {name: adapter for name, adapter in offered.items() if is_open(adapter, team)}
        if name in known and known[name].spec.type != kind:
            here, there = ("loras", "controlnets") if kind == "lora" else ("controlnets", "loras")
            raise InvalidRequest(
                f"{where}.id: '{name}' is of type {known[name].spec.type}, not {kind}; name it in "
                f"{there} instead of {here}.",
                param=f"{where}.id",
            )
        if name not in known:
            usable = sorted(n for n, adapter in known.items() if adapter.spec.type == kind)
            raise NotFound(
                f"The model '{model.name}' has no adapter '{name[:80]}' that is open to your "
                f"team. It may use: {', '.join(usable) or 'none'}. The owner of an "
                "adapter opens it to a team with spec.access.teams.",
                param=f"{where}.id",
            )
        allowed = known[name].spec.scale
        strength = allowed.default if scale is None else scale
        if not allowed.min <= strength <= allowed.max:
            raise InvalidRequest(
                f"{where}.scale is {strength:g}; the adapter '{name}' takes "
                f"{allowed.min:g} to {allowed.max:g}.",
                param=f"{where}.scale",
            )
        return strength


def _read(models: Sequence[ImageModel], adapters: Sequence[LoRAAdapter]) -> _Offer:
    offer = _Offer({}, {}, {})
    for model in models:
        if model.name in offer.models:
            raise InvalidRequest(f"Two ImageModels are named {model.name!r}.")
        offer.models[model.name] = model
    offer.names.update({name: name for name in offer.models})
    for model in models:
        for alias in model.spec.aliases:
            if offer.names.setdefault(alias, model.name) != model.name:
                raise InvalidRequest(
                    f"The alias {alias!r} of ImageModel {model.name} belongs to "
                    f"{offer.names[alias]} already."
                )
    for adapter in adapters:
        offer.adapters.setdefault(adapter.spec.model_ref.name, {})[adapter.name] = adapter
    return offer
