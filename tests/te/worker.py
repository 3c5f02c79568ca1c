"""Megatron's Transformer Engine layers on the CPU: ``worker.py WHEEL_FOLDER RESULTS.json``."""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
import traceback

import cpu_extension

from megatron_mhc.runtime import cpu_device

cpu_device.install()
cpu_extension.install(pathlib.Path(sys.argv[1]))

import torch  # noqa: E402
import transformer_engine.pytorch as te  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.extensions import transformer_engine as extension  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.transformer.transformer_config import (  # noqa: E402
    MLATransformerConfig,
    TransformerConfig,
)

from megatron_mhc import ResidualConfig  # noqa: E402
from megatron_mhc.convert.complete import stored_name  # noqa: E402
from megatron_mhc.patches import engine  # noqa: E402
from megatron_mhc.patches.cpu_device import CPU_DEVICE_PATCHES  # noqa: E402
from megatron_mhc.patches.registry import RESIDUAL_PATCHES, SCHEDULE_PATCHES  # noqa: E402
from megatron_mhc.pipeline.deferred_wgrad import DeferredWgrads, delayed_modules  # noqa: E402
from megatron_mhc.settings.pipeline import PipelineConfig  # noqa: E402

SEQUENCE, VOCABULARY = 16, 64


CONSTANT = {
    'num_residual_streams': 2,
    'fixed_mappings': ('pre', 'post', 'res'),
    'stream_merge': 'mean',
}
SWIGLU = {
    'normalization': 'RMSNorm',
    'gated_linear_unit': True,
    'activation_func': torch.nn.functional.silu,
    'add_bias_linear': False,
    'bias_activation_fusion': False,
}
MOE = {
    **SWIGLU,
    'num_moe_experts': 4,
    'moe_router_topk': 2,
    'moe_token_dispatcher_type': 'alltoall',
    'moe_router_load_balancing_type': 'none',
    'moe_grouped_gemm': True,
}
LINEAR = (te.Linear, te.LayerNormLinear, te.GroupedLinear)
BF16 = {'bf16': True, 'params_dtype': torch.bfloat16}
FP8 = {**BF16, 'fp8': 'hybrid', 'fp8_recipe': 'tensorwise'}


def build(residual=None, te=True, delayed=False, **settings):
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    torch.manual_seed(5)
    latent = settings.get('multi_latent_attention', False)
    config = (MLATransformerConfig if latent else TransformerConfig)(
        **{
            'num_layers': 2,
            'hidden_size': 32,
            'ffn_hidden_size': 64,
            'num_attention_heads': 4,
            'use_cpu_initialization': True,
            'hidden_dropout': 0.0,
            'attention_dropout': 0.0,
            'persist_layer_norm': False,
            'gradient_accumulation_fusion': False,
            'masked_softmax_fusion': False,
            'bias_dropout_fusion': False,
            'attention_backend': AttnBackend.unfused,
            **settings,
        }
    )
    # Set late as the schedules do: the config's own check demands Megatron's overlap with it.
    config.delay_wgrad_compute = delayed
    if residual is not None:
        config.residual_config = ResidualConfig(**residual)
    if te:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    else:
        spec = get_gpt_decoder_block_spec(config, False, normalization=config.normalization)
    model = GPTModel(config, spec, vocab_size=VOCABULARY, max_sequence_length=SEQUENCE)
    return Float16Module(config, model) if config.bf16 else model


def step(model, seed=1):
    """Loss and gradients on fixed tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=generator)
    positions = torch.arange(SEQUENCE).expand(2, -1)
    loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())
    loss.mean().backward()
    return loss.detach(), gradients_of(model)


def gradients_of(model):
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def local_name(name):
    """A parameter's name in the local spec, where norms stand by themselves."""
    for fused, norm in (
        ('self_attention.linear_qkv.layer_norm_', 'input_layernorm.'),
        ('mlp.linear_fc1.layer_norm_', 'pre_mlp_layernorm.'),
    ):
        name = name.replace(fused, norm)
    return name


def assert_same(got, expected):
    assert torch.equal(got[0], expected[0]), (got[0] - expected[0]).abs().max()
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=0, atol=0, msg=name)


# --- layers ---------------------------------------------------------------------------------------


def same_as_local(residual, **settings):
    te, local = build(residual, **settings), build(residual, te=False, **settings)
    weights = dict(local.named_parameters())
    for name, parameter in te.named_parameters():
        assert torch.equal(parameter, weights[local_name(name)]), name
    loss, gradients = step(te)
    expected, others = step(local)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    whole = torch.stack([g.norm() for g in others.values()]).norm()
    assert {local_name(name) for name in gradients} == others.keys()
    for name, gradient in gradients.items():
        assert (gradient - others[local_name(name)]).norm() < 1e-6 * whole, name
    return te


