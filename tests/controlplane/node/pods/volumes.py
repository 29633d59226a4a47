"""The volumes of one pod: folders on this machine that its containers get bound into them."""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from controlplane.client.api_client import ApiClient
from controlplane.client.objects import Object
from controlplane.node.pods.environment import Fields, expand
from controlplane.node.pods.sources import MissingSource, Sources

# Kinds whose files follow their source while the pod runs.
FOLLOWED = ("configMap", "secret", "projected", "downwardAPI")
TOKEN_SECONDS = 3600


@dataclass(frozen=True)
class File:
    """One file of a volume."""

    content: bytes
    mode: int


class Volumes:
    """Makes the volumes below `folder`; `paths` has the folder of each by its name."""

    def __init__(self, api: ApiClient, pod: Object, folder: Path, fields: Fields, sources: Sources):
        self._api, self._pod, self._folder = api, pod, folder
        self._fields, self._sources = fields, sources
        self._specs: list[Object] = pod["spec"].get("volumes", [])
        self._group: int | None = pod["spec"].get("securityContext", {}).get("fsGroup")
        self.paths: dict[str, Path] = {}

    async def prepare(self) -> None:
        """Makes every volume; MissingSource or ApiError when one cannot be made yet."""
        for spec in self._specs:
            if "persistentVolumeClaim" in spec:
                path = await self._claim(spec["persistentVolumeClaim"]["claimName"])
                self._own(path)
            elif "hostPath" in spec:
                path = Path(spec["hostPath"]["path"])
                path.mkdir(parents=True, exist_ok=True)
            else:
                path = self._folder / spec["name"]
                path.mkdir(parents=True, exist_ok=True)
                if "emptyDir" in spec:
                    path.chmod(0o777)
                    self._own(path)
                elif self._followed(spec):
                    write_atomically(path, await self._files(spec), self._group)
                else:
                    kinds = ", ".join(sorted(spec.keys() - {"name"}))
                    raise MissingSource(f"volume {spec['name']}: {kinds} is not to be had here")
            self.paths[spec["name"]] = path

    async def refresh(self) -> None:
        """Brings changed ConfigMaps, Secrets, labels and tokens into the running pod."""
        for spec in self._specs:
            if self._followed(spec):
                write_atomically(self.paths[spec["name"]], await self._files(spec), self._group)

    def source(self, mount: Object, env: dict[str, str]) -> Path:
        """What a volumeMount binds: the volume or a path below it."""
        path = self.paths[mount["name"]]
        below = mount.get("subPath") or expand(mount.get("subPathExpr", ""), env)
        if below:
            path = path / below
            if not path.exists():
                path.mkdir(parents=True)
                self._own(path)
        return path

    @staticmethod
    def _followed(spec: Object) -> bool:
        return any(kind in spec for kind in FOLLOWED)

    def _own(self, path: Path) -> None:
        """What a volume gets for the pod's fsGroup."""
        if self._group is not None:
            os.chown(path, -1, self._group)
            path.chmod(path.stat().st_mode | 0o2770)

    async def _claim(self, name: str) -> Path:
        namespace = self._pod["metadata"]["namespace"]
        claim = await self._api.find(
            f"/api/v1/namespaces/{namespace}/persistentvolumeclaims/{name}"
        )
        volume = (claim or {}).get("spec", {}).get("volumeName")
        if not claim or not volume:
            raise MissingSource(f'persistentvolumeclaim "{name}" is not bound')
        spec = (await self._api.get(f"/api/v1/persistentvolumes/{volume}"))["spec"]
        path = Path((spec.get("hostPath") or spec["local"])["path"])
        path.mkdir(parents=True, exist_ok=True)
        return path

    async def _files(self, spec: Object) -> dict[str, File]:
        holder = next(spec[kind] for kind in FOLLOWED if kind in spec)
        mode = holder.get("defaultMode", 0o644)
        parts = holder.get("sources", []) if "projected" in spec else [spec]
        files: dict[str, File] = {}
        for part in parts:
            files |= await self._part(part, mode)
        return files

    async def _part(self, part: Object, mode: int) -> dict[str, File]:
        for kind in ("configMap", "secret"):
            if source := part.get(kind):
                name, items = source.get("name") or source.get("secretName"), source.get("items")
                data = await self._sources.keys(kind, name, items, bool(source.get("optional")))
                modes = {item["path"]: item.get("mode", mode) for item in items or []}
                return {path: File(text, modes.get(path, mode)) for path, text in data.items()}
        if source := part.get("serviceAccountToken"):
            seconds = source.get("expirationSeconds", TOKEN_SECONDS)
            token = await self._sources.token(source.get("audience"), seconds)
            return {source["path"]: File(token, mode)}
        files = {}
        for item in (part.get("downwardAPI") or {}).get("items", []):
            if "fieldRef" in item:
                text = self._fields.field(item["fieldRef"]["fieldPath"])
            else:
                text = self._fields.resource(item["resourceFieldRef"], {})
            files[item["path"]] = File(text.encode(), item.get("mode", mode))
        return files


def write_atomically(folder: Path, files: dict[str, File], group: int | None = None) -> bool:
    """Gives a volume these files as the kubelet does: all of them lie below `..data`, a link that
    is switched at once, so that no reader sees a mixture. Says whether anything changed."""
    current = folder / "..data"
    if current.exists() and _read(current) == {path: f.content for path, f in files.items()}:
        return False
    fresh = folder / f"..{time.time_ns()}"
    fresh.mkdir(mode=0o755)
    for path, file in files.items():
        target = fresh / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.content)
        target.chmod(file.mode | (0o440 if group is not None else 0))
        if group is not None:
            os.chown(target, -1, group)
    old = os.readlink(current) if current.is_symlink() else None
    link = folder / "..data.new"
    link.symlink_to(fresh.name)
    link.rename(current)
    tops = {path.split("/")[0] for path in files}
    for name in tops:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    for entry in folder.iterdir():
        if not entry.name.startswith("..") and entry.name not in tops:
            entry.unlink()
    if old:
        shutil.rmtree(folder / old, ignore_errors=True)
    return True


def _read(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
