#!/usr/bin/env python
"""Train a model of the mHC paper: 3b, 9b, 27b or 3b-1t, on 1, 8 or 64 GPUs.

python examples/recipe.py 3b --layout 8gpu                       # mock data, nothing to download
python examples/recipe.py 3b --scale-down                        # 20 iterations on a laptop's CPU
python examples/recipe.py 27b --layout 64gpu --print > train.sh  # the same as a bash script
python examples/recipe.py 9b -- --train-iters 100 --log-interval 1

What follows `--` goes to Megatron, after the recipe's own flags. On several nodes start it once on
each with MASTER_ADDR set, as recipe.slurm does.
"""

import argparse
import pathlib
import shlex
import subprocess
import sys

from megatron_mhc.inputs.refusal import OneLineParser, refuse
from megatron_mhc.inputs.values import integer
from megatron_mhc.recipes.answer import describe, verdict
from megatron_mhc.recipes.recipe import LAYOUTS, RECIPES, recipe_flags, scaled_down, words
from megatron_mhc.settings.names import STREAM_TYPES

PRETRAIN = pathlib.Path(__file__).with_name('pretrain_gpt.py')
# Streams that share a hardware queue wait for each other; Megatron asks for 1 with tensor
# parallelism only.
CONNECTIONS = '32'


def parse(argv):
    """The launcher's options, and Megatron's own flags behind `--`."""
    parser = OneLineParser(
        prog='recipe.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('name', choices=RECIPES)
    parser.add_argument('--layout', choices=LAYOUTS['3b'], default='8gpu', help='(default: 8gpu)')
    parser.add_argument('--residual-type', choices=('standard', *STREAM_TYPES), default='mhc')
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
    if options.save and pathlib.Path(options.save).is_file():
        parser.error(f'--save {options.save}: a file; name a folder')
    return options, extra


def data_flags(options, recipe):
    """Mock data with a tokenizer that needs no file, or the user's own."""
    if options.data_path is None:
        return {
            'mock-data': True,
            'tokenizer-type': 'NullTokenizer',
            # One less: some releases add an end-of-document token.
            'vocab-size': recipe.vocab - 1,
            'split': '99,1,0',
        }
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


def torchrun_flags(gpus, gpus_per_node):
    """One node by itself, or one of several that meet at MASTER_ADDR; bash fills in the names."""
    nodes = -(-gpus // gpus_per_node)
    flags = {'nproc-per-node': min(gpus, gpus_per_node)}
    if nodes == 1:
        return {'standalone': True, **flags}
    return {
        'nnodes': nodes,
        **flags,
        'rdzv-backend': 'c10d',
        'rdzv-id': '"${SLURM_JOB_ID:-recipe}"',
        'rdzv-endpoint': '"${MASTER_ADDR:?set it to the first of the nodes}:${MASTER_PORT:-29500}"',
    }


def bash_script(title, topics, extra):
    """The launch as bash: one array a topic, one flag a line."""
    lines = [
        '#!/usr/bin/env bash',
        f'# {title}',
        'set -euo pipefail',
        f'export CUDA_DEVICE_MAX_CONNECTIONS="${{CUDA_DEVICE_MAX_CONNECTIONS:-{CONNECTIONS}}}"',
    ]
    for name, flags in topics.items():
        lines += ['', f'{name}=(', *(f'    {quoted(line)}' for line in words(flags)), ')']
    run = [sys.executable, '-m', 'torch.distributed.run']
    command = [f'{quoted(run)} "${{TORCHRUN_ARGS[@]}}"']
    command.append(quoted(['-m', 'megatron_mhc.run', str(PRETRAIN)]))
    command += [f'"${{{name}[@]}}"' for name in topics if name != 'TORCHRUN_ARGS']
    command.append(' '.join([*map(shlex.quote, extra), '"$@"']))
    return '\n'.join([*lines, '', ' \\\n    '.join(command)])


def quoted(line):
    """Words for bash; what stands in double quotes is bash already."""
    return ' '.join(word if word.startswith('"') else shlex.quote(word) for word in line)


def main(argv=None):
    """Print the script, or run it."""
    options, extra = parse(sys.argv[1:] if argv is None else argv)
    recipe, layout = RECIPES[options.name], LAYOUTS[options.name][options.layout]
    if options.scale_down:
        recipe, layout = scaled_down(recipe, layout)
    try:
        figures = describe(recipe, layout, options.residual_type)
    except ValueError as error:
        refuse('recipe.py', str(error))
    topics = {
        'TORCHRUN_ARGS': torchrun_flags(layout.gpus, options.gpus_per_node),
        **recipe_flags(recipe, layout, options.residual_type),
        'DATA_ARGS': data_flags(options, recipe),
        'LOGGING_ARGS': logging_flags(options),
    }
    size = 'scaled down' if options.scale_down else verdict(figures)
    title = f'{options.name}, ranks: {layout.gpus}; {size}'
    script = bash_script(title, topics, extra)
    if options.print:
        print(script)
        return 0
    print(f'[recipe] {title}', flush=True)
    return subprocess.run(['bash', '-c', script]).returncode


if __name__ == '__main__':
    sys.exit(main())
