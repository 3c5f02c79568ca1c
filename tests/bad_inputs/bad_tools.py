"""Bad lines of the scripts in tools/ and examples/."""

from __future__ import annotations

from bad_values import CHOICE, COUNT, FACTOR, FROM_ZERO
from one_line import all_rows, said

KINDS = (
    ('quickstart.py train', ('--iters', '--seed'), COUNT),
    ('quickstart.py compare', ('--seeds',), COUNT),
    ('quickstart.py train', ('--residual-type',), CHOICE),
    ('prepare_corpus.py --output c', ('--max-bytes',), COUNT),
    ('prepare_corpus.py --output c', ('--glob',), ('', '/etc/*')),
    ('manifold_table.py', ('--streams', '--matrices'), COUNT),
    ('manifold_table.py', ('--scale',), FACTOR),
    ('manifold_table.py', ('--seed',), FROM_ZERO),
    ('bench.py', ('--hidden-sizes', '--tokens', '--num-streams'), COUNT),
    ('bench.py', ('--budget-minutes',), ('0', *FACTOR)),
    ('bench.py', ('--dtype', '--device', '--ops', '--ours', '--peers'), CHOICE),
    (
        'profile_layer.py',
        ('--hidden-size', '--tokens', '--num-streams', '--steps', '--rows'),
        COUNT,
    ),
    (
        'bench_step.py',
        ('--hidden-size', '--num-layers', '--seq-length', '--micro-batch-size', '--samples'),
        COUNT,
    ),
    ('graph_check.py', ('--hidden-size', '--num-layers', '--seq-length', '--train-iters'), COUNT),
    ('bench_step.py', ('--residual-type',), CHOICE),
    ('recipe.py 3b', ('--gpus-per-node',), COUNT),
    ('recipe.py 3b', ('--layout', '--residual-type'), CHOICE),
    ('init_study.py', ('--seeds', '--iters', '--jobs'), COUNT),
    ('init_study.py', ('--only', '--against'), CHOICE),
)

LINES = (
    said('quickstart.py', 'task'),
    said('quickstart.py bogus', 'bogus'),
    said('quickstart.py train extra', 'extra'),
    said('quickstart.py train --seeds 3', '--seeds 3', 'use compare'),
    said('quickstart.py train --output o --corpus-source /no/such', '/no/such'),
    said('prepare_corpus.py', '--output'),
    said('prepare_corpus.py --output c --glob *.none', '--glob', '*.none'),
    said('prepare_corpus.py --output c --max-bytes 3', '--max-bytes', '3'),
    said('plot_losses.py --output x.png', 'NAME=TENSORBOARD_DIR'),
    said('plot_losses.py a=.', '--output'),
    said('plot_losses.py --output x.png folder', 'folder'),
    said('plot_losses.py --output x.png =folder', '=folder'),
    said('plot_losses.py --output x.png a=. a=.', 'a=.'),
    said('plot_losses.py --output x.doc a=.', '--output', 'x.doc'),
    said('plot_losses.py --output /no/such/x.png a=.', '--output', '/no/such/x.png'),
    said('manifold_table.py extra', 'extra'),
    said('bench.py extra', 'extra'),
    said('profile_layer.py --device cpu --contender nosuch', '--contender', 'nosuch'),
    said('bench_step.py --hidden-size 200', '--hidden-size 200', 'multiple of 64'),
    said('graph_check.py --hidden-size 200', '--hidden-size 200', 'multiple of 64'),
    said('recipe.py', 'name'),
    said('recipe.py 4b', '4b'),
    said('recipe.py 3b --data-path x', '--data-path', '--tokenizer'),
    said('recipe.py 3b --tokenizer x', '--data-path', '--tokenizer'),
    said('init_study.py extra', 'extra'),
    said('init_study.py --plot x.doc', '--plot', 'x.doc'),
    said('init_study.py --table --results r.jsonl', '--results', 'r.jsonl'),
    said('init_study.py --results /no/such/r.jsonl', '--results', '/no/such/r.jsonl'),
)

ROWS = all_rows(LINES, KINDS)