def case_layers_are_those_of_the_local_spec():
    """Standard, HC and mHC: the same model of TE layers and of local ones, equal initial weights.

    HC divides the std of output projections; TE layers must have got that too.
    """
    summed, plain = (dict(build(r).named_parameters()) for r in ({'residual_type': 'hc'}, None))
    projection = 'decoder.layers.0.self_attention.linear_proj.weight'
    torch.testing.assert_close(2 * summed[projection], plain[projection])
    for residual in (None, {'residual_type': 'mhc', 'init': 'identity'}, {'residual_type': 'hc'}):
        for settings in ({}, SWIGLU):
            te = same_as_local(residual, **settings)
    layer = te.decoder.layers[0]
    assert type(layer.self_attention.linear_qkv) is extension.TELayerNormColumnParallelLinear
    assert type(layer.self_attention.core_attention) is extension.TEDotProductAttention


def case_other_residuals():
    """Gated: a fused norm is left out, with the projection behind it as it was."""
    gated = {'residual_type': 'gated', 'gated_rank': 3}
    assert step(build(gated, **LATENT))[0].isfinite().all()
    for settings in (SWIGLU, {**MOE, 'moe_grouped_gemm': False}):
        te = same_as_local(gated, **settings)
        assert not any('layer_norm' in name for name, _ in te.decoder.layers.named_parameters())
        same_as_local({'residual_type': 'attention', 'attention_block_size': 3}, **settings)


def constant_maps_are_the_standard_model(**settings):
    assert_same(step(build(CONSTANT, **settings)), step(build(**settings)))


def case_bf16():
    constant_maps_are_the_standard_model(**BF16)


def case_mixture_of_experts():
    """TE's grouped products; all sublayers see what they see without streams."""
    constant_maps_are_the_standard_model(**MOE)
    experts = build({'residual_type': 'mhc'}, **MOE).decoder.layers[0].mlp.experts
    assert isinstance(experts.linear_fc1, extension.TEGroupedLinear)


LATENT = {
    **SWIGLU,
    'multi_latent_attention': True,
    'q_lora_rank': None,
    'kv_lora_rank': 16,
    'qk_head_dim': 8,
    'qk_pos_emb_head_dim': 8,
    'v_head_dim': 8,
    'rope_type': 'rope',
    'apply_rope_fusion': False,
}


def case_latent_attention():
    constant_maps_are_the_standard_model(**LATENT)


def case_the_conversion_finds_every_weight():
    """It builds local layers, whose names are others, and wants each in a checkpoint of these."""
    for settings in (
        SWIGLU,
        MOE,
        {**LATENT, 'q_lora_rank': 16, 'qk_layernorm': True},
        {**MOE, **LATENT, 'q_lora_rank': 16, 'qk_layernorm': True, 'moe_layer_freq': [0, 1]},
    ):
        saved, wanted = (
            names_in_checkpoints(build(te=te, **settings | {'moe_grouped_gemm': te}))
            for te in (True, False)
        )
        for stored, names in zip(saved, wanted, strict=True):
            found = {stored_name(stored, name) for name in names}
            assert found == stored, (settings, found ^ stored)


def names_in_checkpoints(model):
    """Of the ``torch`` format, and of ``torch_dist``; without opaque states."""
    parts = model.sharded_state_dict()
    apply_factories(parts)
    sharded = {part.key for part in nested_values(parts) if isinstance(part, ShardedTensor)}
    return {name for name in model.state_dict() if '_extra_state' not in name}, sharded


def case_recomputation():
    for settings in (
        {'recompute_granularity': 'full', 'recompute_method': 'uniform', 'recompute_num_layers': 1},
        {'recompute_granularity': 'selective', 'recompute_modules': ['core_attn']},
    ):
        for kind in (BF16, FP8):
            residual = {'residual_type': 'mhc', 'init': 'identity'}
            assert_same(step(build(residual, **kind, **settings)), step(build(residual, **kind)))


# --- fp8 ------------------------------------------------------------------------------------------


def case_fp8_recipes_see_what_they_see_without_streams():
    """Bit for bit, so that no scale or amax history is touched by what stands around F."""
    for changes in (
        {},
        {'fp8_recipe': 'delayed'},
        {'fp8': 'e4m3'},
        {'first_last_layers_bf16': True, 'num_layers': 3},
        {'fp8_param': True},
        SWIGLU,
        MOE,
    ):
        settings = {**FP8, **changes}
        model, standard = build(CONSTANT, **settings), build(**settings)
        for seed in (1, 2, 3):  # a delayed scale comes of the steps before
            cpu_extension.QUANTIZED.clear()
            got = step(model, seed)
            count = len(cpu_extension.QUANTIZED)
            assert_same(got, step(standard, seed))
            total = len(cpu_extension.QUANTIZED)
            assert count and total == 2 * count, (changes, seed, count, total)


