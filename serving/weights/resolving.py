"""From a source to the files behind it: found and chosen, nothing fetched yet."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import httpx

from calotype.serving.config import HttpSource, HuggingFaceSource
from calotype.serving.weights.bucket import S3File, find_objects, revision_of
from calotype.serving.weights.hub import Hub, Repository
from calotype.serving.weights.sources import BUILT_IN
from calotype.serving.weights.volume import VolumeFile, find_files
from calotype.serving.weights.web import WebFile, open_client
from calotype.serving.wire.fetch_faults import Fault, failed
from calotype.serving.wire.fetch_order import FetchOrder

AnyFile = WebFile | S3File | VolumeFile
F = TypeVar("F", WebFile, S3File, VolumeFile)

MODEL_FOLDERS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
MODEL_SUFFIXES = (".json", ".safetensors", ".txt", ".jinja", ".model")
"""What is fetched of a model's folder: never a pickle, never code, no weights beside the parts."""
ADAPTER_SUFFIX = ".safetensors"
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Resolved:
    """What shall be fetched."""

    files: tuple[AnyFile, ...]
    revision: str | None
    """None where only the bytes themselves tell; then it is their sha256."""
    archive: bool = False
    """The one file is a tar archive of a model's folder."""


@contextlib.contextmanager
def resolving(order: FetchOrder) -> Iterator[Resolved]:
    """Finds the files; they can be read until the context ends.

    Raises:
        FetchFailed: there are none, too many, or they are not for us.
    """
    source = order.source
    with contextlib.ExitStack() as stack:
        if source.hugging_face is not None:
            hub = Hub()
            stack.callback(hub.close)
            yield _from_hub(order, hub, source.hugging_face)
        elif source.http is not None:
            authorization = os.environ.get("HTTP_AUTHORIZATION")
            headers = {"authorization": authorization} if authorization else {}
            yield _from_web(order, source.http, stack.enter_context(open_client(headers)))
        elif source.s3 is not None:
            objects = _chosen(order, find_objects(source.s3), source.s3.uri)
            yield Resolved(tuple(objects), revision_of(objects))
        else:
            files = _chosen(order, local_files(order), "the volume")
            yield Resolved(tuple(files), _digest_of_versions(files))


def _from_hub(order: FetchOrder, hub: Hub, source: HuggingFaceSource) -> Resolved:
    found = hub.find(source.repo, source.revision)
    _check_licence(order, found)
    files = list(found.files)
    if order.kind == "adapter" and source.filename is not None:
        files = [file for file in files if file.name == source.filename]
        if not files:
            raise failed(
                Fault.NOT_FOUND,
                f"{source.repo} has no file {source.filename} at {found.commit[:12]}; it has: "
                f"{_names(found.files)}.",
            )
    return Resolved(tuple(_chosen(order, files, source.repo)), found.commit)


def _check_licence(order: FetchOrder, found: Repository) -> None:
    answer = order.licence
    if answer is None:
        return
    if answer.name and found.licence and answer.name != found.licence:
        raise failed(
            Fault.LICENCE_NOT_ALLOWED,
            f"spec.licence.name is {answer.name!r}, but the licence of {found.repo} is "
            f"{found.licence!r}; read that one and name it.",
        )
    if not answer.accepted:
        raise failed(
            Fault.LICENCE_NOT_ALLOWED,
            f"The licence {found.licence or answer.name or 'of the weights'!r} of {found.repo} is "
            "not accepted: read it and set spec.licence.accepted to true.",
        )


def _from_web(order: FetchOrder, source: HttpSource, client: httpx.Client) -> Resolved:
    pinned = source.sha256 or order.sha256
    name = unquote(urlsplit(source.url).path).rpartition("/")[2]
    archive = order.kind == "model"
    file = WebFile(client, source.url, name or "download", sha256=pinned)
    files = [file] if archive else [_renamed(file, order)]
    return Resolved(tuple(files), pinned, archive)


def local_files(order: FetchOrder) -> list[VolumeFile]:
    """The files of a source that lies in the pod: in a volume, in the package, at a path.

    Raises:
        FetchFailed: there is none, or it leads out of the folder that the order names.
    """
    source = order.source
    if source.persistent_volume_claim is not None:
        if order.volume_dir is None:
            raise failed(
                Fault.ORDER_INVALID,
                "The order says not where the claim is mounted: volumeDir is missing.",
            )
        return find_files(order.volume_dir / source.persistent_volume_claim.path, order.volume_dir)
    if source.built_in is not None:
        suffix = ADAPTER_SUFFIX if order.kind == "adapter" else ""
        return find_files(BUILT_IN / f"{source.built_in.name}{suffix}", None)
    if order.volume_dir is None and order.kind == "adapter":
        raise failed(
            Fault.ORDER_INVALID,
            "The order says not which folder the path must lie in: volumeDir is missing.",
        )
    return find_files(pathlib.Path(source.path or ""), order.volume_dir)


def _chosen(order: FetchOrder, files: Sequence[F], where: str) -> list[F]:
    """The one file of an adapter, or the files of a model's folder."""
    if order.kind == "adapter":
        weights = [file for file in files if file.name.endswith(ADAPTER_SUFFIX)]
        if len(files) == 1:
            weights = list(files)  # named itself, whatever its name is
        if len(weights) != 1:
            raise failed(
                Fault.SOURCE_INVALID if weights else Fault.NOT_FOUND,
                f"{where} holds {len(weights)} safetensors files"
                + (f" ({_names(weights)})" if weights else "")
                + "; an adapter is exactly one"
                + (": name it in the source." if weights else "."),
            )
        return [_renamed(weights[0], order)]
    found = [file for file in files if is_model_file(file.name)]
    if not any(file.name == "model_index.json" for file in found):
        raise failed(
            Fault.MODEL_INCOMPLETE,
            f"{where} holds no model_index.json: a model is a FLUX.2 folder in diffusers format.",
        )
    return found


def is_model_file(name: str) -> bool:
    """Whether a path inside a diffusers-format folder is part of the model."""
    folder, _, rest = name.rpartition("/")
    if not folder:
        return rest.endswith(".json")
    return folder in MODEL_FOLDERS and rest.endswith(MODEL_SUFFIXES) and not rest.startswith(".")


def _renamed(file: F, order: FetchOrder) -> F:
    """An adapter's file under the last part of its name, and with the digest that is pinned."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", file.name.rpartition("/")[2]).lstrip(".")
    if order.sha256 and file.sha256 and order.sha256 != file.sha256:
        raise failed(
            Fault.CHECKSUM_MISMATCH,
            f"{file.name} has the sha256 {file.sha256}, but the manifest pins {order.sha256}.",
        )
    return dataclasses.replace(
        file, name=plain or "adapter.safetensors", sha256=order.sha256 or file.sha256
    )


def _digest_of_versions(files: Sequence[VolumeFile]) -> str:
    text = "\n".join(f"{file.name} {file.version}" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _names(files: Sequence[AnyFile]) -> str:
    names = [file.name for file in files]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
