"""Measure every manifold of H_res: sums of rows and columns, spectral norm, gradient.

Draws n x n matrices from normal logits of a given scale, in fp32 as training computes them, and
prints one line a manifold. The gradient is compared with central differences in fp64.
"""

import argparse

import torch

from megatron_mhc.inputs.refusal import OneLineParser, refuse
from megatron_mhc.inputs.values import MOST_SEED, MOST_STREAMS, integer, number
from megatron_mhc.manifolds.registry import load, manifold_names

ROW = '| {:<15} | {:>6} | {:>9} | {:>12} | {:>11} | {:>10} | {:>9} |'
TITLES = 'manifold,logits,row error,column error,least entry,2-norm - 1,gradient'.split(',')


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(prog='manifold_table.py', description=__doc__)
    parser.add_argument(
        '--streams', type=integer(1, MOST_STREAMS), default=4, help='n (default: 4)'
    )
    parser.add_argument(
        '--scale', type=number(0), default=1.0, help='std of the logits (default: 1)'
    )
    parser.add_argument(
        '--matrices', type=integer(1, 10_000_000), default=10_000, help='drawn (default: 10000)'
    )
    parser.add_argument('--seed', type=integer(0, MOST_SEED), default=1234)
    return parser.parse_args(argv)


def gradient_error(manifold, logits: torch.Tensor) -> float:
    """Largest |autograd - central difference| over the largest |gradient|, of 16 matrices."""
    logits = logits[:16].double().requires_grad_()
    weights = torch.randn(16, manifold.n, manifold.n, dtype=torch.float64)

    def value(at):
        return (manifold.matrix(at).double() * weights).sum(dim=(-2, -1))

    (exact,) = torch.autograd.grad(value(logits).sum(), logits)
    logits = logits.detach()
    step = 1e-6
    columns = [
        (value(logits + step * unit) - value(logits - step * unit)) / (2 * step)
        for unit in torch.eye(logits.shape[-1], dtype=torch.float64)
    ]
    return float((exact - torch.stack(columns, -1)).abs().max() / exact.abs().max())


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    try:
        manifolds = [(name, load(name, options.streams)) for name in manifold_names()]
    except ValueError as error:
        refuse('manifold_table.py', f'--streams {options.streams}: {error}')
    print(ROW.format(*TITLES))
    print(ROW.format(*('---' for _ in TITLES)))
    for name, manifold in manifolds:
        torch.manual_seed(options.seed)
        logits = options.scale * torch.randn(options.matrices, manifold.num_logits)
        matrix = manifold.matrix(logits)
        sums = [(matrix.sum(axis) - 1).abs().max() for axis in (-1, -2)]
        norm = torch.linalg.matrix_norm(matrix.double(), 2).max() - 1
        gradient = f'{gradient_error(manifold, logits):.1e}' if manifold.num_logits else 'no logits'
        figures = [f'{float(value):.1e}' for value in (*sums, matrix.min(), norm)]
        print(ROW.format(name, manifold.num_logits, *figures, gradient))


if __name__ == '__main__':
    main()
