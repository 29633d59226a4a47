"""Prompts to token ids: a `tokenizer.json` and a chat template, without transformers.

Equal to transformers' PreTrainedTokenizerFast (and PixtralProcessor, which FLUX.2 [dev] puts around
it) for text alone; a test holds it to them. Reads tokenizer.json, tokenizer_config.json and
chat_template.jinja of a diffusers-format folder.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from calotype.serving.core.errors import ModelLoadFailed
from calotype.serving.core.json_object import JsonObject

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTokenizer:
    """A tokenizer with its chat template."""

    def __init__(
        self, tokenizer: Any, template: Any, special_tokens: Mapping[str, str], *, pad_left: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._special_tokens = dict(special_tokens)
        self._pad_left = pad_left
        self._pad_id = int(tokenizer.token_to_id(special_tokens["pad_token"]))

    def render(self, messages: Sequence[Mapping[str, object]], **variables: Any) -> str:
        """The messages as the model was trained to read them."""
        text: str = self._template.render(
            messages=messages, tools=None, documents=None, **self._special_tokens, **variables
        )
        return text

    def ids(self, text: str, length: int, *, special: bool) -> tuple[list[int], int]:
        """Token ids, cut to ``length`` and not padded, and how many there were before the cut.

        Args:
            special: let the tokenizer add its own special tokens.
        """
        found = self._tokenizer.encode(text, add_special_tokens=special).ids
        return list(found[:length]), len(found)

    def padded(self, ids: Sequence[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask (0 for padding), each int64 [1, length]."""
        pad = length - len(ids)
        fill, ones = [self._pad_id] * pad, [1] * len(ids)
        if self._pad_left:
            rows = [[*fill, *ids], [0] * pad + ones]
        else:
            rows = [[*ids, *fill], ones + [0] * pad]
        both = torch.tensor(rows, dtype=torch.int64)
        return both[:1], both[1:]


def load_tokenizer(folder: pathlib.Path) -> ChatTokenizer:
    """Reads the tokenizer of a folder.

    Raises:
        ModelLoadFailed: a file is missing or damaged, or there is no chat template.
    """
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import Tokenizer

    config = _read_config(folder / "tokenizer_config.json")
    source = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(source))
    except Exception as fault:  # The Rust library raises plain Exceptions.
        raise ModelLoadFailed(
            f"{source} is not a tokenizer: {fault}.", param=str(source)
        ) from fault
    # Lengths are this module's business: what the file says would cut or pad a second time.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if config.get("truncation_side", "right") != "right":
        raise ModelLoadFailed(f"{folder}: truncation on the left is not supported.")
    special = {name: token for name in _SPECIAL if (token := _token(config.get(name)))}
    pad = special.get("pad_token")
    if pad is None or tokenizer.token_to_id(pad) is None:
        raise ModelLoadFailed(f"{folder / 'tokenizer_config.json'} names no known pad_token.")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = _raise_from_template
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    try:
        template = environment.from_string(_template_text(folder, config))
    except TemplateError as fault:
        raise ModelLoadFailed(f"{folder} has a damaged chat template: {fault}.") from fault
    return ChatTokenizer(
        tokenizer, template, special, pad_left=config.get("padding_side", "right") == "left"
    )


def _raise_from_template(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _read_config(path: pathlib.Path) -> JsonObject:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise ModelLoadFailed(f"{path} cannot be read: {fault}.", param=str(path)) from fault
    if not isinstance(content, dict):
        raise ModelLoadFailed(f"{path} must hold a JSON object.", param=str(path))
    return content


def _token(value: object) -> str | None:
    # Either the token itself, or a serialised AddedToken.
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template_text(folder: pathlib.Path, config: JsonObject) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    old = folder / "chat_template.json"
    found = _read_config(old).get("chat_template") if old.is_file() else None
    found = found or config.get("chat_template")
    if not isinstance(found, str):
        raise ModelLoadFailed(f"{folder} has no chat template (chat_template.jinja).")
    return found
