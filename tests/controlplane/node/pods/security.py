"""Who a container's process is and what it may do, by the two security contexts."""

from dataclasses import dataclass

from controlplane.client.objects import Object
from controlplane.node.images import Image
from controlplane.node.pods.environment import ConfigError


@dataclass(frozen=True)
class Identity:
    """The user of a process, and what is taken from it."""

    uid: int
    gid: int
    groups: list[int]
    readonly_root: bool
    drop_capabilities: bool
    no_new_privileges: bool

    @classmethod
    def of(cls, pod: Object, container: Object, image: Image) -> "Identity":
        """ConfigError where runAsNonRoot meets root; the container's word goes before the pod's."""
        outer, inner = pod.get("securityContext", {}), container.get("securityContext", {})
        both = {**outer, **inner}
        uid = both.get("runAsUser", image.uid)
        if both.get("runAsNonRoot") and uid == 0:
            raise ConfigError("container has runAsNonRoot and image will run as root")
        groups = [*outer.get("supplementalGroups", [])]
        if "fsGroup" in outer:
            groups.append(outer["fsGroup"])
        return cls(
            uid=uid,
            gid=both.get("runAsGroup", image.uid if uid == image.uid else 0),
            groups=groups,
            readonly_root=bool(inner.get("readOnlyRootFilesystem")),
            drop_capabilities="ALL" in inner.get("capabilities", {}).get("drop", []),
            no_new_privileges=inner.get("allowPrivilegeEscalation") is False,
        )
