"""The printed block of one case on one engine, line by line as the phases happen, then the figures behind it."""

from benchmarks.cases import Case, Sampling
from benchmarks.engines import EngineMode
from benchmarks.metrics import Metrics
from benchmarks.record import Measurement

RULE = "=" * 34
TITLES = {
    "ours": "Benchmarking custom llama3 model inference implementation:",
    "vllm-default": "Benchmarking vLLM inference implementation:",
    "vllm-inprocess": "Benchmarking vLLM inference implementation (in-process):",
    "hf-eager": "Benchmarking Hugging Face transformers inference implementation:",
    "hf-static": "Benchmarking Hugging Face transformers inference implementation (compiled, static cache):",
}
COMPILING, WARMING_UP, RUNNING = "compiling the model...", "model warmup...", "running inference..."


def heading(mode: EngineMode, model: str, case: Case) -> list[str]:
    """What is about to be measured."""
    return [
        TITLES.get(mode.name, f"Benchmarking {mode.label} inference implementation:"),
        RULE,
        f"model name: {model}",
        f"batch size: {case.batch_size}",
        f"max output tokens: {case.output_len}",
        f"input tokens: {case.input_len}",
        f"max model sequence length: {case.max_model_len}",
        RULE,
    ]


def using_device(device: str) -> str:
    return f"using device: {device}"


def result(measurement: Measurement, sampling: Sampling) -> list[str]:
    """Duration, throughput and memory, then the figures that explain them; or the error."""
    metrics = measurement.metrics
    if metrics is None:
        return [f"failed: {measurement.error}"]
    lines = [f"duration: {metrics.duration} Seconds | throughput: {metrics.throughput} Toks/sec"]
    if measurement.peak_memory is not None:
        lines.append(f"peak memory consumption: {measurement.peak_memory[0]} MiB")
    return lines + figures(metrics, sampling, len(measurement.timing.total) if measurement.timing else 0)


def figures(metrics: Metrics, sampling: Sampling, repetitions: int) -> list[str]:
    """The rest of the figures, one line each; those that do not exist are left out."""
    lines = [
        f"sampling: {sampling.title}; median of {repetitions}, "
        f"throughput {metrics.throughput_low:.1f} to {metrics.throughput_high:.1f} Toks/sec",
        f"time to first token (TTFT): {metrics.ttft * 1e3:.2f} ms",
    ]
    if metrics.tpot_ms is not None:
        lines.append(f"time per output token (TPOT): {metrics.tpot_ms:.4f} ms")
    mfu = "" if metrics.prefill_mfu is None else f" | MFU: {metrics.prefill_mfu:.1%}"
    lines.append(f"prefill: {metrics.prefill_tok_s:.1f} Toks/sec{mfu}")
    if metrics.decode_tok_s is not None and metrics.decode_gb_s is not None:
        floor = ""
        if metrics.decode_floor_fraction is not None and metrics.decode_floor_tok_s is not None:
            floor = f" | {metrics.decode_floor_fraction:.1%} of the floor's {metrics.decode_floor_tok_s:.1f} Toks/sec"
        lines.append(f"decode: {metrics.decode_tok_s:.1f} Toks/sec | {metrics.decode_gb_s:.1f} GB/s{floor}")
    return lines
