"""Where the mapping parameters of n streams are kept, in each layout, and in which order.

All store phi as ``[n*n + 2n, n*C]`` with rows pre | post | res, stream index outer in the columns,
and differ in names and in what the rows of res stand for. With L the logits of our H_res:

* ``mhc``: row i*n + j is L[i, j]; columns are normalised first, rows last, and H_res = that.
* ``megatron-main`` (2026-08): the same rows. Normalised the other way round, rows first: the mirror
  of ours, whose limit is the same matrix. H_res is applied as it is, so nothing may be transposed.
* ``megatron-dev``: row i*n + j is L[j, i]; rows first, columns last, and *then* transposed, so that
  transposed logits give our H_res, with ours order of steps.
* ``megatron-bridge``: as dev, whose modules it fills; its arguments lie in ``run_config.yaml``.
* ``deepseek-v4``: as dev (``comb``), the three alpha in one ``scale``. So do ``glm-5.3``, which has
  no learned merge, and ``deepseek-v4.1``, where the last H_pre merges (``--mhc-single-pass``).
* ``hy4``: no rows of res, for H_res is I (``--mhc-manifold identity``), and two alpha.

Where else they differ in what they compute, ``maps.py`` says; ``mhc`` computes as any of them, by
``--mhc-numerics``. Names of those outside of Megatron are those of their released weights:
glm5_next and hy_v4 as transformers 5.24 writes them, and V4.1 as nemo-automodel 0.7 reads it
(``deepseek_v41/state_dict_adapter.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mhc.settings.residual import NORM_EPS, PAPER

SUBLAYERS = ('self_attention', 'mlp')
SINKHORN = 'sinkhorn'
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
        single_pass: ``--mhc-single-pass``; manifold: ``sinkhorn`` or ``identity``.
    """

    num_streams: int
    hidden_size: int
    iterations: int
    layers: tuple[tuple[Parameters, ...], ...]
    head: Parameters | None = None
    norm_eps: float = NORM_EPS
    numerics: str = PAPER
    single_pass: bool = False
    manifold: str = SINKHORN


@dataclass(frozen=True)
class StoredLayout:
    """Names and order of one layout.

    Args:
        transposed: the rows of res are those of our H_res transposed.
        names: sublayer -> names of phi, b and of one or three alpha, ``{layer}`` to be filled in.
        head: names of phi, b and alpha of the learned merge; None where there is none.
        head_always: the mean can be had only as a learned merge.
        flag: the argument that tells Megatron of it; streams: its argument for n.
        numerics: ``--mhc-numerics`` under which ours compute the same.
        single_pass, manifold: as ``Streams`` has them; ``mhc`` takes either of each.
        model_types: of ``config.json`` beside its safetensors; none where Megatron keeps it.
        aliases: (pattern, name) of the same tensors where somebody else saved them.
        constants: values of ``config.json`` that have no flag here, and what ours compute with.
    """

    name: str
    transposed: bool
    names: Mapping[str, tuple[str, ...]]
    head: tuple[str, ...] | None
    head_always: bool = False
    flag: str | None = None
    streams: str = 'num_residual_streams'
    numerics: str = PAPER
    single_pass: bool = False
    manifold: str = SINKHORN
    model_types: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    constants: Mapping[str, float] = field(default_factory=dict)

    def own_name(self, name: str) -> str:
        """What this layout calls a stored tensor; others keep their names."""
        for pattern, own in self.aliases:
            name = re.sub(pattern, own, name)
        return name

    @property
    def num_alpha(self) -> int:
        return 3 if self.manifold == SINKHORN else 2

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
_ENDS = ('fn', 'base', 'scale')
_HEAD = tuple(f'hc_head_{end}' for end in _ENDS)


def _released(attention: str, mlp: str) -> dict[str, tuple[str, ...]]:
    starts = zip(SUBLAYERS, (attention, mlp), strict=True)
    return {sublayer: tuple(start + end for end in _ENDS) for sublayer, start in starts}


