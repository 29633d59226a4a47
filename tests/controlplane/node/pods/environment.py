"""The environment and the words of a container, as the pod's specification asks for them."""

import json
import re
from collections.abc import Iterable, Mapping

from controlplane.client.objects import Object
from controlplane.node.pods import quantity
from controlplane.node.pods.sources import Sources


class ConfigError(RuntimeError):
    """A container that cannot be created from its specification; the message is for its status."""


def expand(text: str, env: Mapping[str, str]) -> str:
    """Replaces $(NAME) where NAME is known, and $$ by one dollar."""
    pattern = r"\$(?:(\$)|\(([A-Za-z_][A-Za-z0-9_.-]*)\))"
    return re.sub(pattern, lambda m: "$" if m[1] else env.get(m[2], m[0]), text)


def of_services(services: Iterable[Object], namespace: str, links: bool) -> dict[str, str]:
    """The variables of Services: of the pod's namespace where links are on, and the API's."""
    env: dict[str, str] = {}
    for service in services:
        meta, spec = service["metadata"], service["spec"]
        of_api = (meta["namespace"], meta["name"]) == ("default", "kubernetes")
        if spec.get("clusterIP") in (None, "", "None"):
            continue
        if of_api or (links and meta["namespace"] == namespace):
            name = meta["name"].upper().replace("-", "_")
            env[f"{name}_SERVICE_HOST"] = spec["clusterIP"]
            env[f"{name}_SERVICE_PORT"] = str(spec["ports"][0]["port"])
            for port in spec["ports"]:
                if port.get("name"):
                    suffix = port["name"].upper().replace("-", "_")
                    env[f"{name}_SERVICE_PORT_{suffix}"] = str(port["port"])
    return env


async def of_container(
    container: Object, fields: "Fields", sources: Sources, base: Mapping[str, str]
) -> dict[str, str]:
    """`base`, then envFrom, then env in order; ConfigError names what is missing."""
    env = dict(base)
    for source in container.get("envFrom", []):
        for kind in ("configMap", "secret"):
            if reference := source.get(f"{kind}Ref"):
                data = await sources.data(
                    kind, reference["name"], optional=bool(reference.get("optional"))
                )
                prefix = source.get("prefix", "")
                env |= {prefix + name: value.decode() for name, value in data.items()}
    for variable in container.get("env", []):
        value = await _value(variable, container, fields, sources, env)
        if value is not None:
            env[variable["name"]] = value
    return env


async def _value(
    variable: Object, container: Object, fields: "Fields", sources: Sources, env: Mapping[str, str]
) -> str | None:
    origin = variable.get("valueFrom")
    if not origin:
        return expand(variable.get("value", ""), env)
    if reference := origin.get("fieldRef"):
        return fields.field(reference["fieldPath"])
    if reference := origin.get("resourceFieldRef"):
        return fields.resource(reference, container)
    kind = "configMap" if "configMapKeyRef" in origin else "secret"
    reference = origin[f"{kind}KeyRef"]
    optional = bool(reference.get("optional"))
    data = await sources.data(kind, reference["name"], optional=optional)
    if reference["key"] in data:
        return data[reference["key"]].decode()
    if optional:
        return None
    where = f"{kind} {sources.namespace}/{reference['name']}"
    raise ConfigError(f"couldn't find key {reference['key']} in {where}")


class Fields:
    """What the downward API says of a pod."""

    def __init__(self, pod: Object, node: str, node_address: str, capacity: Object) -> None:
        self.pod, self.address = pod, ""
        self._node, self._node_address, self._capacity = node, node_address, capacity

    def field(self, path: str) -> str:
        """The text of a fieldRef; ConfigError for a path that there is not."""
        meta, spec = self.pod["metadata"], self.pod["spec"]
        if match := re.fullmatch(r"metadata\.(labels|annotations)(?:\['(.+)'\])?", path):
            table = meta.get(match[1], {})
            if match[2]:
                return str(table.get(match[2], ""))
            return "\n".join(f"{name}={json.dumps(text)}" for name, text in sorted(table.items()))
        values = {
            "metadata.name": meta["name"],
            "metadata.namespace": meta["namespace"],
            "metadata.uid": meta["uid"],
            "spec.nodeName": self._node,
            "spec.serviceAccountName": spec.get("serviceAccountName", "default"),
            "status.hostIP": self._node_address,
            "status.hostIPs": self._node_address,
            "status.podIP": self.address,
            "status.podIPs": self.address,
        }
        if path not in values:
            raise ConfigError(f"unsupported fieldPath: {path}")
        return str(values[path])

    def resource(self, reference: Object, container: Object) -> str:
        """The text of a resourceFieldRef; without a limit it is what the node has."""
        name = reference.get("containerName") or container.get("name")
        holder = next((c for c in self.pod["spec"]["containers"] if c["name"] == name), container)
        group, _, resource = reference["resource"].partition(".")
        table = holder.get("resources", {}).get(group, {})
        value = table.get(resource, self._capacity.get(resource, "0") if group == "limits" else "0")
        return quantity.divided(value, reference.get("divisor", "0"))
