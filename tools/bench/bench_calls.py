"""Each op as a call that can be timed and checked: inputs, forward, the gradients that arrive."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from bench_cases import Inputs
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from megatron_mhc.kernels.peers.contender import LAYER, Contender

OPS = ('sublayer', 'layer', 'fused_edge', 'mapping', 'pre', 'post', 'sinkhorn')
"""``sublayer`` is read, y given, write; ``layer`` two of them, whose time is given per sublayer."""
COMPOSITES = ('sublayer', 'layer')
PARAMS = ('weight', 'bias', 'alpha')


class Group(NamedTuple):
    """Tensors of the contender's layout, and how gradients or results of it look in ours."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    back: Callable[..., tuple[Tensor, ...]]

    def ours(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        if not self.names:
            return {}
        ours = self.back(*(tensor.detach() for tensor in tensors))
        return dict(zip(self.names, ours, strict=True))


class Call(NamedTuple):
    """``forward()`` gives one output for each arriving gradient of ``arriving``."""

    leaves: list[Group]
    forward: Callable[[], tuple[Tensor, ...]]
    arriving: list[Group]

    @property
    def inputs(self) -> list[Tensor]:
        return [tensor for group in self.leaves for tensor in group.tensors]

    @property
    def grads(self) -> list[Tensor]:
        return [tensor for group in self.arriving for tensor in group.tensors]

    def backward(self, outputs: tuple[Tensor, ...], keep: bool = False) -> tuple[Tensor, ...]:
        """Gradients of all inputs, each the full sum over its uses."""
        # A state may hold more than its backward differentiates; None elsewhere fails the check.
        return torch.autograd.grad(
            outputs, self.inputs, self.grads, retain_graph=keep, allow_unused=True
        )

    def both(self) -> tuple[Tensor, ...]:
        return self.backward(self.forward())

    def in_our_layout(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Results and gradients by name, comparable between contenders."""
        outputs = self.forward()
        grads = self.backward(outputs)
        return _named(self.arriving, outputs), _named(self.leaves, grads)


def _named(groups: list[Group], tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    named, rest = {}, list(tensors)
    for group in groups:
        named |= group.ours(rest[: len(group.tensors)])
        rest = rest[len(group.tensors) :]
    return named


def build(op: str, contender: Contender, inputs: Inputs, *, timed: bool = False) -> Call:
    """The call of ``op`` by ``contender`` on its own copies of ``inputs``, to time or to check."""
    if op == 'fused_edge':
        return _fused_edge(contender, inputs, within=timed)
    return _BUILDERS[op](contender, inputs)


def _one(name: str, tensor: Tensor, back: Callable[[Tensor], Tensor]) -> Group:
    return Group((name,), (tensor,), lambda t: (back(t),))


def _leaf(tensor: Tensor) -> Tensor:
    # A copy, so that no two contenders and no two buffers share memory.
    return tensor.detach().clone(memory_format=torch.contiguous_format).requires_grad_()


def _x(c: Contender, inputs: Inputs) -> Group:
    return _one('x', _leaf(c.streams(inputs.x)), c.streams_back)


def _y(inputs: Inputs, index: int = 0) -> Group:
    return _one(f'y{index}', _leaf(inputs.y[index]), lambda t: t)


def _params(c: Contender, inputs: Inputs, index: int = 0) -> Group:
    tensors = tuple(map(_leaf, c.params(*inputs.params[index])))
    return Group(tuple(f'{name}{index}' for name in PARAMS), tensors, c.params_back)


def _d_x(c: Contender, inputs: Inputs) -> Group:
    return _one('x_new', c.streams(inputs.d_x).contiguous(), c.streams_back)


def _d_u(inputs: Inputs, index: int = 0) -> Group:
    return _one(f'u{index}', inputs.d_u[index].clone(), lambda t: t)


def _sinkhorn(c: Contender, inputs: Inputs) -> Call:
    logits = _one('logits', _leaf(c.square(inputs.logits)), c.square_back)
    arriving = _one('h_res', c.square(inputs.d_res).contiguous(), c.square_back)
    return Call([logits], lambda: (c.sinkhorn(*logits.tensors),), [arriving])


def _mapping(c: Contender, inputs: Inputs) -> Call:
    x, params = _x(c, inputs), _params(c, inputs)
    arriving = [
        _one('h_pre', c.gate(inputs.d_pre).contiguous(), c.gate_back),
        _one('h_post', c.gate(inputs.d_post).contiguous(), c.gate_back),
        _one('h_res', c.square(inputs.d_res).contiguous(), c.square_back),
    ]
    return Call([x, params], lambda: c.mapping(*x.tensors, *params.tensors), arriving)


def _pre(c: Contender, inputs: Inputs) -> Call:
    x, h_pre = _x(c, inputs), _one('h_pre', _leaf(c.gate(inputs.h_pre)), c.gate_back)
    return Call([x, h_pre], lambda: (c.pre(*x.tensors, *h_pre.tensors),), [_d_u(inputs)])


def _post(c: Contender, inputs: Inputs) -> Call:
    leaves = [
        _x(c, inputs),
        _y(inputs),
        _one('h_post', _leaf(c.gate(inputs.h_post)), c.gate_back),
        _one('h_res', _leaf(c.square(inputs.h_res)), c.square_back),
    ]
    tensors = [tensor for group in leaves for tensor in group.tensors]
    return Call(leaves, lambda: (c.post(*tensors),), [_d_x(c, inputs)])


def _sublayer(c: Contender, inputs: Inputs) -> Call:
    x, y, params = _x(c, inputs), _y(inputs), _params(c, inputs)

    def forward() -> tuple[Tensor, ...]:
        u, state = c.read(*x.tensors, params.tensors)
        return u, c.write(*y.tensors, state)

    return Call([x, y, params], forward, [_d_u(inputs), _d_x(c, inputs)])


def _layer(c: Contender, inputs: Inputs) -> Call:
    x = _x(c, inputs)
    ys = [_y(inputs, i) for i in range(LAYER)]
    params = [_params(c, inputs, i) for i in range(LAYER)]

    def forward() -> tuple[Tensor, ...]:
        u, state = c.read(*x.tensors, params[0].tensors)
        us = [u]
        for y, following in zip(ys, params[1:], strict=False):
            _, u, state = c.write_read(*y.tensors, state, following.tensors)
            us.append(u)
        return *us, c.write(*ys[-1].tensors, state)

    arriving = [*(_d_u(inputs, i) for i in range(LAYER)), _d_x(c, inputs)]
    return Call([x, *ys, *params], forward, arriving)


def _fused_edge(c: Contender, inputs: Inputs, within: bool) -> Call:
    y, params = _y(inputs), _params(c, inputs, 1)
    _, state = c.read(*_x(c, inputs).tensors, _params(c, inputs).tensors)
    flat, spec = tree_flatten(state)
    flat = [_leaf(t) if isinstance(t, Tensor) and t.is_floating_point() else t for t in flat]
    state = tree_unflatten(flat, spec)
    # The state is each contender's own affair: no names, so it is not compared.
    carried = Group((), tuple(t for t in flat if isinstance(t, Tensor)), lambda *_: ())
    arriving = [_d_x(c, inputs), _d_u(inputs, 1)]

    def forward() -> tuple[Tensor, ...]:
        return c.fused_edge(*y.tensors, state, params.tensors, within)

    return Call([carried, y, params], forward, arriving)


_BUILDERS = {
    'sinkhorn': _sinkhorn,
    'mapping': _mapping,
    'pre': _pre,
    'post': _post,
    'sublayer': _sublayer,
    'layer': _layer,
}
