"""``megatron-mhc docs``: the guides that are part of the package, listed or printed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_mhc.inputs.refusal import refuse

FOLDER = Path(__file__).resolve().parents[1] / 'docs'
# page -> what it is about, in the order in which one reads them.
PAGES = {
    'index': 'where to begin',
    'choosing': 'which start of mHC, which pipeline schedule',
    'launching': 'several nodes, Slurm, containers, and where messages appear',
    'watching': 'TensorBoard, W&B and the report of a run',
    'migrating': "from Megatron-LM's own mHC, and to a newer Megatron-Core",
    'questions': 'asked often, answered in a few lines',
    'commands': 'options with one meaning, JSON, exit status, completion',
    'flags': 'every flag; recomputation, optimizer, monitors, Transformer Engine, inference',
    'support': 'versions, parallelism, what is refused, kernels',
    'troubleshooting': 'by the text of the error',
    'checkpoints': 'what is kept, and what reads it',
    'conversion': 'streams for a standard checkpoint, and other layouts of them',
    'huggingface': 'models for transformers, and back',
    'schedules': 'pipeline schedules: which one, how they work',
    'numerics': 'what DeepSeek-V4, Megatron-LM and GLM-5.3 compute otherwise',
    'initial-values': 'where the maps of mHC start: what was compared',
    'manifolds': 'what H_res is kept on',
    'residuals': 'the gated residual, Attention Residuals',
    'mudd': 'dense connections',
    'engram': 'conditional memory',
    'study': 'the fastest layout of ranks, and what the estimate leaves out',
    'patches': 'what changes in Megatron; the seams in your own tree',
    'api': 'the library, for code of your own',
    'kernels': 'what the kernels move, and how to change one',
    'architecture': 'the rooms of the package, and which way imports go',
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The page, or none for the list."""
    parser.add_argument('page', nargs='?', choices=list(PAGES), metavar='PAGE', help='to print')
    parser.add_argument('--json', action='store_true', help='print one JSON object')
    parser.set_defaults(answer=__name__)


def main(options: argparse.Namespace) -> int:
    """List the pages, or print one of them: through a pager on a terminal, else as it is."""
    if options.page is None:
        if options.json:
            print(json.dumps({'pages': PAGES}, indent=2))
            return 0
        for page, words in PAGES.items():
            print(f'{page:16} {words}')
        return 0
    path = FOLDER / f'{options.page}.md'
    try:
        text = path.read_text(encoding='utf-8')
    except OSError as error:
        refuse('megatron-mhc docs', f'{path}: {error.strerror}; install the package again')
    if options.json:
        print(json.dumps({'page': options.page, 'about': PAGES[options.page], 'text': text}))
    elif sys.stdout.isatty():
        import pydoc

        pydoc.pager(text)
    else:
        sys.stdout.write(text)
    return 0
