"""Names of the schedules of ``catalog``, for a command line that need not know how they go."""

SCHEDULE_NAMES = (
    'gpipe',
    '1f1b',
    '1f1b-overlap',
    'interleaved',
    'zb-h1',
    'zb-v',
    'v-half',
    'v-min',
    'v-bound',
    'dualpipev',
    'dualpipev-w',
    'dualpipe',
    'forward-only',
)
# Where an R runs.
RECOMPUTE_STREAMS = ('compute', 'high')
