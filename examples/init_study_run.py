"""One run of the study of initial values: its text, its command line, its losses.

Importing torch and Megatron takes longer than a short run, so the study does it once and forks a
child for each run: nothing that one leaves behind reaches the next.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools'))

import prepare_corpus  # noqa: E402
import quickstart_flags  # noqa: E402
import supervise  # noqa: E402

# Of all runs, whatever their seed: the same held-out samples in the same order.
HELD_OUT_SEED = 1
HELD_OUT_SAMPLES = 512
BYTES = prepare_corpus.EOD + 1
BPE = 1024


class Size(NamedTuple):
    """A model and its batch, as flags, and the number of its tokens, which names its text."""

    flags: list[str]
    batch: int
    vocabulary: int


def batch(size: int) -> list[str]:
    """One microbatch: the losses are those of several smaller ones, sooner."""
    return ['--micro-batch-size', str(size), '--global-batch-size', str(size)]


QUICKSTART = [*quickstart_flags.MODEL, *quickstart_flags.OPTIMIZER, *batch(16)]
# Deep and narrow: 48 sublayers.
DEEP = [
    *QUICKSTART,
    *('--num-layers', '24', '--hidden-size', '64', '--num-attention-heads', '2'),
    *('--seq-length', '64', '--max-position-embeddings', '64', *batch(8)),
]
SIZES = {
    'quickstart': Size(QUICKSTART, 16, BYTES),
    'deep': Size(DEEP, 8, BYTES),
    'bpe': Size(QUICKSTART, 16, BPE),
}


def prepare(folder: Path, sizes: set[str]) -> str:
    """Write the text of ``sizes`` below ``folder`` unless it is there; returns its digest.

    Raises:
        RuntimeError: a package is missing.
    """
    source = Path(sysconfig.get_path('stdlib'))
    digest: str = prepare_corpus.prepare(folder / str(BYTES), source)['digest']
    done = folder / str(BPE) / digest
    if any(SIZES[size].vocabulary == BPE for size in sizes) and not done.exists():
        write_bpe(done.parent, source)
        done.touch()
    return digest


def write_bpe(folder: Path, source: Path) -> None:
    """The same files, split alike, as tokens of a BPE learned on the training files."""
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError as error:
        raise RuntimeError(
            'bpe: the package tokenizers is not installed; pip install tokenizers, or choose '
            'other groups with --only'
        ) from error
    documents = prepare_corpus.read_documents(source, '**/*.py', 2**24)
    splits = prepare_corpus.split_by_file(documents)
    bpe = ByteLevelBPETokenizer()
    texts = (documents[name].decode() for name in splits['train'])
    # The last number ends a document.
    bpe.train_from_iterator(texts, vocab_size=BPE - 1, show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ('train', 'valid'):
        builder = IndexedDatasetBuilder(str(folder / f'{split}.bin'), dtype=numpy.uint16)
        for name in splits[split]:
            ids = [*bpe.encode(documents[name].decode()).ids, BPE - 1]
            builder.add_document(numpy.array(ids, dtype=numpy.uint16), [len(ids)])
        builder.finalize(str(folder / f'{split}.idx'))


def command(folder: Path, size: str, flags: list[str], iters: int, seed: int) -> list[str]:
    """The arguments of examples/pretrain_gpt.py; one validation, when training has ended."""
    model, samples, vocabulary = SIZES[size]
    text = folder / str(vocabulary)
    return [
        *model,
        *('--train-iters', str(iters), '--seed', str(seed), '--num-workers', '0'),
        *('--eval-interval', str(iters + 1), '--eval-iters', str(HELD_OUT_SAMPLES // samples)),
        *('--log-interval', '1', '--log-timers-to-tensorboard'),
        *('--tokenizer-type', 'NullTokenizer', '--vocab-size', str(vocabulary)),
        *('--train-data-path', str(text / 'train'), '--valid-data-path', str(text / 'valid')),
        *flags,
    ]


def load_megatron() -> None:
    """What every child needs, imported before they are forked."""
    os.environ.setdefault('TORCHDYNAMO_DISABLE', '1')
    os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', LOCAL_WORLD_SIZE='1')
    from megatron_mhc.bootstrap import prepare

    prepare('cpu')
    import pretrain_gpt  # noqa: F401
    import torch

    torch.set_num_threads(1)


def same_held_out(provider: Callable[..., Any]) -> Callable[..., Any]:
    """A provider of datasets whose training samples follow ``--seed`` and no others do."""
    from megatron.training import get_args

    def provide(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        train, _, _ = provider(*args, **kwargs)
        arguments = get_args()
        seed, arguments.seed = arguments.seed, HELD_OUT_SEED
        _, valid, test = provider(*args, **kwargs)
        arguments.seed = seed
        return train, valid, test

    provide.is_distributed = True
    return provide


def train(arguments: list[str], start: dict[str, Any] | None) -> dict[str, float]:
    """Train and validate in this process, once; ``load_megatron`` comes first.

    Args:
        arguments: those of ``command``.
        start: what ``--mhc-init identity`` shall stand for, fields of ``Start``; None as it is.

    Returns:
        ``valid``: loss on the held-out samples; ``train``: mean loss of the last tenth of the
        iterations; ``grad_norm``: the largest, before clipping; ``seconds`` an iteration, median.
    """
    import pretrain_gpt as script
    import torch
    from megatron.training import get_tensorboard_writer, training

    from megatron_mhc.monitor.events import read_events, scalars
    from megatron_mhc.monitor.names import LOSS
    from megatron_mhc.residual.start import STARTS, Start

    if start is not None:
        STARTS['identity'] = Start(**start)
    script.pretrain = functools.partial(training.pretrain, store=torch.distributed.HashStore())
    script.datasets_provider = same_held_out(script.datasets_provider)
    with tempfile.TemporaryDirectory() as scratch:
        outputs = ['--data-cache-path', f'{scratch}/cache', '--tensorboard-dir', scratch]
        sys.argv = ['pretrain_gpt.py', *arguments, *outputs]
        script.main()
        # Megatron's own last flush comes before the validation at the end.
        get_tensorboard_writer().flush()
        found = scalars(read_events(Path(scratch), scratch))
    losses = list(found[LOSS].values())
    last = losses[-max(1, len(losses) // 10) :]
    return {
        'valid': max(found[f'{LOSS} validation'].items())[1],
        'train': sum(last) / len(last),
        'grad_norm': max(found['grad-norm'].values()),
        'seconds': statistics.median(found['iteration-time'].values()),
    }


def run_in_child(arguments: list[str], start: dict[str, Any] | None, log: Path) -> int:
    """Fork a child that trains; returns its process id. The result goes to ``log`` + ``.json``."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if die_with_parent := supervise.follow_parent_to_death():
            die_with_parent()
        with log.open('w') as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        log.with_suffix('.json').write_text(json.dumps(train(arguments, start)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not what the parent has registered to run at its end.
        os._exit(status)
