"""A small matrix of decode-attention launches for compute-sanitizer (not collected by pytest):

PYTHONPATH=.:tests compute-sanitizer --tool memcheck|racecheck|synccheck --kernel-regex kns=decode_attn \\
    python tests/sanitize_decode_attn.py

The filter leaves out the library's matrix products that the expected results come from; racecheck objects to those.
"""

from __future__ import annotations

import torch
from decode_attn_helpers import assert_close, make_case, truth

from llama3.ops import decode_attn as ops


def main() -> None:
    launches = 0
    for version in ("tensor_core", "ring", "tma"):
        for heads in ((32, 8, 128), (3, 1, 64)):
            for paged, lengths in ((False, [1, 0, 64, 65, 700]), (True, [2000])):
                case = make_case(lengths, *heads, paged=paged)
                out = torch.empty_like(case.q)
                ops.decode_attn(case.q, case.k_cache, case.v_cache, case.lengths, **case.rows, out=out, version=version)
                torch.cuda.synchronize()
                assert_close(out, case, truth(case)[0])
                launches += 1
    for version in ("ring", "tma"):
        case = make_case([0, 63, 64, -1, 300], 32, 8, 128, spare_blocks=1)
        qkv = torch.randn(5, 48 * 128, device="cuda").bfloat16()
        table = torch.randn(400, 64, device="cuda")
        out = ops.rope_append_decode(
            qkv, table, table, case.k_cache, case.v_cache, case.lengths, **case.rows, version=version
        )
        assert torch.isfinite(out).all()
        launches += 1
    print(f"{launches} launches checked")


if __name__ == "__main__":
    main()
