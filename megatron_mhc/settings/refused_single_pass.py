"""What single-pass mHC cannot be combined with, beside what no residual topology can."""

from __future__ import annotations

from megatron_mhc.settings.constraint import Constraint, Refusals, full_recompute, predicts

_ROWS = (
    Constraint(
        '--pipeline-model-parallel-size > 1',
        lambda get: (get('pipeline_model_parallel_size') or 1) > 1,
        'the H_pre of the last sublayer is not sent along with the streams',
        'use tensor, sequence or data parallelism',
    ),
    Constraint(
        '--recompute-granularity full',
        full_recompute,
        'a recomputed layer gets the streams without the H_pre of the layer before',
        'use --recompute-granularity selective',
    ),
    Constraint(
        '--mtp-num-layers',
        predicts,
        'the published model merges the streams in another way for them',
        'drop the flag',
    ),
    Constraint(
        '--mhc-post-stream high',
        lambda get: get('mhc_post_stream') == 'high',
        'the next read comes right after F_post,res, with nothing to overlap',
        'drop the flag',
    ),
)
SINGLE_PASS = Refusals('--mhc-single-pass', 'drop --mhc-single-pass', _ROWS)
