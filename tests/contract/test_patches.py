"""Every patch fits the installed release, applies once, and leaves no trace when reverted."""

from __future__ import annotations

import pytest

from megatron_mhc.compat import core_version, require_supported_core
from megatron_mhc.patches import engine


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
