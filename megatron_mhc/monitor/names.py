"""What a monitored run writes, by name: tags, what is checked, and sublayers."""

from __future__ import annotations

PREFIX = 'mhc/'
# Megatron's own.
LOSS, GRADIENT_NORM = 'lm loss', 'grad-norm'
# Tensors. What is drawn by sublayer is written as one: scalars of hundreds of sublayers would bury
# everything else on TensorBoard's page.
H_RES, COMPOSITE, BY_SUBLAYER = 'mhc/h-res', 'mhc/h-res-composite', 'mhc/by-sublayer'
# What is checked in each sublayer, in the order in which a forward meets them.
CHECKED = ('streams', 'maps', 'outputs')
SINGLE_GAINS = ('amax-gain-forward', 'amax-gain-backward')
COMPOSITE_GAINS = ('amax-composite-gain-forward', 'amax-composite-gain-backward')
RANK, COSINE, WRITE_SHARE = 'stream-effective-rank', 'stream-similarity', 'write-share'
LOGIT, LOGIT_GRADIENT, SATURATED = 'res-logit-max', 'res-logit-grad-max', 'res-saturated'
# The rows of BY_SUBLAYER, NaN where a run does not have one.
ROWS = (
    *(*SINGLE_GAINS, *COMPOSITE_GAINS, RANK, WRITE_SHARE, SATURATED),
    *(f'nonfinite-{name}' for name in CHECKED),
)
# Symbol of a hybrid pattern -> what mixes the tokens of its layer, where that is not attention.
MIXERS = {'M': 'mamba', 'G': 'gdn'}
# Of as many streams every entry of H_res is a curve.
FEW_STREAMS = 4


def sublayer_name(sublayer: int, pattern: str = '') -> str:
    """``layer 3 attention``, with Megatron's numbers from 1, of sublayer 4.

    Args:
        pattern: the layers of a hybrid model, as in ``--hybrid-layer-pattern``.
    """
    layer, half = divmod(sublayer, 2)
    symbol = pattern.partition('/')[0].replace('|', '')[layer : layer + 1]
    return f'layer {layer + 1} {"mlp" if half else MIXERS.get(symbol, "attention")}'
