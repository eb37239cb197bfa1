"""What the assembler has made of the kernels, for tests of what C++ cannot say."""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest


def cuobjdump() -> str:
    """The tool, of the CUDA toolkit or of its Python package; without it the test is skipped."""
    packaged = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin/cuobjdump"))
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "cuobjdump")
    found = [str(path) for path in (toolkit, *packaged) if os.access(path, os.X_OK)]
    tool = shutil.which("cuobjdump") or next(iter(found), None)
    if tool is None:
        pytest.skip("needs cuobjdump and nvdisasm, of the CUDA toolkit or of their Python packages")
    return tool


def instructions(library: str, kernel: str) -> dict[str, list[str]]:
    """The instructions of each function of a shared library whose mangled name holds `kernel`."""
    tool = cuobjdump()
    path = f"{Path(tool).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # it runs nvdisasm
    run = subprocess.run([tool, "-sass", library], capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert run.returncode == 0, run.stderr
    text = run.stdout
    functions: dict[str, list[str]] = {}
    for part in text.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        if kernel in name:
            functions[name.strip()] = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+([^;]+);", body, re.MULTILINE)
    return functions
