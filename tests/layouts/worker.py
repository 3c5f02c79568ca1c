"""Train one step of a small GPT in several parallel layouts: ``torchrun worker.py CASES.json DIR``.

Every case loads the same weights from a distributed checkpoint written by one process, runs
Megatron's own schedule on the same microbatches, and saves its gradients (or the weights after an
optimizer step) as a distributed checkpoint again, so that any two layouts can be compared.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import pathlib
import sys

from megatron_mhc import ResidualConfig
from megatron_mhc.runtime import cpu_device

cpu_device.install()
# Where set, the folder of Transformer Engine's wheel: layers are then its own (see ``tests/te``).
TE_WHEEL = os.environ.get('MEGATRON_MHC_TEST_TE')
if TE_WHEEL:
    sys.path.append(str(pathlib.Path(__file__).parents[1] / 'te'))
    import cpu_extension

    cpu_extension.install(pathlib.Path(TE_WHEEL))

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'contract'))

import psutil  # noqa: E402
import torch  # noqa: E402
from counters import counted_activations, counted_lanes  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.common.embeddings.rotary_pos_embedding import (  # noqa: E402
    RotaryEmbedding,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec  # noqa: E402
from megatron.core.models.mamba.mamba_model import MambaModel  # noqa: E402
from megatron.core.num_microbatches_calculator import (  # noqa: E402
    get_num_microbatches,
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)
from megatron.core.optimizer import (  # noqa: E402
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,  # noqa: E402
)
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from megatron.core.transformer.transformer_config import (  # noqa: E402
    MLATransformerConfig,
    TransformerConfig,
)

from megatron_mhc.monitor.collect import Monitor  # noqa: E402
from megatron_mhc.monitor.reduce import gather  # noqa: E402
from megatron_mhc.patches import engine  # noqa: E402
from megatron_mhc.patches.combined_passes import COMBINED_PASSES_PATCHES  # noqa: E402
from megatron_mhc.patches.cpu_device import CPU_DEVICE_PATCHES  # noqa: E402
from megatron_mhc.patches.registry import RESIDUAL_PATCHES, schedule_patches  # noqa: E402
from megatron_mhc.pipeline.tied_embedding import has_second_copy  # noqa: E402
from megatron_mhc.settings.engram import EngramConfig  # noqa: E402
from megatron_mhc.settings.flags_monitor import MonitorConfig  # noqa: E402
from megatron_mhc.settings.pipeline import PipelineConfig  # noqa: E402

SEQUENCE, VOCABULARY = 32, 64


def build(case: dict) -> tuple[TransformerConfig, list[torch.nn.Module]]:
    layout = {'tp': 1, 'pp': 1, 'vpp': None, 'ep': 1, 'sp': False, **case.get('layout', {})}
    sizes = {
        'tensor_model_parallel_size': layout['tp'],
        'pipeline_model_parallel_size': layout['pp'],
        'virtual_pipeline_model_parallel_size': layout['vpp'],
        'expert_model_parallel_size': layout['ep'],
        'expert_tensor_parallel_size': 1,
    }
    holders = case.get('embedding_ranks')
    parallel_state.initialize_model_parallel(
        **sizes,
        # As a script says which pipeline ranks hold a copy; by default the first and the last.
        get_embedding_ranks=holders and (lambda ranks: [ranks[i] for i in holders]),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    config = settings(case, sizes | {'sequence_parallel': layout['sp']})
    if case.get('initial'):
        # As a training script does.
        torch.manual_seed(3 + 100 * parallel_state.get_pipeline_model_parallel_rank())
    stages = range(layout['vpp']) if layout['vpp'] else [None]
    chunks = [model_chunk(case, config, stage) for stage in stages]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=case.get('step') == 'dist',
        overlap_grad_reduce=case.get('overlap', False),
        overlap_param_gather=bool(case.get('gather')),
        align_param_gather=case.get('gather') == 'together',
    )
    config.finalize_model_grads_func = finalize_model_grads
    replicas = [DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks]
    if ddp_config.align_param_gather:
        config.param_sync_func = [chunk.start_param_sync for chunk in replicas]
    return config, replicas


def settings(case: dict, sizes: dict) -> TransformerConfig:
    latent = case.get('config', {}).get('multi_latent_attention')
    config = (MLATransformerConfig if latent else TransformerConfig)(
        num_layers=case.get('layers', 4),
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        batch_p2p_comm=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        activation_func=getattr(torch.nn.functional, case.get('activation', 'gelu')),
        attention_backend=AttnBackend.unfused if TE_WHEEL else AttnBackend.auto,
        **sizes,
        **case.get('config', {}),
    )
    for name, kind in (('residual', ResidualConfig), ('engram', EngramConfig)):
        if case.get(name):
            setattr(config, f'{name}_config', kind(**case[name]))
    if case.get('schedule'):
        config.pipeline_config = PipelineConfig(**case['schedule'])
    # Not in the call, which asks for bf16 beside it.
    config.overlap_moe_expert_parallel_comm = case.get('combined', False)
    config.mhc_post_stream = case.get('post_stream', 'compute')
    return config


def hybrid_chunk(case: dict, config: TransformerConfig, stage: int | None) -> MambaModel:
    place = {'ignore_virtual': False, 'vp_stage': stage}
    return MambaModel(
        config,
        mamba_stack_spec,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        hybrid_layer_pattern=case['pattern'],
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        share_embeddings_and_output_weights=case.get('tied', False),
        position_embedding_type='rope' if config.mtp_num_layers else 'learned_absolute',
        vp_stage=stage,
    )


def model_chunk(case: dict, config: TransformerConfig, stage: int | None) -> torch.nn.Module:
    if case.get('pattern'):
        return hybrid_chunk(case, config, stage)
    spec, mtp = get_gpt_layer_local_spec(), None
    if config.mtp_num_layers:
        mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False, vp_stage=stage)
    if config.num_moe_experts is not None or TE_WHEEL:
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=bool(TE_WHEEL), vp_stage=stage
        )
    place = {'ignore_virtual': False, 'vp_stage': stage}
    chunk = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        share_embeddings_and_output_weights=case.get('tied', False),
        position_embedding_type='rope' if config.mtp_num_layers else 'learned_absolute',
        mtp_block_spec=mtp,
        vp_stage=stage,
    )
    chunk.model_type = 1
    return chunk


def weights(chunks: list[torch.nn.Module]) -> dict:
    """The sharded state of all chunks; virtual stages hold different layers of the same keys."""
    return {
        str(index): chunk.module.sharded_state_dict(metadata={'singleton_local_shards': False})
        for index, chunk in enumerate(chunks)
    }


OWN = ('hyper_connection', 'stream_merge', 'dense_aggregates', '.engram.')


@torch.no_grad()
def randomise(chunks: list[torch.nn.Module]) -> None:
    """Give every parameter of ours a value that makes it matter."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in sorted(chunks[0].module.named_parameters()):
        if any(own in name for own in OWN):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * 0.1)


