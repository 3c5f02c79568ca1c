"""``--mhc-cuda-graphs``: what it allows, and what a graph of n streams excludes."""

import pytest

GRAPHS = '--mhc-cuda-graphs --cuda-graph-impl local'
REFUSED = {
    '--residual-type mudd --cuda-graph-impl local': 'its layers have not been fitted',
    '--residual-type gated --cuda-graph-impl full_iteration': 'its layers have not been fitted',
    '--residual-type attention --enable-cuda-graph': 'its layers have not been fitted',
    '--residual-type mudd --mhc-cuda-graphs': '--mhc-cuda-graphs has no effect with',
    '--residual-type mhc --mhc-cuda-graphs': 'there is no graph; add --cuda-graph-impl local',
    f'--residual-type mhc {GRAPHS} --mhc-alarm warn': '--mhc-monitor / --mhc-alarm cannot be',
    f'--residual-type mhc {GRAPHS} --mhc-single-pass': '--mhc-single-pass with --mhc-cuda-graphs',
    f'--residual-type hc {GRAPHS} --mhc-recompute-layer-num 2': '2 with --mhc-cuda-graphs',
    f'--residual-type hc {GRAPHS} --mhc-post-stream high': 'a replayed layer does not wait for',
    f'--residual-type hc {GRAPHS} --cuda-graph-scope moe_router': '--cuda-graph-modules moe_router',
}


@pytest.mark.parametrize('flags', REFUSED)
def test_refusals_are_one_line_and_name_the_flag(refused, flags):
    assert REFUSED[flags] in refused(flags)


@pytest.mark.parametrize('impl', ['local', 'transformer_engine', 'full_iteration'])
def test_graphs_of_streams_are_asked_for(parse, impl):
    args = parse(*f'--residual-type hc --mhc-cuda-graphs --cuda-graph-impl {impl}'.split())
    assert args.mhc_cuda_graphs and args.cuda_graph_impl == impl
