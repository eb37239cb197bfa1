"""LLM: prompts in, outputs out. The only place, with the tokenizer, that knows of text."""

import time
from collections.abc import Generator, Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llama3 import ops
from llama3.answer import Answer
from llama3.chat_template import Message
from llama3.collector import spared_old_objects
from llama3.device import made_current
from llama3.engine import Engine
from llama3.errors import RequestError, TokenizerError, UserError
from llama3.loaded_model import LoadedModel
from llama3.model import Transformer
from llama3.outputs import RequestOutput
from llama3.plan import CALL_SIZES, MemoryPlan
from llama3.prompts import Prompt, as_prompt_list, check_params, encode_chats, encode_prompt, encode_texts
from llama3.rope import RopeTable
from llama3.sampling_params import SamplingParams
from llama3.sequence import Sequence
from llama3.tokenizer import Tokenizer

# Sequences at once where the caller sets no limit.
DEFAULT_MAX_NUM_SEQS = {"cuda": 256, "cpu": 32}


@dataclass
class RunStats:
    """Wall-clock seconds and token counts of the last `generate`. Prefill lasts until the first token is back."""

    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class LLM:
    """A Llama-3 model ready to generate.

    model: a local folder, a Hugging Face hub name, or a model already in memory. dtype: "auto" is the folder's.
    device: "auto" takes the GPU if there is one. kernels: "auto", "reference" or "cuda". max_model_len: most tokens
    of prompt and answer together; None sizes the cache for each job. max_num_seqs: most sequences decoded at once;
    None takes what fits. max_num_batched_tokens: most prompt tokens in one prefill call; None takes what fits beside
    the cache. seed: of requests that bring none of their own.

    Use it as a context manager, or call `close`, to give the memory back. Bad input raises UserError, a ValueError.
    """

    def __init__(
        self,
        model: str | Path | LoadedModel,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        kernels: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        seed: int = 0,
        *,
        max_num_batched_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> None:
        loaded = model if isinstance(model, LoadedModel) else LoadedModel.load(model, dtype, device, use_tqdm)
        self.name, self.config, self.load_seconds = loaded.name, loaded.config, loaded.load_seconds
        self.dtype, self.device = loaded.weights.embed.dtype, loaded.weights.embed.device
        self._check_limits(max_model_len, max_num_seqs, max_num_batched_tokens, seed)
        self.max_model_len = max_model_len or self.config.max_position_embeddings
        self._fixed_len = max_model_len is not None
        self._max_num_seqs, self.seed = max_num_seqs, seed
        self._tokenizer, self._sampling_defaults = loaded.tokenizer, loaded.sampling_defaults
        stop_ids = self.config.eos_token_ids | loaded.stop_ids
        stop_ids |= loaded.tokenizer.stop_ids if loaded.tokenizer else frozenset()
        self._stop_ids = frozenset(token for token in stop_ids if token < self.config.vocab_size)  # others never come
        self._num_requests = 0
        self._busy = False
        self.stats = RunStats()
        selected, self.kernels = ops.select(kernels, self.config, self.dtype, self.device)
        rope = RopeTable.build(self.config, self.max_model_len, self.device)
        self._call_sizes = (max_num_batched_tokens,) if max_num_batched_tokens else CALL_SIZES[self.device.type]
        self.engine = Engine(Transformer(self.config, loaded.weights, selected, rope), self.device, self.dtype)

    def _check_limits(
        self, max_model_len: int | None, max_num_seqs: int | None, max_num_batched_tokens: int | None, seed: int
    ) -> None:
        longest = self.config.max_position_embeddings
        if max_model_len is not None and not 1 <= max_model_len <= longest:
            raise RequestError(
                f"max_model_len={max_model_len} must be between 1 and the model's max_position_embeddings, {longest}"
            )
        for name, value in (("max_num_seqs", max_num_seqs), ("max_num_batched_tokens", max_num_batched_tokens)):
            if value is not None and value < 1:
                raise RequestError(f"{name}={value} must be at least 1")
        if not 0 <= seed < 2**63:
            raise RequestError(f"seed={seed} must be in [0, 2^63)")

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give weights, cache and graphs back. The object cannot generate any more."""
        if hasattr(self, "engine"):
            self.engine.release()
            del self.engine
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _check_open(self) -> None:
        if not hasattr(self, "engine"):
            raise RequestError("this LLM is closed and has given its memory back: make a new one")

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer; TokenizerError if the model came without one."""
        if self._tokenizer is None:
            raise TokenizerError(f"{self.name} has no tokenizer.json: give prompts as token ids")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What is used where the caller gives no parameters: generation_config.json's values, else the class's."""
        return SamplingParams(**self._sampling_defaults)

    @spared_old_objects()
    def generate(
        self,
        prompts: Prompt | Items[Prompt],
        sampling_params: SamplingParams | Items[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        on_error: str = "raise",
    ) -> list[RequestOutput]:
        """Complete prompts: strings, lists of token ids, or {"prompt": ...} or {"prompt_token_ids": ...}, one or many.
        One output for each, in their order.

        sampling_params: one for all, or one for each. on_error: "raise" raises RequestError, naming the index, before
        anything runs; "record" returns an output with `error` set for a bad prompt and runs the others.
        """
        _check_on_error(on_error)
        prompt_list = as_prompt_list(prompts)
        texts = [prompt if isinstance(prompt, str) else None for prompt in prompt_list]
        return self._complete(texts, encode_texts(prompt_list, self._tokenizer), sampling_params, use_tqdm, on_error)

    def _complete(
        self,
        texts: list[str | None],
        encoded: Items[Prompt | UserError],
        sampling_params: SamplingParams | Items[SamplingParams] | None,
        use_tqdm: bool,
        on_error: str,
    ) -> list[RequestOutput]:
        """`generate` from what has been encoded. texts: as the outputs are to show them."""
        params_list = self._params_list(sampling_params, len(encoded))
        ids_list, errors = [], {}
        for index, (prompt, params) in enumerate(zip(encoded, params_list, strict=True)):
            try:
                ids_list.append(self._encode(prompt, params))
            except UserError as error:
                if on_error == "raise":
                    raise RequestError(f"prompt {index}: {error}") from error
                ids_list.append([])
                errors[index] = str(error)
        answers = {
            index: self._answers(index, ids_list[index], params)
            for index, params in enumerate(params_list)
            if index not in errors
        }
        self._num_requests += len(encoded)
        for _ in self._run([a for group in answers.values() for a in group], use_tqdm):
            pass
        outputs = []
        for index, text in enumerate(texts):
            completions = [answer.completion() for answer in answers.get(index, [])]
            outputs.append(RequestOutput(str(index), text, ids_list[index], completions, error=errors.get(index)))
        return outputs

    @spared_old_objects()
    def chat(
        self,
        messages: Items[Message] | Items[Items[Message]],
        sampling_params: SamplingParams | Items[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        on_error: str = "raise",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **template_kwargs: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of {"role", "content"}) or a list of them, through the chat template.

        on_error: as in `generate`, with a conversation for a prompt. template_kwargs: of `apply_chat_template`;
        chat_template_kwargs adds to them.
        """
        _check_on_error(on_error)
        if isinstance(messages, Mapping):
            raise RequestError("messages must be a list of {'role', 'content'}, not one of them: put it into a list")
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: list[Any] = [messages] if is_one else list(messages)
        encoded = encode_chats(conversations, self.get_tokenizer(), template_kwargs | dict(chat_template_kwargs or {}))
        return self._complete([None] * len(encoded), encoded, sampling_params, use_tqdm, on_error)

    def chat_prompt(self, messages: Items[Message], **template_kwargs: Any) -> list[int]:
        """Token ids of a conversation; the template writes the begin-of-text itself, so none is added."""
        (prompt,) = encode_chats([messages], self.get_tokenizer(), template_kwargs)
        if isinstance(prompt, UserError):
            raise prompt
        return prompt

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Generator[str]:
        """The text of one completion as it comes, in pieces that never split a character. n must be 1."""
        params = sampling_params or self.get_default_sampling_params()
        if params.n != 1:
            raise RequestError(f"stream gives one answer, but n is {params.n}")
        self.get_tokenizer()
        prompts = as_prompt_list(prompt)
        if len(prompts) != 1:
            raise RequestError(f"stream takes one prompt, not {len(prompts)}")
        answer = self._answers(0, self._encode(prompts[0], params), params)[0]
        self._num_requests += 1
        sent = 0
        with spared_old_objects():
            for _ in self._run([answer], use_tqdm=False):
                yield from answer.pieces[sent:]
                sent = len(answer.pieces)

    def _params_list(
        self, sampling_params: SamplingParams | Items[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * count
        params_list = list(sampling_params)
        if len(params_list) != count:
            raise RequestError(
                f"{count} prompts came with {len(params_list)} sampling parameters: give one, or one each"
            )
        return params_list

    def _encode(self, prompt: Prompt | UserError, params: SamplingParams) -> list[int]:
        check_params(params, self._tokenizer, self.config.vocab_size)
        return encode_prompt(prompt, self._tokenizer, self.config.vocab_size, self.max_model_len)

    def _answers(self, index: int, ids: list[int], params: SamplingParams) -> list[Answer]:
        room = self.max_model_len - len(ids)
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._stop_ids)
        answers = []
        for sample in range(params.n):
            sequence = Sequence(
                request=index,
                sample=sample,
                prompt_ids=ids,
                params=params,
                max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
                stop_ids=stop_ids,
                seed=self.seed if params.seed is None else params.seed,
                rng_request=0 if params.seed is not None else self._num_requests + index + 1,
            )
            answers.append(Answer(sequence, self._tokenizer))
        return answers

    def _run(self, answers: list[Answer], use_tqdm: bool) -> Iterator[None]:
        """Run answers to their end; yields whenever new tokens have arrived."""
        if not answers:
            return
        self._check_open()
        if self._busy:
            raise RequestError("this LLM is generating already: finish or close the running stream first")
        by_sequence = {answer.sequence: answer for answer in answers}
        self._prepare([answer.sequence for answer in answers])
        prompts = {a.sequence.request: len(a.sequence.prompt_ids) for a in answers}
        self.stats = stats = RunStats(num_prompt_tokens=sum(prompts.values()))
        start, first = time.perf_counter(), None
        bar = None
        try:
            self._busy = True
            self.engine.add(by_sequence)
            bar = tqdm(total=len(answers), desc="Generating", unit="seq", disable=not use_tqdm, mininterval=0.5)
            while self.engine.has_work:
                with made_current(self.device):
                    arrived = self.engine.step()
                for progress in arrived:
                    first = first or time.perf_counter()
                    stats.num_generated_tokens += len(progress.token_ids)
                    stop_string = by_sequence[progress.sequence].take(progress.token_ids)
                    if stop_string is not None:
                        self.engine.finish(progress.sequence, "stop", stop_string)
                    bar.update(progress.sequence.finished)
                elapsed = max(time.perf_counter() - start, 1e-9)
                bar.set_postfix_str(f"{stats.num_generated_tokens / elapsed:.1f} tok/s", refresh=False)
                yield
                self._check_open()
        finally:
            end = time.perf_counter()
            stats.prefill_seconds, stats.decode_seconds = (first or end) - start, end - (first or end)
            self._busy = False
            if hasattr(self, "engine") and self.engine.has_work:  # interrupted: leave nothing running behind
                self.engine.abort_all()
            if bar is not None:
                bar.close()

    def _prepare(self, sequences: list[Sequence]) -> None:
        """Make the engine ready for these sequences: rows, cache length, size of a prefill call, stop ids they need."""
        needed = max(s.max_context_len for s in sequences)
        max_len = self.max_model_len if self._fixed_len else needed
        free = self.engine.reclaimable_memory()
        plans = [MemoryPlan(self.config, self.dtype, free, 0, size) for size in self._call_sizes]
        limit = self.engine.model.ops.max_rows(self.config, self.device) or len(sequences)
        wanted = min(self._max_num_seqs or DEFAULT_MAX_NUM_SEQS[self.device.type], limit, len(sequences))
        # Rows go before large calls: a call of the smallest size is little slower, a row less costs its share of all.
        num_rows = wanted if self._max_num_seqs else max(1, plans[-1].largest_num_rows(max_len, wanted))
        plans[-1].check(num_rows, max_len)
        max_stop_ids = max(1, *(len(s.stop_ids) for s in sequences))
        kept = self.engine.kept_cache(num_rows, max_len, max_stop_ids)
        held = (num_rows, max_len) if kept is None else (kept.num_slots, kept.max_len)
        plan = next((plan for plan in plans if plan.fits(*held)), plans[-1])
        with made_current(self.device):
            self.engine.prepare(num_rows, max_len, max_stop_ids, plan.num_batched_tokens)


def _check_on_error(on_error: str) -> None:
    if on_error not in ("raise", "record"):
        raise RequestError(f"on_error={on_error!r} must be 'raise' or 'record'")
