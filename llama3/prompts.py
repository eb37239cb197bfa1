"""Prompts as callers give them, turned into token ids or into an error that says what is wrong."""

from array import array
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Items
from numbers import Integral
from typing import Any

import numpy as np

from llama3.chat_template import Message
from llama3.errors import RequestError, TokenizerError, UserError
from llama3.sampling_params import SamplingParams
from llama3.tokenizer import Tokenizer

# Text, token ids, or one of them in a dictionary under vLLM's names for them.
Prompt = str | Items[int] | Mapping[str, Any]
PROMPT_KEYS = ("prompt_token_ids", "prompt")

# Texts that the tokenizer gets at once: enough for every core, and little to hold beside the ids.
TEXTS_AT_ONCE = 1024


def as_prompt_list(prompts: Prompt | Items[Prompt]) -> list[Prompt]:
    """One prompt or many as a list of strings and lists: a flat list of integers is one, and so is a dictionary.

    What is no prompt at all stays in the list for `encode_prompt`, which says so.
    """
    if isinstance(prompts, Mapping):
        return [_unwrapped(prompts)]
    prompts = _unwrapped(prompts)
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | bytearray) or not isinstance(prompts, Iterable):
        raise RequestError(f"prompts must be strings or lists of token ids, not {type(prompts).__name__}")
    items: list[Any] = list(prompts)
    if items and all(is_token_id(item) for item in items):
        return [items]
    return [_unwrapped(item) for item in items]


def _unwrapped(prompt: Any) -> Any:
    """The prompt in a dictionary as in vLLM, and a list in place of a tensor or an array."""
    if isinstance(prompt, Mapping):
        prompt = next((prompt[key] for key in PROMPT_KEYS if prompt.get(key) is not None), prompt)
    return prompt.tolist() if hasattr(prompt, "tolist") else prompt


def is_token_id(value: object) -> bool:
    """Integers of any library, but not booleans."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def encode_texts(prompts: Items[Any], tokenizer: Tokenizer | None, add_special_tokens: bool = True) -> list[Any]:
    """The prompts with token ids in place of texts, encoded on all cores, or the error where a text has none."""
    encoded = list(prompts)
    if tokenizer is None:
        return encoded
    indices = [index for index, prompt in enumerate(prompts) if isinstance(prompt, str) and prompt]
    for start in range(0, len(indices), TEXTS_AT_ONCE):
        batch = indices[start : start + TEXTS_AT_ONCE]
        ids = _outcome(tokenizer.encode_batch, [prompts[i] for i in batch], add_special_tokens)
        if isinstance(ids, UserError):  # one of them has none
            ids = [_outcome(tokenizer.encode, prompts[i], add_special_tokens) for i in batch]
        for index, outcome in zip(batch, ids, strict=True):
            encoded[index] = outcome
    return encoded


def encode_chats(
    conversations: Items[Items[Message]], tokenizer: Tokenizer, template_kwargs: dict[str, Any]
) -> list[list[int] | UserError]:
    """Token ids of each conversation by the chat template, or why it has none. The template writes the begin-of-text
    itself, so none is added."""
    rendered = [_outcome(tokenizer.apply_chat_template, messages, **template_kwargs) for messages in conversations]
    empty = RequestError("the chat template makes nothing of these messages")
    return encode_texts([text or empty for text in rendered], tokenizer, add_special_tokens=False)


def _outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function returns, or the UserError that it raises."""
    try:
        return function(*args, **kwargs)
    except UserError as error:
        return error


def encode_prompt(
    prompt: Prompt | UserError, tokenizer: Tokenizer | None, vocab_size: int, max_model_len: int
) -> list[int]:
    """Token ids of a prompt that can be served, or RequestError. An error that came in place of a prompt is raised."""
    if isinstance(prompt, UserError):
        raise prompt
    if isinstance(prompt, str):
        if not prompt:
            raise RequestError("the prompt is an empty string: give at least one character")
        if tokenizer is None:
            raise TokenizerError("the model has no tokenizer.json: give prompts as token ids")
        ids = tokenizer.encode(prompt)
    elif isinstance(prompt, Mapping):
        keys = " nor ".join(repr(key) for key in PROMPT_KEYS)
        raise RequestError(f"the prompt is a dictionary of {list(prompt)}, with text or token ids under neither {keys}")
    elif isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Iterable):
        raise RequestError(f"the prompt must be a string or a list of token ids, not {type(prompt).__name__}")
    else:
        ids = list(prompt)
        if list(map(type, ids)).count(int) < len(ids):  # as fast as it gets: the GPU may be waiting for millions of ids
            for token in ids:
                if not is_token_id(token):
                    raise RequestError(f"the prompt must be a string or token ids, but it holds {token!r}")
            ids = [int(token) for token in ids]
    if not ids:
        raise RequestError("the prompt has no token ids: give at least one")
    if not _all_below(vocab_size, ids):
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise RequestError(f"token id {wrong} is outside the vocabulary of {vocab_size}")
    if len(ids) >= max_model_len:
        raise RequestError(
            f"the prompt has {len(ids)} tokens and leaves no room to generate: the limit for prompt and answer "
            f"together is {max_model_len} (max_model_len)"
        )
    return ids


def _all_below(vocab_size: int, ids: list[int]) -> bool:
    """Whether integers, at least one, are 0 .. vocab_size - 1. In a third of the time that min and max take."""
    try:
        return bool(np.frombuffer(array("I", ids), np.uintc).max() < vocab_size)
    except OverflowError:  # negative, or of more than 32 bits
        return False


def check_params(params: SamplingParams, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    """RequestError for sampling parameters that this model cannot serve."""
    for token in params.stop_token_ids:
        if token >= vocab_size:
            raise RequestError(f"stop token id {token} is outside the vocabulary of {vocab_size}")
    if params.logprobs is not None and params.logprobs > vocab_size:
        raise RequestError(f"logprobs is {params.logprobs}, more than the vocabulary of {vocab_size}")
    if params.stop_strings and tokenizer is None:
        raise RequestError("stop strings need a tokenizer, and the model has none: use stop_token_ids")
