"""The paper's cost of recompute segments, Eq 20, over integers."""

from __future__ import annotations

import math
import random

import pytest

from megatron_mhc.settings.recompute_cost import (
    best_segment,
    kept_cost,
    segment_cost,
    segment_size,
    whole_cost,
)


@pytest.mark.parametrize(
    ('sublayers', 'size', 'cost', 'without'),
    [(24, 4, 48, 144), (36, 4, 60, 216), (60, 6, 76, 360)],
)
def test_models_of_the_paper(sublayers, size, cost, without):
    assert best_segment(4, sublayers) == size
    assert segment_cost(4, sublayers, size) == cost
    assert whole_cost(4, sublayers) == without


def test_the_least_of_all_integers_and_the_smallest_of_equals(random_seed):
    generator = random.Random(random_seed)
    for _ in range(50):
        n, sublayers = generator.randint(1, 8), generator.randint(1, 120)
        costs = [segment_cost(n, sublayers, size) for size in range(1, sublayers + 1)]
        best = best_segment(n, sublayers)
        assert costs[best - 1] == min(costs) < min(costs[: best - 1], default=math.inf)
        assert abs(best - math.sqrt(n * sublayers / (n + 2))) < 2 + 0.2 * best


def test_values_of_the_flag():
    sizes = {kind: segment_size(kind, 4, 24) for kind in ('none', 'stage', 'auto', 5, 24, 99)}
    assert sizes == {'none': 0, 'stage': 24, 'auto': 4, 5: 5, 24: 24, 99: 24}
    # A chunk without layers has no block, and no cost.
    assert [segment_size(kind, 4, 0) for kind in ('auto', 'stage', 3)] == [1, 1, 1]
    assert segment_cost(4, 24, 99) == segment_cost(4, 24, 24) and kept_cost(4, 25, 4) == 28
