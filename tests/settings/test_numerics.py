"""``--mhc-numerics`` and the flags beside it, in checkpoints, and what is said of the kernels."""

from __future__ import annotations

import argparse

import pytest
import torch

from megatron_mhc.checkpoints.check import check_checkpoint
from megatron_mhc.settings.flags_residual import residual_config_from_args
from megatron_mhc.settings.residual import NUMERICS, ResidualConfig

REFUSED = {
    '--residual-type mhc --mhc-numerics deepseek-v4 --mhc-stream-merge mean': '--mhc-stream-merge '
    'mean contradicts --mhc-numerics deepseek-v4, whose merge is learned',
    '--residual-type mhc --mhc-numerics megatron-main --mhc-stream-merge learned': 'merge is mean',
    '--residual-type mhc --mhc-numerics megatron-main --mhc-norm-eps 1e-5': '--mhc-norm-eps 1e-05 '
    'contradicts --mhc-numerics megatron-main, where it is 1e-06',
    '--residual-type mhc --mhc-numerics glm-5.3 --mhc-single-pass': 'that project has no single',
    '--residual-type mhc --mhc-numerics glm-5.3 --mhc-kernel-backend triton': 'paper does, not as '
    'glm-5.3 does; use auto',
    '--residual-type mhc --mhc-numerics glm-5.3 --mhc-manifold identity': 'keeps H_res on '
    'sinkhorn; use --mhc-manifold sinkhorn, or --mhc-numerics paper',
    '--residual-type mhc --mhc-numerics hy4': 'keeps H_res on identity; use --mhc-manifold '
    'identity',
    '--residual-type mhc --mhc-numerics glm-5.3 --mhc-no-edge-fusion': 'edge_fusion=False has no '
    "effect with numerics='glm-5.3'",
    '--residual-type hc --mhc-numerics paper': '--mhc-numerics has no effect',
}


@pytest.mark.parametrize('flags', REFUSED)
def test_contradictions_are_one_line_and_name_the_flag(refused, flags):
    assert REFUSED[flags] in refused(flags)


def test_numerics_bring_what_belongs_to_them(parse):
    """Left out, merge and eps are theirs; the paper's is the default and changes nothing."""
    for name, merge, eps in (
        ('paper', 'mean', 1e-6),
        ('deepseek-v4', 'learned', 1e-6),
        ('megatron-dev', 'learned', 1e-6),
        ('megatron-main', 'mean', 1e-6),
        ('glm-5.3', 'mean', 1e-5),
        ('hy4', 'learned', 1e-5),
    ):
        manifold = NUMERICS[name].manifold
        flags = f'--residual-type mhc --mhc-numerics {name} --mhc-manifold {manifold}'
        args = parse(*flags.split())
        found = args.mhc_numerics, args.mhc_stream_merge, args.mhc_norm_eps
        assert found == (name, merge, eps)
        assert residual_config_from_args(args) == ResidualConfig(numerics=name, manifold=manifold)
    assert ResidualConfig(numerics='paper') == ResidualConfig()
    eps = parse('--residual-type', 'mhc', *'--mhc-numerics glm-5.3 --mhc-norm-eps 1e-6'.split())
    assert eps.mhc_norm_eps == 1e-6
    single = ResidualConfig(numerics='deepseek-v4', single_pass=True)
    assert single.stream_merge == 'pre'


def test_a_checkpoint_keeps_its_numerics(parse):
    """One from before the flag was trained with the paper's."""
    saved = parse('--residual-type', 'mhc', '--mhc-numerics', 'glm-5.3')
    check_checkpoint(saved, ResidualConfig(numerics='glm-5.3'), 'runs')
    remedy = 'go on with --mhc-numerics glm-5.3 --mhc-norm-eps 1e-05, or'
    with pytest.raises(ValueError, match=remedy):
        check_checkpoint(saved, ResidualConfig(), 'runs')
    with pytest.raises(ValueError, match=f'{remedy[:-4]} --mhc-stream-merge mean'):
        check_checkpoint(saved, ResidualConfig(numerics='megatron-dev'), 'runs')
    old = parse('--residual-type', 'mhc')
    del old.mhc_numerics
    check_checkpoint(old, ResidualConfig(), 'runs')
    with pytest.raises(ValueError, match='go on with --mhc-numerics paper, or leave out --load'):
        check_checkpoint(old, ResidualConfig(numerics='megatron-main'), 'runs')
    for other in (ResidualConfig('hc'), ResidualConfig('mudd'), ResidualConfig('standard')):
        with pytest.raises(ValueError, match="repeat the checkpoint's flags"):
            check_checkpoint(saved, other, 'runs')


def test_kernels_that_run_leave_the_mapping_to_torch(parse, capsys, monkeypatch):
    from megatron_mhc.inputs import refusal
    from megatron_mhc.runtime import kernel_choice

    refusal.announce.cache_clear()
    monkeypatch.setattr(kernel_choice, 'kernel_obstacle', lambda *where: None)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(kernel_choice.cpu_device, 'is_installed', lambda: False)
    args = argparse.Namespace(bf16=True)
    for name in ('deepseek-v4', 'megatron-main'):
        kernel_choice.announce_kernels(args, ResidualConfig(numerics=name))
    lines = [line.split('] ')[1] for line in capsys.readouterr().out.splitlines()]
    torch_line = '{} (bfloat16, n = 4): torch reference, because the kernels compute {} as '
    why = '--mhc-numerics paper does, not as {} does'
    assert lines == [
        torch_line.format('mapping', 'mapping') + why.format('deepseek-v4'),
        'pre, post_res (bfloat16, n = 4): Triton kernels',
        torch_line.format('mapping', 'mapping') + why.format('megatron-main'),
        torch_line.format('post_res', 'post_res') + why.format('megatron-main'),
        'pre (bfloat16, n = 4): Triton kernels',
    ]
