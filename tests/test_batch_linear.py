"""What can be known of the products for a decode step without a GPU: what they refuse, and how they are cut."""

import contextlib

import pytest
import torch

from llama3.errors import UserError
from llama3.ops import batch_linear, batch_plans, linear, one_kernel, plan_table, skinny_linear
from llama3.ops.batch_plans import SPLITS, choose_plan
from llama3.ops.cublaslt import ALIGNMENT
from llama3.ops.one_kernel import LINEAR, LINEAR_ADD, NORM_LINEAR, NORM_SWIGLU
from llama3.shapes import shape_config
from tests.disassembly import instructions

BF16 = torch.bfloat16
GOOD = {"x": 4096, "weight": 4096, "residual": 0, "out": 4096, "num_tokens": 64, "num_rows": 64}
GOOD |= {"squares": 4096, "count": 8}
GOOD |= {"size": 128, "eps": 1e-5, "form": NORM_LINEAR, "splits": 1, "trigger": 4, "shared_bytes": 106 << 10}
GOOD |= {"tile_rows": 128, "ahead": 14, "x_stages": 14, "overlap": False, "stream": 0}
ADDING = {"form": LINEAR_ADD, "residual": 4096}


@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_tokens": 0}, "num_tokens is 0; supported: 1 to 128"),
        ({"num_tokens": 129}, "num_tokens is 129"),
        ({"size": 96}, "size is 96; expected a multiple of 64"),
        ({"num_rows": 24, "form": NORM_SWIGLU}, "num_rows is 24; expected a multiple of 16"),
        ({"tile_rows": 16}, "tile_rows is 16; supported here: multiples of 16 from 32 to 128"),
        ({"tile_rows": 48, "num_tokens": 48}, "tile_rows is 48; supported here: multiples of 16 from 64 to 128"),
        ({"tile_rows": 272, "form": NORM_SWIGLU}, "tile_rows is 272; supported here: multiples of 16 from 32 to 256"),
        ({"tile_rows": 136}, "tile_rows is 136"),
        ({"tile_rows": 144}, "tile_rows is 144; supported here: multiples of 16 from 32 to 128"),
        ({"form": LINEAR, "squares": 0, "count": 0}, "tile_rows is 128; .* from 256 to 256"),
        ({"form": LINEAR, "num_tokens": 65, "tile_rows": 256}, "tile_rows is 256; .* from 128 to 128"),
        (
            {"form": LINEAR, "tile_rows": 256, "splits": 2, "squares": 0, "count": 0},
            "splits is 2; supported here: 1 to 1",
        ),
        ({"form": LINEAR, "tile_rows": 256}, "there are 8 sums of squares a token; expected 0, of out"),
        ({"x_stages": 0, "size": 64}, "x_stages is 0; expected 1 or more"),
        ({"x_stages": 1, "size": 256}, "x_stages is 1; expected 2 or more"),
        ({"tile_rows": 144, "form": NORM_SWIGLU, "num_tokens": 65}, "tile_rows is 144; .* 64 to 128"),
        ({"ahead": -1}, "ahead is -1; expected 0 or more stages"),
        ({"splits": 0}, "splits is 0"),
        ({"splits": 3}, "splits is 3; supported here: 1 to 2"),
        ({"splits": 2, "tile_rows": 64}, "splits is 2; supported here: 1 to 1"),  # a stage is all of the columns
        ({"splits": 9, "size": 8192}, "splits is 9; supported here: 1 to 8"),
        ({"residual": 4096}, "a residual belongs to linear_add"),
        ({"form": LINEAR_ADD}, "a residual belongs to linear_add"),
        ({"squares": 0}, "there are 8 sums of squares a token; expected 1 or more, of x"),
        ({"count": 0}, "there are 0 sums of squares a token; expected 1 or more, of x"),
        (ADDING, "there are 8 sums of squares a token; expected 4, of out"),
        (ADDING | {"squares": 0}, "there are 8 sums of squares a token; expected 0"),
        (ADDING | {"squares": 4098, "count": 4}, "squares must be 16-byte aligned"),
        ({"x": 4098}, "x must be 16-byte aligned"),
        ({"out": 4098}, "out must be 16-byte aligned"),
        (
            {"shared_bytes": 40 << 10},
            "a block needs [0-9]+ bytes .* in 2 stages, and may have 40960 and 2",
        ),
        (  # room for what the blocks of the cluster send, not only for two stages
            ADDING | {"squares": 0, "count": 0, "size": 4096, "splits": 7, "shared_bytes": 57 << 10},
            "a block needs [0-9]+ bytes .* in 3 stages, and may have 58368 and 10",
        ),
    ],
)
def test_the_kernel_refuses(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_linear.library().product(**(GOOD | wrong))


@pytest.mark.nvcc
def test_the_loop_has_its_addresses_in_uniform_registers() -> None:
    """Where `wgmma` takes them from: others have to be moved there (R2UR) before it starts, stage after stage; and what
    is the same in every round is not made anew (S2UR)."""
    kernels = instructions(batch_linear.library().__file__, "batch_linear_kernel")
    assert len(kernels) > 20
    for name, found in kernels.items():
        first = next(i for i, line in enumerate(found) if "HGMMA" in line)
        waited = max(i for i, line in enumerate(found[:first]) if "TRYWAIT" in line)
        assert not [line for line in found[waited - 12 : first] if "R2UR" in line or "S2UR" in line], name


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((64,), (16, 64)), "x is .*expected .*T, K"),
        (((40, 64), (32, 128)), r"weight is .*expected contiguous torch.bfloat16 \[32, 64\]"),
        (((40, 64), (32, 64)), "x is on cpu; expected a CUDA device"),
    ],
)
def test_tensors_are_named(shapes: tuple, message: str) -> None:
    x, weight = (torch.zeros(shape, dtype=BF16) for shape in shapes)
    with pytest.raises(UserError, match=message):
        batch_linear.norm_linear(x, weight, 1e-5)


