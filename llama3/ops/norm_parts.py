"""RMSNorm in two parts, which the product that makes a hidden state leaves for the product that wants its norm."""

from __future__ import annotations

from typing import NamedTuple

import torch

from llama3.ops.tensor_error import wrong_tensor


class NormParts(NamedTuple):
    """Of RMSNorm of x [T, H]: it is `weighted`, each token of it times rsqrt(its sum of squares / H + eps).

    A product scales its sums by that number, which replaces a pass over x (docs/cuda-ops.md).
    """

    weighted: torch.Tensor  # [T, H], x times the norm's weight
    squares: torch.Tensor  # fp32 [P, T]: their sum over P is that of a token's squares

    @staticmethod
    def empty(x: torch.Tensor, count: int) -> NormParts:
        """Not written yet, for x [T, H] and `count` sums of squares a token."""
        return NormParts(torch.empty_like(x), x.new_empty((count, x.shape[0]), dtype=torch.float32))

    def check(self, op: str, x: torch.Tensor) -> None:
        """Raises UserError if these cannot be parts of the norm of x."""
        weighted, squares = self
        if weighted.shape != x.shape or weighted.dtype != x.dtype or not weighted.is_contiguous():
            raise wrong_tensor(op, "parts.weighted", weighted, f"contiguous {x.dtype} {list(x.shape)}")
        if squares.dtype != torch.float32 or squares.shape[1:] != x.shape[:1] or not squares.is_contiguous():
            raise wrong_tensor(op, "parts.squares", squares, f"contiguous torch.float32 [P, {x.shape[0]}]")
        for name, part in (("weighted", weighted), ("squares", squares)):
            if part.device != x.device:
                raise wrong_tensor(op, f"parts.{name}", part, f"it on {x.device}")

    def check_norm(self, op: str, norm: torch.Tensor) -> None:
        """Raises UserError if `norm` cannot be the weight of the norm whose parts these are."""
        size = self.weighted.shape[1]
        if tuple(norm.shape) != (size,) or norm.dtype != self.weighted.dtype or not norm.is_contiguous():
            raise wrong_tensor(op, "next_norm", norm, f"contiguous {self.weighted.dtype} [{size}]")
        if norm.device != self.weighted.device:
            raise wrong_tensor(op, "next_norm", norm, f"it on {self.weighted.device}")
