"""Where a run takes place: versions, GPU, clocks, memory."""

import hashlib
import os
import platform
import resource
import shutil
import subprocess
import time
from typing import Any

import torch

CPU = "CPU"
CLOCK_FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_event_reasons.active")


def describe(on_gpu: bool = True) -> dict[str, Any]:
    """Versions and hardware; nothing that names the machine but a hash that tells two GPUs apart.

    on_gpu: whether the run is to use the GPU, if there is one.
    """
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cpu_cores": os.cpu_count(),
        "device": device_name() if on_gpu else CPU,
    }
    gpu = query_gpu("driver_version", "memory.total", "uuid") if on_gpu else []
    if gpu:
        driver, memory, uuid = gpu
        facts |= {"driver": driver, "gpu_memory": memory, "gpu_id": hashlib.sha256(uuid.encode()).hexdigest()[:12]}
    return facts


def device_name() -> str:
    """The GPU's name without touching it, so that no memory of it is taken; CPU where there is none."""
    found = query_gpu("name")
    return found[0] if found else CPU


def gpu_state() -> dict[str, str]:
    """Clocks, temperature, power and throttle reasons now; empty where there is no GPU."""
    return dict(zip(CLOCK_FIELDS, query_gpu(*CLOCK_FIELDS), strict=False))


def query_command(*fields: str) -> list[str] | None:
    """What makes nvidia-smi print a line of values for the first visible GPU; None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # hidden from CUDA
        return None
    return [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={visible_gpu(0)}"]


def visible_gpu(index: int) -> str:
    """What nvidia-smi and CUDA_VISIBLE_DEVICES call the GPU that CUDA gives this index."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)


def query_gpu(*fields: str) -> list[str]:
    """nvidia-smi's values for the first visible GPU; an empty list where it cannot say."""
    command = query_command(*fields)
    if command is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0 or not done.stdout.strip():
        return []
    return [value.strip() for value in done.stdout.splitlines()[0].split(",")]


def device_memory_used() -> tuple[int, str]:
    """MiB in use on the GPU by all processes: for engines that allocate in a process of their own."""
    found = query_gpu("memory.used")
    return (int(found[0].split()[0]), "used on the GPU") if found else (0, "unknown")


def wait_for_memory(limit_mib: int, seconds: float = 30.0) -> None:
    """Wait until at most `limit_mib` are in use on the GPU: a killed process gives its memory back late."""
    deadline = time.monotonic() + seconds
    while device_memory_used()[0] > limit_mib and time.monotonic() < deadline:
        time.sleep(0.5)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_torch_memory(device: torch.device) -> tuple[int, str]:
    """Peak MiB: of this process's tensors on a GPU, or of the process itself on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20, "allocated on the GPU by PyTorch"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10, "resident on the host"
