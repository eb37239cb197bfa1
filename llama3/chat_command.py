"""A conversation in the terminal: answers stream, Ctrl-C stops the answer and keeps the conversation."""

import argparse
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from llama3.cli import model_arguments, sampling_params
from llama3.errors import UserError
from llama3.llm import LLM
from llama3.sampling_params import SamplingParams

HELP = "/reset forgets the conversation, /system TEXT sets the system message, /exit or Ctrl-D leaves"


@dataclass
class Conversation:
    """Messages so far; `system` stays over a reset."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}, *self.turns] if self.system else list(self.turns)


def answer(
    llm: LLM, conversation: Conversation, text: str, params: SamplingParams, write: Callable[[str], None]
) -> None:
    """Add the user's `text` and the model's answer to the conversation, writing the answer as it comes.

    An answer cut short by Ctrl-C stays as far as it came. A turn that cannot be served leaves no trace and raises.
    """
    conversation.turns.append({"role": "user", "content": text})
    pieces: list[str] = []
    stream: Generator[str] | None = None
    try:
        stream = llm.stream(llm.chat_prompt(conversation.messages, add_generation_prompt=True), params)
        for piece in stream:
            pieces.append(piece)
            write(piece)
    except UserError:
        conversation.turns.pop()
        raise
    except KeyboardInterrupt:
        if stream is not None:
            stream.close()  # ends the sequence in the engine
        write(" [stopped]")
    conversation.turns.append({"role": "assistant", "content": "".join(pieces)})


def handle_command(conversation: Conversation, line: str) -> str | None:
    """Run a line that starts with "/": what to say about it, or None to leave."""
    command, _, rest = line.partition(" ")
    if command in ("/exit", "/quit"):
        return None
    if command == "/reset":
        conversation.turns.clear()
        return "the conversation is forgotten"
    if command == "/system":
        conversation.system = rest.strip() or None
        conversation.turns.clear()
        return f"system message {'set' if conversation.system else 'removed'}; the conversation starts anew"
    return HELP


def chat(args: argparse.Namespace) -> None:
    """The loop: read a line, answer it."""
    params = sampling_params(args)
    with LLM(**model_arguments(args)) as llm:
        print(f"{llm.name}: {llm.kernels}\n{HELP}", file=sys.stderr)
        conversation = Conversation(system=args.system)
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                print()
                continue
            if not line:
                continue
            if line.startswith("/"):
                reply = handle_command(conversation, line)
                if reply is None:
                    return
                print(reply, file=sys.stderr)
                continue
            try:
                answer(llm, conversation, line, params, lambda piece: print(piece, end="", flush=True))
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
            print()
