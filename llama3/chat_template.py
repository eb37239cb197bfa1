"""Chat templates: a folder's own Jinja text turns messages into the prompt, in a sandbox, as transformers renders it.

A template comes with the checkpoint, so it is foreign code: it runs in Jinja's immutable sandbox and sees the messages,
the tools, the special tokens and what the caller passes, nothing else.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llama3.errors import RequestError, TokenizerError

Message = Mapping[str, Any]

# Behind a message that is to be continued: where to cut what the template wrote. Its space tells whether the template
# trims what it is given.
_CUT = "[the answer goes on here] "


class ChatTemplate:
    """One template, compiled when it is made. Raises TokenizerError, naming `source`, if it is not valid Jinja."""

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        try:
            self._template = _environment().from_string(text)
        except TemplateSyntaxError as reason:
            raise TokenizerError(
                f"{source}: the chat template is broken at line {reason.lineno}: {reason.message}"
            ) from None

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt's text for `messages`; `variables` (special tokens, date_string, …) are visible to the template.

        continue_final_message: end within the last message, so that the answer continues it. Raises RequestError for
        messages or tools of the wrong form, TokenizerError where the template itself refuses.
        """
        cleaned = check_messages(messages)
        if continue_final_message:
            if add_generation_prompt:
                raise RequestError("continue_final_message goes with add_generation_prompt=False")
            if not isinstance(cleaned[-1].get("content"), str):
                raise RequestError("continue_final_message: the last message has no text to continue")
            continued = cleaned[-1]["content"].strip()
            cleaned[-1]["content"] += _CUT
        if tools is not None and not all(isinstance(tool, Mapping) for tool in tools):
            raise RequestError("tools must be JSON schemas (dictionaries); describe a Python function by its schema")
        try:
            text = self._template.render(
                messages=cleaned,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except TemplateError as reason:
            raise TokenizerError(f"{self.source}: the chat template refuses these messages: {reason}") from None
        except Exception as reason:  # foreign code may do anything
            raise TokenizerError(f"{self.source}: the chat template fails on these messages: {reason!r}") from None
        return self._before_cut(text, continued) if continue_final_message else text

    def _before_cut(self, text: str, continued: str) -> str:
        before, *after = text.split(_CUT.strip())
        if len(after) != 1 or not before.rstrip().endswith(continued):
            raise TokenizerError(
                f"{self.source}: the chat template leaves out, changes or repeats the last message, so that it cannot "
                "be continued"
            )
        return before if after[0].startswith(" ") else before.rstrip()


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as dictionaries without keys that are None, as transformers passes them. Raises RequestError."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f'messages must be a list of {{"role": …, "content": …}}, not {type(messages).__name__}')
    if not messages:
        raise RequestError("messages is empty: give at least one")
    cleaned = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f'message {index} must be {{"role": …, "content": …}}, not {type(message).__name__}')
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise RequestError(f'message {index} has role {role!r}; it must be "system", "user", "assistant" or "tool"')
        is_result = role in ("tool", "ipython")  # what a tool returned may be any JSON value
        if not (isinstance(content, str) or (is_result and content is not None) or message.get("tool_calls")):
            raise RequestError(f"message {index} ({role}) has content {content!r}; it must be a string")
        cleaned.append({key: value for key, value in message.items() if value is not None})
    return cleaned


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that checkpoints' templates are written for: these flags, filters and functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it only renders."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, not the bare body: names set inside must stay inside, as in transformers.
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter would write < as \u003c: right for HTML, wrong for a prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRuntimeError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
