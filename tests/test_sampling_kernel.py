"""The sampling kernels without a GPU: they build, their integer orderings are right, and bad arguments are named."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import load_custom_kernels
from llama3.decode_state import DecodeState
from llama3.errors import UserError
from llama3.ops import sampling
from llama3.sampling import SamplingTensors

# Every bf16 value in order, and the float halfway to the next: keys must follow, and come back.
ORDERING = r"""
#include <cstdio>
#include "sampling/ordering.cuh"
using namespace sampling;

int failures = 0;
void expect(bool holds, const char* what, float x) {
    if (!holds && failures++ < 5) printf("%s fails at %a\n", what, x);
}

template <typename T>
void check_keys(float x) {
    expect(value_of<T>(key_of<T>(x)) == x, "value_of(key_of(x)) == x", x);
    expect(value_of<T>(key_of<T>(x) + 1) > x || x == 0, "the next key's value is greater", x);
    expect(at_or_below<T>(x) <= x, "at_or_below of a value", x);
}

int main() {
    float last = -INFINITY;
    for (uint32_t order = 0x0080; order <= 0xFF7F; ++order) {  // ordered upper halves of all finite bf16
        const float x = bits_float(order >> 15 ? (order & 0x7FFF) << 16 : (~order & 0xFFFF) << 16);
        expect(x > last || (x == 0 && last == 0), "the test counts upwards", x);
        check_keys<__nv_bfloat16>(x);
        check_keys<float>(x);
        expect(ordered(x) > ordered(last), "ordered grows", x);
        expect(from_ordered(ordered(x)) == x, "from_ordered(ordered(x)) == x", x);
        const int ordinal = ordinal_of(x);
        expect(ordinal >= ordinal_of(last) || order == 0x0080, "ordinals grow", x);
        expect(lowest_of_ordinal(ordinal) <= x && x <= highest_of_ordinal(ordinal), "a value lies in its ordinal", x);
        expect(ordinal_of(lowest_of_ordinal(ordinal)) == ordinal, "the lowest of an ordinal", x);
        expect(ordinal_of(highest_of_ordinal(ordinal)) == ordinal, "the highest of an ordinal", x);
        if (ordinal != 0) {
            expect(key_of<__nv_bfloat16>(lowest_of_ordinal(ordinal)) == key_of<__nv_bfloat16>(x) &&
                   key_of<__nv_bfloat16>(highest_of_ordinal(ordinal)) == key_of<__nv_bfloat16>(x),
                   "one bf16 value an ordinal", x);
            expect(value_of_ordinal(ordinal) == x, "the value of an ordinal", x);
        }
        if (x < 3e38f && x > -3e38f) {
            const float between = bits_float(float_bits(x) + (x < 0 ? -0x1234u : 0x1234u));
            expect(at_or_below<__nv_bfloat16>(between) <= between, "at_or_below between values", between);
            expect(value_of<__nv_bfloat16>(key_of<__nv_bfloat16>(between)) >= at_or_below<__nv_bfloat16>(between),
                   "at_or_below is below the key's value", between);
        }
        last = x;
    }
    for (int i = 0; i < 0x7C00; ++i) {  // all finite fp16, both signs
        const float x = __half2float(__ushort_as_half(i));
        expect(value_of<__half>(key_of<__half>(x)) == x && value_of<__half>(key_of<__half>(-x)) == -x, "fp16 keys", x);
    }
    expect(ordered_for_max(-0.f) == ordered_for_max(0.f), "both zeros are equal", 0);
    expect(ordered_for_max(-NAN) > ordered_for_max(INFINITY), "NaN is the greatest", NAN);
    expect(pack_candidate(7, 3) > pack_candidate(7, 4) && pack_candidate(8, 4) > pack_candidate(7, 3), "candidates", 0);
    const uint64_t packed = pack_candidate(ordered(2.5f), 9);
    expect(candidate_id(packed) == 9 && candidate_score(packed) == 2.5f, "candidates unpack", 2.5f);
    return failures != 0;
}
"""


@pytest.mark.nvcc
def test_orderings(tmp_path: Path) -> None:
    source = tmp_path / "ordering.cu"
    source.write_text(ORDERING)
    program = tmp_path / "ordering"
    flags = ["-std=c++17", "-O1", "--expt-relaxed-constexpr", f"-I{load_custom_kernels.CSRC}"]
    subprocess.run(["nvcc", *flags, str(source), "-o", str(program)], check=True, timeout=120)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


@pytest.fixture(scope="module")
def library():
    return load_custom_kernels.load("sampling", load_custom_kernels.DEFAULT_ARCH)


def launch(library, **changes) -> None:
    """The launcher with arguments that are right until changed; every mistake is found before CUDA is called."""
    rules = dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "seed", "request", "sample"), 0)
    arguments = {
        "logits": 0,
        "stride_logits_row": 64,
        "batch": 2,
        "vocab_size": 64,
        "dtype": 0,
        "rules": library.Rules(**rules),
        "positions": 0,
        "out": 0,
        "state": library.State(),
        "mode": 0,
        "blocks_per_row": 1,
        "overlap": False,
        "stream": 0,
    }
    library.sample(**arguments | changes)


@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"batch": 65536}, "batch is 65536"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"blocks_per_row": 3}, "blocks_per_row is 3"),
        ({"blocks_per_row": 32}, "blocks_per_row is 32"),
        ({"dtype": 7}, "dtype must be"),
        ({"state": "half"}, "decode state is incomplete"),
    ],
)
def test_the_launcher_names_what_it_does_not_support(library, changes: dict, message: str) -> None:
    if changes.get("state") == "half":
        changes = {"state": library.State(token_ids=16)}
    with pytest.raises(ValueError, match=message):
        launch(library, **changes)


@pytest.mark.nvcc
def test_kernels_have_room_for_two_blocks_a_multiprocessor() -> None:
    kernels = load_custom_kernels.build(["sampling"], [load_custom_kernels.DEFAULT_ARCH])[0].kernels
    assert len(kernels) == 9
    for kernel in kernels:
        assert kernel["registers"] <= 64 and kernel["spill_bytes"] == 0 and kernel["stack_bytes"] == 0, kernel


def meta_arguments(batch: int = 3, vocab_size: int = 64) -> dict:
    return {
        "logits": torch.empty(batch, vocab_size, dtype=torch.bfloat16, device="meta"),
        "params": SamplingTensors.allocate(batch, "meta"),
        "positions": torch.empty(batch, dtype=torch.int32, device="meta"),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logits", torch.empty(64, dtype=torch.bfloat16, device="meta"), r"logits is torch.bfloat16 \[64\]"),
        ("logits", torch.empty(3, 64, dtype=torch.float64, device="meta"), "expected bfloat16, float16 or float32"),
        ("logits", torch.empty(64, 3, device="meta").T, "contiguous columns"),
        ("logits", torch.empty(3, 0, device="meta"), r"\[3, 0\]"),
        ("logits", torch.empty(65536, 8, device="meta"), "65536 rows"),
        (
            "positions",
            torch.empty(3, dtype=torch.int64, device="meta"),
            r"positions .* expected contiguous torch.int32",
        ),
        ("positions", torch.empty(4, dtype=torch.int32, device="meta"), r"expected contiguous torch.int32 \[3\]"),
        ("positions", torch.empty(3, dtype=torch.int32), "one CUDA device"),
        ("params", SamplingTensors.allocate(4, "meta"), r"params.temperature is torch.float32 \[4\]"),
        ("out", torch.empty(3, dtype=torch.int32, device="meta"), r"out is torch.int32"),
    ],
)
def test_argument_errors(name: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampling.sample(**meta_arguments() | {name: value})


def test_wrong_dtype_of_a_rule() -> None:
    arguments = meta_arguments()
    arguments["params"] = replace(arguments["params"], top_k=torch.empty(3, dtype=torch.int32, device="meta"))
    with pytest.raises(UserError, match=r"params.top_k is torch.int32 \[3\]"):
        sampling.sample(**arguments)


def test_tensors_on_the_cpu_are_refused() -> None:
    logits, positions = torch.empty(3, 64), torch.empty(3, dtype=torch.int32)
    with pytest.raises(UserError, match="one CUDA device"):
        sampling.sample(logits, SamplingTensors.allocate(3, "cpu"), positions)


def test_more_rows_than_the_state_has() -> None:
    arguments = meta_arguments()
    del arguments["positions"]
    with pytest.raises(UserError, match="logits has 3 rows, and the decode state only 2"):
        sampling.sample_and_place(**arguments, state=DecodeState(2, 1, torch.device("meta")))


def test_fake_implementations() -> None:
    arguments = meta_arguments()
    positions = arguments.pop("positions")
    for result in (
        sampling.sample(**arguments, positions=positions),
        sampling.sample_and_place(**arguments, state=DecodeState(4, 2, torch.device("meta"))),
    ):
        assert result.shape == (3,) and result.dtype == torch.int64 and result.is_meta


@pytest.mark.parametrize(
    ("batch", "vocab_size", "largest", "filtered", "expected"),
    [
        (1, 128256, 16, True, 16),
        (1, 128256, 1, True, 1),
        (1, 512, 16, True, 1),
        (1, 16384, 16, False, 4),
        (16, 128256, 16, True, 8),
        (64, 128256, 8, True, 4),
        (64, 128256, 8, False, 2),
        (256, 128256, 8, True, 1),
        (5000, 128256, 8, True, 1),
    ],
)
def test_blocks_per_row(batch: int, vocab_size: int, largest: int, filtered: bool, expected: int) -> None:
    assert sampling.choose_blocks_per_row(batch, vocab_size, 132, largest, filtered) == expected
