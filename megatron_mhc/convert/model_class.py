"""The same run with the other class of model: what is read, under which names it is written.

Nothing is computed: all tensors keep their bits; iteration, optimizer and random states go along.
"""

from __future__ import annotations

import argparse
import pathlib
import re
from dataclasses import dataclass, field
from typing import Any

from megatron_mhc.checkpoints.files import RELEASE
from megatron_mhc.checkpoints.stored import COMMON
from megatron_mhc.convert.choices import MODEL_CLASSES, OWN
from megatron_mhc.convert.class_args import moved_args
from megatron_mhc.convert.complete import Expected, check_model, check_parts, expected, stored_name
from megatron_mhc.convert.conversion import Progress, silent
from megatron_mhc.convert.layer_names import EMPTY, Names
from megatron_mhc.convert.moved import Moved
from megatron_mhc.convert.optimizer_state import check_optimizer, without_optimizer
from megatron_mhc.convert.output import (
    atomic_folder,
    check_destination,
    write_distributed,
    write_file,
)
from megatron_mhc.convert.pattern import parsed, pattern_of
from megatron_mhc.convert.source import OPAQUE, Source, open_source
from megatron_mhc.convert.verify import largest_difference


@dataclass
class MovedRun:
    """What became of a run, or with ``dry_run`` would.

    Attributes:
        target: ``hybrid`` or ``gpt``; pattern: of the hybrid model.
        names: (name, new name) of weights, of layer i of the GPT model for any i.
        iteration: None of a release.
        weights, states: number of tensors, and of those of the optimizer.
        nbytes: of all; verified: as ``Converted`` has it.
    """

    target: str
    pattern: str
    names: list[tuple[str, str]]
    iteration: int | None
    weights: int
    states: int
    nbytes: int
    verified: dict[str, float] = field(default_factory=dict)


def move(
    source: str | pathlib.Path,
    destination: str | pathlib.Path,
    to: str,
    *,
    step: int | None = None,
    optimizer: bool = True,
    dry_run: bool = False,
    verify: bool = False,
    overwrite: bool = False,
    unchecked: bool = False,
    progress: Progress | None = None,
) -> MovedRun:
    """Write the run at ``source`` as one of a HybridModel or of a GPTModel.

    Args:
        source: what ``--load`` names, or one iteration of it.
        destination: a folder that is not there yet.
        to: one of ``MODEL_CLASSES``.
        step: an iteration other than the tracker's.
        optimizer: with its state, if there is one.
        dry_run, verify, overwrite, unchecked, progress: as ``conversion.convert`` has them.

    Raises:
        ValueError: it has something that the other class has not, or cannot be read or written; the
            destination is then as it was.
    """
    source, destination = pathlib.Path(source), pathlib.Path(destination)
    if to not in MODEL_CLASSES:
        raise ValueError(f'--to {to}: unknown class; choose one of {", ".join(MODEL_CLASSES)}')
    check_destination(destination, source, overwrite)
    opened = open_source(source, step)
    if opened.format == 'safetensors':
        raise ValueError(f'--to {to}: {source} is no checkpoint of Megatron; first --to mhc')
    check_parts(opened)
    try:
        args = moved_args(opened.args, to, unchecked)
        state = {**opened.state, 'args': args}
        # The plain state is written anew.
        run = [name for name in opened.run if not name.startswith(COMMON.partition('/')[0])]
        if optimizer:
            check_optimizer(opened)
        else:
            state, run = without_optimizer(state, run)
        content = _renamed(opened, to, args, state, run)
    except ValueError as error:
        raise ValueError(f'{opened.folder}: {error}') from error
    if not unchecked:
        check_model(opened, OWN)
        _check_target(content, to, expected(opened, to))
    report = _report(content, to)
    if dry_run:
        return report
    with atomic_folder(destination) as folder:
        with (progress or silent)(content.nbytes) as content.advance:
            write = write_file if opened.format == 'torch' else write_distributed
            write(folder, content, report.iteration)
        if verify:
            report.verified = largest_difference(opened.folder, folder, OWN)
            # Of a NaN it is not true.
            if not report.verified['difference'] == 0:
                raise ValueError(
                    f'--verify: logits differ by {report.verified["difference"]:.2e} where every '
                    f'bit is to be the same, so {destination} was not written; please report it'
                )
    return report


