"""The quick start's model and training, written as the Megatron flags that they are."""

import os
import socket
from pathlib import Path

# About 0.9 million parameters: small enough for two CPU cores, deep enough for two pipeline stages.
MODEL = """
    --num-layers 4 --hidden-size 128 --num-attention-heads 4
    --seq-length 128 --max-position-embeddings 128
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --attention-dropout 0 --hidden-dropout 0
    --transformer-impl local
""".split()

OPTIMIZER = """
    --micro-batch-size 4 --global-batch-size 16
    --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-fraction 0.05
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
    --override-opt_param-scheduler
""".split()

RESIDUAL = {
    'standard': ['--residual-type', 'standard'],
    'hc': ['--residual-type', 'hc', '--mhc-num-residual-streams', '4', '--mhc-monitor'],
    'mhc': [
        *('--residual-type', 'mhc', '--mhc-num-residual-streams', '4'),
        *('--mhc-sinkhorn-iterations', '20', '--mhc-monitor'),
    ],
}


def data(corpus: Path) -> list[str]:
    """Bytes as tokens; the last of the 256 ends a document (see prepare_corpus.py)."""
    return [
        *('--tokenizer-type', 'NullTokenizer', '--vocab-size', '256'),
        *('--train-data-path', str(corpus / 'train')),
        *('--valid-data-path', str(corpus / 'valid')),
        *('--data-cache-path', str(corpus / 'cache')),
    ]


def schedule(iters: int, seed: int) -> list[str]:
    """Twelve validations, the first one early, and a checkpoint at each quarter.

    Each validation reads other held-out samples; 256 of them keep the noise near 0.03. The cyclic
    loader starts over when they are used up; the default one would end a run that is resumed with
    more iterations, because Megatron counts the samples that it needs without those used before.
    """
    every = max(1, iters // 12)
    return [
        *('--train-iters', str(iters), '--seed', str(seed)),
        *('--dataloader-type', 'cyclic'),
        *('--log-interval', str(max(1, min(10, iters // 10)))),
        *('--eval-interval', str(every), '--eval-iters', '16'),
        *('--save-interval', str(max(1, iters // 4))),
    ]


def outputs(run: Path) -> list[str]:
    """TensorBoard events and checkpoints; a checkpoint that is there already is resumed from.

    With the exit signal handler, SIGTERM makes Megatron finish its iteration, save and leave.
    """
    return [
        *('--tensorboard-dir', str(run / 'tensorboard')),
        *('--save', str(run / 'checkpoints'), '--load', str(run / 'checkpoints')),
        *('--ckpt-format', 'torch_dist', '--exit-signal-handler'),
    ]


def parallel(gpus: int) -> tuple[int, list[str]]:
    """``(processes, flags)``: two pipeline stages wherever two processes fit; bf16 on GPUs."""
    if gpus == 0:
        return 2, ['--pipeline-model-parallel-size', '2']
    # A power of two divides the four microbatches of a step among the data-parallel ranks.
    processes = 1 << (min(gpus, 8).bit_length() - 1)
    # Transformer Engine and Apex, which would fuse these, may not be there.
    flags = [
        *('--bf16', '--no-gradient-accumulation-fusion', '--no-persist-layer-norm'),
        *('--no-rope-fusion', '--no-masked-softmax-fusion'),
    ]
    return processes, ['--pipeline-model-parallel-size', str(min(2, processes)), *flags]


def environment(processes: int, gpus: int) -> dict[str, str]:
    """The environment of the ranks; what the user has set wins, except the path to this package."""
    defaults = {'PYTHONWARNINGS': 'ignore'}
    if gpus == 0:
        defaults['OMP_NUM_THREADS'] = str(max(1, (os.cpu_count() or 1) // processes))
        # Compiling takes longer than this whole run gains from it.
        defaults['TORCHDYNAMO_DISABLE'] = '1'
        # All ranks are here; gloo would otherwise look the host's name up, which may not resolve.
        for _, name in socket.if_nameindex():
            if name in ('lo', 'lo0'):
                defaults['GLOO_SOCKET_IFNAME'] = name
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get('PYTHONPATH')])]
    return defaults | dict(os.environ) | {'PYTHONPATH': os.pathsep.join(paths)}
