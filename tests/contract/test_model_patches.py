"""What the patches around the model decide: optimizer groups, and refusals at model build."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_mhc import ResidualConfig, with_residual


def local_spec_with(**submodules):
    """A layer spec in which some submodules are others; ``build`` takes it as ``spec``."""

    def spec(config):
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        layer = get_gpt_layer_local_spec()
        return dataclasses.replace(
            layer, submodules=dataclasses.replace(layer.submodules, **submodules)
        )

    return spec


def groups_of(model, standard_rule=True):
    """Parameter name -> weight decay multiplier, through Megatron's own grouping."""
    from megatron.core import optimizer
    from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides

    config = OptimizerConfig(lr=1e-3, min_lr=1e-4, weight_decay=0.1)
    overrides = get_standard_config_overrides(config) if standard_rule else None
    groups = optimizer._get_param_groups([model], config, overrides)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group['wd_mult'] for group in groups for p in group['params']}


@pytest.mark.parametrize('residual_type', ['mhc', 'hc'])
@pytest.mark.parametrize('decay', [True, False])
@pytest.mark.parametrize('standard_rule', [True, False])
def test_only_phi_may_be_decayed(build, residual_type, decay, standard_rule):
    model = build(
        {
            'residual_type': residual_type,
            'mapping_weight_decay': decay,
            'stream_merge': 'learned',
        }
    )
    decays = groups_of(model, standard_rule)
    own = {n: wd for n, wd in decays.items() if 'hyper_connection' in n or 'stream_merge' in n}
    assert own and set(decays) == {name for name, _ in model.named_parameters()}
    for name, multiplier in own.items():
        assert multiplier == (1.0 if decay and name.endswith('mapping_proj.weight') else 0.0), name
    assert decays['decoder.layers.0.mlp.linear_fc1.weight'] == 1.0


def test_a_model_that_was_not_widened_is_refused(build):
    """The patch for a script that builds something else than a GPTModel."""
    model = build()
    model.config.residual_config = ResidualConfig()
    with pytest.raises(RuntimeError, match='--residual-type mhc had no effect.*GPTModel'):
        groups_of(model)


def test_model_build_checks_the_config(build):
    with pytest.raises(ValueError, match='--cpu-offloading-num-layers cannot be combined'):
        build({'residual_type': 'mhc'}, cpu_offloading_num_layers=1, cpu_offloading=True)


def test_cross_attention_is_refused(build):
    from megatron.core.transformer.attention import CrossAttention

    with pytest.raises(ValueError, match='this layer has cross attention'):
        build({'residual_type': 'mhc'}, spec=local_spec_with(cross_attention=CrossAttention))


def test_a_stage_input_of_the_wrong_width_is_refused(build):
    model = build({'residual_type': 'mhc'})
    model.decoder.pre_process = False
    model.decoder.set_input_tensor(torch.zeros(16, 1, 32))
    with pytest.raises(RuntimeError, match=r'width 32 where 4 streams \* 32 are wanted'):
        model.decoder(None, None)


def test_a_settings_object_on_the_config_needs_no_command_line(build, step):
    """Library use: no argument was parsed, yet the model is widened."""
    from megatron_mhc.residual.layer import HyperConnectionTransformerLayer

    model = build({'residual_type': 'hc', 'stream_merge': 'learned'})
    assert all(isinstance(layer, HyperConnectionTransformerLayer) for layer in model.decoder.layers)
    keys = model.sharded_state_dict()
    assert 'decoder.stream_merge.mapping_proj.weight' in {t.key for t in keys.values()}
    loss, gradients = step(model)
    assert loss.isfinite().all()
    assert gradients['decoder.stream_merge.mapping_proj.weight'].abs().max() > 0


def test_a_bias_dropout_add_of_ones_own_is_refused(build):
    def scaled_add(training, fused):
        return lambda x_with_bias, residual, prob: residual + 0.1 * x_with_bias[0]

    with pytest.raises(ValueError, match='mlp_bda=.*scaled_add.*would be lost'):
        build({'residual_type': 'mhc'}, spec=local_spec_with(mlp_bda=scaled_add))


def test_pipeline_parallel_inference_is_refused(build):
    model = build({'residual_type': 'mhc'})
    model.decoder.config.pipeline_model_parallel_size = 2
    with pytest.raises(NotImplementedError, match='receive buffers are one stream wide'):
        model.decoder(torch.zeros(4, 1, 32), None, inference_context=object())


def test_an_already_widened_spec_is_accepted(build, step):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    residual = {'residual_type': 'mhc', 'num_residual_streams': 2}
    by_hand = build(
        residual,
        spec=lambda c: with_residual(get_gpt_layer_local_spec(), ResidualConfig(**residual)),
    )
    assert torch.equal(step(by_hand)[0], step(build(residual))[0])
