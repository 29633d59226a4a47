"""Where a generator gets the embeddings of prompts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Embeddings [tokens, width] of a prompt (tensor or array), and how long it was."""

    embeds: Any
    token_count: int
    truncated: bool


class PromptSource(Protocol):
    async def encode(self, prompt: str) -> EncodedPrompt: ...
