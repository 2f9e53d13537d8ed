"""CASPR: Duvvuri et al., ICLR 2024, with Shampoo's running means and grafting."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tests.references.shampoo import shampoo


def kronecker_sum(m: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(L^(−1/2) M + 2 L^(−1/4) M R^(−1/4) + M R^(−1/2)) / 4, from L^(−1/4) and R^(−1/4)."""
    return (left @ left @ m + 2 * left @ m @ right + m @ right @ right) / 4


def caspr(weight: Tensor, grads: Sequence[Tensor], **options: Any) -> Tensor:
    """Shampoo with the Kronecker sum for the product."""
    return shampoo(weight, grads, combine=kronecker_sum, **options)
