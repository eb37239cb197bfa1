"""Drawing the next token: greedy, or Gumbel-max over the tokens that top-k, top-p and min-p leave.

The noise is a counter-based generator's, keyed by (seed, request, sample, position, token id), so a draw depends
neither on the request's neighbours nor on its place in the batch, and no generator state has to be kept.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
MASK_32 = 0xFFFFFFFF

INTEGER_FIELDS = ("top_k", "seed", "request", "sample")
FLOAT_FIELDS = ("temperature", "top_p", "min_p")


@dataclass(frozen=True)
class SamplingTensors:
    """The sampling rules of B rows as device arrays [B].

    temperature, top_p, min_p: fp32. top_k: int64, 0 for no limit. seed, request, sample: int64, the generator's key.
    all_greedy, any_filter: known on the host, so that what no row needs is not computed.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    request: torch.Tensor
    sample: torch.Tensor
    all_greedy: bool = False
    any_filter: bool = True

    @classmethod
    def allocate(cls, num_rows: int, device: torch.device | str) -> "SamplingTensors":
        """Rows that sample greedily until they are assigned something else."""
        arrays: dict[str, Any] = {n: torch.zeros(num_rows, dtype=torch.int64, device=device) for n in INTEGER_FIELDS}
        arrays |= {name: torch.zeros(num_rows, device=device) for name in FLOAT_FIELDS}
        return cls(**arrays)

    def rows(self, index: slice | torch.Tensor) -> "SamplingTensors":
        """The same rules for some of the rows; a slice gives views of the same memory."""
        return replace(self, **{name: getattr(self, name)[index] for name in INTEGER_FIELDS + FLOAT_FIELDS})


def sample_tokens(logits: torch.Tensor, params: SamplingTensors, positions: torch.Tensor) -> torch.Tensor:
    """Draw one token a row: logits [B, V] of any float dtype, positions [B] of the tokens drawn -> int64 [B]."""
    scores = logits.float()
    greedy = scores.argmax(-1)  # the first, so the lowest id, among equals
    if params.all_greedy:
        return greedy
    is_greedy = params.temperature == 0
    scores = scores / torch.where(is_greedy, 1.0, params.temperature)[:, None]
    if params.any_filter:
        scores = filter_scores(scores, params)
    drawn = (scores + gumbel_noise(params, positions, scores.shape[-1])).argmax(-1)
    return torch.where(is_greedy, greedy, drawn)


def filter_scores(scores: torch.Tensor, params: SamplingTensors) -> torch.Tensor:
    """-inf for what top-k, then top-p of the rest, then min-p leave out; scores fp32 [B, V] are already tempered."""
    ordered = scores.sort(-1, descending=True).values
    rank = torch.arange(scores.shape[-1], device=scores.device)
    limit = torch.where(params.top_k > 0, params.top_k, scores.shape[-1])[:, None]
    probabilities = torch.where(rank < limit, ordered, -torch.inf).softmax(-1)
    # A token stays while the mass before it is below top_p, so the likeliest always stays. That mass may round up to 1,
    # and a top_p of 1 leaves nothing out.
    top_p = torch.where(params.top_p < 1, params.top_p, torch.inf)[:, None]
    kept = (probabilities.cumsum(-1) - probabilities < top_p) & (rank < limit)
    kept &= probabilities >= params.min_p[:, None] * probabilities[:, :1]
    kept |= rank == 0  # a top_p may be so small that fp32 makes it 0
    threshold = torch.where(kept, ordered, torch.inf).amin(-1, keepdim=True)
    return torch.where(scores >= threshold, scores, -torch.inf)


def gumbel_noise(params: SamplingTensors, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """fp32 [B, vocab_size] of standard Gumbel noise; element (b, i) depends on row b's key, its position and i only.

    Philox key: the seed's low and high word. Counter: (token id // 4, position, request, sample); output word
    token id % 4 becomes u = (word + 0.5) / 2^32.
    """
    counter = [
        torch.arange(-(-vocab_size // 4), device=positions.device)[None, :],
        positions.long()[:, None],
        params.request[:, None],
        params.sample[:, None],
    ]
    words = philox(counter, [params.seed[:, None] & MASK_32, params.seed[:, None] >> 32])
    word = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :vocab_size]
    # The largest words round up to u = 1, whose noise of -inf could lose against a token that was filtered out.
    uniform = ((word.float() + 0.5) * 2**-32).clamp(max=1 - 2**-24)
    # The winner is the smallest exponential, so precision is wanted where u is near 0: log1p(-u), not log(u).
    return -torch.log(-torch.log1p(-uniform))


def philox(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Philox4x32-10 on int64 tensors of 32-bit words: a counter of four and a key of two -> four, broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # A 64-bit product wraps in int64, but its two 32-bit halves are still the right ones.
        product_0, product_1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product_1 >> 32) & MASK_32 ^ c1 ^ k0,
            product_1 & MASK_32,
            (product_0 >> 32) & MASK_32 ^ c3 ^ k1,
            product_0 & MASK_32,
        )
        k0, k1 = (k0 + PHILOX_KEY_STEPS[0]) & MASK_32, (k1 + PHILOX_KEY_STEPS[1]) & MASK_32
    return [c0, c1, c2, c3]
