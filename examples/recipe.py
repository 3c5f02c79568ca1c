#!/usr/bin/env python
"""Train a model of the mHC paper (3b, 9b, 27b, 3b-1t) or a Nemotron-H, on 1, 8, 64 or more GPUs.

python examples/recipe.py 3b --layout 8gpu                       # mock data, nothing to download
python examples/recipe.py 3b --scale-down                        # 20 iterations on a laptop's CPU
python examples/recipe.py 27b --layout 64gpu --print > train.sh  # the same as a bash script
python examples/recipe.py 27b --gpus 1024 --print                # beyond the layouts with a name
python examples/recipe.py 9b -- --train-iters 100 --log-interval 1

What follows `--` goes to Megatron, after the recipe's own flags. On several nodes start it once on
each with MASTER_ADDR set, as recipe.slurm does.
"""

import argparse
import dataclasses
import pathlib
import subprocess
import sys

from megatron_mhc.inputs.refusal import OneLineParser, refuse
from megatron_mhc.inputs.values import MOST_RANKS, integer
from megatron_mhc.recipes.answer import describe, verdict
from megatron_mhc.recipes.beyond import layout_beyond
from megatron_mhc.recipes.recipe import LAYOUTS, RECIPES, recipe_flags, scaled_down
from megatron_mhc.recipes.script import LAUNCHER, bash_script, mock_data, torchrun_flags
from megatron_mhc.settings.names import MAPPED_TYPES
from megatron_mhc.settings.queues import CONNECTIONS, connections, one_queue

PRETRAIN = {
    kind: pathlib.Path(__file__).with_name(f'pretrain_{kind}.py') for kind in ('gpt', 'hybrid')
}


def parse(argv):
    """The launcher's options, and Megatron's own flags behind `--`."""
    parser = OneLineParser(
        prog='recipe.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('name', choices=RECIPES)
    parser.add_argument('--layout', choices=LAYOUTS['3b'], help='(default: 8gpu)')
    parser.add_argument(
        '--gpus', type=integer(65, MOST_RANKS), metavar='N', help='more than 64, from 64gpu on'
    )
    parser.add_argument('--residual-type', choices=('standard', *MAPPED_TYPES), default='mhc')
    parser.add_argument(
        '--gpus-per-node', type=integer(1, 1024), default=8, metavar='N', help='(default: 8)'
    )
    parser.add_argument('--scale-down', action='store_true', help='tiny sizes, 20 iterations')
    parser.add_argument('--print', action='store_true', help='print a bash script, run nothing')
    parser.add_argument(
        '--data-path', nargs='+', metavar='PREFIX', help='Megatron .bin/.idx (default: mock data)'
    )
    parser.add_argument('--tokenizer', metavar='MODEL', help='Hugging Face name or folder')
    parser.add_argument('--save', metavar='DIR', help='checkpoints and TensorBoard; resumes')
    own, extra = (argv, [])
    if '--' in argv:
        own, extra = argv[: argv.index('--')], argv[argv.index('--') + 1 :]
    options = parser.parse_args(own)
    if (options.data_path is None) != (options.tokenizer is None):
        parser.error('--data-path and --tokenizer belong together: give both or neither')
    if options.gpus and options.scale_down:
        parser.error(f'--gpus {options.gpus} has no effect with --scale-down; drop one of them')
    if options.save and pathlib.Path(options.save).is_file():
        parser.error(f'--save {options.save}: a file; name a folder')
    return options, extra


def data_flags(options, recipe):
    """Mock data with a tokenizer that needs no file, or the user's own."""
    if options.data_path is None:
        return mock_data(recipe.vocab)
    return {
        'data-path': tuple(options.data_path),
        'tokenizer-type': 'HuggingFaceTokenizer',
        'tokenizer-model': options.tokenizer,
        'split': '99,1,0',
    }


def logging_flags(options):
    """A line every 10 iterations, every one where there are only 20; checkpoints on demand."""
    flags = {
        'log-interval': 1 if options.scale_down else 10,
        'log-throughput': True,
        'eval-interval': 1000,
        'eval-iters': 1 if options.scale_down else 10,
    }
    if options.save:
        flags |= {'save': options.save, 'load': options.save, 'save-interval': 1000}
        flags['tensorboard-dir'] = f'{options.save}/tensorboard'
    return flags


def layout_of(layout, extra):
    """The layout that Megatron's own flags make of ``layout``, and whether it has one queue."""
    parser = OneLineParser(prog='recipe.py', add_help=False, allow_abbrev=False)
    kinds = {'tp': 'tensor-model', 'pp': 'pipeline-model', 'ep': 'expert-model', 'cp': 'context'}
    for name, kind in kinds.items():
        flag, size = f'--{kind}-parallel-size', getattr(layout, name)
        parser.add_argument(flag, dest=name, type=integer(1, MOST_RANKS), default=size)
    asked = vars(parser.parse_known_args(extra)[0])
    return dataclasses.replace(layout, **asked), one_queue(asked['tp'], asked['cp'])


def main(argv=None):
    """Print the script, or run it."""
    options, extra = parse(sys.argv[1:] if argv is None else argv)
    recipe, layout = RECIPES[options.name], LAYOUTS[options.name][options.layout or '8gpu']
    try:
        if options.gpus:
            named = LAYOUTS[options.name][options.layout or '64gpu']
            layout = layout_beyond(recipe.batch, named, {'gpus': options.gpus})
        if options.scale_down:
            recipe, layout = scaled_down(recipe, layout)
        layout, one = layout_of(layout, extra)
        figures = describe(recipe, layout, options.residual_type)
    except ValueError as error:
        refuse('recipe.py', str(error))
    topics = {
        LAUNCHER: torchrun_flags(layout.gpus, options.gpus_per_node),
        **recipe_flags(recipe, layout, options.residual_type, one),
        'DATA_ARGS': data_flags(options, recipe),
        'LOGGING_ARGS': logging_flags(options),
    }
    size = 'scaled down' if options.scale_down else verdict(figures)
    title = f'{options.name}, ranks: {layout.gpus}; {size}'
    # Nobody has said which GPU it will be: from Blackwell on 32 is right for every layout.
    export = f'{CONNECTIONS}="${{{CONNECTIONS}:-{connections(one)}}}"'
    pretrain = PRETRAIN['hybrid' if recipe.shape().pattern else 'gpt']
    script = bash_script(title, [export], topics, sys.executable, str(pretrain), extra)
    if options.print:
        print(script, end='')
        return 0
    print(f'[recipe] {title}', flush=True)
    return subprocess.run(['bash', '-c', script]).returncode


if __name__ == '__main__':
    sys.exit(main())
