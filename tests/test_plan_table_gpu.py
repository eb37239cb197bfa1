"""Every plan that was found, at its own shape, against the reference ops in fp64: a search only times them."""

import pytest

from llama3.ops import batch_linear, batch_plans, plan_table, skinny_linear, skinny_plans
from llama3.ops.one_kernel import LINEAR_ADD, NORM_LINEAR, NORM_SWIGLU
from llama3.ops.reference import ReferenceOps
from tests.one_kernel_helpers import EPS, check_contract, check_swiglu, norm_linear, normal

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper", "poisoned_allocations")]
FAMILIES = {
    batch_plans.FAMILY: (batch_linear, batch_plans.Plan),
    skinny_plans.FAMILY: (skinny_linear, skinny_plans.Plan),
}


@pytest.mark.parametrize("fewer", (0, 7), ids=lambda n: f"{n} tokens fewer")
@pytest.mark.parametrize("found", plan_table.plans().items(), ids=lambda item: str(item[0]))
def test_plans_that_were_found(found: tuple, fewer: int) -> None:
    (family, (form, tokens, num_rows, size)), fields = found
    (ops, plan), num_tokens = FAMILIES[family], tokens - fewer
    how = {"plan": plan(**fields)}
    if form == NORM_SWIGLU:
        check_swiglu(ops, num_tokens, num_rows, size, how)
        return
    x, weight = normal(num_tokens, size, scale=3), normal(num_rows, size, scale=size**-0.5)
    if form == NORM_LINEAR:
        check_contract(ops.norm_linear, norm_linear, how, x, weight, EPS)
    else:
        assert form == LINEAR_ADD
        check_contract(ops.linear_add, ReferenceOps().linear_add, how, x, weight, normal(num_tokens, num_rows))
