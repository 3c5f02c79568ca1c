"""Fine-grained activation offload: what it releases early, no n-stream sublayer reads again.

Copies go from the CPU to the CPU here, and streams do not overlap; but storage is released as on a
GPU, so a tensor that anything still reads would be empty. What only a GPU can show is that its
copies are ordered, which Megatron does by itself.
"""

from __future__ import annotations

import types

import pytest
import torch

MODELS = {
    'standard': None,
    'hc': {'residual_type': 'hc'},
    'mhc': {'residual_type': 'mhc'},
    'single pass': {'residual_type': 'mhc', 'single_pass': True},
    'learned merge': {'residual_type': 'mhc', 'stream_merge': 'learned'},
    'segments': {'residual_type': 'mhc', 'recompute_layer_num': 2},
    'fused edges': {'residual_type': 'mhc', 'kernel_backend': 'triton'},
    'attention': {'residual_type': 'attention'},
}
MODULES = ['attn_norm', 'mlp_norm', 'qkv_linear']


@pytest.fixture
def offload(monkeypatch):
    """Megatron's offload between CPU tensors; returns (released, bytes left of it) as they come."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.pipeline_parallel import fine_grained_activation_offload as module

    # Of Transformer Engine it sets a flag only, for its layers.
    flag = types.SimpleNamespace(CPUOffloadEnabled=False)
    monkeypatch.setattr(transformer_engine, 'cpu_offload', flag)
    handler, released = module.ChunkOffloadHandler, []
    monkeypatch.setattr(
        handler,
        '_can_manage_tensor_for_offload',
        staticmethod(lambda tensor: not isinstance(tensor, torch.nn.Parameter)),
        raising=False,
    )
    bulk_offload = handler.bulk_offload

    def recorded(self, *args):
        bulk_offload(self, *args)
        released.extend((t, t.untyped_storage().size()) for t in args[-1])

    monkeypatch.setattr(handler, 'bulk_offload', recorded)
    yield module.FineGrainedActivationOffloadingInterface, released
    module.PipelineOffloadManager.reset_instance()


@pytest.mark.parametrize('name', MODELS)
def test_offloaded_steps_are_the_same_bits(build, step, offload, name):
    interface, released = offload
    # The first step offloads all layers, later ones keep the last one's; kernels are interpreted.
    seeds, layers = ((1,), 2) if name == 'fused edges' else ((1, 2, 3), 3)
    plain = build(MODELS[name], num_layers=layers)
    wanted = [step(plain, seed) for seed in seeds]
    settings = {'offload_modules': MODULES, 'min_offloaded_tensor_size': 1}
    model = build(
        MODELS[name], num_layers=layers, fine_grained_activation_offloading=True, **settings
    )
    model.load_state_dict(plain.state_dict())
    for seed, (loss, gradients) in zip(seeds, wanted, strict=True):
        got_loss, got = step(model, seed)
        interface.reset()
        assert torch.equal(got_loss, loss) and got.keys() == gradients.keys()
        for key, gradient in gradients.items():
            assert torch.equal(got[key], gradient), key
    # The inputs of both norms of a layer, freed in all layers but the last of later steps.
    assert len(released) == 2 * layers * len(seeds)
    kept = 2 * (len(seeds) - 1)
    assert sum(left == 0 for _, left in released) >= len(released) - kept


def test_dense_connections_read_what_it_would_release(build):
    with pytest.raises(ValueError, match='--fine-grained-activation-offloading cannot be combined'):
        build(
            {'residual_type': 'mudd'},
            fine_grained_activation_offloading=True,
            offload_modules=['mlp_norm'],
        )
