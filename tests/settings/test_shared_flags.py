"""A Megatron release with flags of our names: one flag serves both, and stock stays stock."""

from __future__ import annotations

import argparse

import pytest

from megatron_mhc.patches import arguments


def release(parser, *args, **kwargs):
    """What core 0.20 adds, and a flag whose argument has another name than ours."""
    group = parser.add_argument_group('transformer')
    group.add_argument('--num-layers', type=int)
    group.add_argument('--mhc-num-residual-streams', type=int, default=4)
    group.add_argument('--mhc-sinkhorn-iterations', type=int, default=20)
    group.add_argument('--mhc-init-gating-factor', type=float, default=0.01)
    group.add_argument('--mhc-recompute-layer-num', type=int, default=None)
    group.add_argument('--mhc-init', dest='start', default='theirs')
    group.add_argument('--enable-mhc-connections', action='store_true')
    group.add_argument('--seed', type=int, default=1234)
    return parser


def parse(monkeypatch, *flags: str) -> argparse.Namespace:
    """Through our patch, without the checks that need Megatron."""
    monkeypatch.setattr(
        arguments,
        'accept',
        lambda namespace, unknown, shared: (
            arguments.hand_over(namespace, shared),
            arguments.resolve_arguments(namespace, shared),
        ),
    )
    parser = arguments._wrap(release)(argparse.ArgumentParser(prog='pretrain'))
    return parser.parse_args(flags)


def theirs(*flags: str) -> dict:
    return vars(release(argparse.ArgumentParser()).parse_args(flags))


@pytest.mark.parametrize(
    'flags',
    [
        '',
        '--enable-mhc-connections',
        '--mhc-num-residual-streams 2 --mhc-recompute-layer-num 3 --mhc-init-gating-factor 0.5',
        '--enable-mhc-connections --mhc-sinkhorn-iterations 7 --mhc-init uniform',
    ],
)
def test_without_our_streams_the_flags_are_the_releases(monkeypatch, flags):
    seen, wanted = vars(parse(monkeypatch, *flags.split())), theirs(*flags.split())
    assert {name: seen[name] for name in wanted} == wanted


def test_with_our_streams_they_are_ours(monkeypatch, capsys):
    args = parse(monkeypatch, '--residual-type', 'mhc', '--mhc-recompute-layer-num', 'auto')
    assert (args.mhc_recompute_layer_num, args.mhc_num_residual_streams) == ('auto', 4)
    assert (args.mhc_init, args.start) == ('identity', 'theirs')
    assert 'counts' not in capsys.readouterr().out
    # The unit is another one, which is said.
    args = parse(monkeypatch, '--residual-type', 'hc', '--mhc-recompute-layer-num', '6')
    assert args.mhc_recompute_layer_num == 6
    assert '--mhc-recompute-layer-num 6 counts sublayers' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        ('--mhc-recompute-layer-num auto', "this is Megatron's own flag"),
        ('--mhc-manifold sinkhorn', '--mhc-manifold has no effect with --residual-type standard'),
        ('--residual-type hc --mhc-sinkhorn-iterations 3', 'has no effect with --residual-type hc'),
    ],
)
def test_what_neither_reads_is_refused(monkeypatch, capsys, flags, said):
    with pytest.raises(SystemExit):
        parse(monkeypatch, *flags.split())
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and said in error


def test_the_two_topologies_exclude_each_other():
    from megatron_mhc.settings.refusals import check_residual
    from megatron_mhc.settings.residual import ResidualConfig

    settings = argparse.Namespace(enable_mhc_connections=True)
    check_residual(settings, ResidualConfig('standard'))
    with pytest.raises(ValueError, match='enable-mhc-connections .* cannot be combined'):
        check_residual(settings, ResidualConfig())
