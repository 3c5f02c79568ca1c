"""One process, one model: what must hold on every supported Megatron-Core release."""

from __future__ import annotations

import gc
import pathlib
import sys

import pytest
import torch

from megatron_mhc import ResidualConfig, compat
from megatron_mhc.settings.engram import EngramConfig

# pytest imports tests by path.
sys.path.append(str(pathlib.Path(__file__).parent))
SEQUENCE, VOCABULARY = 16, 64

# Megatron's main branch is tested as if it were released, as on the day when it is.
if (minor := compat.core_minor(version := compat.core_version())) in compat.PREVIEWED:
    compat.TESTED[version] = 'contract'
    compat.CORE_BELOW = (0, int(minor.split('.')[1]) + 1)


@pytest.fixture(scope='module')
def megatron(tmp_path_factory):
    """Megatron's parallel state for a world of one, with our patches in place."""
    from megatron.core import parallel_state, tensor_parallel

    from megatron_mhc.patches import engine
    from megatron_mhc.patches.cpu_device import CPU_DEVICE_PATCHES
    from megatron_mhc.patches.registry import RESIDUAL_PATCHES
    from megatron_mhc.runtime import cpu_device

    device_patches = CPU_DEVICE_PATCHES if cpu_device.is_installed() else ()
    engine.apply(device_patches)
    rendezvous = tmp_path_factory.mktemp('rendezvous') / 'store'
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{rendezvous}', rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    engine.apply(RESIDUAL_PATCHES)
    yield
    engine.revert(device_patches + RESIDUAL_PATCHES)
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    # Threads of the groups end with the last reference, which models hold in cycles.
    gc.collect()


@pytest.fixture(scope='module')
def build(megatron, request):
    """``build(residual=..., spec=..., **config)`` -> GPTModel; equal seeds, equal base weights."""
    from block_models import SMALL
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    # And for each stream: a file may say how many its models have.
    number = getattr(request.module, 'STREAMS', None)
    streams = {'num_residual_streams': number} if number else {}

    def make(
        residual: dict | None = None,
        spec=None,
        mtp_spec=None,
        tied=False,
        engram: dict | None = None,
        **settings,
    ):
        if mtp_spec and minor in compat.PREVIEWED and not HAVE_TE:
            pytest.skip('core 0.20 before its release builds no prediction layer without TE')
        torch.manual_seed(5)
        latent = settings.get('multi_latent_attention')
        kind = MLATransformerConfig if latent else TransformerConfig
        config = kind(**{'num_layers': 3, **SMALL, **settings})
        if residual is not None:
            # Where kernels are compared with torch: the interpreter takes its time for each pass.
            compared = (
                'kernel_backend' in residual and residual.get('residual_type', 'mhc') == 'mhc'
            )
            few = {'sinkhorn_iterations': 2} if compared else {}
            config.residual_config = ResidualConfig(**few | streams | residual)
        if engram is not None:
            config.engram_config = EngramConfig(**engram)
        return GPTModel(
            config,
            spec(config) if spec else get_gpt_layer_local_spec(normalization=config.normalization),
            vocab_size=VOCABULARY,
            max_sequence_length=SEQUENCE,
            share_embeddings_and_output_weights=tied,
            mtp_block_spec=mtp_spec(config) if mtp_spec else None,
            position_embedding_type='rope' if mtp_spec else 'learned_absolute',
        )

    return make


@pytest.fixture(scope='module')
def step():
    """``step(model)`` -> logits or loss, and every gradient, on fixed tokens."""

    def run(model, seed=1):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=generator)
        positions = torch.arange(SEQUENCE).expand(2, -1)
        torch.manual_seed(9)  # dropout
        loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())
        loss.mean().backward()
        gradients = {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        model.zero_grad()
        return loss.detach(), gradients

    return run
