"""The words that flags take: light, for commands that offer them and check nothing."""

from __future__ import annotations

RESIDUAL_TYPES = ('standard', 'hc', 'mhc', 'mudd', 'gated', 'attention')
# Those with n streams.
STREAM_TYPES = ('hc', 'mhc', 'gated')
# Those whose streams are mixed by an H_res, and merged as a flag says.
MAPPED_TYPES = ('hc', 'mhc')
RECOMPUTE_SEGMENTS = ('none', 'stage', 'auto')
STOCK_SCHEDULES = ('1f1b', 'interleaved')
# Those on the inverted V, run from a plan.
V_SCHEDULES = ('zb-v', 'dualpipev', 'dualpipev-w')
PIPELINE_SCHEDULES = (*STOCK_SCHEDULES, *V_SCHEDULES)
# What --device takes; `unchanged` is the adaptor's alone.
DEVICES = ('auto', 'cpu', 'cuda', 'unchanged')
