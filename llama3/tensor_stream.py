"""File ranges to device memory at the speed of the slower of disk and bus, through a fixed ring of staging buffers.

Reader threads fill the buffers while earlier ones are on their way to the device. They use pread and map no file, so
the host holds RING_SIZE buffers and no more.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from llama3.errors import CheckpointError

CHUNK_BYTES = 32 << 20  # long enough that a copy runs at full bus speed, short enough that the ring stays small
RING_SIZE = 8
READER_THREADS = 8  # one pread from the page cache moves 3 to 10 GB/s; a Hopper host bus takes about 50


@dataclass(frozen=True)
class FileRange:
    """`nbytes` bytes from byte `offset` of the file `path`."""

    path: Path
    offset: int
    nbytes: int


def stream_ranges(ranges: Sequence[FileRange], device: torch.device) -> Iterator[torch.Tensor]:
    """Yield the bytes of each range in order as a uint8 tensor [nbytes] on `device`.

    A yielded tensor is valid until the next one is asked for: on the CPU it is the staging buffer itself.
    Raises CheckpointError where a file cannot be read or ends early.
    """
    on_gpu = device.type == "cuda"
    ring_size = min(RING_SIZE, len(ranges))
    buffer_bytes = max((item.nbytes for item in ranges), default=0)
    buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(ring_size)]
    copied = [torch.cuda.Event() for _ in buffers] if on_gpu else []
    threads = max(1, min(READER_THREADS, ring_size, os.cpu_count() or 1))
    with ExitStack() as stack:
        files = {path: stack.enter_context(_open(path)) for path in {item.path for item in ranges}}

        def read(index: int) -> torch.Tensor:
            slot, item = index % ring_size, ranges[index]
            if on_gpu:
                # The copy out of this buffer one round ago; in the first round this returns at once.
                copied[slot].synchronize()
            _read_exactly(files[item.path].fileno(), item, buffers[slot].numpy().data[: item.nbytes])
            return buffers[slot][: item.nbytes]

        # Entered last, so that a consumer that stops early leaves no thread reading from a closed file.
        pool = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="read-weights"))
        reads = deque(pool.submit(read, index) for index in range(ring_size))
        for index in range(len(ranges)):
            data = reads.popleft().result()
            if on_gpu:
                data = data.to(device, non_blocking=True)
                copied[index % ring_size].record(torch.cuda.current_stream(device))
            yield data
            if index + ring_size < len(ranges):
                reads.append(pool.submit(read, index + ring_size))


def _open(path: Path):
    try:
        return path.open("rb", buffering=0)
    except OSError as reason:
        raise CheckpointError(f"{path}: cannot be read ({reason.strerror})") from None


def _read_exactly(file: int, item: FileRange, buffer: memoryview) -> None:
    done = 0
    while done < item.nbytes:
        try:
            count = os.preadv(file, [buffer[done:]], item.offset + done)
        except OSError as reason:
            raise CheckpointError(
                f"{item.path}: cannot be read at byte {item.offset + done} ({reason.strerror})"
            ) from None
        if count == 0:
            raise CheckpointError(f"{item.path}: ended at byte {item.offset + done} while it was read")
        done += count
