"""From one checkpoint to another: what is read, what is made of it, what is written and checked."""

from __future__ import annotations

import contextlib
import copy
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from megatron_mhc.checkpoints.files import RELEASE
from megatron_mhc.convert.choices import FLAGS, OWN, STANDARD, TARGETS
from megatron_mhc.convert.complete import check_model, check_parts
from megatron_mhc.convert.layouts import (
    LAYOUTS,
    SINKHORN,
    StoredLayout,
    Streams,
    hybrid_layout,
    own_layout,
    to_tensors,
)
from megatron_mhc.convert.maps import differences
from megatron_mhc.convert.output import (
    Content,
    atomic_folder,
    check_destination,
    write_distributed,
    write_file,
    write_run_config,
    write_safetensors,
)
from megatron_mhc.convert.saved_args import (
    Described,
    are_stacked,
    converted_args,
    describe,
    norm_eps_of,
    of_gpt_alone,
    read_streams,
)
from megatron_mhc.convert.source import LAYOUT, THEIRS, Source, open_source
from megatron_mhc.convert.upcycle import of_kind, upcycled
from megatron_mhc.convert.verify import largest_difference
from megatron_mhc.settings.residual import PAPER

# Upcycling is exact; what is left of the logits' size is fp32 rounding.
ROUNDING = 1e-4
# Makes a context manager of a number of bytes, which gives a function to be told of those written.
Progress = Callable[[int], contextlib.AbstractContextManager[Callable[[int], Any]]]
PARTS = ('phi', 'b', 'alpha')
STREAMS = re.compile(r'hyper_connection\.|stream_merge\.|hc_head')


class Row(NamedTuple):
    """A line of the mapping table; ``{layer}`` stands for every layer."""

    source: str
    target: str
    shape: tuple[int, ...]
    how: str


@dataclass
class Converted:
    """What a conversion did, or with ``dry_run`` would do.

    Attributes:
        origin, target: layouts; rows: the mapping parameters.
        streams: those parameters; carried: number of entries under their own names, nbytes of all.
        left_out: entries of the run: optimizer, random states.
        differences: of H_pre, H_post, H_res and the merge between both layouts.
        verified: ``difference`` and ``largest`` of the logits, if they were compared.
    """

    origin: str
    target: str
    rows: list[Row]
    streams: Streams
    carried: int
    nbytes: int
    left_out: int
    differences: dict[str, float]
    verified: dict[str, float] = field(default_factory=dict)


