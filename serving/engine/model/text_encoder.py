"""Prompts to embeddings, with the chat template, system message and padding of FLUX.2.

Equal to ``Flux2Pipeline._get_mistral_3_small_prompt_embeds`` ([dev], Mistral-Small-3.2) and
``Flux2KleinPipeline._get_qwen3_prompt_embeds`` ([klein], Qwen3) of diffusers. The denoiser attends
to every text token without a mask, so the padding is part of the function and is never shortened.
Called by the engine, or by a deployment of its own; knows nothing of the denoiser.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from calotype.serving.engine.model.text_model import TextModel
from calotype.serving.engine.model.tokenizer import ChatTokenizer
from calotype.serving.engine.sizing.settings import ChatStyle

# Word for word diffusers.pipelines.flux2.system_messages.SYSTEM_MESSAGE (a test compares them);
# importing it from there would load all of diffusers into the text encoder's process.
SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing "
    "on object relationships, object\nattribution and actions without speculation."
)


@dataclass(frozen=True, slots=True)
class PromptEmbeds:
    """What the denoiser sees of a prompt.

    Attributes:
        embeds: [max_sequence_length, joint_attention_dim], on the encoder's device.
        token_count: tokens before padding, template and system message included.
        truncated: the prompt was longer than max_sequence_length and its end was cut off.
    """

    embeds: torch.Tensor
    token_count: int
    truncated: bool


class TextEncoder:
    """A language model cut off after the last layer that FLUX.2 reads. Thread-safe.

    Args:
        model: a `TextModel`, with all the layers that are read.
        out_layers: hidden states that are put side by side; 0 is the token embedding.
        cache_bytes: embeddings kept for prompts seen before, least recently used dropped first.
            One FLUX.2 [dev] prompt takes 15.7 MB in bfloat16.
    """

    def __init__(
        self,
        model: TextModel,
        tokenizer: ChatTokenizer,
        *,
        max_sequence_length: int,
        out_layers: Sequence[int],
        style: ChatStyle,
        cache_bytes: int = 512 * 1024**2,
    ) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self.max_sequence_length = max_sequence_length
        self.out_layers = tuple(out_layers)
        self.style = style
        self._cache: OrderedDict[str, PromptEmbeds] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def encode(self, prompts: Sequence[str]) -> list[PromptEmbeds]:
        """Embeddings of each prompt, in order.

        Prompts go through the model one by one: the same prompt gives the same bits whoever asks
        beside it, and 512 tokens keep a GPU busy by themselves.
        """
        return [self._encode_one(prompt) for prompt in prompts]

    def _encode_one(self, prompt: str) -> PromptEmbeds:
        with self._lock:
            found = self._cache.get(prompt)
            if found is not None:
                self._cache.move_to_end(prompt)
                return found
            made = self._run(prompt)
            self._keep(prompt, made)
            return made

    def _keep(self, prompt: str, made: PromptEmbeds) -> None:
        size = made.embeds.numel() * made.embeds.element_size()
        if size > self._cache_bytes:
            return
        self._cache[prompt] = made
        self._cached_bytes += size
        while self._cached_bytes > self._cache_bytes:
            _, old = self._cache.popitem(last=False)
            self._cached_bytes -= old.embeds.numel() * old.embeds.element_size()

    @torch.inference_mode()
    def _run(self, prompt: str) -> PromptEmbeds:
        limit = self.max_sequence_length
        # The template of [dev] writes its special tokens itself; for [klein] the tokenizer does.
        ids, count = self._tokenizer.ids(self._render(prompt), limit, special=self.style == "qwen")
        padded, mask = self._tokenizer.padded(ids, limit)
        device = self.model.device
        states = self.model(padded.to(device), mask.to(device))
        embeds = torch.cat([states[layer][0] for layer in self.out_layers], dim=-1)
        return PromptEmbeds(embeds, len(ids), count > limit)

    def _render(self, prompt: str) -> str:
        if self.style == "qwen":
            return self._tokenizer.render(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                enable_thinking=False,
            )
        # [IMG] would stand for an image, as in the pipeline's format_input.
        words = prompt.replace("[IMG]", "")
        return self._tokenizer.render(
            [
                {"role": "system", "content": [{"type": "text", "text": SYSTEM_MESSAGE}]},
                {"role": "user", "content": [{"type": "text", "text": words}]},
            ],
            add_generation_prompt=False,
        )
