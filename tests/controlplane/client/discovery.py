"""Which kinds a cluster serves, and under which path: what kubectl's discovery does."""

from dataclasses import dataclass
from typing import Any

import httpx

ACCEPT = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"


@dataclass(frozen=True)
class Kind:
    """One kind of objects: `path` is the prefix of its group and version."""

    name: str
    plural: str
    path: str
    namespaced: bool

    def url(self, namespace: str | None, name: str | None = None) -> str:
        """The path of a list or of one object; namespace None means all namespaces."""
        where = f"/namespaces/{namespace}" if self.namespaced and namespace else ""
        return f"{self.path}{where}/{self.plural}" + (f"/{name}" if name else "")


class Discovery:
    """Looks kinds up by kind, plural, singular, short name or plural.group, in any case."""

    def __init__(self, api: httpx.Client) -> None:
        self._api = api
        self._kinds: dict[str, Kind] = {}

    def find(self, name: str) -> Kind:
        """The kind of that name; asks the cluster again before it says LookupError."""
        if name.lower() not in self._kinds:
            self._kinds = self._read()
        try:
            return self._kinds[name.lower()]
        except KeyError:
            raise LookupError(f"the cluster serves no kind named {name!r}") from None

    def _read(self) -> dict[str, Kind]:
        kinds: dict[str, Kind] = {}
        for root in ("/api", "/apis"):
            answer = self._api.get(root, headers={"accept": ACCEPT}).raise_for_status()
            for group in answer.json()["items"]:
                group_name = group["metadata"].get("name", "")
                # The first version is the preferred one, and the first group that has a name wins.
                for version in group["versions"]:
                    path = f"{root}/{group_name}" if group_name else root
                    for resource in version.get("resources", []):
                        kind = _kind(resource, f"{path}/{version['version']}")
                        for alias in _names(resource, group_name):
                            kinds.setdefault(alias, kind)
        return kinds


def _kind(resource: dict[str, Any], path: str) -> Kind:
    return Kind(
        name=resource["responseKind"]["kind"],
        plural=resource["resource"],
        path=path,
        namespaced=resource["scope"] == "Namespaced",
    )


def _names(resource: dict[str, Any], group: str) -> set[str]:
    plural = resource["resource"]
    singular = resource.get("singularResource") or resource["responseKind"]["kind"]
    names = {plural, f"{plural}.{group}", singular, resource["responseKind"]["kind"]}
    return {name.lower() for name in [*names, *resource.get("shortNames", [])]}