@pytest.mark.parametrize("residual", (torch.zeros(32, dtype=BF16), torch.zeros(40, 16, dtype=BF16)))
def test_a_wrong_residual_is_named_before_anything_is_made_for_the_next_norm(residual: torch.Tensor) -> None:
    x, weight = (torch.zeros(shape, dtype=BF16) for shape in ((40, 64), (32, 64)))
    with pytest.raises(UserError, match=r"residual is .*expected contiguous torch.bfloat16 \[40, 32\]"):
        batch_linear.linear_add_squares(x, weight, residual)


def test_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_kernel, "is_hopper", lambda device: device.type == "cuda")
    monkeypatch.setattr(one_kernel, "has_fast_memory", lambda device: False)
    cuda = torch.device("cuda")
    assert batch_linear.pays(64, 2048, 2048, BF16, cuda) and batch_linear.pays(17, 3072, 2048, BF16, cuda)
    assert batch_linear.pays(128, 28672, 4096, BF16, cuda)
    assert not batch_linear.pays(64, 2048, 2048, BF16, torch.device("cpu"))
    assert not batch_linear.pays(64, 2048, 2048, torch.float16, cuda)
    assert not batch_linear.pays(16, 2048, 2048, BF16, cuda)
    assert not batch_linear.pays(129, 4096, 4096, BF16, cuda)
    assert not batch_linear.pays(64, 2048, 2040, BF16, cuda)
    assert not batch_linear.pays(64, 128256, 2048, BF16, cuda)


