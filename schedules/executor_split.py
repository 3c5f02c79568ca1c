"""The backward of any module in two parts: I, the gradient of its input, then W, of its weights.

The graph between input and output has two sides. Operations from which the input is reached pass
its gradient on: I runs those. What hangs on them, from an edge that leaves this path to a weight,
is left for W. I notes the gradients that arrive at every operation with such an edge; W runs the
operation once more from them, asking for its weights only, so that a matrix product computes dX in
I and dW in W. What the forward saved lives until W.

Some weights get their gradient in I: those of several operations, which must be summed before they
are added to ``.grad``, and those of autograd functions (also compiled code and custom operators):
such a function computes all its gradients whenever it runs, and may have side effects.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

# An operation on the path to the input, and the weights that hang on one of its edges.
Exit = tuple[Node, set[Node]]


class WeightGradients:
    """The weight gradients that I left over."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run: Callable[[], None] | None = run

    def weight(self) -> None:
        """Add them to ``.grad``.

        Raises:
            RuntimeError: it was called before.
        """
        if self._run is None:
            raise RuntimeError('the weight gradients of this backward have been computed already')
        run, self._run = self._run, None
        run()


def backward_input(
    output: Tensor, grad: Tensor | None, x: Tensor | None
) -> tuple[Tensor | None, WeightGradients]:
    """The gradient of ``x``, and what is left to do for the weights.

    Both parts together leave in every ``.grad`` what ``output.backward(grad)`` would, bit for bit,
    by the same additions; hooks on weights run once, in the part that computes the weight.

    A hook on a tensor *inside* the module runs again in W if that tensor is the output of an
    operation with weights; one that changes the gradient changes it twice. A region under
    ``torch.utils.checkpoint`` is rebuilt for each of its operations with weights (and without
    ``use_reentrant=False`` torch refuses): rebuild whole stages instead, by a plan with R.

    Args:
        output: of the module; a scalar if ``grad`` is None.
        grad: gradient of ``output``.
        x: input of the module, a leaf. None, or without gradient, on the first stage: everything is
            W then, and there is no gradient of the input.

    Raises:
        ValueError: ``x`` is not a leaf.
    """
    everything = WeightGradients(lambda: torch.autograd.backward(output, grad))
    if x is None or not x.requires_grad or output.grad_fn is None:
        return None, everything
    if not x.is_leaf:
        raise ValueError('a stage begins a new graph: pass x.detach().requires_grad_() to it')
    on_path = _path(output.grad_fn, x)
    if not on_path:
        return None, everything
    early, late = _divide(_exits(on_path))
    arrived: dict[Node, tuple[Tensor | None, ...]] = {}

    def note(node: Node) -> Callable[[tuple[Tensor | None, ...]], None]:
        return lambda grads: arrived.__setitem__(node, grads)

    hooks = [node.register_prehook(note(node)) for node in late]
    try:
        inputs = [x, *map(_weight, early)]
        torch.autograd.backward(output, grad, inputs=inputs, retain_graph=True)
    finally:
        for hook in hooks:
            hook.remove()
    gradient, x.grad = x.grad, None
    return gradient, WeightGradients(lambda: _weights(late, arrived))


def _weights(late: dict[Node, set[Node]], arrived: dict[Node, tuple[Tensor | None, ...]]) -> None:
    for node, grads in arrived.items():
        given = {i: grad for i, grad in enumerate(grads) if grad is not None}
        if given:
            torch.autograd.backward(
                [GradientEdge(node, i) for i in given],
                list(given.values()),
                inputs=[_weight(leaf) for leaf in late[node]],
            )


def _successors(node: Node) -> list[Node]:
    return [child for child, _ in node.next_functions if child is not None]


def _is_leaf(node: Node) -> bool:
    # An autograd function may have any attribute.
    return hasattr(node, 'variable') and not isinstance(node, BackwardCFunction)


def _weight(leaf: Node) -> Tensor:
    """What a leaf of the graph adds gradients to."""
    variable: Tensor = getattr(leaf, 'variable')  # noqa: B009  only leaves have it
    return variable


def _path(root: Node, x: Tensor) -> dict[Node, None]:
    """The operations from ``root`` on from which ``x`` is reached."""
    reaches: dict[Node, bool] = {}
    stack = [root]
    while stack:
        node = stack[-1]
        if node not in reaches:
            reaches[node] = _is_leaf(node) and _weight(node) is x
            stack += [child for child in _successors(node) if child not in reaches]
        else:
            stack.pop()
            reaches[node] |= any(reaches[child] for child in _successors(node))
    return {node: None for node, reached in reaches.items() if reached}


def _exits(on_path: dict[Node, None]) -> list[Exit]:
    """Where gradients leave the path, edges from one operation to one successor taken together."""
    return [
        (node, _leaves(child))
        for node in on_path
        for child in dict.fromkeys(_successors(node))
        if child not in on_path
    ]


def _leaves(start: Node) -> set[Node]:
    """The operations from ``start`` on that add to a tensor's ``.grad``."""
    seen, stack = {start}, [start]
    while stack:
        found = [child for child in _successors(stack.pop()) if child not in seen]
        seen.update(found)
        stack += found
    return {node for node in seen if _is_leaf(node)}


def _divide(exits: list[Exit]) -> tuple[set[Node], dict[Node, set[Node]]]:
    """Weights whose gradient I computes, and those left for W, by operation."""
    uses = Counter(leaf for _, leaves in exits for leaf in leaves)
    early: set[Node] = set()
    late: dict[Node, set[Node]] = defaultdict(set)
    for node, leaves in exits:
        if _computes_all(node) or any(uses[leaf] > 1 for leaf in leaves):
            early |= leaves
        elif leaves:
            late[node] |= leaves
    return early, late


def _computes_all(node: Node) -> bool:
    """Whether ``node`` was written as an autograd function, in Python or C++."""
    return isinstance(node, BackwardCFunction) or 'CppNode' in node.name()
