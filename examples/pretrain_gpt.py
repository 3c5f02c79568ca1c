"""Pretrain a GPT model with Megatron-Core's own training loop.

The released wheels carry ``megatron.training`` but no pretrain script; this is one that runs on
0.17, 0.18 and 0.19. Arguments are Megatron's own (``--help`` lists them):

    torchrun --nproc-per-node 8 examples/pretrain_gpt.py --num-layers 12 --hidden-size 768 ...
"""

import sys
from functools import partial
from inspect import signature

import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import (
    get_mtp_num_layers_to_build,
    get_mtp_ranks,
)
from megatron.core.transformer.spec_utils import import_module
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers, pretrain
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

ARGS_DEFAULTS = {'tokenizer_type': 'GPT2BPETokenizer'}


def layer_spec(args, config, vp_stage=None):
    """The decoder's spec: ``--spec`` if given, else Transformer Engine's or the local one."""
    if args.spec is not None:
        return import_module(args.spec)
    use_te = args.transformer_impl == 'transformer_engine'
    if args.num_experts:
        # Dense and expert layers may alternate, so the whole block is specified.
        return get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=use_te,
            normalization=args.normalization,
            qk_l2_norm=args.qk_l2_norm,
            vp_stage=vp_stage,
        )
    options = {
        'qk_layernorm': args.qk_layernorm,
        'multi_latent_attention': args.multi_latent_attention,
        'qk_l2_norm': args.qk_l2_norm,
    }
    if use_te:
        return get_gpt_layer_with_transformer_engine_spec(**options)
    return get_gpt_layer_local_spec(normalization=args.normalization, **options)


def model_provider(
    pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None
):
    """Build this pipeline stage's part of the model."""
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    mtp_spec = None
    if args.mtp_num_layers:
        # A prediction layer has the shape of the last decoder layer, wherever that one lives.
        use_te = args.transformer_impl == 'transformer_engine'
        layers = get_gpt_decoder_layer_specs(config, use_te, args.normalization, args.qk_l2_norm)
        mtp_spec = get_gpt_mtp_block_spec(config, layers[-1], use_te, vp_stage=vp_stage)
    return GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(args, config, vp_stage),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        mtp_block_spec=mtp_spec,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def shard_sequence(batch):
    """Keep this context-parallel rank's two chunks, one early and one late, of every sequence."""
    size, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    if size == 1:
        return batch
    return {
        key: torch.cat([value.chunk(2 * size, dim=1)[i] for i in (rank, 2 * size - 1 - rank)], 1)
        for key, value in batch.items()
    }


def get_batch(data_iterator, model):
    """The next microbatch ``[b, s]``, or Nones on a stage that needs neither tokens nor labels."""
    needed = (get_attr_wrapped_model(model, n) for n in ('pre_process', 'post_process'))
    if not (any(needed) or get_attr_wrapped_model(model, 'mtp_process')):
        return {'tokens': None, 'position_ids': None, 'labels': None, 'loss_mask': None}
    # Only tensor-parallel rank 0 reads data; the others receive it.
    data = next(data_iterator) if mpu.get_tensor_model_parallel_rank() == 0 else None
    integers = ['tokens', 'position_ids', 'labels']
    batch = tensor_parallel.broadcast_data(integers, data, torch.int64)
    batch.update(tensor_parallel.broadcast_data(['loss_mask'], data, torch.float32))
    return shard_sequence(batch)


def loss_func(loss_mask, output_tensor):
    """``(sum of token losses, number of tokens, report)``: Megatron divides one by the other."""
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output_tensor.view(-1).float() * mask)
    if get_args().check_for_nan_in_loss_and_grad:
        for reject, name in ((torch.isnan, 'NaN'), (torch.isinf, 'Inf')):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=reject,
                message=f'{name} in the forward loss',
                tolerance=0.0,
                fatal=True,
            )
    tokens = mask.sum().detach().to(torch.int)
    report = torch.cat([loss.detach().view(1), tokens.view(1)])
    return loss, tokens, {'lm loss': report}


def forward_step(data_iterator, model, return_schedule_plan=False):
    """Run one microbatch through this stage."""
    timers = get_timers()
    timers('batch-generator', log_level=2).start()
    batch = get_batch(data_iterator, model)
    timers('batch-generator').stop()
    # Attention is causal in every layer, so no mask is passed.
    inputs = (batch['tokens'], batch['position_ids'], None)
    targets = {'labels': batch['labels'], 'loss_mask': batch['loss_mask']}
    if return_schedule_plan:
        output = model.build_schedule_plan(*inputs, **targets)
    else:
        output = model(*inputs, **targets)
    return output, partial(loss_func, batch['loss_mask'])


def datasets_provider(num_samples, vp_stage=None):
    """Train, validation and test sets of ``num_samples = (train, validation, test)`` samples."""
    args = get_args()
    if args.reset_attention_mask:
        print('--reset-attention-mask: this script passes no mask; drop it', file=sys.stderr)
        sys.exit(2)
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )

    def wanted_here():
        if mpu.get_tensor_model_parallel_rank() != 0:
            return False
        mtp = args.mtp_num_layers and get_mtp_num_layers_to_build(
            core_transformer_config_from_args(args), vp_stage=vp_stage
        )
        return is_first_or_last_pipeline_stage(vp_stage) or bool(mtp)

    dataset = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(dataset, num_samples, wanted_here, config).build()


# Every rank builds its own share.
datasets_provider.is_distributed = True


def get_embedding_ranks(pp_ranks):
    """Pipeline ranks that hold a copy of the word embedding."""
    args = get_args()
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)


def main(provider=None):
    """Call ``pretrain`` in the form that the installed release expects.

    ``provider``: of another model, in a script that shares all the rest.
    """
    options = {
        'train_valid_test_dataset_provider': datasets_provider,
        'model_provider': provider or model_provider,
        'model_type': ModelType.encoder_or_decoder,
        'forward_step_func': forward_step,
        'get_embedding_ranks': get_embedding_ranks,
    }
    if 'cfg_container' in signature(pretrain).parameters:
        # From 0.18 on arguments are parsed here and handed over as a container of configurations.
        from megatron.training.argument_utils import pretrain_cfg_container_from_args
        from megatron.training.arguments import parse_and_validate_args

        args = parse_and_validate_args(args_defaults=ARGS_DEFAULTS)
        options['cfg_container'] = pretrain_cfg_container_from_args(args)
    else:
        options['args_defaults'] = ARGS_DEFAULTS
    pretrain(**options)


if __name__ == '__main__':
    main()
