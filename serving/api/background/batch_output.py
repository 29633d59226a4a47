"""The two files in which a batch is answered, written line by line and picture by picture.

A batch of thousands of pictures is far larger than a gateway's memory: neither a file nor a line of
it is ever whole in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from calotype.serving.api.generation.files import keep_stream
from calotype.serving.api.generation.responses import images_body, shown_images
from calotype.serving.api.http.failures import error_object, wire
from calotype.serving.api.http.stored import StoredPictures
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.errors import CalotypeError, Cancelled, StorageFailed
from calotype.serving.core.json_object import JsonObject
from calotype.serving.database.blob_refs import BATCH_OUTPUT
from calotype.serving.jobs.records import BatchLine, BatchRecord

KEPT_SECONDS = 30 * 86_400.0
_PAGE = 100


def failure(error: CalotypeError) -> JsonObject:
    """The answer of a line that ended with an error."""
    return {"status_code": wire(error).status, "body": {"error": error_object(error)}}


class BatchOutput:
    """Writes the answers of one batch."""

    def __init__(self, gateway: Gateway, batch: BatchRecord) -> None:
        self._gateway, self._batch = gateway, batch
        self._pictures: set[str] = set()
        """The assets whose bytes are in the file that is written."""

    def write(self, name: str) -> str | None:
        """The id of the file with the answers (``output``) or the refusals (``errors``).

        None when there are none. Blocks for as long as the files of the batch are read.

        Raises:
            NotFound, StorageFailed: a picture or the file system failed; nothing is stored.
            Conflict: a picture in it is gone by now.
        """
        self._pictures.clear()
        lines = self._texts(errors=name == "errors")
        first = next(lines, None)
        if first is None:
            return None
        file = keep_stream(
            self._gateway,
            self._batch.team_id,
            _joined(first, lines),
            "jsonl",
            purpose=BATCH_OUTPUT,
            filename=f"{self._batch.id}_{name}.jsonl",
            content_type="application/jsonl",
            expires=self._gateway.database.clock.time() + KEPT_SECONDS,
            pictures=self._pictures,
        )
        return file.id

    def _texts(self, *, errors: bool) -> Iterator[Iterator[bytes]]:
        """The lines of one of the files, each in pieces."""
        after = 0
        answered = self._gateway.database.batches.answered_lines
        while page := answered(self._batch.id, after, _PAGE):
            after = page[-1].line
            for line in page:
                pictures = StoredPictures(self._gateway.blobs)
                answer = self._answer(line, pictures)
                if (answer["status_code"] != 200) is errors:
                    text = json.dumps(_described(line, answer), ensure_ascii=False)
                    yield pictures.pieces(text + "\n")

    def _answer(self, line: BatchLine, pictures: StoredPictures) -> JsonObject:
        answer: JsonObject = dict(line.answer or {})
        if answer.get("status_code") != 200:
            return answer
        job = self._gateway.database.jobs.get_job(line.job_id or "")
        try:
            if job is None:
                raise Cancelled("The job is gone.")
            images = shown_images(self._gateway, job)
            body = images_body(self._gateway, "", job, images, pictures)
            pictures.check()
        except StorageFailed:
            raise  # the whole file is written again when the store is back
        except CalotypeError as problem:
            return failure(problem)
        if job.input["response_format"] != "url":
            self._pictures |= {image["asset_id"] for image in images}
        return answer | {"body": body}


def _described(line: BatchLine, answer: JsonObject) -> JsonObject:
    error = None
    if answer["status_code"] != 200:
        found = answer["body"]["error"]
        error = {"code": found["code"], "message": found["message"]}
    return {
        "id": f"batch_req_{line.batch_id.removeprefix('batch_')}_{line.line}",
        "custom_id": line.custom_id,
        "response": answer | {"request_id": f"{line.batch_id}-{line.line}"},
        "error": error,
    }


def _joined(first: Iterator[bytes], others: Iterator[Iterator[bytes]]) -> Iterator[bytes]:
    yield from first
    for line in others:
        yield from line
