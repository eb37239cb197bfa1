"""The numerics contract: a low-precision result may err at most twice what PyTorch in that precision errs."""

import torch

# One unit of rounding at magnitude 1, for results that PyTorch happens to hit exactly.
ROUNDING_FLOOR = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23}


def assert_within_contract(
    result: torch.Tensor, truth: torch.Tensor, same_precision: torch.Tensor, factor: float = 2.0
) -> None:
    """`truth` is fp32 or fp64, `same_precision` the same op by PyTorch in the dtype of `result`.

    Largest and root-mean-square errors are bounded by `factor` times PyTorch's, plus one rounding of the largest and
    of the root-mean-square value; a NaN or infinity anywhere fails.
    """
    assert result.shape == truth.shape == same_precision.shape
    truth = truth.double().to(result.device)
    error = (result.double() - truth).abs()
    allowed = (same_precision.double().to(result.device) - truth).abs()
    assert torch.isfinite(error).all(), f"{int((~torch.isfinite(error)).sum())} elements are not finite"
    floor = ROUNDING_FLOOR[result.dtype]
    for name, measure in (("largest", torch.Tensor.max), ("rms", lambda t: t.square().mean().sqrt())):
        bound = factor * measure(allowed) + floor * measure(truth.abs())
        worst = int(error.argmax())
        assert measure(error) <= bound, (
            f"{name} error {float(measure(error)):.3e} is over {float(bound):.3e}; worst element {worst} of "
            f"{tuple(result.shape)}: {result.flatten()[worst].item()!r}, truth {truth.flatten()[worst].item()!r}"
        )
