"""Every patch fits the installed release, applies once, and leaves no trace when reverted."""

from __future__ import annotations

import inspect

import pytest

from megatron_mhc.compat import core_minor, core_version, require_supported_core
from megatron_mhc.patches import engine
from megatron_mhc.patches.placed import PLACED, Seam


def all_patches():
    from megatron_mhc.patches.cpu_device import CPU_DEVICE_PATCHES
    from megatron_mhc.patches.registry import ALL_PATCHES

    return (*ALL_PATCHES, *CPU_DEVICE_PATCHES)


def test_the_core_under_test_is_supported():
    assert require_supported_core() == core_version()


def test_every_patch_fits(megatron):
    states = {patch.id: engine.inspect_patch(patch) for patch in all_patches()}
    bad = {k: v for k, v in states.items() if v[0] not in ('ready', 'applied', 'not needed')}
    assert not bad


def stand_in(function, **changes: str):
    """A function with the parameters of ``function``, some under other names, and one more."""
    parameters = [
        p.replace(name=changes.get(p.name, p.name), annotation=inspect.Parameter.empty)
        for p in inspect.signature(function).parameters.values()
    ]
    more = inspect.Parameter('one_more', inspect.Parameter.KEYWORD_ONLY, default=None)
    at = len(parameters) - any(p.kind is p.VAR_KEYWORD for p in parameters)

    def copy(*args, **kwargs): ...

    copy.__signature__ = inspect.Signature([*parameters[:at], more, *parameters[at:]])
    return copy


def test_patches_pass_one_more_parameter_on_and_miss_a_renamed_one(megatron, monkeypatch):
    version = core_minor(core_version())
    for patch in all_patches():
        if version not in patch.fingerprints:
            continue
        function = inspect.unwrap(engine._declared(patch)[0])
        seam = Seam(stand_in(function), None, engine.fingerprint(stand_in(function)))
        monkeypatch.setitem(PLACED, patch.id, seam)
        monkeypatch.delitem(engine._APPLIED, patch.id, raising=False)
        assert engine.inspect_patch(patch)[0] == 'ready', patch.id
        seam.accepted = None
        state, detail = engine.inspect_patch(patch)
        if patch.in_tree:
            assert state == 'unknown' and '--apply --untested` takes it' in detail, patch.id
        else:
            assert state == 'untested', patch.id
        # As callers do: what has no default by position, the rest by name.
        declared = inspect.signature(function).parameters.values()
        options = {p.name: None for p in declared if p.default is not p.empty}
        plain = [p for p in declared if p.kind is p.POSITIONAL_OR_KEYWORD]
        required = [p.name for p in plain if p.default is p.empty]
        options |= {p.name: None for p in declared if p.kind is p.KEYWORD_ONLY}
        wrapped = inspect.signature(patch.wrap(seam.original))
        wrapped.bind(*required, **options, one_more=1)
        for name in patch.reads:
            seam.original = stand_in(function, **{name: 'another'})
            seam.accepted = engine.fingerprint(seam.original)
            state, detail = engine.inspect_patch(patch)
            assert state == 'unknown' and f'the patch reads {name}, ' in detail, patch.id


def sample(*, wrap=lambda original: lambda *a, **k: original(*a, **k), **changes):
    fields = {
        'id': 'sample',
        'target': 'megatron.core.utils:divide',
        'wrap': wrap,
        'reason': 'test',
        'fingerprints': {},
        **changes,
    }
    return engine.Patch(**fields)


@pytest.fixture
def fitting(megatron):
    from megatron.core import utils

    from megatron_mhc.compat import core_minor

    minor = core_minor(core_version())
    return {minor: engine.fingerprint(utils.divide)}


def test_apply_and_revert(fitting):
    from megatron.core import utils

    original = utils.divide
    patch = sample(wrap=lambda f: lambda a, b: 10 * f(a, b), fingerprints=fitting)
    engine.apply((patch,))
    engine.apply((patch,))
    assert utils.divide(6, 3) == 20
    assert engine.inspect_patch(patch)[0] == 'applied'
    engine.revert((patch,))
    assert utils.divide is original


def test_an_unknown_signature_stops_before_anything_is_applied(fitting):
    from megatron.core import utils

    original = utils.divide
    stale = sample(id='stale', fingerprints=dict.fromkeys(fitting, '00000000'))
    with pytest.raises(RuntimeError, match="patch 'stale' cannot be applied.*megatron-mhc doctor"):
        engine.apply((sample(fingerprints=fitting), stale))
    assert utils.divide is original


def test_a_missing_symbol_is_named(fitting):
    gone = sample(id='gone', target='megatron.core.utils:no_such_name', fingerprints=fitting)
    with pytest.raises(RuntimeError, match='no_such_name'):
        engine.apply((gone,))