def convert(
    source: str | pathlib.Path,
    destination: str | pathlib.Path,
    to: str = 'mhc',
    *,
    origin: str = 'auto',
    step: int | None = None,
    upcycling: dict[str, Any] | None = None,
    dry_run: bool = False,
    verify: bool = False,
    overwrite: bool = False,
    unchecked: bool = False,
    numerics: str | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Convert a checkpoint; needs neither a GPU nor a process group.

    Args:
        source: what ``--load`` names, one iteration of it, or a folder of safetensors.
        destination: a folder that is not there yet.
        to: one of ``TARGETS``.
        origin: layout of the source: ``auto``, ``standard`` or one of ``TARGETS``.
        step: an iteration other than the tracker's.
        upcycling: arguments of ``upcycled`` for a standard model.
        dry_run: write nothing.
        verify: run both models on random tokens and compare their logits.
        overwrite: replace the checkpoint at ``destination``, once the new one is whole.
        unchecked: do not ask that the source has every weight of the model that its saved
            arguments describe, for one that ``pretrain_gpt.py`` does not build.
        numerics: ``--mhc-numerics`` of what is made ``mhc``; the source's own if None, under which
            it computes the same.
        progress: makes a context manager of the number of bytes, which gives a function to be told
            of those written.

    Raises:
        ValueError: something cannot be read, fitted or written; the destination is then as it was.
    """
    source, destination = pathlib.Path(source), pathlib.Path(destination)
    if to not in TARGETS:
        raise ValueError(f'--to {to}: unknown layout; choose one of {", ".join(TARGETS)}')
    check_destination(destination, source, overwrite)
    opened, layout, upcycling = open_source(source, step), LAYOUTS[to], upcycling or {}
    check_parts(opened)
    described = describe(opened, origin)
    if described.symbols:
        if to != 'mhc':
            raise of_gpt_alone(opened, described.symbols)
        layout = hybrid_layout(described.symbols)
    elif to == 'mhc' and described.layout is not None:
        layout = own_layout(described.layout.manifold)
    _check_change(source, opened.format, described, layout, upcycling)
    _check_numerics(source, described, layout, numerics)
    content, report = _made(opened, described, layout, upcycling, numerics)
    if not unchecked:
        check_model(opened, origin)
    if dry_run:
        return report
    with atomic_folder(destination) as folder:
        with (progress or silent)(content.nbytes) as content.advance:
            _write(folder, content, report.streams, layout)
        if verify:
            # A hybrid model has our connections, or none.
            whose = OWN if described.symbols else origin
            report.verified = largest_difference(opened.folder, folder, whose)
            exact = described.name == STANDARD and to == 'mhc' and not upcycling.get('noise')
            if exact or _same_function(described, report):
                _check_equal(report.verified, destination)
    return report


def _made(
    opened: Source,
    described: Described,
    layout: StoredLayout,
    upcycling: dict[str, Any],
    numerics: str | None,
) -> tuple[Content, Converted]:
    """What the new checkpoint is to hold, and what there is to tell of it."""
    carried = _carried(opened, described)
    if described.layout is None:
        sublayers = 1 if described.symbols else 2
        streams = upcycled(
            described.num_layers, described.hidden_size, sublayers=sublayers, **upcycling
        )
        streams = of_kind(streams, layout)
    else:
        ours = (numerics or described.numerics) if layout.name == 'mhc' else None
        streams = read_streams(opened, described, ours)
    stacked = not layout.model_types and are_stacked(carried)
    new = to_tensors(streams, layout, stacked)
    args = converted_args(opened.args, streams, layout, upcycling.get('init_gating_factor'))
    content = Content(opened, carried, new, {**opened.common, 'args': args, 'iteration': 0})
    report = Converted(
        described.name,
        layout.name,
        _rows(described, layout, new, stacked),
        streams,
        len(carried),
        content.nbytes,
        opened.left_out,
        {}
        if described.symbols
        else differences(
            streams,
            described.layout or own_layout(layout.manifold),
            layout,
            norm_eps_of(opened.args),
        ),
    )
    return content, report


def _check_change(
    source: pathlib.Path,
    form: str,
    described: Described,
    layout: StoredLayout,
    upcycling: dict[str, Any],
) -> None:
    if described.name == layout.name:
        raise ValueError(f'--to {layout.name}: {source} is in that layout already')
    if described.layout is not None and upcycling:
        raise ValueError(
            f'{", ".join(FLAGS[name] for name in upcycling)}: only a standard model gets new '
            f'streams, and {source} is a {described.name} checkpoint, whose own are kept; leave it '
            'out'
        )
    if layout.name == 'megatron-bridge' and form == 'torch':
        raise ValueError(
            f'--to {layout.name}: {source} is a file of the torch format, and megatron-bridge '
            'reads distributed ones alone; save it with --ckpt-format torch_dist'
        )
    if described.layout is None or layout.name == 'mhc':
        return
    _check_kind(source, described.layout.manifold, described.single_pass, layout)


def _check_kind(
    source: pathlib.Path, manifold: str, single_pass: bool, layout: StoredLayout
) -> None:
    """Refuse what no weights make up for: another manifold, and reads of another sublayer."""
    others = [other for other in LAYOUTS.values() if other.name != 'mhc']
    fit = [o.name for o in others if (o.manifold, o.single_pass) == (manifold, single_pass)]
    if layout.name in fit:
        return
    remedy = f'choose {" or ".join(fit)}' if fit else 'it stays as it is'
    own, theirs = _flags(manifold, single_pass), _flags(layout.manifold, layout.single_pass)
    if own:
        raise ValueError(
            f'--to {layout.name}: {source} was trained with {own}, which that layout has not; '
            f'{remedy}'
        )
    raise ValueError(
        f'--to {layout.name}: its models have {theirs}, without which {source} was trained; '
        f'{remedy}'
    )


def _flags(manifold: str, single_pass: bool) -> str:
    flags = [f'--mhc-manifold {manifold}'] if manifold != SINKHORN else []
    return ' '.join([*flags, *(['--mhc-single-pass'] if single_pass else [])])


def _check_numerics(
    source: pathlib.Path, described: Described, layout: StoredLayout, numerics: str | None
) -> None:
    if numerics is None:
        return
    if layout.name != 'mhc' or described.layout is None:
        what = f'--to {layout.name}' if layout.name != 'mhc' else 'a standard model'
        raise ValueError(
            f'--mhc-numerics {numerics}: no effect with {what}: a layout has numerics of its own, '
            'and new streams are exact under those of the paper alone; leave it out'
        )
    if numerics not in (PAPER, described.numerics):
        raise ValueError(
            f'--mhc-numerics {numerics}: {source} is a {described.name} checkpoint; choose '
            f'{described.numerics}, under which it computes the same, or {PAPER}'
        )


def _same_function(described: Described, report: Converted) -> bool:
    return report.target == 'mhc' and report.streams.numerics == described.numerics != PAPER


def _check_equal(verified: dict[str, float], destination: pathlib.Path) -> None:
    # Of a NaN neither is true.
    if not verified['difference'] <= ROUNDING * verified['largest']:
        raise ValueError(
            f'--verify: logits differ by {verified["difference"]:.2e} where they are to be equal, '
            f'so {destination} was not written; please report it'
        )


@contextlib.contextmanager
def silent(nbytes: int) -> Iterator[Callable[[int], Any]]:
    yield lambda count: None


def _carried(source: Source, described: Described) -> list[str]:
    """Names of what stays as it is.

    Raises:
        ValueError: mapping parameters outside of the decoder, which would be in the wrong order.
    """
    owned = set(described.owned())
    names = [name for name in source.entries if name not in owned]
    strange = [name for name in names if STREAMS.search(name)]
    if strange and source.format != 'safetensors':
        # Arguments that name a layout are believed: --from could only contradict them.
        remedy = 'name its layout with --from'
        if described.layout is not None:
            remedy = (
                'only what has no multi-token prediction, and is laid out as Megatron-LM was in '
                'August 2026, can be converted'
            )
        raise ValueError(
            f'{source.folder}: {strange[0]} has no place in the {described.name} layout that the '
            f'saved arguments tell of; {remedy}'
        )
    return names


def _write(folder: pathlib.Path, content: Content, streams: Streams, layout: StoredLayout) -> None:
    if layout.model_types:
        write_safetensors(folder, content, _config(content, streams, layout))
    elif content.source.format == 'torch':
        write_file(folder, content)
    else:
        write_distributed(folder, content)
        if layout.name == 'megatron-bridge':
            write_run_config(folder / RELEASE, content.common['args'])


def _config(content: Content, streams: Streams, layout: StoredLayout) -> dict[str, Any]:
    """``config.json``: what its project has in it, if it came from there, and what streams need."""
    theirs = getattr(content.source, 'config', content.common.get(THEIRS, {}))
    config: dict[str, Any] = copy.deepcopy(theirs)
    inner = config['text_config'] if isinstance(config.get('text_config'), dict) else config
    inner |= {
        'num_hidden_layers': len(streams.layers),
        'hidden_size': streams.hidden_size,
        'hc_mult': streams.num_streams,
        'rms_norm_eps': streams.norm_eps,
        **layout.constants,
    }
    if layout.manifold == SINKHORN:
        inner['hc_sinkhorn_iters'] = streams.iterations
    return {**config, LAYOUT: layout.name}


def _rows(
    described: Described, layout: StoredLayout, new: dict[str, Tensor], stacked: bool
) -> list[Row]:
    rows = []
    own = described.layout
    symbols = described.symbols
    for sublayer in dict.fromkeys(s for _, s in _sublayers(layout, symbols)):
        old = _templates(own, sublayer, described.stacked) if own else [[]] * 3
        for part, before, after in zip(
            PARTS, old, _templates(layout, sublayer, stacked), strict=True
        ):
            how = 'as it is' if own else 'new'
            if own and own.transposed != layout.transposed and part != 'alpha':
                how = 'rows of res transposed'
            if own and len(before) != len(after):
                how = 'joined' if len(before) > len(after) else 'split'
            first = next(layer for layer, s in _sublayers(layout, symbols) if s == sublayer)
            shape = tuple(new[after[0].replace('{layer}', str(first))].shape)
            rows.append(Row(_joined(before), _joined(after), shape, how))
    merge = own.head if own and described.learned else None
    if layout.head is not None and layout.head[0] in new:
        how = 'as it is' if merge else 'new: the mean'
        for name_before, name in zip(merge or ('-',) * 3, layout.head, strict=True):
            rows.append(Row(name_before, name, tuple(new[name].shape), how))
    else:
        rows += [Row(name, '-', (), 'left out: the mean') for name in merge or ()]
    return rows


def _sublayers(layout: StoredLayout, symbols: str) -> list[tuple[int, str]]:
    """Layers and what they have; of a GPT model one layer, for all are alike."""
    layers = range(len(symbols) or 1)
    return [(i, sublayer) for i in layers for sublayer, _ in layout.sublayer_names(i)]


def _joined(names: list[str]) -> str:
    if len(names) < 2:
        return ''.join(names) or '-'
    start = os.path.commonprefix(names)
    return f'{start}{{{",".join(name.removeprefix(start) for name in names)}}}'


def _templates(layout: StoredLayout, sublayer: str, stacked: bool) -> list[list[str]]:
    """Names of phi, of b and of alpha."""
    names = layout.names[sublayer]
    if stacked:
        names = tuple(name.replace('.{layer}', '') for name in names)
    return [[names[0]], [names[1]], list(names[2:])]
