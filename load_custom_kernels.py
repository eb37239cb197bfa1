#!/usr/bin/env python3
"""Build the CUDA kernels (cached) and load them: `python load_custom_kernels.py [--arch 80,86,89,90a,120]`.

A *family* is a folder `csrc/<family>/` with a `binding.cpp` (pybind11) beside its `.cu` files;
it becomes one Python module of that name:

    decode_attn = load_custom_kernels.load("decode_attn")

Every source is one compile job, all jobs run in parallel, and an object is reused while its source, the headers that
it includes, the flags, the architecture and the CUDA version stay the same. Nothing here imports torch or needs a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

CSRC = Path(__file__).resolve().parent / "csrc"
ARCHS = ("80", "86", "89", "90a", "120")
DEFAULT_ARCH = "90a"  # what to build for on a machine without a GPU
MIN_CUDA = (12, 8)  # the first release that knows sm_120

NVCC_FLAGS = (
    "-std=c++17",
    "-lineinfo",
    "--expt-relaxed-constexpr",
    "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
)
OPTIMISATION = {".cu": "-O3", ".cpp": "-O1"}  # by suffix: bindings take a quarter less to compile, and do nothing slow
LINK_FLAGS = ("-shared", "-cudart=static")
FAMILY_FLAGS: dict[str, tuple[str, ...]] = {}  # what a family needs beyond NVCC_FLAGS


class KernelBuildError(RuntimeError):
    """The kernels cannot be built or loaded here; the message is one line that says what was found and what to do."""


def families() -> list[str]:
    """Every kernel family in the tree: the folders of csrc/ that hold a binding."""
    return sorted(path.parent.name for path in CSRC.glob("*/binding.cpp"))


@functools.cache
def load(family: str, arch: str | None = None) -> ModuleType:
    """Build `family` for `arch` (default: this machine's GPU, or 90a without one) and return its module.

    Raises KernelBuildError: no nvcc, compiler error, register spills, wgmma one by one, unsupported GPU or family.
    """
    library = build([family], [arch or detect_arch()])[0]
    return library.load()


@dataclass(frozen=True)
class Library:
    """One built family: where it lies, what each of its kernels uses, and how long the build took (0 if cached)."""

    family: str
    arch: str
    path: Path
    kernels: list[dict]
    seconds: float

    def load(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location(self.family, self.path)
        assert spec and spec.loader
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except ImportError as error:
            raise KernelBuildError(f"built {self.path} but cannot load it: {error}") from error
        return module


def build(names: list[str], archs: list[str]) -> list[Library]:
    """Compile and link every (family, arch) that is not in the cache, all sources in parallel; return them in order."""
    for arch in archs:
        if arch not in ARCHS:
            raise KernelBuildError(f"architecture '{arch}' is not supported; choose from {', '.join(ARCHS)}")
    for name in names:
        if name not in families():
            raise KernelBuildError(f"no kernel family '{name}' in {CSRC}; found: {', '.join(families()) or 'none'}")
    jobs = [_Job(name, arch, source) for name in names for arch in archs for source in _sources(name)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = dict(zip(jobs, pool.map(_compile, jobs), strict=True))
        linked = [
            pool.submit(_link, name, arch, [objects[_Job(name, arch, source)] for source in _sources(name)])
            for name in names
            for arch in archs
        ]
        return [future.result() for future in linked]


def detect_arch() -> str:
    """The entry of ARCHS that runs on GPU 0, asked of the driver itself; DEFAULT_ARCH where there is no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return DEFAULT_ARCH
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return DEFAULT_ARCH
    for value, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
    return arch_for(major.value, minor.value)


def arch_for(major: int, minor: int) -> str:
    """Map a compute capability to the architecture whose machine code it runs (same major, highest minor below)."""
    fitting = [a for a in ARCHS if int(a.rstrip("a")) // 10 == major and int(a.rstrip("a")) % 10 <= minor]
    if not fitting:
        raise KernelBuildError(
            f"this GPU has compute capability {major}.{minor}; the kernels support {', '.join(ARCHS)} (A100 and newer)"
        )
    return fitting[-1]


@dataclass(frozen=True)
class _Job:
    family: str
    arch: str
    source: Path


@dataclass(frozen=True)
class _Object:
    path: Path
    kernels: list[dict]
    seconds: float


def cache_folder() -> Path:
    """Where built kernels lie, and what was found out about them; not made yet, perhaps."""
    named = os.environ.get("LLAMA3_KERNEL_CACHE")
    return Path(named or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama3-kernels")


def _cache() -> Path:
    """`cache_folder`, made if need be."""
    try:
        root = cache_folder()
        root.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise KernelBuildError(
            f"no folder for the built kernels ({error}): set LLAMA3_KERNEL_CACHE to one that can be written"
        ) from None
    return root


def _sources(family: str) -> list[Path]:
    return sorted(p for p in (CSRC / family).iterdir() if p.suffix in (".cu", ".cpp"))


def compiler_problem() -> str | None:
    """Why there is no CUDA compiler to build with, in one line; None if there is one."""
    try:
        _nvcc()
    except KernelBuildError as error:
        return str(error)
    return None


@functools.cache
def _nvcc() -> tuple[str, tuple[int, int], str]:
    """(path, release, full version text) of the CUDA compiler."""
    home = os.environ.get("CUDA_HOME")
    found = (
        shutil.which(str(Path(home) / "bin/nvcc"))
        if home
        else shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    )
    if not found:
        where = f"in CUDA_HOME={home}" if home else "on PATH or in /usr/local/cuda"
        raise KernelBuildError(
            f"nvcc not found {where}; install the CUDA toolkit >= {MIN_CUDA[0]}.{MIN_CUDA[1]} or set CUDA_HOME"
        )
    result = subprocess.run([found, "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+)\.(\d+)", result.stdout)
    if result.returncode or not release:
        raise KernelBuildError(
            f"{found} --version failed: {(result.stderr or result.stdout).strip().splitlines()[-1:]}"
        )
    version = (int(release[1]), int(release[2]))
    if version < MIN_CUDA:
        raise KernelBuildError(
            f"{found} is CUDA {version[0]}.{version[1]}; the kernels need >= {MIN_CUDA[0]}.{MIN_CUDA[1]}"
        )
    return found, version, result.stdout


@functools.cache
def _includes() -> tuple[str, ...]:
    try:
        import pybind11
    except ImportError:
        raise KernelBuildError("pybind11 is not installed; pip install -r requirements.txt") from None
    return tuple(f"-I{path}" for path in (CSRC, sysconfig.get_paths()["include"], pybind11.get_include()))


def _with_headers(source: Path, seen: dict[Path, str]) -> dict[Path, str]:
    """`source` and every file that it includes with quotes, transitively: path -> text."""
    if source not in seen:
        seen[source] = source.read_text()
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', seen[source], re.MULTILINE):
            for folder in (source.parent, CSRC):
                if (folder / name).is_file():
                    _with_headers((folder / name).resolve(), seen)
                    break
    return seen


def _compile(job: _Job) -> _Object:
    nvcc, _, version = _nvcc()
    number = job.arch
    command = [
        nvcc,
        f"-gencode=arch=compute_{number},code=sm_{number}",
        OPTIMISATION[job.source.suffix],
        *NVCC_FLAGS,
        *FAMILY_FLAGS.get(job.family, ()),
        *_includes(),
    ]
    command += ["-c", str(job.source)]
    texts = [f"{path.relative_to(CSRC)}\n{text}" for path, text in sorted(_with_headers(job.source, {}).items())]
    key = hashlib.sha256("\0".join([*command, version, sys.version, *texts]).encode()).hexdigest()[:20]
    target = _cache() / f"{job.family}-{job.source.stem}-sm_{number}-{key}.o"
    report = target.with_suffix(".json")
    if not (target.is_file() and report.is_file()):
        began, scratch = time.perf_counter(), target.with_suffix(f".{os.getpid()}.tmp.o")
        result = subprocess.run([*command, "-o", str(scratch)], capture_output=True, text=True)
        if result.returncode:
            scratch.unlink(missing_ok=True)
            raise KernelBuildError(_compiler_message(job, result.stdout + result.stderr))
        kernels = parse_resources(result.stderr)
        complaints = {
            "registers spill to memory": [k["name"] for k in kernels if k["spill_bytes"]],
            "wgmma instructions run one by one": _demangle(serialized_kernels(result.stderr)),
        }
        for complaint, names in complaints.items():
            if names:
                scratch.unlink()
                raise KernelBuildError(f"{job.source.name} for sm_{number}: {complaint} in {', '.join(names)}")
        scratch.replace(target)
        report.write_text(json.dumps(kernels))
        return _Object(target, kernels, time.perf_counter() - began)
    return _Object(target, json.loads(report.read_text()), 0.0)


def _compiler_message(job: _Job, output: str) -> str:
    if os.environ.get("LLAMA3_KERNEL_VERBOSE"):
        print(output, file=sys.stderr)
    errors = [line.strip() for line in output.splitlines() if "error" in line.lower()] or output.strip().splitlines()[
        -1:
    ]
    first = errors[0] if errors else "no message"
    return f"nvcc could not compile {job.source.name} for sm_{job.arch}: {first} (LLAMA3_KERNEL_VERBOSE=1 shows all)"


def serialized_kernels(ptxas: str) -> list[str]:
    """The kernels of which `ptxas` says that it had to wait for each wgmma before the next: a warpgroup's instructions
    in a branch that it cannot know to be the same for all its threads, or accumulators that something else touches."""
    return re.findall(r"wgmma\.mma_async instructions are serialized.*? in (?:the )?function '([^']+)'", ptxas)


def parse_resources(ptxas: str) -> list[dict]:
    """Per kernel in the output of `ptxas -v`: name, registers, static shared bytes, spill bytes, stack bytes."""
    kernels: list[dict] = []
    for line in ptxas.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)'", line):
            kernels.append({"name": entry[1], "registers": 0, "static_smem": 0, "spill_bytes": 0, "stack_bytes": 0})
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if kernels:  # a device function that was not inlined counts for the kernel above it
                kernels[-1]["stack_bytes"] += int(frame[1])
                kernels[-1]["spill_bytes"] += int(frame[2]) + int(frame[3])
        elif used := re.search(r"Used (\d+) registers", line):
            kernels[-1]["registers"] = int(used[1])
            if smem := re.search(r"(\d+) bytes smem", line):
                kernels[-1]["static_smem"] = int(smem[1])
    return [
        {**kernel, "name": name} for kernel, name in zip(kernels, _demangle([k["name"] for k in kernels]), strict=True)
    ]


def _demangle(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if not tool or not names:
        return names
    plain = subprocess.run([tool, *names], capture_output=True, text=True).stdout.splitlines()
    plain = [
        re.sub(r"\(anonymous namespace\)::|\((?:int|bool|unsigned int|[\w:]+)\)(?=[\w-])", "", name) for name in plain
    ]
    return [re.sub(r"\(.*$|^void ", "", name) for name in plain]


def _link(family: str, arch: str, objects: list[_Object]) -> Library:
    key = hashlib.sha256("\0".join([*(o.path.name for o in objects), *LINK_FLAGS]).encode()).hexdigest()[:20]
    target = _cache() / f"{family}-sm_{arch}-{key}" / f"{family}{sysconfig.get_config_var('EXT_SUFFIX')}"
    began = time.perf_counter()
    if not target.is_file():
        target.parent.mkdir(exist_ok=True)
        scratch = target.with_suffix(f".{os.getpid()}.tmp")
        command = [_nvcc()[0], *LINK_FLAGS, *(str(o.path) for o in objects), "-o", str(scratch)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise KernelBuildError(
                f"cannot link {family} for sm_{arch}: {(result.stdout + result.stderr).strip().splitlines()[0]}"
            )
        scratch.replace(target)
    linked = time.perf_counter() - began
    seconds = sum(o.seconds for o in objects)
    return Library(family, arch, target, [k for o in objects for k in o.kernels], seconds + linked if seconds else 0.0)


def _print_report(library: Library) -> None:
    state = f"compiled in {library.seconds:.1f} s (sum over sources)" if library.seconds else "cached"
    print(f"{library.family} for sm_{library.arch}: {len(library.kernels)} kernels, {state}\n  {library.path}")
    if library.kernels:
        print(f"  {'kernel':72} {'registers':>9} {'smem B':>7} {'spill B':>7} {'stack B':>7}")
    for k in library.kernels:
        print(
            f"  {k['name'][:72]:72} {k['registers']:9} {k['static_smem']:7} {k['spill_bytes']:7} {k['stack_bytes']:7}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", help=f"comma-separated list from {','.join(ARCHS)}; default: this machine's GPU")
    parser.add_argument("--family", help="comma-separated list; default: all")
    args = parser.parse_args()
    began = time.perf_counter()
    try:
        archs = args.arch.split(",") if args.arch else [detect_arch()]
        names = args.family.split(",") if args.family else families()
        for library in build(names, archs):
            _print_report(library)
            library.load()
    except KernelBuildError as error:
        print(f"load_custom_kernels.py: {error}", file=sys.stderr)
        return 2
    print(f"{len(names)} families x {len(archs)} architectures built and loaded in {time.perf_counter() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