def case_fp8_leaves_the_mapping_in_fp32():
    for residual in ({'residual_type': 'mhc', 'init': 'identity'}, {'residual_type': 'hc'}):
        for recipe in ('tensorwise', 'delayed'):
            residual = {**residual, 'stream_merge': 'learned'}
            settings = {**FP8, 'fp8_recipe': recipe, 'fp8_param': True}
            model = build(residual, **settings)
            own = {
                name: parameter
                for name, parameter in model.named_parameters()
                if 'hyper_connection' in name or 'stream_merge' in name
            }
            assert own and all(type(p) is torch.nn.Parameter for p in own.values())
            assert all(p.dtype == torch.float32 for p in own.values())
            fc1 = model.module.decoder.layers[0].mlp.linear_fc1.weight
            assert isinstance(fc1, te.QuantizedTensor)
            seen = []
            layer = model.module.decoder.layers[1]
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, seen=seen: seen.append(kwargs['hidden_states']),
                with_kwargs=True,
            )
            cpu_extension.QUANTIZED.clear()
            loss, gradients = step(model)
            assert seen[0].dtype == torch.bfloat16 and seen[0].shape[-1] == 4 * 32
            assert cpu_extension.QUANTIZED
            assert not [s for s in cpu_extension.QUANTIZED if 4 * 32 in s]
            for name in own:
                assert gradients[name].dtype == torch.float32, name
            # fp8 in the sublayers moves the mapping's gradient no more than its own rounding.
            plain = step(build(residual, **BF16))
            assert not torch.equal(loss, plain[0])
            torch.testing.assert_close(loss, plain[0], rtol=0.01, atol=0.01)


# --- weight gradients -----------------------------------------------------------------------------


def with_main_gradients(model, **settings):
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **settings)
    return DistributedDataParallel(model.config, ddp, model)


def microbatch(model, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=generator)
    positions = torch.arange(SEQUENCE).expand(2, -1)
    return model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous()).mean()


def main_gradients(chunk):
    gradients = {n: p.main_grad.clone() for n, p in chunk.module.named_parameters()}
    left = [n for n, p in chunk.module.named_parameters() if p.grad is not None]
    assert not left, left
    return gradients


def case_weight_gradients_can_be_put_off():
    """I of two microbatches, then their W: TE's linear layers do theirs in ``backward_dw``."""
    residual = {'residual_type': 'mhc', 'init': 'identity'}
    for kind in ({}, MOE, FP8):
        for fused in (False, True):
            settings = {**kind, 'gradient_accumulation_fusion': fused}
            at_once = with_main_gradients(build(residual, **settings))
            for seed in (1, 2):
                microbatch(at_once, seed).backward()
            expected = main_gradients(at_once)
            engine.apply(SCHEDULE_PATCHES)
            try:
                model = build(residual, delayed=True, **settings)
                # What the schedule's patch in DDP asks for.
                model.config.pipeline_config = PipelineConfig('zb-v')
                chunk = with_main_gradients(model)
                delayed = delayed_modules(chunk)
                linear = [m for m in chunk.modules() if isinstance(m, LINEAR)]
                assert delayed and set(delayed) == set(linear)
                losses = [microbatch(chunk, seed) for seed in (1, 2)]
                pending = []
                for loss in losses:
                    pending.append(DeferredWgrads(delayed))
                    with pending[-1].collect():
                        loss.backward()
                fc1 = 'decoder.layers.0.self_attention.linear_qkv.weight'
                early = {n: p.main_grad for n, p in chunk.module.named_parameters() if fc1 in n}
                assert early and not any(gradient.any() for gradient in early.values())
                for weights in pending:
                    weights.run()
                got = main_gradients(chunk)
            finally:
                engine.revert(SCHEDULE_PATCHES)
                engine.apply(RESIDUAL_PATCHES)
            for name, gradient in expected.items():
                # Under fp8 TE has this bias's gradient in I and adds them up, in 16 bits, until W.
                summed = name.endswith('linear_qkv.bias') and kind is FP8
                error = (got[name] - gradient).norm() / (gradient.norm() + 1e-12)
                assert error < (2**-8 if summed else 1e-6), (name, kind, fused, error)


def main() -> None:
    engine.apply(CPU_DEVICE_PATCHES)
    store = pathlib.Path(tempfile.mkdtemp()) / 'store'
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{store}', rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    engine.apply(RESIDUAL_PATCHES)
    results = {}
    for name, case in list(globals().items()):
        if name.startswith('case_'):
            try:
                case()
                results[name] = None
            except Exception:
                results[name] = traceback.format_exc()
                print(name, results[name])
    pathlib.Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == '__main__':
    main()
