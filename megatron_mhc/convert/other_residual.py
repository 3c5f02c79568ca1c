"""``megatron-mhc convert --to gated`` and ``--to attention``: a standard model's other residuals.

``gated`` starts as the model that it was. Gates of 1/2 (W_up = 0) and writes of 1 (W_write = 0)
leave

    u = 1/(2n) sum_i gain_i N(x)

of n equal streams, so gains that sum to 2n times the weight of the norm that they replace give its
output (``--gated-residual-init prenorm``). The norms are left out, the final one too.

``attention`` starts with queries of 0, under which a sublayer reads the mean of k sums in place of
their sum. The norm behind undoes the factor but for its eps, which then is k^2 times as large
beside the mean square: close, and not equal.
"""

from __future__ import annotations

import argparse
import copy
import pathlib
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.convert.choices import FLAGS, OWN, RESIDUALS
from megatron_mhc.convert.complete import check_model, check_parts, stored_name
from megatron_mhc.convert.conversion import ROUNDING, Progress, silent
from megatron_mhc.convert.output import (
    Content,
    atomic_folder,
    check_destination,
    write_distributed,
    write_file,
)
from megatron_mhc.convert.saved_args import PROGRESS, Described, describe
from megatron_mhc.convert.source import Source, open_source
from megatron_mhc.convert.told import Told, tell_verified
from megatron_mhc.convert.verify import largest_difference
from megatron_mhc.residual.attention import AttentionMerge, BlockAttention
from megatron_mhc.residual.gated import GatedConnection, GatedMerge, Gates
from megatron_mhc.residual.hyper_connection import HyperConnection
from megatron_mhc.settings.flag import write_back
from megatron_mhc.settings.residual import ResidualConfig

# Option of the command -> field of the settings, by residual.
OPTIONS = {
    'gated': {'num_streams': 'num_residual_streams', 'gated_rank': 'gated_rank'},
    'attention': {'attention_block_size': 'attention_block_size'},
}
SUBLAYERS = {'self_attention': 'input_layernorm', 'mlp': 'pre_mlp_layernorm'}
FINAL = 'decoder.final_layernorm.'
# What a run may have that one of them cannot start from: argument, its flag, what is wanted of it.
UNFIT = {
    'gated': {
        'normalization': ('--normalization', 'RMSNorm', 'its reads are RMSNorms'),
        'fp32_residual_connection': (
            '--fp32-residual-connection',
            False,
            'the norm that brings fp32 streams to the type of the weights is left out',
        ),
        'layernorm_zero_centered_gamma': (
            '--apply-layernorm-1p',
            False,
            'its gains are the weights of the norms themselves',
        ),
    },
    'attention': {},
}


@dataclass
class Changed:
    """What became of a standard model, or with ``dry_run`` would.

    Attributes:
        residual: the settings; layers: L.
        new: name -> shape; left_out: names of norms.
        carried: number of entries under their own names; nbytes: of all.
        exact: whether logits are to be equal; verified: as ``Converted`` has it.
    """

    residual: ResidualConfig
    layers: int
    new: dict[str, list[int]]
    left_out: list[str]
    carried: int
    nbytes: int
    exact: bool
    verified: dict[str, float] = field(default_factory=dict)


def change(
    source: str | pathlib.Path,
    destination: str | pathlib.Path,
    to: str,
    *,
    step: int | None = None,
    settings: dict[str, Any] | None = None,
    dry_run: bool = False,
    verify: bool = False,
    overwrite: bool = False,
    unchecked: bool = False,
    progress: Progress | None = None,
) -> Changed:
    """Give a standard GPT model another residual; a release, as ``conversion.convert`` writes one.

    Args:
        source, destination, step, dry_run, verify, overwrite, unchecked, progress: as there.
        to: one of ``RESIDUALS``.
        settings: fields of ``ResidualConfig``.

    Raises:
        ValueError: the model has another residual already, or something that this one cannot start
            from; the destination is then as it was.
    """
    source, destination = pathlib.Path(source), pathlib.Path(destination)
    if to not in RESIDUALS:
        raise ValueError(f'--to {to}: unknown residual; choose one of {", ".join(RESIDUALS)}')
    check_destination(destination, source, overwrite)
    opened = open_source(source, step)
    check_parts(opened)
    described = describe(opened)
    _check_fit(opened, described, to)
    seed = getattr(opened.args, 'seed', None)
    given = {**(settings or {}), **({} if seed is None else {'seed': seed})}
    if to == 'gated':
        given['gated_init'] = 'prenorm'
    residual = ResidualConfig(residual_type=to, **given)
    new, left_out = _made(opened, described, residual)
    carried = [name for name in opened.entries if name not in left_out]
    args = _args(opened.args, residual)
    content = Content(opened, carried, new, {**opened.common, 'args': args, 'iteration': 0})
    shapes = {name: list(value.shape) for name, value in new.items()}
    counts = len(carried), content.nbytes
    report = Changed(residual, described.num_layers, shapes, left_out, *counts, to == 'gated')
    if not unchecked:
        check_model(opened, 'auto')
    if dry_run:
        return report
    with atomic_folder(destination) as folder:
        with (progress or silent)(content.nbytes) as content.advance:
            (write_file if opened.format == 'torch' else write_distributed)(folder, content)
        if verify:
            found = report.verified = largest_difference(opened.folder, folder, OWN)
            # Of a NaN it is not true.
            if report.exact and not found['difference'] <= ROUNDING * found['largest']:
                raise ValueError(
                    f'--verify: logits differ by {found["difference"]:.2e} where they are to be '
                    f'equal, so {destination} was not written; please report it'
                )
    return report


