"""Decode attention without a GPU: argument checks, the schedule's arithmetic, the fake ops."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from llama3.errors import UserError
from llama3.ops import decode_attn as ops


def arguments(**changes) -> dict:
    """Valid arguments of decode_attn but for the device."""
    values = {
        "q": torch.zeros(3, 32, 128, dtype=torch.bfloat16),
        "k_cache": torch.zeros(12, 8, 64, 128, dtype=torch.bfloat16),
        "v_cache": torch.zeros(12, 8, 64, 128, dtype=torch.bfloat16),
        "context_lens": torch.zeros(3, dtype=torch.int32),
        "blocks_per_slot": 4,
    }
    return values | changes


def fused_arguments(**changes) -> dict:
    values = arguments(
        qkv=torch.zeros(3, 48 * 128, dtype=torch.bfloat16),
        cos=torch.zeros(256, 64),
        sin=torch.zeros(256, 64),
        positions=torch.zeros(3, dtype=torch.int32),
    )
    del values["q"], values["context_lens"]
    return values | changes


half = torch.zeros(3, 32, 128, dtype=torch.float16)
BAD = {
    "q dims": ({"q": torch.zeros(3, 128)}, "q is"),
    "q columns": ({"q": torch.zeros(3, 32, 256, dtype=torch.bfloat16)[..., ::2]}, "q is"),
    "q dtype": ({"q": half}, r"q is torch.float16 \[3, 32, 128\].*bfloat16"),
    "head_dim": ({"k_cache": torch.zeros(12, 8, 64, 96, dtype=torch.bfloat16)}, "64 or 128"),
    "block size": ({"k_cache": torch.zeros(12, 8, 32, 128, dtype=torch.bfloat16)}, "k_cache is"),
    "cache dtype": ({"k_cache": torch.zeros(12, 8, 64, 128)}, "bfloat16 or float16"),
    "v shape": ({"v_cache": torch.zeros(11, 8, 64, 128, dtype=torch.bfloat16)}, "v_cache is"),
    "ratio": ({"q": torch.zeros(3, 12, 128, dtype=torch.bfloat16)}, "12 query heads over 8"),
    "ratio 9": ({"q": torch.zeros(3, 72, 128, dtype=torch.bfloat16)}, "72 query heads over 8"),
    "lengths dtype": ({"context_lens": torch.zeros(3, dtype=torch.int64)}, "context_lens is torch.int64"),
    "lengths shape": ({"context_lens": torch.zeros(4, dtype=torch.int32)}, r"context_lens is .*int32 \[3\]"),
    "slots": ({"slots": torch.zeros(3)}, "slots is"),
    "no blocks": ({"blocks_per_slot": 0}, "blocks_per_slot is 0"),
    "cache too small": ({"blocks_per_slot": 5}, "at least 3 slots x 5 blocks"),
    "both": ({"block_table": torch.zeros(3, 4, dtype=torch.int32)}, "not both"),
    "table": ({"block_table": torch.zeros(2, 4, dtype=torch.int32), "blocks_per_slot": 0}, "block_table is"),
    "out": ({"out": torch.zeros(3, 32, 64, dtype=torch.bfloat16)}, "out is"),
    "lse": ({"lse": torch.zeros(3, 31)}, "lse is"),
    "version": ({"version": "fastest"}, "version 'fastest'"),
    "device": ({}, "k_cache is on cpu"),
}


@pytest.mark.parametrize(("changes", "message"), list(BAD.values()), ids=list(BAD))
def test_bad_arguments(changes, message, monkeypatch):
    if "version" in changes:
        monkeypatch.setattr(ops, "_check_device", lambda *a, **k: None)
    with pytest.raises(UserError, match=message):
        ops.decode_attn(**arguments(**changes))


BAD_FUSED = {
    "qkv": ({"qkv": torch.zeros(3, 1000, dtype=torch.bfloat16)}, "qkv is"),
    "no queries": ({"qkv": torch.zeros(3, 16 * 128, dtype=torch.bfloat16)}, "qkv is"),
    "cos": ({"cos": torch.zeros(256, 128)}, "cos is"),
    "sin": ({"sin": torch.zeros(256, 64, dtype=torch.bfloat16)}, "sin is torch.bfloat16"),
    "positions": ({"positions": torch.zeros(3)}, "positions is"),
    "out": ({"out": torch.zeros(3, 32, 128, dtype=torch.bfloat16)}, "out is"),
    "device": ({}, "k_cache is on cpu"),
}


@pytest.mark.parametrize(("changes", "message"), list(BAD_FUSED.values()), ids=list(BAD_FUSED))
def test_bad_fused_arguments(changes, message):
    with pytest.raises(UserError, match=message):
        ops.rope_append_decode(**fused_arguments(**changes))


def test_fake_ops_allocate_the_output():
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments().items()}
    assert ops.decode_attn(**meta).shape == (3, 32, 128)
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in fused_arguments().items()}
    assert ops.rope_append_decode(**meta).shape == (3, 32 * 128)


@pytest.mark.parametrize("num_units", (1, 8, 64, 120, 136, 256, 2048))
def test_other_grids_leave_no_multiprocessor_idle(num_units):
    assert ops.choose_grid(num_units, 132) == 132


@pytest.mark.nvcc
class TestLibrary:
    """The compiled library, which loads and rejects arguments without a GPU."""

    def launch(self, **changes):
        values = dict.fromkeys(
            ("out", "lse", "lengths", "slots", "block_table", "cos", "sin", "partials", "partials_size", "stream"), 0
        )
        values |= dict.fromkeys(("q", "k_cache", "v_cache"), 1 << 20)
        values |= {"q_strides": (4096, 128), "out_strides": (4096, 128)}
        values |= {
            "k_strides": (65536, 8192, 128),
            "v_strides": (65536, 8192, 128),
            "blocks_per_slot": 4,
            "table_stride": 0,
        }
        values |= {"batch": 1, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "num_blocks": 4, "scale": 1.0}
        values |= {"dtype": 0, "grid": 132, "min_tiles": 1, "version": 4, "pdl": False}
        ops.library().decode(**(values | changes))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"head_dim": 96}, "head_dim is 96"),
            ({"num_heads": 72}, "num_heads / num_kv_heads is 9"),
            ({"num_heads": 12}, "multiple of num_kv_heads"),
            ({"batch": 0}, "batch"),
            ({"grid": 0}, "grid"),
            ({"k_strides": (65536, 8192, 129)}, "multiples of 8"),
            ({"v_cache": (1 << 20) + 8}, "16-byte aligned"),
            ({"q_strides": (4096, 127)}, "even"),
            ({"cos": 16, "sin": 0}, "cos and sin"),
            ({"cos": 16, "sin": 16, "version": 1}, "no fused form"),
        ],
    )
    def test_bad_launches(self, changes, message):
        with pytest.raises(ValueError, match=message):
            self.launch(**changes)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_launch_without_a_gpu_says_so(self):
        with pytest.raises(RuntimeError, match="cuda"):
            self.launch()

    @pytest.mark.parametrize("grid", [1, 2, 7, 108, 132, 264])
    @pytest.mark.parametrize("min_tiles", [1, 3, 50])
    def test_every_tile_has_one_range(self, grid, min_tiles):
        for tiles in [0, 1, 2, 5, 31, 131, 132, 133, 256, 1024, 2111, 2112, 2113, 4096, 8192, 65537, 4194304, 16000001]:
            if grid < 8 and tiles > 1 << 20:
                continue  # beyond the range of the fast division
            first = ops.library().first_tiles(tiles, grid, min_tiles)
            assert first[0] == 0
            assert first[-1] == tiles
            sizes = [b - a for a, b in pairwise(first)]
            assert min(sizes) >= 0
            assert (
                all(size >= min(min_tiles, tiles) for size in sizes[:-1] if size and sum(sizes) > size)
                or tiles < grid * min_tiles
            )
            for r in range(grid):
                for tile in {first[r], first[r + 1] - 1} if sizes[r] else ():
                    assert ops.library().range_of(tile, tiles, grid, min_tiles) == r

    @pytest.mark.parametrize("unit_tiles", (1, 3, 9, 33, 64, 700))
    @pytest.mark.parametrize("num_units", (126, 128, 132))
    def test_the_grid_chosen_cuts_no_unit_of_equal_rows(self, num_units, unit_tiles):
        grid = ops.choose_grid(num_units, 132)
        first = ops.library().first_tiles(num_units * unit_tiles, grid, 1)
        assert first == [unit * unit_tiles for unit in range(num_units + 1)]

    def test_long_work_is_even(self):
        first = ops.library().first_tiles(8192, 132, 1)
        assert {b - a for a, b in pairwise(first)} == {62, 63}

    @pytest.mark.parametrize(("head_dim", "shared_bytes", "rows"), [(128, 101376, 874), (64, 101376, 3540)])
    def test_rows_are_limited_by_shared_memory(self, head_dim, shared_bytes, rows):
        found = ops.library().max_batch(head_dim, shared_bytes)
        assert found == pytest.approx(rows, abs=1) and ops.library().max_batch(head_dim, shared_bytes - 12) == found - 1

    def test_workspace_holds_every_partial(self):
        words = ops.library().workspace_floats
        assert words(4, 512, 64, 8, 128, 132) >= 132 * 8 * (128 + 2)
        assert words(4, 1, 1, 1, 64, 132) == words(3, 512, 64, 8, 128, 132)  # one workspace serves every shape
        assert words(0, 4, 32, 8, 128, 132) == 0  # naive: one part, no partials