def _renamed(
    opened: Source, to: str, args: argparse.Namespace, state: dict[str, Any], run: list[str]
) -> Moved:
    gpt, hybrid = (opened.args, args) if to == 'hybrid' else (args, opened.args)
    distributed = opened.format == 'torch_dist'
    names = Names(
        parsed(str(pattern_of(hybrid))).layers,
        distributed,
        stacked=distributed and _stacks(gpt, opened.common.get('content_metadata') or {}),
        fused=not getattr(gpt, 'multi_latent_attention', False) if _is_local(gpt) else None,
    )
    own = [*opened.entries, *run]
    parts = names.to_hybrid(own) if to == 'hybrid' else names.to_gpt(own)
    empty = (f'{EMPTY}/shard_0_1',) if to == 'hybrid' and distributed else ()
    return Moved(opened, parts, state, empty)


def _is_local(args: argparse.Namespace) -> bool:
    return getattr(args, 'transformer_impl', None) == 'local'


def _stacks(gpt: argparse.Namespace, metadata: dict[str, Any]) -> bool:
    """Whether a GPT model saves equal layers as one tensor; see TransformerBlock of Megatron."""
    apart = ('non_homogeneous_layers', 'singleton_local_shards')
    every = getattr(gpt, 'moe_layer_freq', 1)
    return not (
        any(metadata.get(name) for name in apart)
        or getattr(gpt, 'hetereogenous_dist_checkpoint', False)
        or isinstance(every, list)
        or every > 1
    )


def _check_target(content: Moved, to: str, tables: tuple[Expected, Expected]) -> None:
    """Raise ValueError unless ``content`` has every weight of its model, and no other."""
    distributed = content.source.format == 'torch_dist'
    weights = tables[distributed]
    # Tables are of local layers; of a hybrid model its checkpoints have the names of Transformer
    # Engine with them.
    exact = _is_local(content.common['args']) or (to == 'hybrid' and distributed)
    there = {
        name: entry
        for name, entry in content.entries().items()
        if entry.shape is not None
        and not any(p.name in content.source.run for p in content.parts[name])
    }
    for name, (shape, _) in weights.items():
        own = name if exact else stored_name(there, name)
        entry = there.pop(own, None)
        if entry is None:
            raise ValueError(
                f'{content.source.folder}: {name} of the {to} model would be missing; add '
                "--unchecked where the model is none of Megatron's own layers"
            )
        if list(entry.shape or ()) != shape:
            raise ValueError(
                f'{content.source.folder}: {name} would have shape {list(entry.shape or ())} where '
                f"the {to} model has {shape}; add --unchecked where the model is not Megatron's own"
            )
    if there:
        rest = content.parts[next(iter(there))][0].name
        raise ValueError(
            f'{content.source.folder}: {rest} has no place in the {to} model; '
            "add --unchecked where its layer spec is not Megatron's own"
        )


def _report(content: Moved, to: str) -> MovedRun:
    args, state = content.common['args'], content.common
    hybrid = args if to == 'hybrid' else content.source.args
    release = content.source.folder.name == RELEASE
    names: dict[tuple[str, str], None] = {}
    states = weights = 0
    for target, parts in content.parts.items():
        source = parts[0].name
        states += source.startswith('optimizer.')
        if source in content.source.run or OPAQUE in source:
            continue
        weights += 1
        names[_counted(source, to == 'gpt'), _counted(target, to == 'hybrid')] = None
    return MovedRun(
        to,
        str(pattern_of(hybrid)),
        [pair for pair in names if pair[0] != pair[1]],
        None if release else int(state.get('iteration', 0)),
        weights,
        states,
        content.nbytes,
    )


def _counted(name: str, hybrid: bool) -> str:
    """``name`` of layer i for any i of a GPT model."""

    def number(found: re.Match[str]) -> str:
        return f'decoder.layers.{{{("2i", "2i+1")[int(found[1]) % 2] if hybrid else "i"}}}.'

    return re.sub(r'decoder\.layers\.(\d+)\.', number, name)
