"""A token whose streams are zero: an unused or damaged row of the embedding must not take over."""

from __future__ import annotations

import pytest
import torch

STEPS = 12
RESIDUALS = {
    'mhc': {},
    'mhc-identity': {'init': 'identity'},
    'mhc-learned': {'stream_merge': 'learned'},
    'mhc-kronecker': {'manifold': 'kronecker'},
    'mhc-single-pass': {'single_pass': True},
    # Not with its own sum, for which output projections start smaller, and so all that x adds to.
    'hc': {'residual_type': 'hc', 'stream_merge': 'mean'},
    'hc-learned': {'residual_type': 'hc', 'stream_merge': 'learned'},
}


def gradient_norms(model, step) -> list[float]:
    """Of the whole model over ``STEPS`` steps of SGD, before each of which a row is zero again.

    It is that of a token in the middle, which attends to others, and all positions are zero: at the
    start of a sequence every sublayer of any model would have zeros to norm.
    """
    norms, optimizer = [], torch.optim.SGD(model.parameters(), lr=0.01)
    for number in range(STEPS):
        with torch.no_grad():
            generator = torch.Generator().manual_seed(number)
            token = torch.randint(0, 64, (2, 17), generator=generator)[0, 8]
            model.embedding.word_embeddings.weight[token] = 0
            model.embedding.position_embeddings.weight.zero_()
        _, gradients = step(model, seed=number)
        norms.append(torch.stack([g.norm() for g in gradients.values()]).norm().item())
        for name, parameter in model.named_parameters():
            parameter.grad = gradients.get(name)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return norms


@pytest.mark.parametrize('name', RESIDUALS)
def test_its_gradient_is_that_of_the_standard_model(name, build, step):
    standard = gradient_norms(build(), step)
    ours = gradient_norms(build(RESIDUALS[name]), step)
    ratios = [a / b for a, b in zip(ours, standard, strict=True)]
    print('gradient norm over that of the standard model:', *(f'{ratio:.2f}' for ratio in ratios))
    assert max(ratios) < 1.5


def test_the_papers_eps_lets_it_take_over(build, step):
    """What the default is for; the flag still gives the paper's."""
    from megatron_mhc.settings.residual import PAPER_NORM_EPS

    norms = gradient_norms(build({'norm_eps': PAPER_NORM_EPS}), step)
    assert norms[0] > 100 * gradient_norms(build(), step)[0]
