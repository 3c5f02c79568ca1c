"""The words that flags take: light, for commands that offer them and check nothing."""

from __future__ import annotations

RESIDUAL_TYPES = ('standard', 'hc', 'mhc', 'mudd', 'gated', 'attention')
# Those with n streams.
STREAM_TYPES = ('hc', 'mhc', 'gated')
# Those whose streams are mixed by an H_res, and merged as a flag says.
MAPPED_TYPES = ('hc', 'mhc')
RECOMPUTE_SEGMENTS = ('none', 'stage', 'auto')
STOCK_SCHEDULES = ('1f1b', 'interleaved')
# Run from a plan: on the inverted V, those with fused slots last; one stage a rank; and a stage of
# each of two copies of the model.
FUSED_SCHEDULES = ('dualpipev', 'dualpipev-w')
V_SCHEDULES = ('zb-v', 'v-half', 'v-min', 'v-bound', *FUSED_SCHEDULES)
LINE_SCHEDULES = ('1f1b-overlap', 'zb-h1')
MIRRORED_SCHEDULES = ('dualpipe',)
TWO_CHUNK_SCHEDULES = (*V_SCHEDULES, *MIRRORED_SCHEDULES)
PLANNED_SCHEDULES = (*LINE_SCHEDULES, *TWO_CHUNK_SCHEDULES)
PIPELINE_SCHEDULES = (*STOCK_SCHEDULES, *PLANNED_SCHEDULES)
# Those of which a study looks at all layouts unless it is told which: all but the one that is made
# for a bound.
STUDIED_SCHEDULES = (
    *STOCK_SCHEDULES,
    *LINE_SCHEDULES,
    *(name for name in V_SCHEDULES if name != 'v-bound'),
)
# What --device takes; `unchanged` is the adaptor's alone.
DEVICES = ('auto', 'cpu', 'cuda', 'unchanged')
