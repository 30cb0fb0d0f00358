"""What stands between layers: the rules that keep mean 0 and variance 1 where branches meet."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn


class NormalizedAdd(nn.Module):
    r"""A weighted sum of independent branches of variance 1 that has variance 1.

    .. math:: y = \frac{\sum_i w_i x_i}{\sqrt{\sum_i w_i^2}}

    For a residual net of L blocks, :math:`x \leftarrow \sqrt{1-a^2}\,x + a f(x)` with
    :math:`a^2 = 1/L` bounds the growth of gradients by :math:`e^{(J^2-1)/2}` at any depth
    (docs/method.md, section 6); that is :meth:`residual`.

    Args:
        weights: One a branch, in the order of ``forward``'s arguments; their length is irrelevant.

    Shape:
        Any number of tensors of one shape, to that shape.

    Raises:
        ValueError: If there is no weight, or they are all zero or not finite; in ``forward``, if
            the number of branches is another.

    Example:
        >>> NormalizedAdd((3.0, 4.0))(torch.tensor(1.0), torch.tensor(0.5))
        tensor(1.)
    """

    def __init__(self, weights: Sequence[float] = (1.0, 1.0)) -> None:
        super().__init__()
        length = math.hypot(*weights)
        if not weights or not math.isfinite(length) or length == 0:
            raise ValueError(f"weights must be finite and not all zero, got {tuple(weights)}")
        self.weights = tuple(weight / length for weight in weights)

    @classmethod
    def residual(cls, blocks: int) -> NormalizedAdd:
        """For (trunk, branch) in a stack of ``blocks`` residual blocks: a^2 = 1/blocks."""
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {blocks}")
        return cls((math.sqrt(1 - 1 / blocks), math.sqrt(1 / blocks)))

    def forward(self, *branches: Tensor) -> Tensor:
        if len(branches) != len(self.weights):
            raise ValueError(f"expected {len(self.weights)} branches, got {len(branches)}")
        total = branches[0] * self.weights[0]
        for weight, branch in zip(self.weights[1:], branches[1:], strict=True):
            total = total.add(branch, alpha=weight)
        return total

    def extra_repr(self) -> str:
        return ", ".join(f"{weight:.4g}" for weight in self.weights)
