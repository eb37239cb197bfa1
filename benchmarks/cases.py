"""What is measured: cases (batch size, prompt length, tokens to generate), suites of them, and how tokens are drawn."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama3.errors import RequestError


@dataclass(frozen=True)
class Case:
    """`batch_size` prompts of `input_len` random tokens at once, exactly `output_len` tokens generated for each."""

    batch_size: int
    input_len: int
    output_len: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RequestError(f"a benchmark case has {name} {value!r}; it must be an integer of at least 1")

    @property
    def max_model_len(self) -> int:
        """Tokens of one sequence at its end."""
        return self.input_len + self.output_len

    def __str__(self) -> str:
        return f"{self.batch_size} x {self.input_len}/{self.output_len}"


@dataclass(frozen=True)
class Sampling:
    """How a benchmark draws its tokens; temperature 0 is greedy."""

    name: str
    temperature: float
    top_p: float

    @property
    def title(self) -> str:
        return "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}, top-p {self.top_p:g}"


SAMPLINGS = {
    "mission": Sampling("mission", temperature=0.6, top_p=0.9),
    "greedy": Sampling("greedy", temperature=0.0, top_p=1.0),
}
SAMPLING_CHOICES = (*SAMPLINGS, "both")

SEED_BATCHED = (Case(256, 128, 128), Case(64, 128, 2048), Case(16, 2048, 128), Case(16, 2048, 2048))
SEED_SINGLE = (Case(1, 128, 128), Case(1, 128, 2048), Case(1, 2048, 128), Case(1, 2048, 2048))
SUITES = {
    "seed": SEED_BATCHED + SEED_SINGLE,
    "profile": tuple(Case(1, prefill, decode) for prefill in (128, 512) for decode in (512, 1024, 1536)),
}


def samplings(choice: str) -> tuple[Sampling, ...]:
    """The ways to draw that `--sampling` names."""
    return tuple(SAMPLINGS.values()) if choice == "both" else (SAMPLINGS[choice],)


def parse_cases(text: str) -> tuple[Case, ...]:
    """Cases from JSON, or from a file of it: [[batch, in, out], ...] or a list of objects with Case's fields.

    One that is listed twice is one.
    """
    source = Path(text).read_text() if not text.lstrip().startswith("[") and Path(text).is_file() else text
    try:
        rows = json.loads(source)
    except json.JSONDecodeError as error:
        raise RequestError(
            f"--scenarios is neither a file nor JSON ({error}); give for example '[[1, 128, 128], [64, 128, 2048]]'"
        ) from error
    if not isinstance(rows, list) or not rows:
        raise RequestError("--scenarios must be a list of at least one case: '[[batch, input, output], ...]'")
    return tuple(dict.fromkeys(_case(row) for row in rows))


def _case(row: Any) -> Case:
    if isinstance(row, Sequence) and not isinstance(row, str) and len(row) == 3:
        return Case(*row)
    if isinstance(row, dict) and set(row) == {"batch_size", "input_len", "output_len"}:
        return Case(**row)
    raise RequestError(
        f"--scenarios holds {row!r}; a case is [batch, input, output] or an object of batch_size, input_len, output_len"
    )
