"""Bad values of the launcher's flags, ours and those of Megatron that we count with."""

from __future__ import annotations

from bad_values import CHOICE, COUNT, FACTOR, FROM_ZERO, NO_NUMBER
from one_line import all_rows, said

MHC = '--residual-type mhc'
HC = '--residual-type hc'
ENGRAM = '--engram-layers 2'
STEP = '--lr-decay-style step'
MONITOR = f'{MHC} --mhc-monitor --tensorboard-dir t'
PP2 = '--num-layers 8 --pipeline-model-parallel-size 2 --global-batch-size 8'
V = f'{PP2} --micro-batch-size 1 --pipeline-schedule zb-v'
DUAL = f'{PP2} --micro-batch-size 1 --pipeline-schedule dualpipev'

# Values that Megatron's own int() refuses, in its words, are left out: numbers that it takes.
MEGATRONS = ('0', '-1', '-7', '99999999999999')

KINDS = (
    ('', ('--residual-type',), CHOICE),
    (MHC, ('--mhc-num-residual-streams', '--mhc-sinkhorn-iterations'), COUNT),
    (HC, ('--mhc-num-residual-streams',), (*COUNT, '65', '1000000')),
    (MHC, ('--mhc-sinkhorn-iterations',), ('1000000000', '10001')),
    (MHC, ('--mhc-init-gating-factor', '--mhc-mapping-lr-mult'), FACTOR),
    (MHC, ('--mhc-norm-eps',), ('0', '1e-40', '2', *FACTOR)),
    (MHC, ('--mhc-recompute-layer-num',), (*COUNT, 'None', 'AUTO')),
    (
        MHC,
        (
            *('--mhc-manifold', '--mhc-init', '--mhc-stream-merge', '--mhc-fixed-mappings'),
            *('--mhc-mapping-weight-decay', '--mhc-mapping-optimizer', '--mhc-kernel-backend'),
            *('--mhc-projection-precision', '--mhc-recompute-stream', '--mhc-post-stream'),
            '--mhc-numerics',
        ),
        ('x', 'MHC', '4', 'none,auto'),
    ),
    (HC, ('--hc-variant',), CHOICE),
    ('--residual-type mudd', ('--mudd-variant',), CHOICE),
    ('', ('--engram-layers',), COUNT),
    (ENGRAM, ('--engram-ngram-orders', '--engram-heads', '--engram-table-size'), COUNT),
    (ENGRAM, ('--engram-ngram-orders', '--engram-table-size'), ('1', '999999999999999999')),
    (ENGRAM, ('--engram-dim',), COUNT),
    (ENGRAM, ('--engram-lr-mult',), FACTOR),
    (ENGRAM, ('--engram-seed',), FROM_ZERO),
    (f'{STEP} --lr-step-rates 0.5', ('--lr-step-milestones',), ('0', '1', '-0.5', '2', *NO_NUMBER)),
    (f'{STEP} --lr-step-milestones 0.5', ('--lr-step-rates',), FACTOR),
    (MONITOR, ('--mhc-monitor-interval', '--mhc-monitor-tokens'), COUNT),
    (f'{MHC} --mhc-alarm warn', ('--mhc-alarm-gain',), ('0', '1', '-3', *NO_NUMBER, '1e+300')),
    (f'{MHC} --mhc-alarm warn', ('--mhc-alarm-saturation',), ('-0.1', '1.5', *NO_NUMBER)),
    (f'{MHC} --mhc-alarm warn', ('--mhc-alarm-rank',), ('0', '0.9', '1.2', *NO_NUMBER)),
    (MHC, ('--mhc-alarm',), CHOICE),
    (MONITOR, ('--log-interval',), MEGATRONS),
    (V, ('--pipeline-verify-steps',), FROM_ZERO),
    (DUAL, ('--pipeline-w-placement',), CHOICE),
    ('', ('--pipeline-schedule',), CHOICE),
    *(
        (
            line,
            (
                *('--num-layers', '--hidden-size', '--num-attention-heads', '--micro-batch-size'),
                *('--global-batch-size', '--tensor-model-parallel-size'),
                *('--pipeline-model-parallel-size', '--context-parallel-size'),
                *('--expert-model-parallel-size', '--seq-length', '--seed'),
            ),
            MEGATRONS,
        )
        for line in (MHC, V)
    ),
    (ENGRAM, ('--tensor-model-parallel-size', '--num-layers'), MEGATRONS),
    (V, ('--mtp-num-layers',), ('-1', '99999999999999')),
)

