"""Child program: LiteLLM with its `openai/` provider.

python litellm_calls.py URL KEY PNG_FILE
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import sys
from typing import Any

import litellm

URL, KEY, IMAGE = sys.argv[1:]
WAY: dict[str, Any] = {
    "model": "openai/shapes",
    "api_base": f"{URL}/v1",
    "api_key": KEY,
    "max_retries": 0,
}


def digest(answer: Any) -> str:
    return hashlib.sha256(base64.b64decode(answer.data[0].b64_json)).hexdigest()


def refusal(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return ""


plain = litellm.image_generation(prompt="a fox", seed=7, steps=3, **WAY)
dropped = litellm.image_generation(
    prompt="a fox", seed=7, steps=3, response_format="b64_json", drop_params=True, **WAY
)
awaited = asyncio.run(litellm.aimage_generation(prompt="a fox", seed=7, steps=3, **WAY))
with open(IMAGE, "rb") as file:
    edited = litellm.image_edit(image=file, prompt="a cat", **WAY)
print(
    json.dumps(
        {
            "pictures": [digest(plain), digest(dropped), digest(awaited)],
            "edit": digest(edited),
            "usage": plain.usage.total_tokens,
            "refusals": [
                refusal(lambda: litellm.image_generation(prompt="something forbidden", **WAY)),
                refusal(lambda: litellm.image_generation(prompt="a fox", steps=0, **WAY)),
                refusal(
                    lambda: litellm.image_generation(prompt="a", **(WAY | {"api_key": "ct_live_x"}))
                ),
                refusal(
                    lambda: litellm.image_generation(prompt="a", **(WAY | {"model": "openai/no"}))
                ),
            ],
        }
    )
)