def test_where_they_run_on_a_gpu_of_fast_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_kernel, "is_hopper", lambda device: True)
    monkeypatch.setattr(one_kernel, "has_fast_memory", lambda device: True)
    cuda = torch.device("cuda")
    assert batch_linear.pays(64, 2048, 8192, BF16, cuda) and batch_linear.pays(17, 3072, 2048, BF16, cuda)
    assert batch_linear.pays(64, 28672, 4096, BF16, cuda) and not batch_linear.pays(65, 2048, 2048, BF16, cuda)
    assert batch_linear.pays(9, 2048, 8192, BF16, cuda) and not batch_linear.pays(8, 2048, 8192, BF16, cuda)
    assert batch_linear.pays(17, 6144, 4096, BF16, cuda) and not batch_linear.pays(16, 6144, 4096, BF16, cuda)


@pytest.mark.parametrize("fast_memory", (False, True))
@pytest.mark.parametrize("shape", ((2048, 8192), (16384, 2048), (3072, 8192), (28672, 4096)))
def test_every_token_count_has_one_family(
    shape: tuple[int, int], fast_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_kernel, "is_hopper", lambda device: True)
    monkeypatch.setattr(one_kernel, "has_fast_memory", lambda device: fast_memory)
    for num_tokens in range(1, (64 if fast_memory else 128) + 1):
        given = num_tokens, *shape, BF16, torch.device("cuda")
        assert skinny_linear.pays(*given) != batch_linear.pays(*given)
        assert num_tokens >= batch_linear.MIN_TOKENS or not batch_linear.pays(*given)  # or the embedding has no squares


@pytest.mark.nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="would launch with addresses that are not memory")
@pytest.mark.parametrize("fast_memory", (False, True))
@pytest.mark.parametrize("num_tokens", (8, 16, 17, 33, 64, 96, 128))
@pytest.mark.parametrize("shape", ("1b", "3b", "8b", "tiny"))
def test_plans_are_what_the_kernel_takes(shape: str, num_tokens: int, fast_memory: bool) -> None:
    c = shape_config(shape)
    products = [(NORM_LINEAR, c.qkv_size, c.hidden_size), (LINEAR_ADD, c.hidden_size, c.q_size)]
    products += [
        (NORM_SWIGLU, 2 * c.intermediate_size, c.hidden_size),
        (LINEAR_ADD, c.hidden_size, c.intermediate_size),
    ]
    for form, num_rows, size in products:
        plan = choose_plan(form, num_tokens, num_rows, size, 132, fast_memory)
        assert plan.splits in SPLITS
        operands = {"residual": 4096, "squares": 0, "count": 0} if form == LINEAR_ADD else {}
        given = {"num_tokens": num_tokens, "num_rows": num_rows, "size": size, "form": form}
        given |= plan._asdict()
        with contextlib.suppress(RuntimeError):  # the checks are passed, and there is no GPU
            batch_linear.library().product(**(GOOD | operands | given))


def test_llama_1b_fills_the_machine_once() -> None:
    """The plans that were the best of those measured on 132 multiprocessors."""
    products = {"qkv": (NORM_LINEAR, 3072, 2048), "o": (LINEAR_ADD, 2048, 2048)}
    products |= {"gate-up": (NORM_SWIGLU, 16384, 2048), "down": (LINEAR_ADD, 2048, 8192)}
    splits = {name: choose_plan(form, 64, *shape, num_sms=132).splits for name, (form, *shape) in products.items()}
    assert splits == {"qkv": 4, "o": 8, "gate-up": 1, "down": 8}


