"""What can be known of the CUDA ops without a GPU: that they compile and load, what they refuse, how they choose."""

import ctypes
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama3.errors import UserError
from llama3.forward_batch import PrefillBatch
from llama3.kv_cache import LayerCache
from llama3.ops import cublaslt, cuda, elementwise, gemm, gemm_search, linear, prefill_attention
from llama3.ops.prefill_attention import PrefillPlan
from llama3.rope import RopeTable
from llama3.shapes import shape_config

BF16 = torch.bfloat16


# ---- the kernels' own checks, before any call of CUDA

ALIGNED, ODD = 4096, 4098


@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("kernel", "arguments", "message"),
    [
        ("rms_norm", (ALIGNED, ALIGNED, ALIGNED, 1, 12, 1e-5), "hidden_size is 12; expected a multiple of 8"),
        ("rms_norm", (ALIGNED, ALIGNED, ALIGNED, 1, 32768, 1e-5), "at most 16384"),
        ("rms_norm", (ALIGNED, ALIGNED, ALIGNED, 0, 16, 1e-5), "no rows"),
        ("rms_norm", (ODD, ALIGNED, ALIGNED, 1, 16, 1e-5), "x must be 16-byte aligned"),
        ("silu_mul", (ALIGNED, ALIGNED, 1, 12), "size is 12; expected a multiple of 8"),
        ("silu_mul", (ALIGNED, ODD, 1, 16), "out must be 16-byte aligned"),
        ("rope_append", (*(ALIGNED,) * 8, 1, 4, 2, 96, 1), "head_dim is 96; supported: 64, 128"),
        ("rope_append", (*(ALIGNED,) * 8, 1, 4, 0, 64, 1), "num_kv_heads"),
        ("rope_append", (*(ALIGNED,) * 7, ODD, 1, 4, 2, 64, 1), "v_cache must be 16-byte aligned"),
    ],
)
def test_kernels_refuse(kernel: str, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(elementwise.library(), kernel)(*arguments, 0, False, 0)


@pytest.mark.nvcc
def test_gather_refuses() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        elementwise.library().gather_cache(*(ALIGNED,) * 6, 1, 0, 2, 64, 1, 0)


# ---- the Python checks


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(16, dtype=BF16), torch.zeros(16, dtype=BF16), r"x is torch.bfloat16 \[16\].*expected \[T, H\]"),
        (torch.zeros(2, 16), torch.zeros(16), "bfloat16 or float16, not in torch.float32"),
        (torch.zeros(2, 16, dtype=BF16), torch.zeros(8, dtype=BF16), r"weight is .*expected contiguous .* \[16\]"),
        (torch.zeros(2, 32, dtype=BF16)[:, ::2], torch.zeros(16, dtype=BF16), r"x is .* strides \[32, 2\]"),
        (torch.zeros(2, 16, dtype=BF16), torch.zeros(16, dtype=BF16), "x is on cpu; expected a CUDA device"),
    ],
)
def test_rms_norm_names_what_is_wrong(x: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        elementwise.rms_norm(x, weight, 1e-5)


@pytest.mark.parametrize(
    ("ids", "table", "message"),
    [
        (torch.zeros(2, dtype=torch.int32), torch.zeros(9, 16, dtype=BF16), "table is on cpu; expected a CUDA device"),
        (torch.zeros(2), torch.zeros(9, 16), "bfloat16 or float16, not in torch.float32"),
        (torch.zeros(2), torch.zeros(9, 32, dtype=BF16)[:, ::2], r"table is .* strides \[32, 2\]"),
    ],
)
def test_embed_names_what_is_wrong(ids: torch.Tensor, table: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        elementwise.embed(ids, table, with_squares=True)


@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden_size": 12}, "hidden_size is 12; expected a multiple of 8"),
        ({"num_tokens": 0}, "there are no tokens"),
        ({"table": 4098}, "table must be 16-byte aligned"),
        ({"out": 4098}, "out must be 16-byte aligned"),
    ],
)
def test_the_embedding_kernel_refuses(wrong: dict[str, int], message: str) -> None:
    good = {"token_ids": 4096, "table": 4096, "out": 4096, "squares": 0, "num_tokens": 2, "hidden_size": 16}
    with pytest.raises(ValueError, match=message):
        elementwise.library().embed(**good | {"dtype": 0, "overlap": False, "stream": 0} | wrong)


