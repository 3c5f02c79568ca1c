"""Bad arguments of the Python API: a call, and what its message has to name."""

from __future__ import annotations

import math

import torch

from megatron_mhc import ops
from megatron_mhc.residual.mhc import ManifoldHyperConnection
from megatron_mhc.settings.engram import EngramConfig
from megatron_mhc.settings.pipeline import PipelineConfig
from megatron_mhc.settings.residual import ResidualConfig

N, C, T = 2, 4, 3
WRONG_INTEGERS = (0, -1, 1.5, '2', None, True, 10**20, math.nan, (2,), 10**5000)
WRONG_FACTORS = (-1, -0.1, math.nan, math.inf, -math.inf, 'x', None, True, (1,), 1e300, 10**400)
WRONG_BOOLS = ('no', 'off', 'yes', 'False', 0, 1, None, ())
WRONG_NAMES = ('x', '', None, 3, True, ('a',))
WRONG_TENSORS = (None, 1.0, 'x', [1.0], torch.ones(2, dtype=torch.int64))


def inputs() -> dict[str, torch.Tensor]:
    maps = N * N + 2 * N
    return {
        'x': torch.randn(T, N * C),
        'y': torch.randn(T, C),
        'weight': torch.randn(maps, N * C),
        'bias': torch.zeros(maps),
        'alpha': torch.ones(3),
        'h_pre': torch.rand(T, N),
        'h_post': torch.rand(T, N),
        'h_res': torch.eye(N).expand(T, N, N),
    }


def call(op: str, **changed):
    """``op`` with good arguments but for those changed."""
    given = inputs()
    taken = {
        'mapping': ('x', 'weight', 'bias', 'alpha'),
        'read': ('x', 'weight', 'bias', 'alpha'),
        'pre': ('x', 'h_pre'),
        'post_res': ('x', 'y', 'h_post', 'h_res'),
        'write': ('y',),
        'write_read': ('y', 'weight', 'bias', 'alpha'),
        'sinkhorn': (),
    }[op]
    arguments = {name: given[name] for name in taken}
    if op in ('mapping', 'read', 'write_read'):
        arguments['num_streams'] = N
    if op in ('write', 'write_read'):
        arguments['carried'] = ops.Carried(given['x'], given['h_post'], given['h_res'], False)
    if op == 'sinkhorn':
        arguments['logits'] = given['h_res']
    return getattr(ops, op)(**{**arguments, **changed})


def write_after_read(**changed):
    """``post`` of a module with what it read, but for what is changed."""
    module = ManifoldHyperConnection(C, ResidualConfig(num_residual_streams=N), 0)
    _, _, carried = module(torch.randn(T, N * C))
    return module.post(**{'y': torch.randn(T, C), 'carried': carried, **changed})


def build(**changed):
    given = {'hidden_size': C, 'residual': ResidualConfig(num_residual_streams=N), 'sublayer': 0}
    return ManifoldHyperConnection(**{**given, **changed})


def read_with(x):
    return build()(x)