def batches(microbatches: int) -> list[torch.Tensor]:
    """This rank's microbatches; data-parallel ranks take them in turn, as one process would."""
    rank = parallel_state.get_data_parallel_rank()
    size = parallel_state.get_data_parallel_world_size()
    make = torch.Generator().manual_seed(3)
    tokens = [
        torch.randint(0, VOCABULARY, (1, SEQUENCE + 1), generator=make) for _ in range(microbatches)
    ]
    return tokens[rank::size]


def forward_step(iterator, model):
    tokens = next(iterator)
    positions = torch.arange(SEQUENCE).unsqueeze(0)
    output = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())

    def loss(output):
        mean = output.float().mean()
        return mean, {'loss': mean.detach().clone()}

    return output, loss


def run(case: dict, folder: pathlib.Path) -> dict:
    """One case; one with a schedule is run from a plan."""
    if case.get('combined'):
        engine.apply(COMBINED_PASSES_PATCHES)
        try:
            with counted_lanes() as counts:
                return {**step(case, folder), 'lanes': counts}
        finally:
            engine.revert(COMBINED_PASSES_PATCHES)
    if not case.get('schedule'):
        return step(case, folder)
    patches = schedule_patches(PipelineConfig(**case['schedule']))
    engine.apply(patches)
    try:
        with counted_activations() as held:
            result = step(case, folder)
    finally:
        engine.revert(patches)
        engine.apply(RESIDUAL_PATCHES)
    in_flight = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(in_flight, held[0] / (case['layout'].get('vpp') or 1))
    return {**result, 'in_flight': in_flight}


def step(case: dict, folder: pathlib.Path) -> dict:
    config, chunks = build(case)
    equal = copies_agree(chunks) and mirrors_agree(case, chunks)
    if case.get('initial'):
        save(weights(chunks), folder / case['name'])
        return {'next': draws(), 'equal_copies': equal}
    if case.get('reference'):
        randomise(chunks)
        save(weights(chunks), folder / case['weights'])
    else:
        state = dist_checkpointing.load(weights(chunks), str(folder / case['weights']))
        for index, chunk in enumerate(chunks):
            # Of a stage without layers nothing is stored.
            chunk.module.load_state_dict(state.get(str(index), {}))
    optimizer = make_optimizer(case, chunks)
    monitor = None
    if case.get('tokens'):
        alarm = MonitorConfig(interval=1, tokens=case['tokens'], alarm='warn')
        monitor = Monitor(chunks, alarm, lambda: 1)
    forward_only = case.get('forward_only', False)
    losses = passes(case, chunks, forward_only)
    report = {} if monitor is None else monitored(monitor, config.num_layers)
    gathered = [None] * torch.distributed.get_world_size()
    own = [entry['loss'].item() for entry in losses]
    first_of_tp = parallel_state.get_tensor_model_parallel_rank() == 0
    torch.distributed.all_gather_object(gathered, own if first_of_tp else [])
    grad_norm = None
    if not forward_only:
        if case.get('step'):
            optimizer.step()
            if case.get('gather'):
                # The next step gathers what this one has updated.
                passes(case, chunks, forward_only)
        else:
            grad_norm = gradients_as_weights(optimizer, chunks)
        save(weights(chunks), folder / case['name'])
    equal = equal and copies_agree(chunks) and mirrors_agree(case, chunks)
    for chunk in chunks:
        # Its hooks on the gradients of experts are in a cycle that the collector cannot see.
        chunk.__dict__.clear()
    return {'losses': gathered, 'grad_norm': grad_norm, 'report': report, 'equal_copies': equal}


