"""Caches with poison in them, and the truth that decode attention is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 64
MAX_SCORES = 1 << 30  # elements of the expected result's scores that exist at a time


@dataclass
class Case:
    """One decode-attention input; everything that must not be read is NaN."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    lengths: torch.Tensor  # int32 [B]
    rows: dict  # slots + blocks_per_slot, or block_table
    blocks: torch.Tensor  # int64 [sequences, max_blocks], where the blocks are; row i reads sequence i % sequences

    def dense(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one row, [num_kv_heads, tokens, head_dim]."""
        tokens = max(int(self.lengths[row]), 0)
        picked = self.blocks[row % len(self.blocks), : -(-tokens // BLOCK)]
        k, v = (c[picked].transpose(0, 1).flatten(1, 2)[:, :tokens] for c in (self.k_cache, self.v_cache))
        return k, v


def make_case(
    lengths: list[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    paged: bool = False,
    shuffled_slots: bool = False,
    spare_blocks: int = 0,
    strided: bool = False,
    seed: int = 0,
    device: str = "cuda",
) -> Case:
    """Random inputs. `spare_blocks` more blocks a row than needed; `strided` puts the cache inside a wider tensor,
    sequence major, so that no stride is the default one."""
    g = torch.Generator(device=device).manual_seed(seed)
    batch = len(lengths)
    need = max(1, -(-max(lengths) // BLOCK)) + spare_blocks
    total = batch * need + 3
    order = torch.randperm(total - 3, generator=g, device=device) if paged else torch.arange(total - 3, device=device)
    blocks = order.view(batch, need)
    if strided:
        caches = [
            torch.full((total, BLOCK, num_kv_heads, head_dim + 64), float("nan"), dtype=dtype, device=device)[
                ..., 64:
            ].transpose(1, 2)
            for _ in range(2)
        ]
    else:
        caches = [
            torch.full((total, num_kv_heads, BLOCK, head_dim), float("nan"), dtype=dtype, device=device)
            for _ in range(2)
        ]
    rows: dict = {"block_table": blocks.int().contiguous()} if paged else {"blocks_per_slot": need}
    if shuffled_slots and not paged:
        slots = torch.randperm(batch, generator=g, device=device)
        blocks = blocks[slots]
        rows["slots"] = slots.int()
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    position = torch.arange(need * BLOCK, device=device).view(1, need, BLOCK)
    valid = position < lens.view(-1, 1, 1)  # [B, need, 64]
    for cache in caches:
        for head in range(num_kv_heads):  # one head at a time keeps the scratch small
            data = torch.randn(batch, need, BLOCK, head_dim, generator=g, device=device, dtype=torch.float32).to(dtype)
            data[~valid] = float("nan")
            cache[blocks, head] = data
    q = torch.randn(batch, num_heads, head_dim, generator=g, device=device).to(dtype)
    return Case(q, caches[0], caches[1], lens, rows, blocks)


def with_batch(case: Case, batch: int) -> Case:
    """`batch` rows with queries of their own over the sequences of `case`, which all have one length: row i reads
    sequence i % sequences, so that a large batch fits into memory. `case` has slots or a block table."""
    sequences = torch.arange(batch, device=case.q.device) % len(case.blocks)
    rows = {name: x[sequences] if isinstance(x, torch.Tensor) else x for name, x in case.rows.items()}
    g = torch.Generator(device=case.q.device).manual_seed(batch)
    q = torch.randn(batch, *case.q.shape[1:], generator=g, device=case.q.device).to(case.q.dtype)
    return Case(q, case.k_cache, case.v_cache, case.lengths[:1].repeat(batch), rows, case.blocks[:batch])


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, compute: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T) v in `compute` for one row: q [Hq, D], k and v [Hkv, S, D] -> out [Hq, D], lse [Hq]."""
    if k.shape[1] == 0:
        return torch.zeros_like(q, dtype=compute), torch.full(
            (q.shape[0],), float("-inf"), dtype=compute, device=q.device
        )
    grouped = q.to(compute).view(k.shape[0], -1, q.shape[-1])
    scores = (grouped @ k.to(compute).transpose(1, 2)) * scale
    out = torch.softmax(scores, -1) @ v.to(compute)
    return out.reshape(q.shape), torch.logsumexp(scores, -1).flatten()


def truth(
    case: Case, compute: torch.dtype = torch.float64, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = case.q.shape[-1] ** -0.5 if scale is None else scale
    lengths = case.lengths.tolist()
    if len(set(lengths)) == 1 and lengths[0] > 0:
        return _truth_of_equal_lengths(case, lengths[0], compute, scale)
    results = [attend(case.q[i], *case.dense(i), scale, compute) for i in range(len(lengths))]
    return torch.stack([out for out, _ in results]), torch.stack([lse for _, lse in results])


def _truth_of_equal_lengths(
    case: Case, length: int, compute: torch.dtype, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows of a sequence at once, in as many rounds as it takes to keep the scores small."""
    sequences, (batch, num_heads, d) = len(case.blocks), case.q.shape
    used = -(-length // BLOCK)
    k, v = (
        c[case.blocks[:, :used]].transpose(1, 2).flatten(2, 3)[:, :, :length].to(compute)
        for c in (case.k_cache, case.v_cache)
    )  # [sequences, num_kv_heads, length, head_dim]
    num_kv_heads = k.shape[1]
    rounds = -(-batch // sequences)
    q = case.q.new_zeros(rounds * sequences, num_heads, d)
    q[:batch] = case.q
    q = q.view(rounds, sequences, num_kv_heads, -1, d)
    at_once = max(1, MAX_SCORES // (sequences * num_heads * length))
    outs, lses = [], []
    for part in q.split(at_once):  # [n, sequences, num_kv_heads, group, head_dim]
        rows = part.to(compute).permute(1, 2, 0, 3, 4).flatten(2, 3)
        scores = (rows @ k.transpose(2, 3)) * scale
        shape = (sequences, num_kv_heads, len(part), -1)
        lses.append(torch.logsumexp(scores, -1).view(shape).permute(2, 0, 1, 3).reshape(-1, num_heads))
        out = torch.softmax(scores, -1) @ v
        outs.append(out.view(*shape, d).permute(2, 0, 1, 3, 4).reshape(-1, num_heads, d))
    return torch.cat(outs)[:batch], torch.cat(lses)[:batch]


def error(x: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative error in the Frobenius norm; inf if x is not finite."""
    difference = (x.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30)
    return difference.item() if torch.isfinite(x).all() else float("inf")


def assert_close(out: torch.Tensor, case: Case, reference: torch.Tensor) -> float:
    """The numerics contract: at most twice the error of the same op in 16-bit PyTorch, plus one rounding."""
    allowed = 2 * error(truth(case, case.q.dtype)[0], reference) + torch.finfo(case.q.dtype).eps
    found = error(out, reference)
    assert found <= allowed, f"relative error {found:.2e}, allowed {allowed:.2e}"
    return found
