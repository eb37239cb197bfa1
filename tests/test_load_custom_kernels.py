"""The kernel build: reports, cache, and one clear line for everything that can be missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import load_custom_kernels as build

ROOT = Path(build.__file__).parent

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3fooILi128EEvPf' for 'sm_90a'
ptxas info    : Function properties for _Z3fooILi128EEvPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 152 registers, used 2 barriers, 1024 bytes smem
ptxas info    : Compiling entry function 'plain' for 'sm_90a'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 16 registers
"""


def test_resources_are_read_from_ptxas():
    foo, plain = build.parse_resources(PTXAS)
    assert (foo["registers"], foo["static_smem"], foo["spill_bytes"], foo["stack_bytes"]) == (152, 1024, 16, 8)
    assert "foo" in foo["name"]
    assert plain == {"name": "plain", "registers": 16, "static_smem": 0, "spill_bytes": 0, "stack_bytes": 0}


def test_kernels_whose_wgmma_run_one_by_one() -> None:
    """As ptxas of CUDA 13.0 puts it, and what it says of harmless things beside it."""
    text = "ptxas info    : (C7520) Potential Performance Loss: wgmma.mma_async instructions are serialized due to"
    text += " program dependence on compiler-inserted WG.AR in divergent path in the function '_Z3barv'\n"
    harmless = "ptxas info    : (C7519) warpgroup.arrive is injected in around line 9 by compiler to allow use of"
    assert build.serialized_kernels(text + harmless + " registers in GMMA in function '_Z3foov'\n") == ["_Z3barv"]
    assert build.serialized_kernels(PTXAS) == []


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "80"),
        ((8, 6), "86"),
        ((8, 7), "86"),
        ((8, 9), "89"),
        ((9, 0), "90a"),
        ((12, 0), "120"),
        ((12, 1), "120"),
    ],
)
def test_arch_of_a_gpu(capability, arch):
    assert build.arch_for(*capability) == arch


@pytest.mark.parametrize("capability", [(7, 5), (10, 0)])
def test_unsupported_gpu_is_named(capability):
    with pytest.raises(build.KernelBuildError, match=f"compute capability {capability[0]}.{capability[1]}"):
        build.arch_for(*capability)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, "load_custom_kernels.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def assert_one_line(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr


def test_missing_nvcc(tmp_path):
    assert_one_line(run(CUDA_HOME=str(tmp_path)), "nvcc not found", str(tmp_path))


def test_old_nvcc(tmp_path):
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    assert_one_line(run(CUDA_HOME=str(tmp_path), LLAMA3_KERNEL_CACHE=str(tmp_path)), "CUDA 11.8", ">= 12.8")


def test_broken_compiler(tmp_path):
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && echo 'release 13.0, V13.0.88' && exit 0\n"
        "echo 'error: unsupported GNU version! gcc versions later than 15 are not supported!' >&2\nexit 1\n"
    )
    nvcc.chmod(0o755)
    result = run("--family", "decode_attn", CUDA_HOME=str(tmp_path), LLAMA3_KERNEL_CACHE=str(tmp_path))
    assert_one_line(result, "could not compile", "unsupported GNU version")


def test_a_cache_that_cannot_be_made(tmp_path):
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    (tmp_path / "file").touch()
    result = run(CUDA_HOME=str(tmp_path), LLAMA3_KERNEL_CACHE=str(tmp_path / "file/kernels"))
    assert_one_line(result, "no folder for the built kernels", "file/kernels", "set LLAMA3_KERNEL_CACHE")


def test_the_cache_lies_in_the_home_where_nothing_else_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA3_KERNEL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert build._cache() == tmp_path / ".cache" / "llama3-kernels"


@pytest.mark.nvcc
def test_unknown_names():
    assert_one_line(run("--arch", "75"), "'75'", "90a")
    assert_one_line(run("--family", "nothing"), "'nothing'", "decode_attn")


@pytest.mark.nvcc
def test_cache_follows_sources_and_headers(tmp_path, monkeypatch):
    """A changed header rebuilds, an unchanged tree does not; spills fail the build."""
    family = tmp_path / "csrc/tiny"
    family.mkdir(parents=True)
    (family / "value.h").write_text("constexpr int kValue = 1;\n")
    (family / "binding.cpp").write_text(
        '#include <pybind11/pybind11.h>\n#include "value.h"\n'
        'PYBIND11_MODULE(tiny, m) { m.def("value", [] { return kValue; }); }\n'
    )
    monkeypatch.setattr(build, "CSRC", tmp_path / "csrc")
    monkeypatch.setenv("LLAMA3_KERNEL_CACHE", str(tmp_path / "cache"))
    build._includes.cache_clear()
    try:
        first = build.build(["tiny"], ["90a"])[0]
        assert first.seconds > 0
        assert first.load().value() == 1
        assert build.build(["tiny"], ["90a"])[0].seconds == 0
        (family / "value.h").write_text("constexpr int kValue = 2;\n")
        second = build.build(["tiny"], ["90a"])[0]
        assert second.seconds > 0
        assert second.path != first.path
    finally:
        build._includes.cache_clear()
