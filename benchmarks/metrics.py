"""From seconds to figures: throughput, time to first token, time per token, FLOPs utilisation, distance to the floor.

Two kinds of run are timed, both by the wall clock around `generate`: the whole case, and prompts of the same size with
one token to generate. The second is prefill alone; what the first takes longer is decode.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.peaks import Peaks
from llama3.config import ModelConfig


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of repetitions: of the whole case, and of the same with one token to generate."""

    total: tuple[float, ...]
    one_token: tuple[float, ...]


@dataclass(frozen=True)
class Metrics:
    """Figures of one case on one engine; None where they do not exist (no decode, no peak known).

    Medians of the repetitions. duration, ttft: seconds. throughput: generated tokens a second over all of `generate`,
    with its lowest and highest repetition. tpot_ms: milliseconds from token to token, which is also those of a decode
    step. decode_gb_s: bytes that decode must read, over the time that it took. prefill_mfu: model FLOPs of the prompts
    over time and matrix peak. decode_floor_tok_s: tokens a second if those bytes were read at the bandwidth peak and
    nothing else took time; decode_floor_fraction: how much of that is reached.
    """

    duration: float
    throughput: float
    throughput_low: float
    throughput_high: float
    ttft: float
    prefill_tok_s: float
    prefill_mfu: float | None
    decode_seconds: float | None
    tpot_ms: float | None
    decode_tok_s: float | None
    decode_gb_s: float | None
    decode_floor_tok_s: float | None
    decode_floor_fraction: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compute_metrics(config: ModelConfig, dtype: torch.dtype, case: Case, timing: Timing, peaks: Peaks) -> Metrics:
    """The figures of `case` from its timing. Raises ValueError if either kind of run is missing."""
    if not timing.total or not timing.one_token:
        raise ValueError(f"{case}: a case needs at least one whole run and one run of one token, got {timing}")
    duration, ttft = statistics.median(timing.total), statistics.median(timing.one_token)
    throughputs = [throughput(case, seconds) for seconds in timing.total]
    decode = decode_seconds(case, duration, ttft)
    steps = case.output_len - 1
    moved = decode_bytes(config, dtype, case)
    floor = floor_tokens_per_second(config, dtype, case, peaks)
    decode_rate = None if decode is None else case.batch_size * steps / decode
    return Metrics(
        duration=duration,
        throughput=throughput(case, duration),
        throughput_low=min(throughputs),
        throughput_high=max(throughputs),
        ttft=ttft,
        prefill_tok_s=case.batch_size * case.input_len / ttft,
        prefill_mfu=prefill_mfu(config, case, ttft, peaks),
        decode_seconds=decode,
        tpot_ms=None if decode is None else decode / steps * 1e3,
        decode_tok_s=decode_rate,
        decode_gb_s=None if decode is None else moved / decode / 1e9,
        decode_floor_tok_s=floor,
        decode_floor_fraction=None if decode_rate is None or floor is None else decode_rate / floor,
    )


def throughput(case: Case, seconds: float) -> float:
    """Generated tokens a second, prefill included: batch x output tokens / seconds."""
    return case.batch_size * case.output_len / seconds


def decode_seconds(case: Case, duration: float, ttft: float) -> float | None:
    """Seconds of the output_len - 1 decode steps. None for one token, and where noise leaves nothing."""
    seconds = duration - ttft
    return seconds if case.output_len > 1 and seconds > 0 else None


def prefill_mfu(config: ModelConfig, case: Case, seconds: float, peaks: Peaks) -> float | None:
    """Model FLOPs of all prompts (causal attention, one row of the head a prompt) over seconds and the matrix peak."""
    if peaks.matrix_flops is None:
        return None
    return case.batch_size * config.prefill_flops(case.input_len) / seconds / peaks.matrix_flops


def decode_bytes(config: ModelConfig, dtype: torch.dtype, case: Case) -> int:
    """Bytes that the decode steps of a case cannot avoid: the weights once a step, and K and V of each context.

    Step s of output_len - 1 feeds the token at position input_len + s - 1, so its context is input_len + s tokens.
    """
    steps = case.output_len - 1
    contexts = steps * case.input_len + steps * (steps + 1) // 2
    return steps * config.decode_weight_bytes(dtype) + case.batch_size * contexts * config.kv_bytes_per_token(dtype)


def floor_seconds(config: ModelConfig, dtype: torch.dtype, case: Case, peaks: Peaks) -> float | None:
    """Seconds that decode takes at the bandwidth peak; None without a peak or a decode step."""
    if peaks.read_bandwidth is None or case.output_len == 1:
        return None
    return decode_bytes(config, dtype, case) / peaks.read_bandwidth


def floor_tokens_per_second(config: ModelConfig, dtype: torch.dtype, case: Case, peaks: Peaks) -> float | None:
    """The decode rate at the bandwidth peak: batch x decode steps / floor_seconds."""
    seconds = floor_seconds(config, dtype, case, peaks)
    return None if seconds is None else case.batch_size * (case.output_len - 1) / seconds


def ratio(ours: float | None, theirs: Sequence[float]) -> float | None:
    """Ours over the best of theirs; None if either is missing. Larger values are better."""
    return None if ours is None or not theirs else ours / max(theirs)
