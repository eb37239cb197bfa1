"""Text to token ids and back, the chat template, and the ids that end an answer: all from the model's own folder."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from llama3.chat_template import ChatTemplate, Message
from llama3.errors import RequestError, TokenizerError
from llama3.json_file import JsonObject, is_token_id

# Llama 3's ends of a text, of a tool call and of a turn. They end an answer wherever the vocabulary has them, because
# many folders list only one of them.
END_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


class Tokenizer:
    """A byte-level BPE tokenizer with the special tokens and chat template of its folder.

    bos_token_id: put in front of plain prompts, or None. stop_ids: every id that ends an answer.
    """

    def __init__(
        self,
        backend: Backend,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        stop_ids: Iterable[int] = (),
        bos_token_id: int | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        self._backend, self._source = backend, source
        self._special_tokens = dict(special_tokens or {})
        self._chat_templates = dict(chat_templates or {})
        self._compiled: dict[str, ChatTemplate] = {}
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise TokenizerError(f"{source}: not a byte-level BPE tokenizer, as Llama 3 has; no other is supported")
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.bos_token_id = self._named_id("bos_token", bos_token_id)
        eos_token_id = self._named_id("eos_token", None)
        ends = {token_id for token_id in self.special_ids if added[token_id].content in END_TOKENS}
        self.stop_ids = frozenset(stop_ids) | ends | ({eos_token_id} if eos_token_id is not None else set())
        self._bytes: dict[int, bytes] = {}
        self._warned_of_double_bos = False

    @classmethod
    def from_folder(cls, folder: Path | str) -> "Tokenizer":
        """Read `folder`'s tokenizer.json and, where present, the JSON files and the template beside it.

        Raises TokenizerError where a file is missing, corrupt, or does not fit the model's vocabulary.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{path}: no such file; it comes with every Llama-3 checkpoint in Hugging Face's form")
        try:
            backend = Backend.from_file(str(path))
        except Exception as reason:  # the library raises plain Exception
            raise TokenizerError(f"{path}: not a valid tokenizer file: {reason}") from None
        # Truncation or padding left in the file by whoever trained it would cut prompts in silence.
        backend.no_truncation()
        backend.no_padding()

        model_config = JsonObject.read_optional(folder / "config.json", TokenizerError)
        vocab_size: Any = model_config.values.get("vocab_size")
        largest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if is_token_id(vocab_size) and largest >= vocab_size:
            raise TokenizerError(f"{path}: has token id {largest}, but the model's vocabulary ends at {vocab_size - 1}")
        files = (folder / "special_tokens_map.json", folder / "tokenizer_config.json")
        config = {
            key: value for file in files for key, value in JsonObject.read_optional(file, TokenizerError).values.items()
        }
        generation_config = JsonObject.read_optional(folder / "generation_config.json", TokenizerError)
        bos_ids = model_config.token_ids("bos_token_id")
        return cls(
            backend,
            source=str(path),
            special_tokens=_special_tokens(config),
            stop_ids=model_config.token_ids("eos_token_id") + generation_config.token_ids("eos_token_id"),
            bos_token_id=bos_ids[0] if bos_ids else None,
            chat_templates=_chat_templates(folder, config),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, after begin-of-text if `add_special_tokens`; special tokens written out get their ids.

        Raises RequestError for text that is not Unicode (a lone surrogate).
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        for text in texts:
            _check_unicode(text)
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        batch = [encoding.ids for encoding in encodings]
        if self.bos_token_id is not None and not self._warned_of_double_bos:
            twice = [self.bos_token_id, self.bos_token_id]
            if any(ids[:2] == twice for ids in batch):
                self._warned_of_double_bos = True
                warnings.warn(
                    "a prompt starts with two begin-of-text tokens, which changes the answer: the text already holds "
                    "one, so encode it with add_special_tokens=False",
                    stacklevel=2,
                )
        return batch

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`. Bytes that are not UTF-8 become U+FFFD; ids without a token become nothing."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt's text for a conversation, special tokens written out; encode it with add_special_tokens=False.

        `chat_template`: a text in place of the folder's, or the name of one of its others. `variables` such as
        date_string, documents or continue_final_message (see `ChatTemplate.render`) go to the template.
        Raises RequestError for malformed messages, TokenizerError where there is no template or it refuses.
        """
        template = self._chat_template(chat_template, tools is not None)
        return template.render(messages, add_generation_prompt, tools, **{**self._special_tokens, **variables})

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, perhaps a part of a character; nothing for an id without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id) or ""
            try:
                known = bytes(_BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:  # an added token stands for its own text
                known = token.encode()
            self._bytes[token_id] = known
        return known

    def _named_id(self, name: str, default: int | None) -> int | None:
        token = self._special_tokens.get(name)
        if token is None:
            return default
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise TokenizerError(f"{self._source}: has no token {token!r}, which tokenizer_config.json names {name}")
        return token_id

    def _chat_template(self, given: str | None, with_tools: bool) -> ChatTemplate:
        name = "tool_use" if with_tools and "tool_use" in self._chat_templates else "default"
        text = self._chat_templates.get(name if given is None else given, given)
        if text is None and self._chat_templates:
            names = ", ".join(self._chat_templates)
            raise TokenizerError(f"{Path(self._source).parent}: has no default chat template: name one of {names}")
        if text is None:
            raise TokenizerError(
                f"{Path(self._source).parent}: has no chat template (chat_template in tokenizer_config.json, or "
                "chat_template.jinja): a base model continues text, so use generate, or pass chat_template"
            )
        if text not in self._compiled:
            self._compiled[text] = ChatTemplate(text, "chat_template" if text == given else self._source)
        return self._compiled[text]


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes each byte as one visible character: itself where Latin-1 prints it, else from U+0100 up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, … by name: what templates may print. A value is a string or {"content": string}."""
    named = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            named[name] = content
    return named


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. Where some are in files, they replace the JSON file's, but for a default that none of them is;
    chat_template.jinja is the default one."""
    value = config.get("chat_template") or {}
    # Either one text, or [{"name": …, "template": …}].
    entries = value if isinstance(value, list) else [{"name": "default", "template": value}] if value else []
    try:
        templates = {str(entry["name"]): str(entry["template"]) for entry in entries}
    except (TypeError, KeyError):
        path = folder / "tokenizer_config.json"
        raise TokenizerError(f"{path}: chat_template must be a string or a list of name and template") from None
    paths = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        paths["default"] = folder / "chat_template.jinja"
    if paths:
        templates = {name: text for name, text in templates.items() if name == "default"}
    for name, path in paths.items():
        try:
            templates[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as reason:
            raise TokenizerError(f"{path}: cannot be read: {reason}") from None
    return templates


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as reason:
        raise RequestError(
            f"the text is not Unicode: it holds a lone surrogate, {text[reason.start]!r}, at character {reason.start}"
        ) from None