# A function, its keyword, the values, and how the message calls it.
TABLE = (
    (ResidualConfig, 'num_residual_streams', WRONG_INTEGERS, '--mhc-num-residual-streams'),
    (ResidualConfig, 'sinkhorn_iterations', WRONG_INTEGERS, '--mhc-sinkhorn-iterations'),
    (ResidualConfig, 'init_gating_factor', WRONG_FACTORS, '--mhc-init-gating-factor'),
    (
        ResidualConfig,
        'norm_eps',
        (*(v for v in WRONG_FACTORS if v is not None), 0, 1e-40, 1.5),
        '--mhc-norm-eps',
    ),
    (ResidualConfig, 'numerics', WRONG_NAMES, '--mhc-numerics'),
    (ResidualConfig, 'mapping_lr_mult', WRONG_FACTORS, '--mhc-mapping-lr-mult'),
    (ResidualConfig, 'seed', (-1, 1.5, 'x', None, True, 2**43), '--seed'),
    (ResidualConfig, 'single_pass', WRONG_BOOLS, 'single_pass'),
    (ResidualConfig, 'edge_fusion', WRONG_BOOLS, 'edge_fusion'),
    (ResidualConfig, 'mapping_weight_decay', WRONG_BOOLS, 'mapping_weight_decay'),
    (ResidualConfig, 'hc_tanh', WRONG_BOOLS, 'hc_tanh'),
    (ResidualConfig, 'residual_type', WRONG_NAMES, '--residual-type'),
    (ResidualConfig, 'init', WRONG_NAMES, '--mhc-init'),
    (ResidualConfig, 'stream_merge', ('x', '', 3, True, ('a',)), '--mhc-stream-merge'),
    (ResidualConfig, 'manifold', WRONG_NAMES, '--mhc-manifold'),
    (ResidualConfig, 'kernel_backend', WRONG_NAMES, '--mhc-kernel-backend'),
    (ResidualConfig, 'projection_precision', WRONG_NAMES, '--mhc-projection-precision'),
    (ResidualConfig, 'mapping_optimizer', WRONG_NAMES, '--mhc-mapping-optimizer'),
    (ResidualConfig, 'fixed_mappings', (3, None, 'pre', ('x',), (3,)), '--mhc-fixed-mappings'),
    (
        ResidualConfig,
        'recompute_layer_num',
        (0, -1, 1.5, '2', None, True, 'x', 10**20),
        '--mhc-recompute-layer-num',
    ),
    (EngramConfig, 'layers', ((), (0,), (2, 2), (1.5,), ('x',), 3, None, (10**20,)), 'layers'),
    (EngramConfig, 'ngram_orders', ((), (1,), (2, 2), 3, None, (10**20,)), 'ngram-orders'),
    (EngramConfig, 'heads', WRONG_INTEGERS, '--engram-heads'),
    (EngramConfig, 'table_size', WRONG_INTEGERS, '--engram-table-size'),
    (EngramConfig, 'dim', WRONG_INTEGERS, '--engram-dim'),
    (EngramConfig, 'lr_mult', WRONG_FACTORS, '--engram-lr-mult'),
    (EngramConfig, 'seed', (-1, 1.5, 'x', None, True, 2**63), '--engram-seed'),
    (PipelineConfig, 'verify_steps', (-1, 1.5, 'x', None, True, 10**20), '--pipeline-verify-steps'),
    (PipelineConfig, 'schedule', WRONG_NAMES, '--pipeline-schedule'),
    (PipelineConfig, 'live_bound', (0, -1, math.nan, math.inf, 'x', True, (1,)), '--pipeline-live'),
    *(
        (op, name, values, name)
        for op in ('mapping', 'read', 'write_read')
        for name, values in (
            ('num_streams', WRONG_INTEGERS),
            ('sinkhorn_iterations', WRONG_INTEGERS),
            ('norm_eps', (*WRONG_FACTORS, 1.5)),
            ('precision', WRONG_NAMES),
            ('weight', WRONG_TENSORS),
            ('alpha', WRONG_TENSORS),
        )
    ),
    *((op, 'backend', WRONG_NAMES, 'backend') for op in ('mapping', 'pre', 'write', 'sinkhorn')),
    *((op, 'numerics', WRONG_NAMES, 'numerics') for op in ('mapping', 'sinkhorn', 'post_res')),
    *((op, 'x', WRONG_TENSORS, 'x') for op in ('mapping', 'read', 'pre', 'post_res')),
    *(
        (op, 'dropout', (-0.1, 1, 1.0, 'x', None, math.nan, math.inf, True, (0,)), 'dropout')
        for op in ('post_res', 'write', 'write_read', write_after_read)
    ),
    *(
        (op, 'seed', (3, 'x', 1.5, torch.ones(1), torch.ones(2, dtype=torch.int64)), 'seed')
        for op in ('post_res', 'write', write_after_read)
    ),
    *(
        (op, 'carried', (None, 3, 'x', (), torch.ones(2), (1, 2, 3, 4)), 'carried')
        for op in ('write', 'write_read', write_after_read)
    ),
    ('write', 'carried', (ops.Carried(None, None, None, False),), 'carried.x'),
    ('write', 'y', WRONG_TENSORS, 'y'),
    ('pre', 'h_pre', (*WRONG_TENSORS, torch.tensor(1.0)), 'h_pre'),
    ('post_res', 'h_post', (*WRONG_TENSORS, torch.tensor(1.0)), 'h_post'),
    ('post_res', 'h_res', (*WRONG_TENSORS, torch.tensor(1.0)), 'h_res'),
    ('post_res', 'bias', (1.0, 'x', [1.0], torch.tensor(1.0)), 'bias'),
    ('sinkhorn', 'logits', (*WRONG_TENSORS, torch.tensor(1.0), torch.ones(2, 3)), 'logits'),
    ('sinkhorn', 'iterations', WRONG_INTEGERS, 'iterations'),
    (build, 'hidden_size', WRONG_INTEGERS, 'hidden_size'),
    (build, 'sublayer', (-1, 1.5, '2', None, True, 10**20), 'sublayer'),
    (build, 'residual', (None, 'mhc', {}), 'residual'),
    (read_with, 'x', (None, 'x', 3, [1.0], torch.tensor(1.0)), 'x'),
)


def cases() -> list[tuple]:
    """``(function, keyword, value, name)`` of each bad call."""
    needed = {EngramConfig: {'layers': (2,)}, PipelineConfig: {'schedule': 'zb-v'}}
    found = []
    for target, keyword, values, name in TABLE:
        for value in values:
            found.append((target, {**needed.get(target, {}), keyword: value}, name))
    return found


def run(target, arguments) -> object:
    return call(target, **arguments) if isinstance(target, str) else target(**arguments)
