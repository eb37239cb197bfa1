"""cuBLASLt through ctypes: the library that PyTorch has loaded already, asked for what PyTorch does not offer, which is
the choice of its algorithm, and a residual that is added without being copied first.

Enumerators and structures are those of cublasLt.h (CUDA 12 and 13).
"""

import ctypes
import functools
from ctypes import c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass

import torch

COMPUTE_32F = 68  # cublasComputeType_t
TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # cudaDataType_t
TRANSA = 3  # cublasLtMatmulDescAttributes_t
MAX_WORKSPACE_BYTES = 1  # cublasLtMatmulPreferenceAttributes_t
TRANSPOSE = 1  # cublasOperation_t
WORKSPACE_BYTES = 32 << 20
ALIGNMENT = 256  # bytes: what algorithms assume of every matrix unless they are asked for otherwise
ALGORITHM_BYTES = 64  # cublasLtMatmulAlgo_t, opaque


class CublasLtError(RuntimeError):
    """A call failed; the message names it and its cublasStatus_t."""


class _Heuristic(ctypes.Structure):  # cublasLtMatmulHeuristicResult_t
    _fields_ = (
        ("algorithm", c_uint64 * (ALGORITHM_BYTES // 8)),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The shared library of the CUDA version that PyTorch was built with. Raises OSError if there is none."""
    major = (torch.version.cuda or "13").split(".")[0]
    lib = ctypes.CDLL(f"libcublasLt.so.{major}")
    lib.cublasLtGetVersion.restype = c_size_t
    # handle, description, alpha, A, B, beta, C, D with their layouts, algorithm, workspace and its size, stream
    lib.cublasLtMatmul.argtypes = [c_void_p] * 14 + [c_size_t, c_void_p]
    return lib


def version() -> int:
    return library().cublasLtGetVersion()


def _call(name: str, *arguments: object) -> None:
    status = getattr(library(), name)(*arguments)
    if status:
        raise CublasLtError(f"{name} failed with cublasStatus_t {status}")


def _create(name: str, *arguments: object) -> int:
    made = c_void_p()
    _call(name, ctypes.byref(made), *arguments)
    assert made.value is not None
    return made.value


@functools.cache
def _handle(device: torch.device) -> int:
    with torch.cuda.device(device):
        return _create("cublasLtCreate")


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    """Shared by all products of a device: they run one after the other."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


_ONE, _ZERO = c_float(1), c_float(0)


@dataclass(frozen=True)
class Product:
    """out [T, N] = x [T, K] weight^T (+ residual [T, N]), all row-major, for one shape."""

    num_tokens: int
    num_rows: int
    size: int
    dtype: torch.dtype
    device: torch.device

    @functools.cached_property
    def _descriptors(self) -> tuple[int, int, int, int]:
        # cuBLAS is column-major: it computes out^T [N, T] = weight [N, K] x^T [K, T].
        description = _create("cublasLtMatmulDescCreate", COMPUTE_32F, TYPES[torch.float32])
        transpose = c_int(TRANSPOSE)
        size = c_size_t(ctypes.sizeof(transpose))
        _call("cublasLtMatmulDescSetAttribute", c_void_p(description), TRANSA, ctypes.byref(transpose), size)

        def layout(rows: int, columns: int) -> int:
            sizes = (c_uint64(rows), c_uint64(columns), c_int64(rows))
            return _create("cublasLtMatrixLayoutCreate", TYPES[self.dtype], *sizes)

        weight, x = layout(self.size, self.num_rows), layout(self.size, self.num_tokens)
        return description, weight, x, layout(self.num_rows, self.num_tokens)

    def algorithms(self, count: int) -> list[bytes]:
        """Up to `count` algorithms for `run`, the one that the library thinks fastest first."""
        description, weight, x, out = (c_void_p(d) for d in self._descriptors)
        preference = c_void_p(_create("cublasLtMatmulPreferenceCreate"))
        limit = c_size_t(WORKSPACE_BYTES)
        attribute = (MAX_WORKSPACE_BYTES, ctypes.byref(limit), c_size_t(ctypes.sizeof(limit)))
        _call("cublasLtMatmulPreferenceSetAttribute", preference, *attribute)
        results, found = (_Heuristic * count)(), c_int()
        operands = (description, weight, x, out, out)
        asked = (preference, c_int(count), results, ctypes.byref(found))
        _call("cublasLtMatmulAlgoGetHeuristic", c_void_p(_handle(self.device)), *operands, *asked)
        _call("cublasLtMatmulPreferenceDestroy", preference)
        usable = [bytes(results[i].algorithm) for i in range(found.value) if results[i].state == 0]
        if not usable:
            raise CublasLtError(f"cuBLASLt has no algorithm for {self}")
        return usable

    def run(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor | None,
        out: torch.Tensor,
        algorithm: bytes,
    ) -> None:
        """Launch on the current stream. Contiguous, aligned tensors of the product's shapes: not checked here."""
        description, weight_layout, x_layout, out_layout = self._descriptors
        status = library().cublasLtMatmul(
            _handle(self.device),
            description,
            ctypes.addressof(_ONE),
            weight.data_ptr(),
            weight_layout,
            x.data_ptr(),
            x_layout,
            ctypes.addressof(_ZERO if residual is None else _ONE),
            (out if residual is None else residual).data_ptr(),
            out_layout,
            out.data_ptr(),
            out_layout,
            algorithm,
            _workspace(self.device).data_ptr(),
            WORKSPACE_BYTES,
            torch.cuda.current_stream(self.device).cuda_stream,
        )
        if status:
            raise CublasLtError(f"cublasLtMatmul failed with cublasStatus_t {status} for {self}")
