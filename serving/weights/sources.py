"""From a manifest's ``source`` to files on this machine's disk."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib

from calotype.serving.config import ImageModel, LoRAAdapter, Source
from calotype.serving.core.errors import AdapterLoadFailed, EngineError, ModelLoadFailed

BUILT_IN = pathlib.Path(__file__).with_name("embedded")
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
"""What is fetched of a model repository: never a pickle, never code."""
REVISION_ANNOTATION = "calotype.dev/revision"
"""Changes with an adapter's file where the manifest does not pin its digest."""


def model_folder(model: ImageModel) -> pathlib.Path:
    """The diffusers-format folder of a model; fetches it when it lies in a repository.

    Raises:
        ModelLoadFailed: there is no such folder, or it cannot be fetched.
    """
    source = model.spec.source
    if source.merge is not None:
        raise ModelLoadFailed(
            f"ImageModel {model.name}: source.merge is merged before it is loaded, by `calotype "
            "serve` or the operator; name the merged folder in source.path."
        )
    return source_folder(source, model.name)


def source_folder(source: Source, name: str) -> pathlib.Path:
    """The folder of one source, for the ImageModel of that name.

    Raises:
        ModelLoadFailed: there is no such folder, or it cannot be fetched.
    """
    if source.hugging_face is not None:
        return _snapshot(source, ModelLoadFailed, MODEL_FILES)
    if source.built_in is not None:
        folder = BUILT_IN / source.built_in.name
        if not (folder / "model_index.json").is_file():
            known = sorted(p.parent.name for p in BUILT_IN.glob("*/model_index.json"))
            raise ModelLoadFailed(
                f"ImageModel {name}: no built-in model is named "
                f"{source.built_in.name!r}; there is: {', '.join(known) or 'none'}."
            )
        return folder
    folder = pathlib.Path(source.path or "")
    if not folder.is_dir():
        raise ModelLoadFailed(
            f"ImageModel {name}: source.path {str(folder)!r} is no folder; it must be a "
            "FLUX.2 folder in diffusers format, with model_index.json in it."
        )
    return folder


def adapter_file(adapter: LoRAAdapter) -> pathlib.Path:
    """The safetensors file of an adapter, with the digest that the manifest pins.

    Raises:
        AdapterLoadFailed: there is no such file, it cannot be fetched, or its digest differs.
    """
    source = adapter.spec.source
    if source.hugging_face is not None:
        wanted = source.hugging_face.filename or "*.safetensors"
        folder = _snapshot(source, AdapterLoadFailed, [wanted])
        files = sorted(folder.glob(wanted))
        if len(files) != 1:
            raise AdapterLoadFailed(
                f"LoRAAdapter {adapter.name}: {source.hugging_face.repo} holds {len(files)} files "
                f"{wanted}; an adapter is exactly one: name it in source.huggingFace.filename."
            )
        file = files[0]
    elif source.built_in is not None:
        file = BUILT_IN / f"{source.built_in.name}.safetensors"
    else:
        file = pathlib.Path(source.path or "")
    if not file.is_file():
        raise AdapterLoadFailed(f"LoRAAdapter {adapter.name}: there is no file {file}.")
    if adapter.spec.sha256 is not None:
        digest = _digest(file)
        if digest != adapter.spec.sha256:
            raise AdapterLoadFailed(
                f"LoRAAdapter {adapter.name}: {file} has the sha256 {digest}, "
                f"but the manifest pins {adapter.spec.sha256}."
            )
    return file


def adapter_revision(adapter: LoRAAdapter) -> str:
    """Names the weights that a manifest asks for; another name is another revision."""
    if adapter.spec.sha256 is not None:
        return adapter.spec.sha256
    annotations = (adapter.metadata.model_extra or {}).get("annotations") or {}
    noted = annotations.get(REVISION_ANNOTATION)
    if noted is not None:
        return str(noted)
    source = adapter.spec.source
    return source.hugging_face.revision if source.hugging_face is not None else "unpinned"


def _digest(file: pathlib.Path) -> str:
    """sha256 of a file; read again only when it was written to."""
    try:
        stat = file.stat()
        return _digest_of(file, (stat.st_mtime_ns, stat.st_size, stat.st_ino))
    except OSError as error:
        raise AdapterLoadFailed(f"{file} cannot be read: {error.strerror}.") from None


@functools.lru_cache(maxsize=4096)
def _digest_of(file: pathlib.Path, version: tuple[int, int, int]) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _snapshot(source: Source, fault: type[EngineError], patterns: list[str]) -> pathlib.Path:
    from huggingface_hub import snapshot_download

    wanted = source.hugging_face
    if wanted is None:
        raise fault("The source names no repository.")
    try:
        found = snapshot_download(
            wanted.repo,
            revision=wanted.revision,
            allow_patterns=patterns,
            token=os.environ.get("HF_TOKEN"),
        )
    except Exception as error:  # the library's own errors, and those of the network under it
        raise fault(
            f"{wanted.repo} (revision {wanted.revision}) could not be fetched from Hugging Face: "
            f"{_why(error)}."
        ) from error
    return pathlib.Path(found)


def _why(error: Exception) -> str:
    """What to do about a failed download; the library's own texts are paragraphs."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision; correct source.huggingFace.revision"
    if isinstance(error, RepositoryNotFoundError):
        return "it is not there, or private or gated, which needs HF_TOKEN in the environment"
    if isinstance(error, LocalEntryNotFoundError | ConnectionError):
        return (
            "the hub cannot be reached from this machine; download the repository elsewhere and "
            "write source: {path: FOLDER}"
        )
    words = " ".join(str(error).split()).rstrip(".")
    hint = "; a gated one needs HF_TOKEN in the environment"
    return words + (hint if isinstance(error, HfHubHTTPError) else "")
