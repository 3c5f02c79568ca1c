"""A hybrid layer pattern, checked before Megatron does so by assertions or while models are built.

A ``standard`` run is left to Megatron.
"""

from __future__ import annotations

import argparse

from megatron_mhc.compat import core_version
from megatron_mhc.inputs.values import shown
from megatron_mhc.settings.constraint import layer_pattern
from megatron_mhc.settings.hybrid_stages import LAYERS


def pattern_of(args: argparse.Namespace) -> str | None:
    """The layer pattern, by either name of its flag, with the parts of an older flag behind it.

    None of another model; empty where it was given so.
    """
    pattern = layer_pattern(vars(args).get)
    names = 'hybrid_layer_pattern', 'hybrid_override_pattern'
    if pattern is None and any(getattr(args, name, None) == '' for name in names):
        return ''
    predicted = getattr(args, 'mtp_hybrid_override_pattern', None)
    if pattern is None or predicted is None or '/' in pattern:
        return pattern
    return pattern + f'/{predicted}' * (args.mtp_num_layers or 0)


def check_hybrid_pattern(args: argparse.Namespace) -> None:
    """Raise ValueError for a pattern that no model of this release can have on these stages."""
    pattern = pattern_of(args)
    if pattern is None:
        return
    from megatron.core.ssm.mamba_hybrid_layer_allocation import Symbols

    main, *predicted = pattern.split('/')
    flag = f'--hybrid-layer-pattern {shown(pattern) or "''"}'
    known = ''.join(sorted(Symbols.VALID_LAYERS))
    for symbol in pattern:
        if symbol not in Symbols.VALID_LAYERS | {'|', '/'}:
            raise ValueError(
                f'{flag}: {symbol!r} is no layer of megatron-core {core_version()}, which has '
                f'{known}; replace it'
            )
    if '*' in pattern and set('+D') & set(pattern):
        raise ValueError(
            f"{flag}: one model has either '*' or latent attention ('+', 'D'), whose sizes "
            'are other flags; use one of them'
        )
    # Megatron lets a '/' with nothing behind it be.
    _check_predictions(args, flag, predicted if any(predicted) else [])
    split = args.tensor_model_parallel_size
    if 'G' in pattern and split > 1 and not args.sequence_parallel:
        raise ValueError(
            f"{flag}: Megatron sums the gradient of the output norm of 'G' ({LAYERS['G']}) over "
            f'--tensor-model-parallel-size {split} with --sequence-parallel alone; add it'
        )
    ranks, segments = args.pipeline_model_parallel_size, main.split('|')
    if not main.replace('|', ''):
        raise ValueError(f'{flag}: no layer; give one symbol for each, of {known}')
    if len(segments) > 1 and (ranks == 1 or len(segments) % ranks):
        raise ValueError(
            f'{flag}: {len(segments)} stages do not divide over --pipeline-model-parallel-size '
            f"{ranks}; have '|' end as many stages for each rank, or leave them out on one"
        )
    uneven = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    if len(segments) == 1 and uneven == (None, None) and len(main) % ranks:
        raise ValueError(
            f'{flag}: {len(main)} layers do not divide over --pipeline-model-parallel-size '
            f"{ranks}; say with '|' where stages end"
        )


def _check_predictions(args: argparse.Namespace, flag: str, predicted: list[str]) -> None:
    """The same of the parts behind '/', one for each token that is predicted beyond the next."""
    if any(part != predicted[0] or '|' in part for part in predicted):
        raise ValueError(
            f"{flag}: every part behind '/' is one more prediction by the same layers, on the last "
            "stage; repeat the first part, and leave out '|'"
        )
    wanted = args.mtp_num_layers
    if wanted and wanted != len(predicted):
        raise ValueError(
            f"{flag}: {len(predicted)} parts behind '/', but --mtp-num-layers {wanted}; give one "
            'each, or leave the number to the pattern'
        )
    if predicted and args.position_embedding_type not in ('rope', 'none'):
        raise ValueError(
            f'{flag}: Megatron has prediction layers with --position-embedding-type rope or none '
            f'alone, and this is {args.position_embedding_type}; add one of them'
        )
