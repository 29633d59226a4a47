"""Child program: what a product team does with OpenAI's SDK for Python, of whatever version.

python openai_calls.py URL KEY PNG_FILE MASK_FILE
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import sys
import warnings
from typing import Any

import openai

warnings.simplefilter("ignore")
URL, KEY, IMAGE, MASK = sys.argv[1:]


def digest(text: str) -> str:
    return hashlib.sha256(base64.b64decode(text)).hexdigest()


def refusal(call: Any) -> dict[str, Any]:
    try:
        call()
    except openai.APIStatusError as error:
        body: Any = error.body
        return {
            "class": type(error).__name__,
            "code": error.code,
            "param": error.param,
            "request_id": error.request_id,
            "message": body["message"],
        }
    return {}


def synchronous() -> dict[str, Any]:
    client = openai.OpenAI(base_url=URL + "/v1", api_key=KEY, max_retries=0)
    with open(IMAGE, "rb") as file:
        picture = file.read()
    with open(MASK, "rb") as file:
        mask = file.read()
    images = client.images
    seed = {"seed": 7}
    plain = images.generate(model="gpt-image-1", prompt="a fox", n=2, extra_body=seed)
    raw = images.with_raw_response.generate(prompt="a fox", extra_body=seed)
    url = images.generate(model="dall-e-3", prompt="a fox", response_format="url", extra_body=seed)
    edits = [
        images.edit(image=picture, prompt="a cat", extra_body=seed),
        images.edit(image=[picture, io.BytesIO(picture)], mask=mask, prompt="a cat"),
    ]
    varied = images.create_variation(image=picture)
    uploaded = client.files.create(file=("a.png", picture), purpose="vision")
    file = {
        "listed": uploaded.id in [f.id for f in client.files.list()],
        "same": client.files.content(uploaded.id).read() == picture,
        "deleted": client.files.delete(uploaded.id).deleted,
    }
    wrong = openai.OpenAI(base_url=URL + "/v1", api_key="ct_live_wrong", max_retries=0)
    return {
        "pictures": [digest(image.b64_json or "") for image in plain.data or []],
        "usage": plain.usage.total_tokens if plain.usage else None,
        "created": plain.created,
        "headers": dict(raw.headers),
        "url": (url.data or [])[0].url,
        "edits": [digest((e.data or [])[0].b64_json or "") for e in edits],
        "variation": digest((varied.data or [])[0].b64_json or ""),
        "models": [model.id for model in client.models.list()],
        "model": client.models.retrieve("dall-e-3").id,
        "flagged": [r.flagged for r in client.moderations.create(input="hello").results],
        "file": file,
        "stream": [
            described(event)
            for event in images.generate(
                prompt="a fox", stream=True, partial_images=2, extra_body=seed
            )
        ],
        "edit_stream": [
            described(event)
            for event in images.edit(
                image=picture, prompt="a cat", stream=True, partial_images=1, extra_body=seed
            )
        ],
        "refusals": [
            refusal(lambda: images.generate(prompt="something forbidden")),
            refusal(lambda: images.generate(prompt="a fox", size="1x1")),  # type: ignore[call-overload]
            refusal(lambda: images.generate(prompt="a fox", model="midjourney")),
            refusal(lambda: wrong.models.list()),
            refusal(lambda: list(images.generate(prompt="something forbidden", stream=True))),
            refusal(lambda: images.edit(image=b"no picture", prompt="a cat")),
        ],
    }


def described(event: Any) -> dict[str, Any]:
    number = getattr(event, "partial_image_index", None)
    usage = getattr(event, "usage", None)
    return {
        "type": event.type,
        "number": number,
        "digest": digest(event.b64_json),
        "usage": None if usage is None else usage.total_tokens,
    }


async def asynchronous() -> dict[str, Any]:
    async with openai.AsyncOpenAI(base_url=URL + "/v1", api_key=KEY, max_retries=0) as client:
        answers = await asyncio.gather(
            *(client.images.generate(prompt="a fox", extra_body={"seed": 7}) for _ in range(3))
        )
        stream = await client.images.generate(
            prompt="a fox", stream=True, partial_images=1, extra_body={"seed": 7}
        )
        return {
            "pictures": [digest((a.data or [])[0].b64_json or "") for a in answers],
            "stream": [described(event) async for event in stream],
            "models": [model.id async for model in client.models.list()],
        }


print(
    json.dumps(
        {
            "version": openai.__version__,
            "sync": synchronous(),
            "async": asyncio.run(asynchronous()),
        }
    )
)
