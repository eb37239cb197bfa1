"""What a worker process and its parent say to each other: one JSON object a line, over the worker's stdin and stdout.

The parent sends {"command": ...} and waits for one {"event": ...} before it sends the next:

    load     a LoadSpec's fields                   -> ready     seconds, details, full_warmup
    prepare  case                                  -> prepared  seconds
    run      case, output_len, sampling, prompt_seed -> ran     seconds
    memory                                         -> memory    mib, counts
    profile  case, sampling, prompt_seed, trace_path -> profiled tables
    quit                                           -> the worker ends

Any of them may be answered by error: kind (the exception's class), message (one line), traceback.
"""

import json
import random
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import IO, Any

from benchmarks.cases import Case, Sampling

# Ids from here on are special tokens in Llama 3's vocabulary; prompts are drawn below them.
NUM_PLAIN_TOKENS = 128000


def send(stream: IO[str], message: Mapping[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def case_of(message: Mapping[str, Any]) -> Case:
    return Case(**message["case"])


def sampling_of(message: Mapping[str, Any]) -> Sampling:
    return Sampling(**message["sampling"])


def fresh_prompts(case: Case, vocab_size: int, seed: str) -> list[list[int]]:
    """`batch_size` prompts of random ids; with a new seed for each batch, no prefix cache sees a prompt twice."""
    return random_prompts([case.input_len] * case.batch_size, vocab_size, seed)


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: str) -> list[list[int]]:
    """A prompt of random ids of each length."""
    ids = iter(random.Random(seed).choices(range(min(vocab_size, NUM_PLAIN_TOKENS)), k=sum(lengths)))
    return [list(islice(ids, length)) for length in lengths]
