"""Where the mapping parameters of n streams are kept, in four layouts, and in which order.

All store phi as ``[n*n + 2n, n*C]`` with rows pre | post | res, stream index outer in the columns,
and differ in names and in what the rows of res stand for. With L the logits of our H_res:

* ``mhc``: row i*n + j is L[i, j]; columns are normalised first, rows last, and H_res = that.
* ``megatron-main`` (2026-08): the same rows. Normalised the other way round, rows first: the mirror
  of ours, whose limit is the same matrix. H_res is applied as it is, so nothing may be transposed.
* ``megatron-dev``: row i*n + j is L[j, i]; rows first, columns last, and *then* transposed, so that
  transposed logits give our H_res, with ours order of steps.
* ``deepseek-v4``: as dev (``comb``), the three alpha in one ``scale``.

Where else the four differ in what they compute, ``maps.py`` says; ``mhc`` computes as any of them,
by ``--mhc-numerics``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mhc.settings.residual import NORM_EPS, PAPER

SUBLAYERS = ('self_attention', 'mlp')
# Of a hybrid model's layers, where it is not attention of some kind.
HYBRID_SUBLAYERS = {'-': 'mlp', 'E': 'mlp', 'M': 'mixer'}


class Parameters(NamedTuple):
    """phi ``[rows, n*C]``, b ``[rows]`` and alpha (``[3]``, the head's ``[1]``), all fp32."""

    phi: Tensor
    bias: Tensor
    alpha: Tensor


@dataclass(frozen=True)
class Streams:
    """All that n streams add to a model, as our modules have it.

    Args:
        num_streams: n; hidden_size: C; iterations: passes of Sinkhorn-Knopp.
        layers: per layer the parameters of attention and of the MLP; of a hybrid model, of the
            one sublayer that it is.
        head: of the learned merge; None where the mean is taken.
        norm_eps: of the norm of all n*C values, where a layout lets it be chosen.
        numerics: ``--mhc-numerics``, which ``mhc`` alone lets be chosen.
    """

    num_streams: int
    hidden_size: int
    iterations: int
    layers: tuple[tuple[Parameters, ...], ...]
    head: Parameters | None = None
    norm_eps: float = NORM_EPS
    numerics: str = PAPER


@dataclass(frozen=True)
class StoredLayout:
    """Names and order of one layout.

    Args:
        transposed: the rows of res are those of our H_res transposed.
        names: sublayer -> names of phi, b and of one or three alpha, ``{layer}`` to be filled in.
        head: names of phi, b and alpha of the learned merge; None where there is none.
        head_always: the mean can be had only as a learned merge.
        flag: the argument that tells Megatron of it; streams: its argument for n.
    """

    name: str
    transposed: bool
    names: Mapping[str, tuple[str, ...]]
    head: tuple[str, ...] | None
    head_always: bool = False
    flag: str | None = None
    streams: str = 'num_residual_streams'

    def sublayer_names(self, layer: int | None) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Names of one layer; of all layers in one tensor where ``layer`` is None."""
        middle = '' if layer is None else f'.{layer}'
        for sublayer in SUBLAYERS:
            names = self.names[sublayer]
            yield sublayer, tuple(name.replace('.{layer}', middle) for name in names)

    def owned(self, num_layers: int, stacked: bool, learned: bool) -> list[str]:
        """Every name that streams have in this layout."""
        layers = (None,) if stacked else range(num_layers)
        names = [
            name for layer in layers for _, group in self.sublayer_names(layer) for name in group
        ]
        head = self.head if learned else None
        return [*names, *(head or ())]


def _megatron(sublayer: str) -> tuple[str, ...]:
    module = f'decoder.layers.{{layer}}.{sublayer}_hyper_connection.'
    ends = ('mapping_proj.weight', 'bias', 'alpha_pre', 'alpha_post', 'alpha_res')
    return tuple(module + end for end in ends)


_MEGATRON = {sublayer: _megatron(sublayer) for sublayer in SUBLAYERS}
_HEAD = ('hc_head_fn', 'hc_head_base', 'hc_head_scale')
_V4 = {
    sublayer: tuple(f'layers.{{layer}}.hc_{short}_{end}' for end in ('fn', 'base', 'scale'))
    for sublayer, short in zip(SUBLAYERS, ('attn', 'ffn'), strict=True)
}
_MERGE = 'decoder.stream_merge.'
LAYOUTS = {
    layout.name: layout
    for layout in (
        StoredLayout(
            'mhc',
            transposed=False,
            names=_MEGATRON,
            streams='mhc_num_residual_streams',
            head=(_MERGE + 'mapping_proj.weight', _MERGE + 'bias', _MERGE + 'alpha'),
        ),
        StoredLayout(
            'megatron-main',
            transposed=False,
            names=_MEGATRON,
            head=None,
            flag='enable_mhc_connections',
            streams='mhc_num_residual_streams',
        ),
        StoredLayout(
            'megatron-dev',
            transposed=True,
            names=_MEGATRON,
            head=tuple('decoder.' + name for name in _HEAD),
            head_always=True,
            flag='enable_hyper_connections',
        ),
        StoredLayout('deepseek-v4', transposed=True, names=_V4, head=_HEAD, head_always=True),
    )
}


@dataclass(frozen=True)
class HybridLayout(StoredLayout):
    """Ours in a hybrid model, where a layer is one sublayer and no two are in one tensor.

    Args:
        symbols: of the layers, as ``--hybrid-layer-pattern`` has them.
    """

    symbols: str = ''

    def sublayer_names(self, layer: int | None) -> Iterator[tuple[str, tuple[str, ...]]]:
        assert layer is not None
        sublayer = HYBRID_SUBLAYERS.get(self.symbols[layer], 'self_attention')
        yield sublayer, tuple(n.replace('{layer}', str(layer)) for n in self.names[sublayer])


def hybrid_layout(symbols: str) -> HybridLayout:
    """Where a hybrid model of these layers keeps its mapping parameters."""
    ours = LAYOUTS['mhc']
    sublayers = ('self_attention', *dict.fromkeys(HYBRID_SUBLAYERS.values()))
    names = {sublayer: _megatron(sublayer) for sublayer in sublayers}
    return HybridLayout(
        ours.name, ours.transposed, names, ours.head, streams=ours.streams, symbols=symbols
    )


def transpose_res(rows: Tensor, num_streams: int) -> Tensor:
    """Exchange L[i, j] and L[j, i] among the last n*n of ``[n*n + 2n, ...]`` rows."""
    n = num_streams
    res = rows[2 * n :].unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)
    return torch.cat([rows[: 2 * n], res])


def to_tensors(streams: Streams, layout: StoredLayout, stacked: bool) -> dict[str, Tensor]:
    """``streams`` under the names and in the order of ``layout``.

    Args:
        stacked: all layers in one tensor ``[L, ...]``, as distributed checkpoints have equal ones.

    Raises:
        ValueError: the layout has no learned merge, and ``streams`` has.
    """
    tensors: dict[str, Tensor] = {}
    for number, layer in enumerate(streams.layers):
        for (_, names), own in zip(layout.sublayer_names(number), layer, strict=True):
            tensors.update(zip(names, _stored(own, layout, streams.num_streams), strict=True))
    if stacked:
        tensors = _stack(tensors, layout, len(streams.layers))
    head = streams.head
    if head is None and layout.head_always:
        head = mean_as_head(streams.num_streams, streams.hidden_size)
    if head is not None:
        if layout.head is None:
            raise ValueError(
                f'--to {layout.name}: its model takes the mean of the streams and has no place for '
                'the learned merge of this checkpoint; choose another layout'
            )
        tensors.update(zip(layout.head, head, strict=True))
    return tensors


def _stored(own: Parameters, layout: StoredLayout, n: int) -> list[Tensor]:
    if layout.transposed:
        own = own._replace(phi=transpose_res(own.phi, n), bias=transpose_res(own.bias, n))
    joined = len(layout.names[SUBLAYERS[0]]) == 3
    return [own.phi, own.bias, *([own.alpha] if joined else own.alpha.split(1))]


def _stack(tensors: dict[str, Tensor], layout: StoredLayout, num_layers: int) -> dict[str, Tensor]:
    stacked: dict[str, list[Tensor]] = {}
    for number in range(num_layers):
        pairs = zip(layout.sublayer_names(None), layout.sublayer_names(number), strict=True)
        for (_, together), (_, names) in pairs:
            for key, name in zip(together, names, strict=True):
                stacked.setdefault(key, []).append(tensors[name])
    return {key: torch.stack(values) for key, values in stacked.items()}


def from_tensors(
    get: Callable[[str], Tensor],
    layout: StoredLayout,
    *,
    num_streams: int,
    hidden_size: int,
    num_layers: int,
    iterations: int,
    stacked: bool,
    learned: bool,
    norm_eps: float = NORM_EPS,
    numerics: str = PAPER,
    fold: bool = True,
) -> Streams:
    """What ``to_tensors`` is given, from tensors of any float dtype, by name.

    Args:
        fold: take a learned merge that is the mean for the mean.

    Raises:
        ValueError: a tensor has another shape than n, C and L say.
    """
    n = num_streams
    rows, width = n * n + 2 * n, n * hidden_size

    def part(name: str, number: int | None, shape: tuple[int, ...]) -> Tensor:
        value = get(name)
        if number is not None:
            if value.shape[0] != num_layers:
                raise _mismatch(name, value.shape, (num_layers, *shape))
            value = value[number]
        if tuple(value.shape) != shape:
            raise _mismatch(name, value.shape, shape)
        return value.float()

    def sublayer(names: tuple[str, ...], number: int | None) -> Parameters:
        phi, bias = part(names[0], number, (rows, width)), part(names[1], number, (rows,))
        sizes = (3,) if len(names) == 3 else (1, 1, 1)
        alpha = torch.cat(
            [part(name, number, (size,)) for name, size in zip(names[2:], sizes, strict=True)]
        )
        if layout.transposed:
            phi, bias = transpose_res(phi, n), transpose_res(bias, n)
        return Parameters(phi, bias, alpha)

    def sublayers(number: int) -> tuple[Parameters, Parameters]:
        attention, mlp = (
            sublayer(names, number if stacked else None)
            for _, names in layout.sublayer_names(None if stacked else number)
        )
        return attention, mlp

    layers = tuple(map(sublayers, range(num_layers)))
    head = None
    if learned and layout.head is not None:
        shapes = ((n, width), (n,), (1,))
        values = (part(name, None, shape) for name, shape in zip(layout.head, shapes, strict=True))
        head = Parameters(*values)
        if fold and layout.head_always and _is_mean(head, n):
            head = None
    return Streams(n, hidden_size, iterations, layers, head, norm_eps, numerics)


def _mismatch(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> ValueError:
    return ValueError(
        f'{name} has shape {tuple(found)} where the saved arguments call for {tuple(wanted)} '
        '(n streams, hidden size, layers): the checkpoint and its arguments do not belong together'
    )


def mean_as_head(num_streams: int, hidden_size: int) -> Parameters:
    """The mean as a learned merge: sigma(b) = 1/n for every token, so b = -log(n - 1)."""
    n = num_streams
    bias = torch.full((n,), 1 / n).logit() if n > 1 else torch.full((n,), torch.inf)
    return Parameters(torch.zeros(n, n * hidden_size), bias, torch.ones(1))


def _is_mean(head: Parameters, n: int) -> bool:
    constant = mean_as_head(n, head.phi.shape[1] // n)
    return all(torch.equal(a, b) for a, b in zip(head, constant, strict=True))
