"""What training takes on a layout: days, GPU-hours and money for a number of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mhc.study.points import Point

HOUR, DAY = 3600, 24 * 3600


@dataclass(frozen=True)
class Budget:
    """What is trained, and what it may cost.

    Args:
        tokens: of the whole training.
        price: of an hour of one GPU, in any currency; None where nobody asks.
    """

    tokens: float
    price: float | None = None

    def of(self, point: Point) -> dict[str, float]:
        """``days``, ``gpu_hours`` and, with a price, ``cost``; at the speed of every step."""
        seconds = self.tokens / point.tokens_per_gpu_s
        found = {'days': seconds / point.layout.gpus / DAY, 'gpu_hours': seconds / HOUR}
        return found if self.price is None else found | {'cost': seconds / HOUR * self.price}

    def words(self, point: Point) -> str:
        """One line of them."""
        found = self.of(point)
        line = f'{self.tokens / 1e9:,.4g} billion tokens: {found["days"]:,.3g} days, '
        line += f'{found["gpu_hours"]:,.0f} GPU-hours'
        return line if self.price is None else f'{line}, cost {found["cost"]:,.0f}'
