"""What the device can do at most: matrix product FLOP/s and read bandwidth, known, given or measured.

python -m benchmarks.peaks        measure both here, print them as one JSON line
"""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

# Measured: an 8192^3 bf16 matrix product of random data, and streaming loads over 8 GiB.
H200_READ_BANDWIDTH = 4.585e12  # bytes/s of streaming loads over 8 GiB
KNOWN = {"NVIDIA H200": (787e12, H200_READ_BANDWIDTH)}

REPETITIONS = 10


@dataclass(frozen=True)
class Peaks:
    """matrix_flops: FLOP/s of a large bf16 matrix product. read_bandwidth: bytes/s of a streaming read, or None."""

    matrix_flops: float | None
    read_bandwidth: float | None
    source: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def known_peaks(device_name: str) -> Peaks:
    """The peaks of a device that was measured before; unknown for others."""
    if device_name in KNOWN:
        return Peaks(*KNOWN[device_name], source=f"measured before on {device_name}")
    return Peaks(None, None, source=f"unknown for {device_name}")


def override(peaks: Peaks, matrix_flops: float | None, read_bandwidth: float | None) -> Peaks:
    """`peaks`, except for what the user gave."""
    if matrix_flops is None and read_bandwidth is None:
        return peaks
    given = [name for name, value in (("matrix", matrix_flops), ("read", read_bandwidth)) if value is not None]
    return Peaks(
        matrix_flops if matrix_flops is not None else peaks.matrix_flops,
        read_bandwidth if read_bandwidth is not None else peaks.read_bandwidth,
        source=f"{' and '.join(given)} given" + (f"; else {peaks.source}" if len(given) == 1 else ""),
    )


def measure(device: torch.device) -> Peaks:
    """Measure both on `device`, with random data: zeros would draw less power and run at higher clocks."""
    small = device.type != "cuda"
    matrix = measure_matrix(device, size=512 if small else 8192)
    read = measure_read(device, num_bytes=2**26 if small else 2**33)
    return Peaks(matrix, read, source="measured in this run")


def measure_matrix(device: torch.device, size: int) -> float:
    """FLOP/s of a bf16 matrix product of `size` cubed."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _median_seconds(device, lambda: torch.mm(a, b))


def measure_read(device: torch.device, num_bytes: int) -> float:
    """Bytes/s of reading `num_bytes` once: the best of torch's reductions and, on a GPU, a Triton loop of loads."""
    data = torch.empty(num_bytes // 4, dtype=torch.int32, device=device).random_()
    candidates: list[Callable[[], object]] = [lambda: data.view(torch.float32).sum(), lambda: data.amax()]
    if device.type == "cuda":
        try:
            from benchmarks.triton_read import reader

            candidates += [reader(data, block, rounds) for block, rounds in ((2048, 16), (4096, 16), (8192, 8))]
        except ImportError as error:
            print(f"read bandwidth without Triton ({error}): the figure may be some percent low", file=sys.stderr)
    return num_bytes / min(_median_seconds(device, read) for read in candidates)


def _median_seconds(device: torch.device, run: Callable[[], object]) -> float:
    """Median seconds of one call: by events on a GPU, by the wall clock on a CPU."""
    for _ in range(3):
        run()
    if device.type != "cuda":
        import time

        samples = []
        for _ in range(REPETITIONS):
            start = time.perf_counter()
            run()
            samples.append(time.perf_counter() - start)
        return statistics.median(samples)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPETITIONS)]
    for start_event, end_event in events:
        start_event.record()
        run()
        end_event.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


if __name__ == "__main__":
    from llama3.device import resolve_device

    print(json.dumps(measure(resolve_device(sys.argv[1] if len(sys.argv) > 1 else "auto")).to_json()))
