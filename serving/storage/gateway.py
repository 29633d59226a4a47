"""The pictures of a model app's jobs, through the gateways: it has no way to the bucket itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterable, Iterator

import httpx

from calotype.serving.core.errors import NotFound, StorageFailed
from calotype.serving.core.protocols import PART_BYTES, OpenBlob
from calotype.serving.core.tls import believed_certificates
from calotype.serving.storage.keys import check_key

TOKEN = "CALOTYPE_INTERNAL_TOKEN"
"""Environment variable with the model's token."""
PATH = "/internal/v1/blobs"
SECONDS = 60.0
CONNECT_SECONDS = 3.0


class GatewayBlobStore:
    """A `BlobStore` that reaches the pictures of one model's jobs.

    Args:
        url: of the gateways' internal port.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        self._client = httpx.Client(
            base_url=url.rstrip("/") + PATH,
            headers={"authorization": f"Bearer {token or os.environ.get(TOKEN, '')}"},
            timeout=httpx.Timeout(SECONDS, connect=CONNECT_SECONDS),
            verify=believed_certificates(),
            trust_env=False,
        )

    def close(self) -> None:
        self._client.close()

    def put(self, key: str, data: bytes) -> None:
        self._ask("PUT", key, data).close()

    def put_parts(self, key: str, parts: Iterable[bytes]) -> None:
        self._ask("PUT", key, iter(parts)).close()

    def get(self, key: str) -> bytes:
        return b"".join(self.open(key).parts)

    def open(self, key: str) -> OpenBlob:
        answer = self._ask("GET", key)
        parts = _parts_of(answer)
        next(parts)  # begun, so that closing it closes the answer
        return OpenBlob(int(answer.headers["content-length"]), parts)

    def delete(self, key: str) -> None:
        self._ask("DELETE", key).close()

    def entries(self, prefix: str = "") -> Iterator[tuple[str, float]]:
        """Nothing: cleaning up is for the gateways."""
        return iter(())

    def _ask(
        self, method: str, key: str, content: bytes | Iterator[bytes] | None = None
    ) -> httpx.Response:
        """The answer, whose body was not read."""
        request = self._client.build_request(method, f"/{check_key(key)}", content=content)
        try:
            answer = self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise _away(error) from error
        if answer.is_success:
            return answer
        answer.close()
        if answer.status_code == 404:
            raise NotFound(f"There is no stored file {key!r}.")
        raise StorageFailed(
            f"The gateway refuses {method} of {key!r}: status {answer.status_code}.",
            retry_after=10,
        )


def _parts_of(answer: httpx.Response) -> Generator[bytes]:
    """An empty part, then those of the body."""
    with contextlib.closing(answer):
        yield b""
        try:
            yield from answer.iter_bytes(PART_BYTES)
        except httpx.HTTPError as error:
            raise _away(error) from error


def _away(error: httpx.HTTPError) -> StorageFailed:
    return StorageFailed(
        f"No gateway answers for the pictures of this model: {error}.", retry_after=10
    )