LINES = (
    said(f'{PP2} --pipeline-schedule zb-v', '--micro-batch-size', 'zb-v'),
    said(f'{V} --rampup-batch-size -2 1 1', '--rampup-batch-size', '-2'),
    said('--mhc-bogus', '--mhc-bogus'),
    said('--hc-bogus 3', '--hc-bogus'),
    said('--mudd-bogus', '--mudd-bogus'),
    said('--engram-bogus', '--engram-bogus'),
    said('--pipeline-schedules zb-v', '--pipeline-schedules'),
    said(f'{MHC} --mhc-num-residual-streams', '--mhc-num-residual-streams'),
    said('--mhc-num-residual-streams 4', '--mhc-num-residual-streams', 'standard'),
    said('--residual-type mudd --mhc-num-residual-streams 4', '--mhc-num-residual-streams', 'mudd'),
    said(f'{HC} --mhc-manifold identity', '--mhc-manifold', 'hc'),
    said(f'{MHC} --mhc-numerics glm-5.3 --mhc-stream-merge sum', '--mhc-stream-merge', 'sum'),
    said(f'{MHC} --mhc-numerics megatron-dev --mhc-norm-eps 1e-5', '--mhc-norm-eps', '1e-05'),
    said(f'{HC} --mhc-numerics glm-5.3', '--mhc-numerics', 'hc'),
    said(f'{MHC} --hc-no-tanh', '--hc-no-tanh', 'mhc'),
    said(f'{MHC} --mudd-variant static', '--mudd-variant', 'mhc'),
    said(f'{MHC} --mhc-single-pass --mhc-stream-merge sum', '--mhc-stream-merge', 'sum'),
    said(f'{MHC} --mhc-manifold identity --mhc-fixed-mappings res', '--mhc-manifold', 'res'),
    said(f'{MHC} --mhc-manifold orthogonal --mhc-sinkhorn-iterations 3', 'sinkhorn_iterations=3'),
    said(f'{MHC} --mhc-recompute-stream high', '--mhc-recompute-stream', 'high'),
    said(f'{MHC} --mhc-fixed-mappings pre pre x', '--mhc-fixed-mappings', 'x'),
    said(f'{MHC} --mhc-monitor', '--mhc-monitor', '--tensorboard-dir'),
    said(f'{MHC} --mhc-monitor-tokens 4', '--mhc-monitor-tokens', '--mhc-alarm'),
    said('--mhc-monitor', '--mhc-monitor', 'standard'),
    said(f'{MHC} --mhc-alarm-gain 3', '--mhc-alarm-gain', '--mhc-alarm warn'),
    said('--engram-dim 64', '--engram-dim', '--engram-layers'),
    said(f'{ENGRAM} 2', '--engram-layers', '2 2'),
    said('--engram-layers 3', '--engram-layers', '3'),
    said(f'{ENGRAM} --engram-dim 100', '--engram-dim', '100'),
    said('--hybrid-layer-pattern *E', '--hybrid-layer-pattern *E', '--num-experts'),
    said(f'{MHC} --hybrid-layer-pattern *E-E', "'E' (experts)", '--num-experts'),
    said(f'{MHC} --hybrid-layer-pattern=', "--hybrid-layer-pattern ''", 'no layer'),
    said('--lr-step-rates 0.5', '--lr-step-rates', 'linear'),
    said(f'{STEP} --lr-step-milestones 0.5', '--lr-step-milestones', '0.5'),
    said(f'{STEP} --lr-step-milestones 0.9 0.8', '--lr-step-milestones', '0.9 0.8'),
    said('--pipeline-schedule interleaved', '--pipeline-schedule', 'interleaved'),
    said('--pipeline-verify-steps 2', '--pipeline-verify-steps', '1f1b'),
    said('--pipeline-schedule zb-v --micro-batch-size 1', '--pipeline-model-parallel-size 1'),
    said(f'{V} --pipeline-w-placement after', '--pipeline-w-placement', 'zb-v'),
)

ROWS = all_rows(LINES, KINDS)
