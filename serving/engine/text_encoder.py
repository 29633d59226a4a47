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
from typing import Any, Literal

import torch

ChatStyle = Literal["mistral", "qwen"]

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
        model: transformers' MistralModel or Qwen3Model, without a language-model head.
        tokenizer: transformers' fast tokenizer with FLUX.2's chat template.
        out_layers: hidden states that are put side by side; 0 is the token embedding.
        cache_bytes: embeddings kept for prompts seen before, least recently used dropped first.
            One FLUX.2 [dev] prompt takes 15.7 MB in bfloat16.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_sequence_length: int,
        out_layers: Sequence[int],
        style: ChatStyle,
        cache_bytes: int = 512 * 1024**2,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_sequence_length = max_sequence_length
        self.out_layers = tuple(out_layers)
        self.style = style
        self._cache: OrderedDict[str, PromptEmbeds] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        # One prompt at a time: the model is shared, and tokenizers keep truncation state.
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
        ids, mask, truncated = self._tokenize(prompt)
        device = self.model.device
        states = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        embeds = torch.cat([states[layer][0] for layer in self.out_layers], dim=-1)
        return PromptEmbeds(embeds, int(mask.sum()), truncated)

    def _tokenize(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Ids and mask, int64 [1, max_sequence_length], and whether the prompt was cut."""
        text = self._render(prompt)
        limit = self.max_sequence_length
        # A template writes its own special tokens; Qwen's pipeline lets the tokenizer add its own.
        special = self.style == "qwen"
        inputs = self.tokenizer(
            text,
            add_special_tokens=special,
            padding="max_length",
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        truncated = bool(mask.all()) and (
            len(self.tokenizer(text, add_special_tokens=special)["input_ids"]) > limit
        )
        return ids, mask, truncated

    def _render(self, prompt: str) -> str:
        if self.style == "qwen":
            return str(
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}],
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=False,
                )
            )
        # [IMG] would stand for a picture, as in the pipeline's format_input.
        words = prompt.replace("[IMG]", "")
        messages = [
            {"role": "system", "content": [{"type": "text", "text": SYSTEM_MESSAGE}]},
            {"role": "user", "content": [{"type": "text", "text": words}]},
        ]
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=False
            )
        )
