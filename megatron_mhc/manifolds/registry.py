"""Manifolds by name: ours, and those that installed packages offer as entry points."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

from megatron_mhc.manifolds.sizes import NUM_LOGITS

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from megatron_mhc.manifolds.manifold import Manifold

GROUP = 'megatron_mhc.manifolds'
BUILT_IN = {
    'sinkhorn': 'Sinkhorn',
    'permutation': 'Permutation',
    'kronecker': 'Kronecker',
    'orthostochastic': 'Orthostochastic',
    'orthogonal': 'Orthogonal',
    'diagonal': 'Diagonal',
    'identity': 'Identity',
}


@functools.cache
def offered() -> dict[str, EntryPoint]:
    """Entry points of other packages by name.

    Raises:
        ValueError: a name is taken, by us or by another package.
    """
    # Half of what `import megatron_mhc` would take.
    import importlib.metadata

    found: dict[str, EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        if point.name in BUILT_IN or found.get(point.name, point) != point:
            taken = found[point.name].value if point.name in found else 'megatron-mhc'
            raise ValueError(
                f'entry point {GROUP}: {point.name} = {point.value}: the name is taken by {taken}; '
                'rename it in the package that declares it, or uninstall that package'
            )
        found[point.name] = point
    return found


def manifold_names() -> tuple[str, ...]:
    """All that ``--mhc-manifold`` takes."""
    return (*BUILT_IN, *offered())


def num_logits(name: str, n: int) -> int:
    """Logits of H_res for n streams; for ours no torch is imported.

    Raises:
        ValueError: no such manifold, or none for this n.
    """
    return NUM_LOGITS[name](n) if name in NUM_LOGITS else load(name, n).num_logits


@functools.cache
def load(name: str, n: int) -> Manifold:
    """The manifold ``name`` for n streams; one of another package is tried out first.

    Raises:
        ValueError: no such manifold, none for this n, or one that does not keep its word.
    """
    if name in BUILT_IN:
        module = importlib.import_module(f'megatron_mhc.manifolds.{name}')
        manifold: Manifold = getattr(module, BUILT_IN[name])(n)
        return manifold
    from megatron_mhc.manifolds.trial import tried

    point = offered()[name]
    return tried(point, n)