def test_silu_mul_names_what_is_wrong() -> None:
    with pytest.raises(UserError, match="multiple of 8"):
        elementwise.silu_mul(torch.zeros(2, 24, dtype=BF16))
    with pytest.raises(UserError, match="gate_up is on cpu"):
        elementwise.silu_mul(torch.zeros(2, 32, dtype=BF16))


def cache_of(num_kv_heads: int = 2) -> LayerCache:
    return LayerCache(*torch.zeros(2, 3, num_kv_heads, 64, 64, dtype=BF16).unbind(), blocks_per_slot=3)


def test_rope_append_names_what_is_wrong() -> None:
    rope, ids = RopeTable.build(shape_config("1b"), 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match=r"qkv is .*expected \[T, \(Hq \+ 2 \* 2\) \* 64\]"):
        elementwise.rope_append(torch.zeros(2, 256, dtype=BF16), rope, cache_of(), ids, ids)
    qkv = torch.zeros(2, 8 * 64, dtype=BF16)
    with pytest.raises(UserError, match="qkv is on cpu"):
        elementwise.rope_append(qkv, rope, cache_of(), ids, ids)
    with pytest.raises(UserError, match="k_cache"):
        elementwise.gather_cache(replace(cache_of(), k=torch.zeros(3, 2, 32, 64, dtype=BF16)), ids.int(), ids.int(), 2)


@pytest.mark.parametrize(
    ("x", "weight", "residual", "message"),
    [
        ((16,), (8, 16), None, "expected"),
        ((2, 16), (8, 32), None, r"weight is .*expected .*\[8, 16\]"),
        ((2, 16), (8, 16), (2, 16), r"residual is .*expected .*\[2, 8\]"),
    ],
)
def test_product_names_what_is_wrong(x: tuple, weight: tuple, residual: tuple | None, message: str) -> None:
    tensors = [None if shape is None else torch.zeros(shape, dtype=BF16) for shape in (x, weight, residual)]
    with pytest.raises(UserError, match=message):
        linear.product(*tensors)


def test_operands_are_copied_only_if_they_must_be() -> None:
    storage = torch.arange(1024, dtype=torch.float32)
    skip = -storage.data_ptr() % cublaslt.ALIGNMENT // 4
    good, odd = storage[skip : skip + 64].view(8, 8), storage[skip + 1 : skip + 65].view(8, 8)
    assert linear._aligned(good) is good
    for view in (odd, good.t()):
        copy = linear._aligned(view)
        assert copy is not view and copy.is_contiguous() and torch.equal(copy, view)


# ---- whether the ops can run


def reason(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = BF16, capability: tuple = (9, 0), **changes
) -> str | None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(cuda.load_custom_kernels, "load", lambda family: None)
    monkeypatch.setattr(cuda.load_custom_kernels, "detect_arch", lambda: "90a")
    return cuda.CudaOps.why_not(replace(shape_config("1b"), **changes), dtype, torch.device("cuda"))


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    config = shape_config("1b")
    assert "the device is cpu" in (cuda.CudaOps.why_not(config, BF16, torch.device("cpu")) or "")
    assert reason(monkeypatch) is None
    assert "not in float32" in (reason(monkeypatch, torch.float32) or "")
    assert "capability 7.5" in (reason(monkeypatch, capability=(7, 5)) or "")
    assert "built for GPU 0 (sm_90a), and cuda is sm_80: hide the others" in (
        reason(monkeypatch, capability=(8, 0)) or ""
    )
    assert "32 query heads for 2" in (reason(monkeypatch, num_kv_heads=2) or "")
    assert "hidden_size is 2052" in (reason(monkeypatch, hidden_size=2052) or "")


def test_why_not_passes_on_what_the_build_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(family: str) -> None:
        raise cuda.load_custom_kernels.KernelBuildError("nvcc not found on PATH")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(cuda.load_custom_kernels, "load", fail)
    monkeypatch.setattr(cuda.load_custom_kernels, "detect_arch", lambda: "90a")
    assert cuda.CudaOps.why_not(shape_config("1b"), BF16, torch.device("cuda")) == "nvcc not found on PATH"


# ---- how prompts are attended to


def test_plan_of_equal_prompts_is_dense() -> None:
    plan = PrefillPlan.of(PrefillBatch.build([0, 1], [7, 7], [0, 0], "cpu"))
    assert plan.equal_lengths and plan.key_slots is None
    assert (plan.max_queries, plan.max_keys, plan.num_keys) == (7, 7, 14)


