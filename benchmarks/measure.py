"""How a case is measured: a warm-up, then whole runs and one-token runs by turns, each on fresh prompts."""

from dataclasses import dataclass
from typing import Protocol

from benchmarks.cases import Case, Sampling
from benchmarks.metrics import Timing

# Enough for an engine to meet every graph and kernel of a case, unless it says that it compiles for the whole length.
WARMUP_TOKENS = 32


class CaseRunner(Protocol):
    """What a worker's client offers."""

    def run(self, case: Case, output_len: int, sampling: Sampling, prompt_seed: str) -> float: ...


class Allowance(Protocol):
    """Says whether there is time for another repetition, from what the last one took."""

    def another(self, took: float) -> bool: ...


@dataclass(frozen=True)
class Plan:
    """repeats: how many repetitions are wanted. seed: of the prompts; engines of one run get the same prompts."""

    repeats: int
    seed: int
    full_warmup: bool


def warm_up(runner: CaseRunner, case: Case, sampling: Sampling, plan: Plan) -> None:
    """Let the engine meet everything that the timed runs will use."""
    length = case.output_len if plan.full_warmup else min(case.output_len, WARMUP_TOKENS)
    for output_len in dict.fromkeys((length, 1)):
        runner.run(case, output_len, sampling, _prompt_seed(plan, case, sampling, f"warm-up {output_len}"))


def measure_case(runner: CaseRunner, case: Case, sampling: Sampling, plan: Plan, allowance: Allowance) -> Timing:
    """At least one repetition, at most `plan.repeats`; errors of the runner pass through."""
    total: list[float] = []
    one_token: list[float] = []

    def run(output_len: int) -> float:
        seed = _prompt_seed(plan, case, sampling, f"{output_len} tokens, repetition {len(total)}")
        return runner.run(case, output_len, sampling, seed)

    while len(total) < plan.repeats:
        if total and not allowance.another(total[-1] + one_token[-1]):
            break
        # A case of one token is its own prefill.
        one_token.append(run(1))
        total.append(run(case.output_len) if case.output_len > 1 else one_token[-1])
    return Timing(tuple(total), tuple(one_token))


def _prompt_seed(plan: Plan, case: Case, sampling: Sampling, label: str) -> str:
    return f"{plan.seed}/{case}/{sampling.name}/{label}"