def _check_fit(opened: Source, described: Described, to: str) -> None:
    if described.layout is not None:
        raise ValueError(
            f'--to {to}: {opened.folder} is a {described.name} checkpoint, and only a standard '
            'model gets another residual; it stays as it is'
        )
    if described.symbols:
        raise ValueError(
            f'--to {to}: {opened.folder} is a hybrid model; first --to gpt, and afterwards --to '
            'hybrid'
        )
    if getattr(opened.args, 'mtp_num_layers', None):
        raise ValueError(
            f'--to {to}: {opened.folder} has --mtp-num-layers {opened.args.mtp_num_layers}, whose '
            'layers predict from what the final norm leaves; it stays as it is'
        )
    for name, (flag, wanted, why) in UNFIT[to].items():
        found = getattr(opened.args, name, None)
        if found not in (None, wanted):
            shown = flag if found is True else f'{flag} {found}'
            raise ValueError(
                f'--to {to}: {opened.folder} was trained with {shown}, and {why}; use --to mhc'
            )


def _made(
    opened: Source, described: Described, residual: ResidualConfig
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the residual, and the names that have no place beside them."""
    layers, width = described.num_layers, described.hidden_size
    gated = residual.residual_type == 'gated'
    std = getattr(opened.args, 'init_method_std', 0.02)
    new: dict[str, list[Tensor]] = {}
    replaced: set[str] = set()

    def weight(norm: str, layer: int | None) -> Tensor:
        name = stored_name(opened.entries, f'{norm}weight')
        replaced.add(name)
        return opened.tensor(name) if layer is None else opened.layer(name, layer)

    def fold(gates: Gates, norm: str, layer: int | None) -> None:
        gain = gates.gain.data.view(gates.num_streams, width)
        gain.mul_(weight(norm, layer).float())

    for sublayer in range(2 * layers):
        layer, (name, norm) = sublayer // 2, tuple(SUBLAYERS.items())[sublayer % 2]
        stem = 'decoder.layers.' if described.stacked else f'decoder.layers.{layer}.'
        own: HyperConnection
        if gated:
            own = gate = GatedConnection(width, residual, sublayer, std=std)
            fold(gate.gates, f'{stem}{norm}.', layer if described.stacked else None)
        else:
            own = BlockAttention(width, residual, sublayer)
        for key, value in own.named_parameters():
            new.setdefault(f'{stem}{name}_hyper_connection.{key}', []).append(value.data)
    merge: torch.nn.Module
    if gated:
        merge = last = GatedMerge(width, residual, std=std)
        fold(last, FINAL, None)
    else:
        merge = AttentionMerge(width, residual, 2 * layers)
    tensors = {
        name: torch.stack(values) if described.stacked else values[0]
        for name, values in new.items()
    }
    tensors |= {f'decoder.stream_merge.{key}': p.data for key, p in merge.named_parameters()}
    # With what Transformer Engine keeps beside a weight.
    own_modules = re.compile(rf'{FINAL}|decoder\.layers\.(\d+\.)?(input|pre_mlp)_layernorm\.')
    out = [n for n in opened.entries if n in replaced or (gated and own_modules.match(n))]
    return tensors, out


def _args(args: argparse.Namespace, residual: ResidualConfig) -> argparse.Namespace:
    args, kind = copy.copy(args), residual.residual_type
    for name in PROGRESS:
        setattr(args, name, 0)
    args.residual_type = kind
    write_back(args, residual, lambda flag: kind in flag.only.get('residual_type', (kind,)))
    return args


def answer(options: argparse.Namespace, given: dict[str, Any], progress: Progress) -> Told:
    """Change the residual; ``given`` are options of new streams.

    Raises:
        ValueError: one that this residual has not; or as ``change``.
    """
    fields = OPTIONS[options.to]
    vain = [FLAGS[name] for name in given if name not in fields]
    vain += ['--from'] * (options.origin not in ('auto', 'standard'))
    vain += ['--mhc-numerics'] * (options.mhc_numerics is not None)
    if vain:
        raise ValueError(f'{", ".join(vain)}: no effect with --to {options.to}; leave it out')
    report = change(
        options.source,
        options.destination,
        options.to,
        step=options.step,
        settings={fields[name]: value for name, value in given.items()},
        dry_run=options.dry_run,
        verify=options.verify,
        overwrite=options.overwrite,
        unchecked=options.unchecked,
        progress=progress,
    )
    load = _how_to_load(report, options.destination)
    plain = {
        'to': options.to,
        'layers': report.layers,
        'new': report.new,
        'left_out': report.left_out,
        'carried': report.carried,
        'bytes': report.nbytes,
        'exact': report.exact,
        'verified': report.verified or None,
        'load': None if options.dry_run else load,
    }
    return Told(plain, lambda: _print(report), load)


def _how_to_load(report: Changed, destination: pathlib.Path) -> str:
    residual = report.residual
    flags = f'--residual-type {residual.residual_type}'
    if report.exact:
        flags += f' --mhc-num-residual-streams {residual.streams}'
        flags += f' --gated-residual-rank {residual.gated_rank}'
    else:
        flags += f' --attention-residual-block-size {residual.attention_block_size}'
    return f'train on with --load {destination} {flags}'


def _print(report: Changed) -> None:
    print(f'standard -> {report.residual.residual_type}: {report.layers} layers')
    for name, shape in report.new.items():
        print(f'  new: {name} {shape}')
    for name in report.left_out:
        print(f'  left out, its weight is in a gain: {name}')
    print(f'  {report.carried} other entries under their own names; {report.nbytes:,} bytes in all')
    if not report.exact:
        print('not exact: a norm behind the mean of k sums has k^2 times its eps, see --verify')
    tell_verified(report.verified)
