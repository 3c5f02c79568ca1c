"""What runs of several seeds say about each other: means, paired differences, standard errors."""

import hashlib
import math
import statistics
from pathlib import Path

from plot_losses import VALID, Runs

from megatron_mhc.inputs.table import table


def source_of(data: Path) -> str:
    """What a picture says that it was drawn of: the digest of the losses in ``data``."""
    return f'losses {hashlib.sha256(data.read_bytes()).hexdigest()[:16]}'


def last_losses(runs: Runs) -> dict[str, list[float]]:
    """Last validation loss of each seed, in nats a byte."""
    return {
        name: [losses[VALID][max(losses[VALID])] for losses in seeds]
        for name, seeds in runs.items()
    }


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """And the standard error of the mean, NaN for one value; both NaN for none."""
    if not values:
        return math.nan, math.nan
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.fmean(values), spread / math.sqrt(len(values))


def comparison(runs: Runs) -> list[str]:
    """A line for each name: mean last validation loss, and how much it is above the first's.

    Differences are taken seed by seed, since runs of one seed see the same data in the same order.
    """
    (base, *_), last = runs, last_losses(runs)
    rows: list[tuple[str, ...]] = [('residual', 'last validation', f"less {base}'s")]
    for name, losses in last.items():
        shown = '0'
        if name != base:
            pairs = zip(losses, last[base], strict=True)
            mean, error = mean_and_error([loss - other for loss, other in pairs])
            shown = f'{mean:+.3f}' + ('' if math.isnan(error) else f' ± {error:.3f}')
        rows.append((name, f'{statistics.fmean(losses):.3f}', shown))
    seeds = min(map(len, last.values()))
    said = 'one seed: no error is known' if seeds == 1 else f'{seeds} seeds; ± standard error'
    return [*table(rows, '<>>'), f'(nats per byte on files not trained on; {said})']