def test_plan_of_ragged_prompts_reads_their_own_keys() -> None:
    batch = PrefillBatch.build([0, 1, 2], [1, 9, 4], [0, 0, 0], "cpu")
    plan = PrefillPlan.of(batch)
    assert not plan.equal_lengths and plan.key_slots is None and plan.key_starts is batch.seq_starts


def test_plan_of_continued_prompts_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # needs a GPU
    plan = PrefillPlan.of(PrefillBatch.build([3, 1], [4, 4], [0, 60], "cpu"))
    assert not plan.equal_lengths  # as many new tokens, but not as many keys
    assert plan.key_slots is not None and plan.key_slots.tolist() == [3, 1] and plan.key_slots.dtype == torch.int32
    assert plan.key_starts.tolist() == [0, 4, 68]
    assert (plan.max_queries, plan.max_keys, plan.num_keys) == (4, 64, 68)


def test_cudnn_gets_the_large_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_attention, "attend_dense", lambda *_: "cuDNN")
    monkeypatch.setattr(prefill_attention, "attend_packed", lambda *_: "FlashAttention")

    def library(*lengths: int, comes_again: bool = False) -> str:
        batch = PrefillBatch.build(range(len(lengths)), lengths, [0] * len(lengths), "cpu")
        plan = PrefillPlan.of(replace(batch, comes_again=comes_again))
        q = torch.empty(sum(lengths), 32, 64, device="meta")
        return prefill_attention.attend(q, q, q, cache_of(), plan)  # type: ignore[return-value]

    assert library(*[2048] * 8) == library(16384) == "cuDNN"
    assert library(128) == library(2048) == library(*[2048] * 7, 2047) == "FlashAttention"
    assert library(2048, comes_again=True) == library(1536, comes_again=True) == "cuDNN"
    assert library(1280, comes_again=True) == library(2000, 48, comes_again=True) == "FlashAttention"


# ---- the search for algorithms