@pytest.mark.parametrize("num_rows", (3072, 4096, 5120, 6144, 16384, 28672))
def test_with_fast_memory_every_multiprocessor_has_one_tile(num_rows: int) -> None:
    """Or, where that would take a cluster that finds few places, most of them have."""
    form = NORM_SWIGLU if num_rows > 8192 else LINEAR_ADD  # whose tiles may be taller
    plan = choose_plan(form, 64, num_rows, 4096, 132, fast_memory=True)
    blocks = -(-num_rows // plan.tile_rows) * plan.splits
    assert 0.8 * 132 <= blocks <= batch_plans.CLUSTERS_AT_ONCE[plan.splits] * plan.splits <= 132


def test_llama_8b_runs_as_measured_with_fast_memory_by_the_rule() -> None:
    products = {"qkv": (NORM_LINEAR, 6144, 4096), "o": (LINEAR_ADD, 4096, 4096)}
    products |= {"gate-up": (NORM_SWIGLU, 28672, 4096), "down": (LINEAR_ADD, 4096, 14336)}
    plans = {name: choose_plan(form, 64, *shape, 131, True) for name, (form, *shape) in products.items()}
    assert {name: (plan.splits, plan.tile_rows) for name, plan in plans.items()} == {
        "qkv": (2, 96), "o": (2, 64), "gate-up": (1, 224), "down": (2, 64),
    }  # fmt: skip


def test_plans_that_were_found_run_where_they_were_found() -> None:
    for (family, (form, tokens, *shape)), fields in plan_table.plans().items():
        if family != batch_plans.FAMILY:
            continue
        plan = batch_plans.Plan(**fields)
        assert choose_plan(form, tokens, *shape, 132, True) == plan
        assert choose_plan(form, tokens - 15, *shape, 132, True) == plan  # in the same kernel
        elsewhere = choose_plan(form, tokens, *shape, 114, True), choose_plan(form, tokens, *shape, 132, False)
        assert all(other.tile_rows >= batch_plans.MIN_TILE_ROWS for other in elsewhere)
    assert choose_plan(NORM_LINEAR, 64, 3072, 2048, 132, True) != choose_plan(NORM_LINEAR, 64, 3072, 2048, 114, True)


def test_where_the_head_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_kernel, "is_hopper", lambda device: device.type == "cuda")
    monkeypatch.setattr(one_kernel, "has_fast_memory", lambda device: True)
    cuda, vocabulary = torch.device("cuda"), 128256
    assert batch_linear.pays_at_head(1, vocabulary, 2048, BF16, cuda)
    assert batch_linear.pays_at_head(64, vocabulary, 4096, BF16, cuda)
    assert not batch_linear.pays_at_head(65, vocabulary, 2048, BF16, cuda)
    assert not batch_linear.pays_at_head(8, 16384, 2048, BF16, cuda)
    assert not batch_linear.pays_at_head(8, vocabulary + 1, 2048, BF16, cuda)
    assert not batch_linear.pays_at_head(8, vocabulary, 2048, torch.float16, cuda)
    assert not batch_linear.pays_at_head(8, vocabulary, 2048, BF16, torch.device("cpu"))
    monkeypatch.setattr(one_kernel, "has_fast_memory", lambda device: False)
    assert not batch_linear.pays_at_head(8, vocabulary, 2048, BF16, cuda)


@pytest.mark.parametrize(("apart", "own"), ((0, True), (1, False)), ids=("as it is", "copied"))
def test_a_head_that_had_to_be_copied_is_not_read_early(monkeypatch: pytest.MonkeyPatch, apart: int, own: bool) -> None:
    """The kernel reads weights before the previous kernel has ended, and that one would be the copy."""
    memory = torch.ones(32 * 64 + ALIGNMENT, dtype=BF16)
    first = -memory.data_ptr() % ALIGNMENT // 2 + apart  # elements to an aligned address, and on
    weight, x = memory[first : first + 32 * 64].view(32, 64), torch.ones(2, 64, dtype=BF16)
    ran: list[str] = []
    monkeypatch.setattr(batch_linear, "pays_at_head", lambda *shape: True)
    monkeypatch.setattr(batch_linear, "linear", lambda x, weight: ran.append("own") or x)
    monkeypatch.setattr(linear.gemm_search, "algorithm_for", lambda *arguments: ran.append("library"))
    monkeypatch.setattr(linear.gemm_search, "run", lambda *arguments: None)
    linear.product(x, weight)
    linear.product(x, weight, allow_own=False)
    assert ran == ["own" if own else "library", "library"]