_V4 = _released('layers.{layer}.hc_attn_', 'layers.{layer}.hc_ffn_')
# Before mapping parameters that transformers saved; DeepSeek's own files have it not.
_V4_ALIASES = ((r'^model\.(?=(layers\.\d+\.)?hc_)', ''),)
_EPS = {'hc_eps': 1e-6}
_HY4 = r'model.\1.hc_pre.'
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
            numerics='megatron-main',
        ),
        StoredLayout(
            'megatron-dev',
            transposed=True,
            names=_MEGATRON,
            head=tuple('decoder.' + name for name in _HEAD),
            head_always=True,
            flag='enable_hyper_connections',
            numerics='megatron-dev',
        ),
        StoredLayout(
            'deepseek-v4',
            transposed=True,
            names=_V4,
            head=_HEAD,
            head_always=True,
            numerics='deepseek-v4',
            model_types=('deepseek_v4',),
            aliases=_V4_ALIASES,
            constants=_EPS,
        ),
        StoredLayout(
            'deepseek-v4.1',
            transposed=True,
            names=_V4,
            head=None,
            numerics='deepseek-v4',
            single_pass=True,
            model_types=('deepseek_v41', 'deepseek_v41_text'),
            aliases=_V4_ALIASES,
            constants=_EPS,
        ),
        StoredLayout(
            'glm-5.3',
            transposed=True,
            names={
                sublayer: tuple(f'model.language_model.{name}' for name in names)
                for sublayer, names in _V4.items()
            },
            head=None,
            numerics='glm-5.3',
            model_types=('glm5_next', 'glm5_next_text'),
            aliases=(
                (
                    r'^(?:model\.)?(?:language_model\.)?(?=layers\.\d+\.hc_)',
                    'model.language_model.',
                ),
            ),
            constants=_EPS,
        ),
        StoredLayout(
            'hy4',
            transposed=False,
            names=_released(
                'model.layers.{layer}.hc_pre.hc_attn_layer.hc_',
                'model.layers.{layer}.hc_pre.hc_mlp_layer.hc_',
            ),
            head=tuple(f'model.hc_pre.hc_head.hc_head_{end}' for end in _ENDS),
            head_always=True,
            numerics='hy4',
            manifold='identity',
            model_types=('hy_v4',),
            aliases=(
                (r'^(?:model\.)?(layers\.\d+)\.(?:hc_pre\.)?(?=hc_(?:attn|mlp)_layer\.)', _HY4),
                (
                    r'^(?:model\.)?(?:hc_pre\.)?hc_head\.hc_(?:head_)?',
                    'model.hc_pre.hc_head.hc_head_',
                ),
            ),
            constants={**_EPS, 'hc_magnitude': 2.0},
        ),
    )
}
LAYOUTS['megatron-bridge'] = replace(LAYOUTS['megatron-dev'], name='megatron-bridge')


def own_layout(manifold: str = SINKHORN) -> StoredLayout:
    """``mhc``, which has no alpha_res where no logits of H_res are."""
    ours = LAYOUTS['mhc']
    if manifold == SINKHORN:
        return ours
    names = {sublayer: names[:-1] for sublayer, names in ours.names.items()}
    return replace(ours, names=names, manifold=manifold)


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
    single_pass: bool = False,
    fold: bool = True,
) -> Streams:
    """What ``to_tensors`` is given, from tensors of any float dtype, by name.

    Args:
        fold: take a learned merge that is the mean for the mean.

    Raises:
        ValueError: a tensor has another shape than n, C and L say.
    """
    n, alphas = num_streams, layout.num_alpha
    rows, width = 2 * n + (n * n if layout.manifold == SINKHORN else 0), n * hidden_size

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
        sizes = (alphas,) if len(names) == 3 else (1,) * alphas
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
    kept = numerics, single_pass, layout.manifold
    return Streams(n, hidden_size, iterations, layers, head, norm_eps, *kept)


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
