"""Predictions of recorded launches, their sum over a sublayer, and what the record says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_mhc.kernels.roofline.gpus import Gpu
from megatron_mhc.kernels.roofline.names import RECORDED
from megatron_mhc.kernels.roofline.predict import Prediction, Work, predict
from megatron_mhc.kernels.roofline.profile import Section
from megatron_mhc.kernels.roofline.work import work_of
from megatron_mhc.kernels.traffic import our_forms
from megatron_mhc.kernels.verdict import Problem, label, resident_warps

if TYPE_CHECKING:
    from megatron_mhc.kernels.offline import Resources
    from megatron_mhc.kernels.triton.launch import Launch

# What the share of a copy may lose beside the record, as a share of what it was: less is no change
# that a user would see, and the same Triton makes the same code.
MARGIN = 0.05
# The kernels of one sublayer between two fused edges, forward and backward, by their labels.
SUBLAYER = (
    *('pack', 'projection mix', 'maps_forward u'),
    *('maps_backward u', 'read_backward g u', 'post_res_backward'),
)


@dataclass(frozen=True)
class Shape:
    """C channels, T tokens and the dtype of the streams by its name on the command line."""

    hidden_size: int
    tokens: int
    dtype: str


def predict_launch(
    launch: Launch,
    found: Resources,
    gpu: Gpu,
    describe: Callable[[Launch, Sequence[Section], int], Work] = work_of,
) -> Prediction:
    """The prediction for a compiled launch, whose ``Work`` is as ``describe`` says.

    Raises:
        ValueError: its loops are not those that the model knows, no block fits on an SM, or it was
            compiled without a profile.
    """
    blocks = resident_warps(gpu.arch, found, launch.options['num_warps'])
    blocks //= launch.options['num_warps']
    if not blocks or found.profile is None:
        why = 'was not profiled' if blocks else f'does not fit on an SM of {gpu.title}'
        raise ValueError(f'{label(launch)} {why}')
    return predict(found.profile, describe(launch, found.profile, blocks), gpu)


def recorded_percent(
    launch: Launch, gpu: Gpu, shape: Shape, record: dict[str, Any], version: str
) -> float | None:
    """Percent of a copy on record for this launch, Triton ``version``, GPU and shape; or None."""
    known = record.get('predicted')
    release = version.partition('+')[0]
    if not known or release not in record['triton'] or gpu.name != known['gpu']:
        return None
    if shape != Shape(known['hidden_size'], known['tokens'], record['dtype']):
        return None
    percents: list[float | None] | float | None = known['kernels'].get(
        f'{label(launch)} {launch.constants["N"]}'
    )
    if isinstance(percents, list):
        version_at: int = record['triton'].index(release)
        return percents[version_at]
    return percents


def lost_percent(seen: Prediction | None, wanted: float | None) -> list[Problem]:
    """The problem of a kernel that the model finds slower than it was; ``wanted`` in percent."""
    if wanted is None:
        return []
    remedy = 'mend it, or record it anew'
    if seen is None:
        text = f'the model no longer understands its loops, {wanted} % of copy on record'
        return [Problem('predicted', 0, f'{text}: {remedy}')]
    if seen.copy_percent >= wanted * (1 - MARGIN):
        return []
    text = (
        f'{seen.copy_percent:.1f} % of copy predicted on {RECORDED} (static model, not measured; '
        f'bound by {seen.bound}), {wanted} % on record, {MARGIN:.0%} of it allowed to go: {remedy}'
    )
    return [Problem('predicted', round(wanted - seen.copy_percent), text)]


def sublayer(
    n: int, shape: Shape, itemsize: int, gpu: Gpu, seconds: dict[str, float]
) -> dict[str, Any]:
    """Forward and backward of one sublayer beside the time of its bytes alone.

    Args:
        n: streams; itemsize: bytes of a stream's element.
        seconds: of the kernels by their labels; what is not in ``SUBLAYER`` is left out.

    Returns:
        Vectors of C per token, megabytes and microseconds; ``predicted_us`` is None where a kernel
        is missing, and ``missing`` names it.
    """
    forms = our_forms(n)
    traffic = forms['forward at the fused edge'] + forms['backward at the fused edge']
    moved = traffic.bytes(shape.tokens, shape.hidden_size, itemsize)
    missing = [name for name in SUBLAYER if name not in seconds]
    total = None if missing else 1e6 * sum(seconds[name] for name in SUBLAYER)
    bytes_us = 1e6 * moved / gpu.copy
    return {
        'num_streams': n,
        'launches': len(SUBLAYER),
        'vectors': traffic.elements,
        'megabytes': moved / 1e6,
        'bytes_us': bytes_us,
        'predicted_us': total,
        'copy_percent': None if total is None else 100 * bytes_us / total,
        'missing': missing,
    }


def by_streams(rows: Iterable[tuple[int, str, float]]) -> dict[int, dict[str, float]]:
    """``(n, label, seconds)`` -> n -> label -> seconds."""
    found: dict[int, dict[str, float]] = {}
    for n, name, seconds in rows:
        found.setdefault(n, {})[name] = seconds
    return found
