"""What names the weights of a model or an adapter in a recipe."""

from __future__ import annotations

import functools
import hashlib
import pathlib

from calotype.serving.config import ImageModel, LoRAAdapter

ANNOTATION = "calotype.dev/weights-digest"
"""Of a manifest: the digest, where somebody who has the files knows it."""
_WHOLE_BYTES = 256 * 1024 * 1024
_SAMPLE_BYTES = 1024 * 1024
_SAMPLES = 8
_MODELS = pathlib.Path(__file__).parents[2] / "weights" / "embedded"


def model_digest(model: ImageModel) -> str:
    """``sha256:...`` of all files; ``sampled:...`` of large ones; else what the source is called.

    A file that is changed in place changes it.
    """
    noted = _annotation(model)
    if noted is not None:
        return noted
    source = model.spec.source
    if source.built_in is not None:
        return _digest_of_package(source.built_in.name)
    if source.path is not None and pathlib.Path(source.path).exists():
        return _digest_of(pathlib.Path(source.path))
    if source.hugging_face is not None:
        return f"huggingface:{source.hugging_face.repo}@{source.hugging_face.revision}"
    return "unknown"


def adapter_digest(adapter: LoRAAdapter) -> str:
    """Like `model_digest`; the manifest's own ``sha256`` if it states one."""
    if adapter.spec.sha256 is not None:
        return f"sha256:{adapter.spec.sha256}"
    noted = _annotation(adapter)
    if noted is not None:
        return noted
    source = adapter.spec.source
    if source.built_in is not None:
        return _digest_of_package(f"{source.built_in.name}.safetensors")
    if source.path is not None and pathlib.Path(source.path).exists():
        return _digest_of(pathlib.Path(source.path))
    if source.hugging_face is not None:
        return f"huggingface:{source.hugging_face.repo}@{source.hugging_face.revision}"
    return "unknown"


def _annotation(resource: ImageModel | LoRAAdapter) -> str | None:
    noted = (resource.metadata.model_extra or {}).get("annotations")
    found = noted.get(ANNOTATION) if isinstance(noted, dict) else None
    return str(found) if found else None


@functools.cache
def _digest_of_package(name: str) -> str:
    """Looked at once: the files of the package do not change under a process."""
    return _digest_of(_MODELS / name)


def _digest_of(place: pathlib.Path) -> str:
    files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
    signature = []
    for file in files:
        try:
            stat = file.stat()
        except OSError:
            continue  # removed between the listing and now; the next look has another signature
        signature.append((str(file), stat.st_size, stat.st_mtime_ns))
    return _digest(str(place), tuple(signature))


@functools.lru_cache(maxsize=256)
def _digest(place: str, signature: tuple[tuple[str, int, int], ...]) -> str:
    whole = sum(size for _, size, _ in signature) <= _WHOLE_BYTES
    digest = hashlib.sha256()
    for name, size, _ in signature:
        file = pathlib.Path(name)
        inside = file.name if name == place else file.relative_to(place).as_posix()
        digest.update(f"{inside}\0{size}\0".encode())
        with file.open("rb") as handle:
            if whole:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
                continue
            # Hashing a hundred gigabytes takes minutes: the safetensors header and samples do.
            for part in range(_SAMPLES):
                handle.seek(max(0, size - _SAMPLE_BYTES) * part // max(1, _SAMPLES - 1))
                digest.update(handle.read(_SAMPLE_BYTES))
    return f"{'sha256' if whole else 'sampled'}:{digest.hexdigest()}"
