"""A launch as bash: arrays of flags by topic, for torchrun on each node, and for Slurm."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from megatron_mhc.recipes.recipe import Flags, words

# Flags, or words of somebody's own command line.
Topics = Mapping[str, Flags | Sequence[str]]
LAUNCHER = 'TORCHRUN_ARGS'


def flags_text(topics: Mapping[str, Flags]) -> str:
    """Flags for a shell, a topic a line."""
    lines = [' '.join(shlex.join(line) for line in words(flags)) for flags in topics.values()]
    return ' \\\n    '.join(line for line in lines if line)


class Bash(str):
    """A word that is bash already, in double quotes; all others are quoted."""


def mock_data(vocab: int) -> Flags:
    """Mock data, with a tokenizer that needs no file."""
    return {
        'mock-data': True,
        'tokenizer-type': 'NullTokenizer',
        # One less: some releases add an end-of-document token.
        'vocab-size': vocab - 1,
        'split': '99,1,0',
    }


def ranks_of_node(gpus: int, gpus_per_node: int) -> int:
    """The most ranks of a node with which all nodes have as many."""
    return max(ranks for ranks in range(1, min(gpus, gpus_per_node) + 1) if gpus % ranks == 0)


def torchrun_flags(gpus: int, gpus_per_node: int) -> Flags:
    """One node by itself, or one of several that meet at MASTER_ADDR; bash fills in the names."""
    ranks = ranks_of_node(gpus, gpus_per_node)
    flags: Flags = {'nproc-per-node': ranks}
    if ranks == gpus:
        return {'standalone': True, **flags}
    return {
        'nnodes': gpus // ranks,
        **flags,
        'rdzv-backend': 'c10d',
        'rdzv-id': Bash('"${SLURM_JOB_ID:-recipe}"'),
        'rdzv-endpoint': Bash(
            '"${MASTER_ADDR:?set it to the first of the nodes}:${MASTER_PORT:-29500}"'
        ),
    }


def bash_script(
    title: str, exports: Sequence[str], topics: Topics, python: str, script: str, extra: list[str]
) -> str:
    """The launch as bash: one array a topic, one flag a line.

    Args:
        title: a comment, of one line whatever is in it.
        exports: ``NAME=VALUE``, of the environment, as bash.
        topics: flags, those of torchrun under ``LAUNCHER``.
        python: the interpreter; ``Bash``, or a path.
        script: that is launched, likewise.
        extra: further flags, before those that the script is given.
    """
    lines = ['#!/usr/bin/env bash', '# ' + ' '.join(title.split()), 'set -euo pipefail']
    lines += [f'export {one}' for one in exports]
    for name, flags in topics.items():
        found = words(flags) if isinstance(flags, dict) else _by_flag(flags)
        lines += ['', f'{name}=(', *(f'    {quoted(line)}' for line in found), ')']
    run = [python, '-m', 'torch.distributed.run']
    command = [f'{quoted(run)} "${{{LAUNCHER}[@]}}"']
    command.append(f'-m megatron_mhc.run {quoted([script])}')
    command += [f'"${{{name}[@]}}"' for name in topics if name != LAUNCHER]
    command.append(' '.join([*map(shlex.quote, extra), '"$@"']))
    return '\n'.join([*lines, '', ' \\\n    '.join(command)]) + '\n'


def slurm_script(name: str, script: str, gpus: int, gpus_per_node: int) -> str:
    """A job that runs ``script``, which lies beside it, once on each of its nodes.

    Args:
        name: of the job.
        script: as ``bash_script`` writes it.
        gpus: ranks in all.
        gpus_per_node: the most of one node.
    """
    ranks = ranks_of_node(gpus, gpus_per_node)
    return f"""#!/usr/bin/env bash
# Submit from the folder of this file, which all nodes must see; its arguments go to Megatron.
#SBATCH --job-name={name}
#SBATCH --nodes={gpus // ranks}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={ranks}
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
set -euo pipefail

MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
# Jobs that share a node must not meet.
MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
export MASTER_ADDR MASTER_PORT

srun --kill-on-bad-exit=1 bash "$SLURM_SUBMIT_DIR/{script}" "$@"
"""


def quoted(line: Sequence[str]) -> str:
    """Words for bash."""
    return ' '.join(word if isinstance(word, Bash) else shlex.quote(word) for word in line)


def _by_flag(line: Sequence[str]) -> list[list[str]]:
    """A command line with one flag a list."""
    found: list[list[str]] = []
    for word in line:
        if word.startswith('--') or not found:
            found.append([])
        found[-1].append(word)
    return found