def draws() -> list[int]:
    """What the generator of each rank gives next."""
    found = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, int(torch.randint(10**9, ())))
    return found


def copies_agree(chunks: list[torch.nn.Module]) -> bool:
    """Whether no rank holds unequal copies of the word embedding."""
    held = [c.module for c in chunks if c.module.pre_process or has_second_copy(c.module)]
    copies = [chunk.shared_embedding_or_output_weight() for chunk in held]
    agree = [True] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(agree, all(torch.equal(c, copies[0]) for c in copies))
    return all(agree)


def mirrors_agree(case: dict, chunks: list[torch.nn.Module]) -> bool:
    """Whether the two ranks that hold a stage each have it alike, where a schedule has two copies."""
    if case.get('schedule', {}).get('schedule') != 'dualpipe':
        return True
    own = [digests(chunk) for chunk in chunks]
    group = parallel_state.get_pipeline_model_parallel_group()
    found = [None] * group.size()
    torch.distributed.all_gather_object(found, own, group=group)
    return found == found[::-1]


def digests(chunk: torch.nn.Module) -> list[str]:
    return [
        hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()
        for parameter in chunk.parameters()
    ]


def make_optimizer(case: dict, chunks: list[torch.nn.Module]):
    config = OptimizerConfig(
        lr=1e-2,
        min_lr=1e-2,
        weight_decay=0.1,
        clip_grad=0.0,  # its norm is summed in shard order
        adam_eps=1e-8,
        use_distributed_optimizer=case.get('step') == 'dist',
        overlap_param_gather=bool(case.get('gather')),
    )
    return get_megatron_optimizer(config, chunks, get_standard_config_overrides(config))


def passes(case: dict, chunks: list[torch.nn.Module], forward_only: bool) -> list:
    mine = batches(case.get('microbatches', 4))[case.get('skipped', 0) :]
    for chunk in chunks:
        chunk.zero_grad_buffer()
        chunk.train()
    unset_num_microbatches_calculator()
    init_num_microbatches_calculator(0, None, len(mine), 1, 1)
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(mine) for _ in chunks],
        model=chunks,
        num_microbatches=len(mine),
        seq_length=SEQUENCE,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def monitored(monitor: Monitor, layers: int) -> dict:
    monitor.after_backward()
    found = gather(monitor, layers, 4, True, 1.0, get_num_microbatches())
    report = {name: values.tolist() for name, values in found.metrics.items()}
    report |= {'h-res': found.h_res.tolist(), 'composite': found.composite.tolist()}
    return report | {'pipeline-rank': found.pipeline_rank.tolist()}


@torch.no_grad()
def gradients_as_weights(optimizer, chunks: list[torch.nn.Module]) -> float:
    """Put them where they are saved; returns their norm."""
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    for chunk in chunks:
        for parameter in chunk.module.parameters():
            parameter.data.copy_(parameter.main_grad)
    return norm


def save(state: dict, path: pathlib.Path) -> None:
    if torch.distributed.get_rank() == 0:
        path.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(path))


def in_a_world_of_its_own(case: dict, folder: pathlib.Path, store: torch.distributed.Store) -> dict:
    """One case between making all process groups and leaving them, and the threads then left.

    Each group keeps threads of gloo's that wake a hundred times a second: those of dozens of cases
    would take the processors away from the work.
    """
    torch.distributed.init_process_group(
        'gloo', store=store, rank=int(os.environ['RANK']), world_size=int(os.environ['WORLD_SIZE'])
    )
    result = run(case, folder)
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    # Threads end with the last reference: models hold some in cycles, and Megatron remembers rotary
    # embeddings with their group.
    RotaryEmbedding.forward.cache_clear()
    gc.collect()
    return {**result, 'threads': psutil.Process().num_threads()}


def main() -> None:
    cases = json.loads(pathlib.Path(sys.argv[1]).read_text())
    folder = pathlib.Path(sys.argv[2])
    store, rank, world = next(torch.distributed.rendezvous('env://'))
    engine.apply(CPU_DEVICE_PATCHES)
    engine.apply(RESIDUAL_PATCHES)
    results = {}
    # What is there now stays; without its half a million objects each collection is quick.
    gc.freeze()
    for number, case in enumerate(cases):
        meeting = torch.distributed.PrefixStore(str(number), store)
        results[case['name']] = in_a_world_of_its_own(case, folder, meeting)
    if rank == 0:
        (folder / f'results-{world}.json').write_text(json.dumps(results))


if __name__ == '__main__':
    main()
