"""A patch as data: what is rebound, why, and the signatures it was written against.

A patch *wraps*: its factory receives the original callable and returns the replacement, which calls
the original with ``*args, **kwargs``. Nothing here copies an upstream body. Before a symbol is
rebound its signature is compared with the one recorded for the installed core release; an unknown
one stops the run with the symbol, the version seen and the remedy.

Where ``megatron-mhc patch`` has put a seam into the user's tree, that seam is switched instead of a
name being rebound.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_mhc.compat import (
    PREVIEWED,
    TESTED,
    core_folder,
    core_minor,
    core_version,
    nearest_minor,
    take_as_it_is,
)
from megatron_mhc.patches.placed import PLACED, Seam, plain


@dataclass(frozen=True)
class Patch:
    """One rebinding of a Megatron name.

    Args:
        id: short name shown by ``megatron-mhc doctor``.
        target: ``package.module:attribute`` or ``package.module:Class.attribute``.
        wrap: ``original -> replacement``, both plain functions: those of a class method take the
            class as their first argument.
        reason: why this place and no other, one sentence.
        fingerprints: core minor release -> ``fingerprint`` of the original there. A release that is
            left out has no such symbol and needs no patch.
        reads: parameters of the original that the patch takes or sets by name; without them it
            would fail while a model trains, whatever else of the signature is accepted.
        in_tree: whether ``megatron-mhc patch`` has a seam for it, on which a user can vouch for
            another signature. Where not, the names that it reads suffice.
    """

    id: str
    target: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = field(repr=False)
    reason: str
    fingerprints: Mapping[str, str]
    reads: tuple[str, ...] = ()
    in_tree: bool = True

    @property
    def module(self) -> str:
        return self.target.partition(':')[0]

    def owner(self) -> tuple[object, str]:
        """The object that holds the attribute, and the attribute's name."""
        path = self.target.partition(':')[2].split('.')
        owner = functools.reduce(getattr, path[:-1], importlib.import_module(self.module))
        return owner, path[-1]


def fingerprint(function: Callable[..., Any]) -> str:
    """Digest of the parameter names and kinds of ``function``, nothing else of it."""
    parameters = inspect.signature(function).parameters.values()
    text = ','.join(f'{p.kind.name[0]}{p.kind.name[-1]}:{p.name}' for p in parameters)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def on_every_release(digest: str) -> dict[str, str]:
    """``fingerprints`` of a symbol whose signature is the same in every recorded minor release."""
    return dict.fromkeys((*map(core_minor, TESTED), *PREVIEWED), digest)


# Id of an applied patch -> what takes it back.
_APPLIED: dict[str, Callable[[], None]] = {}


def inspect_patch(patch: Patch) -> tuple[str, str]:
    """``(state, detail)`` without applying.

    The state is applied, ready, untested (applied all the same), not needed, missing or unknown.
    """
    version = core_version()
    if version is None:
        return 'missing', 'megatron-core is not installed'
    if patch.fingerprints.get(nearest_minor(version)) is None:
        return 'not needed', f'no such place in megatron-core {version}'
    expected = patch.fingerprints.get(core_minor(version))
    if patch.id in _APPLIED:
        return 'applied', expected or ''
    try:
        placed = _placed(patch)
        function = placed.original if placed else _declared(patch)[0]
    except (ImportError, AttributeError, KeyError) as error:
        return 'missing', f'{patch.target} not found in megatron-core {version}: {error}'
    seen, names = fingerprint(function), list(inspect.signature(function).parameters)
    if gone := [name for name in patch.reads if name not in names]:
        return 'unknown', renamed(gone, names)
    if seen not in (expected, placed and placed.accepted):
        changed = (
            f'signature {seen} ({", ".join(names)}), expected {expected} for megatron-core '
            f'{version} in {core_folder()}'
        )
        if not patch.in_tree:
            return 'untested', changed
        return 'unknown', f'{changed}; {take_as_it_is(core_folder())} takes it as it is'
    return 'ready', f'{seen}, a seam in the tree' if placed else seen


def renamed(gone: Sequence[str], names: Sequence[str]) -> str:
    """Why a function cannot be wrapped that has not the parameters which a patch reads."""
    return (
        f'the patch reads {", ".join(gone)}, and the parameters are {", ".join(names) or "none"}; '
        'give the parameter its name in Megatron-Core back'
    )


def _placed(patch: Patch) -> Seam | None:
    """The seam that ``megatron-mhc patch`` has put into the tree for this patch."""
    # A seam that was put by hand into another module is known as soon as that is imported.
    if patch.id not in PLACED:
        importlib.import_module(patch.module)
    return PLACED.get(patch.id)


def _declared(patch: Patch) -> tuple[Callable[..., Any], Callable[..., Any]]:
    owner, name = patch.owner()
    # vars() keeps a staticmethod or classmethod wrapper that getattr would strip.
    return plain(vars(owner)[name])


def apply(patches: tuple[Patch, ...]) -> None:
    """Check all of ``patches``, then apply those not yet in place; all or nothing.

    Raises:
        RuntimeError: a target is missing or has a signature that was never seen.
    """
    states = [(patch, *inspect_patch(patch)) for patch in patches]
    for patch, state, detail in states:
        if state in ('missing', 'unknown'):
            raise RuntimeError(
                f'patch {patch.id!r} cannot be applied: {detail} (target {patch.target}). '
                f'Install a tested megatron-core ({", ".join(TESTED)}); '
                '`megatron-mhc doctor` lists every patch.'
            )
    for patch, state, _ in states:
        if state in ('ready', 'untested'):
            _APPLIED[patch.id] = _put_in_place(patch)


def _put_in_place(patch: Patch) -> Callable[[], None]:
    """Switch the seam in the tree, or rebind the name; returns what takes it back."""
    placed = _placed(patch)
    if placed is not None:
        placed.switch(patch.wrap)
        return functools.partial(placed.switch, None)
    owner, name = patch.owner()
    declared = vars(owner)[name]
    function, rebuild = _declared(patch)
    # A name that another module imported leads to the seam on its def, which may be switched.
    if getattr(getattr(function, 'seam', None), 'wrap', None) is patch.wrap:
        return lambda: None
    setattr(owner, name, rebuild(functools.wraps(function)(patch.wrap(function))))
    return functools.partial(setattr, owner, name, declared)


def revert(patches: tuple[Patch, ...]) -> None:
    """Restore the originals of ``patches``, newest first; patches not in place are ignored."""
    for patch in reversed(patches):
        if patch.id in _APPLIED:
            _APPLIED.pop(patch.id)()


def applied() -> tuple[str, ...]:
    """Ids of the patches in place, oldest first."""
    return tuple(_APPLIED)