class FakeProduct(SimpleNamespace):
    __hash__ = object.__hash__

    def algorithms(self, count: int) -> list[bytes]:
        return [bytes([i]) * cublaslt.ALGORITHM_BYTES for i in range(count)]


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[FakeProduct]:
    """A search whose third candidate wins; the list collects what was measured."""
    measured: list[FakeProduct] = []

    def measure(product: FakeProduct, *operands: object) -> bytes:
        measured.append(product)
        return product.algorithms(3)[2]

    monkeypatch.setenv("LLAMA3_KERNEL_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setattr(gemm_search, "measure", measure)
    monkeypatch.setattr(gemm_search, "_key", lambda product: product.name)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("_decode_batches", "_first", "_measured"):
        monkeypatch.setattr(gemm_search, name, type(getattr(gemm_search, name))())
    return measured


def ask(product: FakeProduct) -> gemm_search.Algorithm:
    tensor = torch.zeros(1)
    return gemm_search.algorithm_for(product, tensor, tensor, None, tensor)  # type: ignore[arg-type]


def test_only_decode_batches_are_searched(searches: list[FakeProduct]) -> None:
    prompt, decode = FakeProduct(num_tokens=37, name="p"), FakeProduct(num_tokens=64, name="d")
    assert ask(prompt) == ask(decode) == prompt.algorithms(1)[0] and not searches
    gemm_search.expect_decode(64)
    assert ask(decode) == decode.algorithms(3)[2]
    assert ask(decode) == decode.algorithms(3)[2] and searches == [decode]
    assert ask(prompt) == prompt.algorithms(1)[0]


def test_nothing_is_measured_during_capture(searches: list[FakeProduct], monkeypatch: pytest.MonkeyPatch) -> None:
    gemm_search.expect_decode(64)
    decode = FakeProduct(num_tokens=64, name="d")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert ask(decode) == decode.algorithms(1)[0] and not searches


def test_searches_are_remembered_on_disk(searches: list[FakeProduct], monkeypatch: pytest.MonkeyPatch) -> None:
    gemm_search.expect_decode(64)
    ask(FakeProduct(num_tokens=64, name="a"))
    ask(FakeProduct(num_tokens=64, name="b"))
    assert set(json.loads(gemm_search.cache_path().read_text())) == {"a", "b"}
    monkeypatch.setattr(gemm_search, "_measured", {})  # another process
    again = FakeProduct(num_tokens=64, name="a")
    assert ask(again) == again.algorithms(3)[2] and len(searches) == 2


@pytest.mark.parametrize("plan", gemm.PLANS[gemm.PLAIN])
def test_our_kernel_is_remembered_too(
    searches: list[FakeProduct], monkeypatch: pytest.MonkeyPatch, plan: gemm.Plan
) -> None:
    gemm_search.expect_decode(64)
    monkeypatch.setattr(gemm_search, "measure", lambda *_: plan)
    product = FakeProduct(num_tokens=64, name="a")
    assert ask(product) == plan
    assert json.loads(gemm_search.cache_path().read_text()) == {
        "a": f"csrc/gemm {plan.rows}x{plan.splits}x{plan.tokens}"
    }
    monkeypatch.setattr(gemm_search, "_measured", {})  # another process
    monkeypatch.setattr(gemm_search, "measure", None)
    assert ask(product) == plan


@pytest.mark.parametrize(
    "name",
    [
        *("csrc/gemm", "csrc/gemm 128", "csrc/gemm 128x2", "csrc/gemm 96x2x128", "csrc/gemm 128x2x128 "),
        *("csrc/gemm 0128x2x128", "00ff", "apart", "", 1),
    ],
)
def test_what_is_no_algorithm_is_measured_anew(searches: list[FakeProduct], name: object) -> None:
    gemm_search.cache_path().parent.mkdir()
    gemm_search.cache_path().write_text(json.dumps({"a": name}))
    gemm_search.expect_decode(64)
    product = FakeProduct(num_tokens=64, name="a")
    assert ask(product) == product.algorithms(3)[2] and searches == [product]


def test_plans_are_remembered_for_an_epilogue() -> None:
    assert gemm_search._parse("csrc/gemm 192x2x128", gemm.PLAIN) == gemm.Plan(192, 2)
    assert gemm_search._parse("csrc/gemm 192x2x128", gemm.RESIDUAL) is None


def test_the_way_of_swiglu_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMA3_KERNEL_CACHE", str(tmp_path))
    x, gate_up = torch.zeros(300, 16, dtype=BF16), torch.zeros(32, 16, dtype=BF16)
    for i, plan in enumerate((None, *gemm.PLANS[gemm.SWIGLU])):
        monkeypatch.setattr(gemm_search, "fastest", lambda ways, x, weight, i=i: i)
        assert gemm_search._fastest_swiglu(str(i), x, gate_up, torch.clone) == plan
    monkeypatch.setattr(gemm_search, "fastest", None)
    assert gemm_search._fastest_swiglu("3", x, gate_up, torch.clone) == gemm.Plan(224)
    remembered = {"0": "apart", "1": "csrc/gemm 256x1x128", "2": "csrc/gemm 192x1x256", "3": "csrc/gemm 224x1x128"}
    assert json.loads(gemm_search.cache_path().read_text()) == remembered


def test_copies_of_a_weight_are_aligned() -> None:
    weight = torch.randn(9, 40).to(BF16)
    copies = gemm_search._copies(weight)
    assert len(copies) == gemm_search.MAX_COPIES and all(torch.equal(copy, weight) for copy in copies)
    assert (copies[1].data_ptr() - copies[0].data_ptr()) % cublaslt.ALIGNMENT == 0


def test_a_cache_that_cannot_be_written_is_done_without(searches: list[FakeProduct]) -> None:
    gemm_search.cache_path().parent.touch()  # a file where the folder would be
    gemm_search.expect_decode(64)
    product = FakeProduct(num_tokens=64, name="a")
    assert ask(product) == ask(product) == product.algorithms(3)[2] and len(searches) == 1


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_spoilt_cache_is_measured_anew(searches: list[FakeProduct], text: str) -> None:
    gemm_search.cache_path().parent.mkdir()
    gemm_search.cache_path().write_text(text)
    gemm_search.expect_decode(64)
    ask(FakeProduct(num_tokens=64, name="a"))
    assert len(searches) == 1 and set(json.loads(gemm_search.cache_path().read_text())) == {"a"}


def test_the_structure_of_cublaslt() -> None:
    """cublasLtMatmulHeuristicResult_t: a shifted field would hand the library a broken algorithm."""
    assert ctypes.sizeof(cublaslt._Heuristic) == 96
    assert cublaslt._Heuristic.workspace_bytes.offset == cublaslt.ALGORITHM_BYTES
    assert cublaslt._Heuristic.state.offset == 72
