"""What the layout tests share: how cases are run, and what they are held to."""

from __future__ import annotations

import json
import pathlib

import launch as ranks
import torch

WORKER = pathlib.Path(__file__).parent / 'worker.py'
# fp32. A gating factor's gradient is one scalar in which thousands of terms cancel, so tensors are
# held to 1e-6 of the whole gradient, and each to its own norm only by what a wrong sum would show.
SPLIT_SUM_TOLERANCE = 1e-6
OWN_NORM_TOLERANCE = 1e-3
# A rank's groups hold 8 x 3 threads of gloo's; those of a case must be gone when it has ended.
MOST_THREADS = 20

MOE = {
    'num_moe_experts': 4,
    'moe_router_topk': 2,
    'moe_token_dispatcher_type': 'alltoall',
    'moe_router_load_balancing_type': 'none',
    'add_bias_linear': False,
}
# Small layers of 'M' and 'G'; the latter want silu as well.
MIXERS = {
    'mamba_state_dim': 8,
    'mamba_head_dim': 8,
    'mamba_num_groups': 2,
    'linear_key_head_dim': 8,
    'linear_value_head_dim': 8,
    'linear_num_key_heads': 2,
    'linear_num_value_heads': 4,
}
# Latent attention, small, with another width of values than of keys, and sparse attention by it.
LATENT = {
    'multi_latent_attention': True,
    'q_lora_rank': None,
    'kv_lora_rank': 16,
    'qk_head_dim': 8,
    'qk_pos_emb_head_dim': 4,
    'v_head_dim': 8,
    'rope_type': 'rope',
    'apply_rope_fusion': False,
}
SPARSE = {
    **LATENT,
    'add_bias_linear': False,
    'normalization': 'RMSNorm',
    'experimental_attention_variant': 'dsa',
    'dsa_indexer_n_heads': 2,
    'dsa_indexer_head_dim': 8,
    'dsa_indexer_topk': 4,
    'dsa_indexer_loss_coeff': 0.1,
}


def launch(world: int, cases: list[dict], folder: pathlib.Path, **environment: str) -> dict:
    """Run ``cases`` in one world of ranks; name -> what ``worker.py`` returned."""
    description = folder / f'cases-{world}.json'
    description.write_text(json.dumps(cases))
    done = ranks.launch(world, WORKER, description, folder, timeout=600, **environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((folder / f'results-{world}.json').read_text())


def assert_stepped_alike(folder: pathlib.Path, tensors, model: str) -> None:
    """A step of the distributed optimizer changed every weight, as the plain one did, bit for bit.

    Args:
        tensors: the fixture; model: of the cases ``plain-step-`` and ``dist-step-``.
    """
    plain, sharded = (tensors(folder / f'{kind}-step-{model}') for kind in ('plain', 'dist'))
    before = tensors(folder / f'{model}-weights')
    assert plain.keys() == sharded.keys()
    for key, value in plain.items():
        assert torch.equal(value, sharded[key]), key
        assert not torch.equal(value, before[key]), key
