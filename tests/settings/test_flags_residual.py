"""The command line: flags, their resolution, and a one-line refusal for everything wrong."""

from __future__ import annotations

import argparse

import pytest
import torch
from launch import launch
from torch.distributed.checkpoint import FileSystemWriter, save

from megatron_mhc.checkpoints.check import check_checkpoint
from megatron_mhc.settings.flags_residual import residual_config_from_args
from megatron_mhc.settings.residual import ResidualConfig

MINIMAL = ['--num-layers', '2', '--hidden-size', '32', '--num-attention-heads', '4']


def test_standard_is_the_default_and_patches_nothing(parse):
    from megatron_mhc.patches import engine

    args = parse()
    assert args.residual_type == 'standard'
    assert not residual_config_from_args(args).enabled
    assert set(engine.applied()) & {'gpt-model', 'p2p', 'param-groups'} == set()


def test_defaults_are_the_papers(parse):
    args = parse('--residual-type', 'mhc')
    assert (args.mhc_num_residual_streams, args.mhc_sinkhorn_iterations) == (4, 20)
    assert (args.mhc_init_gating_factor, args.mhc_stream_merge) == (0.01, 'mean')
    assert parse('--residual-type', 'hc').mhc_stream_merge == 'sum'


def test_flags_reach_the_settings_and_survive_a_second_reading(parse):
    args = parse(
        *'--residual-type hc --mhc-num-residual-streams 2 --hc-variant static --hc-no-tanh'.split(),
        *'--mhc-fixed-mappings pre res --mhc-mapping-weight-decay off --seed 3'.split(),
        *'--mhc-mapping-lr-mult 0.5 --optimizer muon --mhc-mapping-optimizer scalar'.split(),
    )
    expected = ResidualConfig(
        residual_type='hc',
        num_residual_streams=2,
        hc_variant='static',
        hc_tanh=False,
        fixed_mappings=('pre', 'res'),
        mapping_weight_decay=False,
        mapping_lr_mult=0.5,
        mapping_optimizer='scalar',
        seed=3,
    )
    assert residual_config_from_args(args) == expected
    # Megatron saves the namespace with a checkpoint: plain values only.
    for name, value in vars(args).items():
        if name.startswith(('residual', 'mhc_', 'hc_')):
            assert isinstance(value, (str, int, float, bool, list, type(None))), name


@pytest.mark.parametrize(('given', 'value'), [('auto', 'auto'), ('stage', 'stage'), ('7', 7)])
def test_recompute_blocks_are_asked_for(parse, given, value):
    args = parse('--residual-type', 'mhc', '--mhc-recompute-layer-num', given)
    residual = residual_config_from_args(args)
    assert (residual.recompute_layer_num, residual.recompute_stream) == (value, 'compute')
    assert args.mhc_recompute_layer_num == value


def test_a_factor_other_than_the_optimizer_states_is_refused(parse, tmp_path, capsys):
    saved = write_checkpoint(tmp_path, residual_type='mhc', mhc_mapping_lr_mult=0.5)
    load = ('--load', saved, '--residual-type', 'mhc')
    parse(*load, '--mhc-mapping-lr-mult', '0.5')
    parse(*load, '--no-load-optim')
    parse(*load, '--finetune')
    for flags, said in (
        ((), '--mhc-mapping-lr-mult 1.0: the optimizer state in --load'),
        (('--mhc-mapping-lr-mult', '0.25'), '--mhc-mapping-lr-mult 0.25: the optimizer state'),
        (
            '--mhc-mapping-lr-mult 0.5 --optimizer muon --mhc-mapping-optimizer scalar'.split(),
            '--mhc-mapping-optimizer scalar: the optimizer state',
        ),
    ):
        with pytest.raises(SystemExit):
            parse(*load, *flags)
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and said in error


PP2 = '--pipeline-model-parallel-size 2'
VPP = f'{PP2} --num-layers-per-virtual-pipeline-stage 1'
MLP = '--recompute-granularity selective --recompute-modules mlp'
REFUSED = {
    '--residual-type residual': "argument --residual-type: invalid choice: 'residual'",
    '--residual-type mhc --mhc-num-residual-streams 0': '--mhc-num-residual-streams 0: wanted',
    '--residual-type mhc --mhc-num-residual-streams four': 'argument --mhc-num-residual-streams',
    '--residual-type mhc --mhc-sinkhorn-iterations 0': '--mhc-sinkhorn-iterations 0: wanted',
    '--residual-type mhc --mhc-init-gating-factor inf': '--mhc-init-gating-factor: inf: wanted',
    '--residual-type mhc --mhc-stream-merge max': 'argument --mhc-stream-merge: invalid choice',
    '--mhc-num-residual-streams 4': '--mhc-num-residual-streams has no effect with --residual-type '
    'standard',
    '--hc-no-tanh': '--hc-no-tanh has no effect',
    '--residual-type mhc --hc-variant static': '--hc-variant has no effect',
    '--residual-type hc --mhc-sinkhorn-iterations 5': '--mhc-sinkhorn-iterations has no effect',
    '--residual-type mhc --mhc-kernel-backend cuda': 'argument --mhc-kernel-backend: invalid',
    '--residual-type mhc --mhc-num-residual-streams 3 --mhc-kernel-backend triton': ''
    '--mhc-kernel-backend triton: the kernels are written for n in (1, 2, 4, 8) streams, not 3',
    '--residual-type mhc --mhc-projection-precision bf16x2': 'bf16x2: it needs bf16 streams',
    '--residual-type hc --mhc-projection-precision tf32': '--mhc-projection-precision has no',
    '--residual-type hc --mhc-no-edge-fusion': '--mhc-no-edge-fusion has no effect',
    '--residual-type hc --mhc-no-seam-fusion': '--mhc-no-edge-fusion has no effect',
    '--mhc-recompute-layer-num 4': '--mhc-recompute-layer-num has no effect with --residual-type',
    '--residual-type mhc --mhc-recompute-layer-num 0': '--mhc-recompute-layer-num 0: wanted none, ',
    '--residual-type mhc --mhc-recompute-layer-num -2': '--mhc-recompute-layer-num -2: wanted ',
    '--residual-type hc --mhc-recompute-layer-num all': '--mhc-recompute-layer-num: all: wanted ',
    '--residual-type mhc --mhc-recompute-stream compute': 'without --mhc-recompute-layer-num',
    '--residual-type mhc --mhc-recompute-layer-num auto --mhc-recompute-stream high': 'high has no '
    'effect with the stock schedules',
    '--residual-type mhc --mhc-mapping-lr-mult -1': '--mhc-mapping-lr-mult -1.0: wanted a finite',
    '--residual-type hc --mhc-mapping-lr-mult nan': '--mhc-mapping-lr-mult: nan: wanted a finite',
    '--mhc-mapping-lr-mult 1': '--mhc-mapping-lr-mult has no effect with --residual-type standard',
    '--residual-type mhc --mhc-mapping-optimizer scalar': '--mhc-mapping-optimizer scalar with '
    '--optimizer adam or sgd cannot be combined',
    '--residual-type mhc --mhc-mapping-optimizer scalar --optimizer muon --decoupled-lr 1': ''
    '--decoupled-lr with --mhc-mapping-optimizer scalar cannot be combined',
    '--residual-type mhc --mhc-cuda-graphs --cuda-graph-impl local '
    '--overlap-moe-expert-parallel-comm': 'passes hand over in Python',
    '--residual-type mhc --overlap-moe-expert-parallel-comm --delay-wgrad-compute': ''
    '--overlap-moe-expert-parallel-comm cannot be combined',
    '--residual-type mhc --cuda-graph-impl local': '--cuda-graph-impl',
    '--residual-type hc --cuda-graph-impl transformer_engine': '--cuda-graph-impl',
    '--residual-type mhc --cuda-graph-impl full_iteration': '--cuda-graph-impl',
    '--residual-type mhc --enable-cuda-graph': '--enable-cuda-graph',
    '--residual-type mhc --external-cuda-graph': '--enable-cuda-graph',
    '--residual-type mhc --inference-fuse-tp-communication': '--inference-fuse-tp-communication',
    '--residual-type mhc --fused-residual-rmsnorm': '--fused-residual-rmsnorm',
    f'--residual-type hc {MLP}': '--recompute-modules mlp without --disable-bias-linear',
    f'--residual-type mhc {MLP} --num-experts 2 --moe-layer-freq 2': 'recompute other modules',
    '--residual-type hc --cpu-offloading-num-layers 1': '--cpu-offloading-num-layers',
    '--residual-type mudd --transformer-impl local --fine-grained-activation-offloading': 'later layers still read',
    '--residual-type hc --transformer-impl inference_optimized': 'inference_optimized',
    '--residual-type mhc --use-torch-fsdp2': '--use-torch-fsdp2',
    '--residual-type mhc --yaml-cfg x.yaml': '--yaml-cfg cannot be combined',
    '--residual-type hc --hybrid-layer-pattern *x': "*x: 'x' is no layer of megatron-core",
    '--residual-type hc --hybrid-layer-pattern |': 'no layer; give one symbol for each',
    '--residual-type hc --hybrid-layer-pattern *-/*-/-*': 'repeat the first part',
    '--residual-type hc --hybrid-layer-pattern *-/*|-': "leave out '|'",
    '--residual-type hc --hybrid-layer-pattern *-/*-': '--position-embedding-type rope or none',
    '--residual-type hc --hybrid-layer-pattern *- --mtp-num-layers 1': "0 parts behind '/'",
    '--residual-type hc --hybrid-layer-pattern *- --mtp-hybrid-override-pattern *x '
    '--mtp-num-layers 2': "*-/*x/*x: 'x' is no layer",
    '--residual-type hc --hybrid-layer-pattern *-+': "one model has either '*' or latent",
    '--residual-type hc --hybrid-layer-pattern *-|*-': '2 stages do not divide over',
    f'--residual-type hc --hybrid-layer-pattern *-* {PP2}': '3 layers do not divide over',
    '--residual-type hc --hybrid-layer-pattern *-/*- --pipeline-model-parallel-layout Ett|mL '
    f'{PP2}': 'the pattern says itself which layers a stage has',
    f'--residual-type mhc --no-overlap-p2p-communication {VPP}': '--no-overlap-p2p-communication',
    f'--residual-type mhc --no-overlap-p2p-communication --hybrid-layer-pattern *|-|*|- {PP2}': ''
    '--no-overlap-p2p-communication',
}


@pytest.mark.parametrize('others', ['--disable-bias-linear', '--num-experts 2'])
def test_an_mlp_that_returns_no_bias_may_be_recomputed(parse, others):
    assert parse(*f'--residual-type mhc {MLP} {others}'.split()).recompute_modules == ['mlp']


@pytest.mark.parametrize('flags', REFUSED)
def test_refusals_are_one_line_and_name_the_flag(refused, flags):
    assert REFUSED[flags] in refused(flags)


@pytest.mark.parametrize(('local_rank', 'said'), [('0', 1), ('3', 0)])
def test_other_ranks_wait_for_the_first_to_say_why(monkeypatch, capsys, local_rank, said):
    """torchrun ends the first rank as soon as another one has gone."""
    from megatron_mhc.inputs import refusal

    waited = []
    monkeypatch.setattr(refusal.time, 'sleep', waited.append)
    monkeypatch.setenv('RANK', '11')
    monkeypatch.setenv('LOCAL_RANK', local_rank)
    with pytest.raises(SystemExit) as stopped:
        refusal.refuse('pretrain', 'no')
    assert stopped.value.code == 2 and waited == [refusal.PATIENCE]
    assert capsys.readouterr().err == said * 'pretrain: error on rank 11: no\n'


def test_kernels_are_announced_once_with_the_reason(parse, capsys):
    from megatron_mhc.inputs import refusal

    refusal.announce.cache_clear()
    parse('--residual-type', 'mhc', '--bf16')
    parse('--residual-type', 'mhc', '--bf16')
    parse('--residual-type', 'hc', '--mhc-kernel-backend', 'torch')
    parse('--residual-type', 'standard')
    lines = [line for line in capsys.readouterr().out.splitlines() if 'reference' in line]
    if torch.cuda.is_available():
        lines.insert(0, '')
    else:
        assert lines[0] == (
            '[megatron-mhc] read, write, write_read (bfloat16, n = 4): torch reference, because '
            'the streams are on the CPU'
        )
    assert lines[1:] == [
        '[megatron-mhc] pre, post_res (float32, n = 4): torch reference, as --mhc-kernel-backend '
        'torch asks'
    ]


def test_other_flags_keep_megatrons_own_errors(parse, capsys):
    with pytest.raises(SystemExit):
        parse('--num-layers', 'many')
    assert 'usage: pretrain' in capsys.readouterr().err


def test_a_misspelt_flag_of_ours_is_refused_even_where_unknown_ones_pass(parse, capsys):
    from megatron.training import arguments

    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(prog='pretrain'))
    parser.allow_abbrev = False
    assert parser.parse_known_args([*MINIMAL, '--my-own-flag'])[1] == ['--my-own-flag']
    with pytest.raises(SystemExit):
        parser.parse_known_args([*MINIMAL, '--mhc-streams', '4'])
    assert 'argument --mhc-streams: no such flag' in capsys.readouterr().err


def write_checkpoint(folder, **saved):
    if saved.get('residual_type') == 'mhc':
        saved.setdefault('mhc_norm_eps', 1e-6)
    (folder / 'iter_0000010').mkdir(parents=True)
    (folder / 'latest_checkpointed_iteration.txt').write_text('10')
    writer = FileSystemWriter(folder / 'iter_0000010')
    save({'weight': torch.ones(2)}, storage_writer=writer, no_dist=True)
    torch.save({'args': argparse.Namespace(**saved)}, folder / 'iter_0000010' / 'common.pt')
    (folder / 'iter_0000010' / 'metadata.json').write_text(
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",'
        ' "common_backend_version": 1}'
    )
    return str(folder)


def test_a_checkpoint_of_another_topology_is_refused(parse, tmp_path, capsys):
    standard = write_checkpoint(tmp_path / 'standard', num_layers=2)
    four = write_checkpoint(tmp_path / 'mhc', residual_type='mhc', mhc_num_residual_streams=4)
    theirs = write_checkpoint(
        tmp_path / 'theirs', enable_mhc_connections=True, mhc_num_residual_streams=4
    )
    off = write_checkpoint(
        tmp_path / 'off', enable_mhc_connections=False, mhc_num_residual_streams=4
    )
    untracked = write_checkpoint(tmp_path / 'untracked', residual_type='hc')
    (tmp_path / 'untracked' / 'latest_checkpointed_iteration.txt').unlink()
    parse('--load', standard)
    parse('--load', off)
    parse('--load', untracked)
    parse('--load', four, '--residual-type', 'mhc', '--mhc-init-gating-factor', '0.1')
    parse('--load', str(tmp_path / 'none'), '--residual-type', 'mhc')
    (tmp_path / 'per-rank' / 'iter_0000010' / 'mp_rank_00').mkdir(parents=True)
    (tmp_path / 'per-rank' / 'latest_checkpointed_iteration.txt').write_text('10')
    torch.save(
        {'args': argparse.Namespace(residual_type='hc'), 'model': torch.zeros(8)},
        tmp_path / 'per-rank' / 'iter_0000010' / 'mp_rank_00' / 'model_optim_rng.pt',
    )
    parse('--load', str(tmp_path / 'per-rank'), '--residual-type', 'hc')
    for flags in (
        ('--load', str(tmp_path / 'per-rank')),
        ('--load', standard, '--residual-type', 'mhc'),
        ('--load', four),
        ('--load', four, '--residual-type', 'hc'),
        ('--load', four, '--residual-type', 'mhc', '--mhc-num-residual-streams', '2'),
        ('--load', four, '--residual-type', 'mhc', '--mhc-sinkhorn-iterations', '30'),
        ('--load', four, '--ckpt-step', '10'),
        ('--load', untracked, '--ckpt-step', '10'),
        ('--load', theirs),
        ('--load', theirs, '--residual-type', 'mhc'),
        ('--pretrained-checkpoint', standard, '--residual-type', 'mhc'),
    ):
        with pytest.raises(SystemExit):
            parse(*flags)
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and 'the checkpoint was trained with' in error


def test_a_checkpoint_keeps_its_norm_eps(parse, refused):
    """Resolved into what is saved; one from before the flag was trained with the paper's."""
    saved = parse('--residual-type', 'mhc')
    assert saved.mhc_norm_eps == 1e-6
    old = argparse.Namespace(**vars(saved))
    del old.mhc_norm_eps
    default, paper = ResidualConfig(), ResidualConfig(norm_eps=1e-20)
    check_checkpoint(saved, default, 'runs')
    check_checkpoint(old, paper, 'runs')
    for stored, run, remedy in ((saved, paper, '1e-06'), (old, default, '1e-20')):
        with pytest.raises(ValueError, match=f'go on with --mhc-norm-eps {remedy}'):
            check_checkpoint(stored, run, 'runs')
    standard = argparse.Namespace(residual_type='standard')
    with pytest.raises(ValueError, match='convert runs NEW --to mhc --mhc-norm-eps 1e-20`'):
        check_checkpoint(standard, paper, 'runs')
    # The maps of hc have the eps of the model, its learned merge does not.
    hc = argparse.Namespace(residual_type='hc')
    check_checkpoint(hc, ResidualConfig('hc'), 'runs')
    hc.mhc_stream_merge = 'learned'
    check_checkpoint(hc, ResidualConfig('hc', stream_merge='learned', norm_eps=1e-20), 'runs')
    with pytest.raises(ValueError, match='go on with --mhc-norm-eps 1e-20'):
        check_checkpoint(hc, ResidualConfig('hc', stream_merge='learned'), 'runs')
    for value in ('nan', 'inf', '0', '-1e-6', '1e-40'):
        assert '--mhc-norm-eps' in refused(f'--residual-type mhc --mhc-norm-eps={value}')
    assert '--norm-epsilon' in refused('--residual-type hc --mhc-norm-eps 1e-8')
    for value in (True, '1e-6'):
        with pytest.raises(ValueError, match='--mhc-norm-eps'):
            ResidualConfig(norm_eps=value)


def test_launcher_help_needs_no_megatron():
    blocked = (
        'import sys; sys.modules["megatron"] = sys.modules["triton"] = None\n'
        'from megatron_mhc.run import main; main(["--help"])'
    )
    done = launch(0, '-c', blocked)
    assert done.returncode == 0, done.stderr
    for text in ('--device', '--residual-type', '--mhc-num-residual-streams', 'default: 20'):
        assert text in done.stdout
    for text in ('--engram-layers', '--pipeline-schedule', '--lr-step-rates', '--mhc-monitor'):
        assert text in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason='a real device is left to its script')
@pytest.mark.parametrize(('end', 'status'), [('', 0), ('\nraise SystemExit(3)', 3)])
def test_launcher_leaves_the_process_groups_at_the_end(tmp_path, end, status):
    """A thread of gloo's may otherwise abort a run that is done, as the interpreter exits."""
    script = tmp_path / 'script.py'
    script.write_text(
        'import torch\n'
        "torch.distributed.init_process_group('gloo')\n"
        'print(torch.distributed.is_initialized())' + end
    )
    done = launch(
        0,
        '-c',
        'import atexit, torch\n'
        'atexit.register(lambda: print(torch.distributed.is_initialized()))\n'
        f'from megatron_mhc.run import main; main([{str(script)!r}])',
    )
    assert done.returncode == status, done.stderr
    assert done.stdout.split()[-2:] == ['True', 'False']


def test_launcher_names_what_is_missing(tmp_path):
    done = launch(0, '-c', 'from megatron_mhc.run import main; main(["no_such_script.py"])')
    assert done.returncode == 2 and 'SCRIPT no_such_script.py: no such file' in done.stderr
    script = tmp_path / 'script.py'
    script.write_text('')
    code = f'from megatron_mhc.run import main; main(["--device", "cuda", {str(script)!r}])'
    if not torch.cuda.is_available():
        assert '--device cuda: torch sees no CUDA device' in launch(0, '-c', code).stderr


@pytest.mark.parametrize(
    ('module', 'name'), [('gpt.gpt_model', 'GPTModel'), ('hybrid.hybrid_model', 'HybridModel')]
)
def test_adaptor_after_a_model_was_built_is_refused(module, name):
    done = launch(
        0,
        '-c',
        f'from megatron.core.models.{module} import {name} as Model\n'
        'model = Model.__new__(Model)\n'
        'import megatron_mhc.adaptor',
    )
    assert done.returncode != 0
    assert f'RuntimeError: a {name} exists already' in done.stderr


def test_adaptor_after_arguments_were_parsed_is_refused():
    done = launch(
        0,
        '-c',
        'from megatron.training import global_vars\n'
        'global_vars._GLOBAL_ARGS = object()\n'
        'import megatron_mhc.adaptor',
    )
    assert 'RuntimeError: Megatron has parsed its arguments' in done.stderr


def test_an_unsupported_core_is_refused(monkeypatch):
    from megatron_mhc import compat

    refused = {None: 'not installed', '0.16.1': '>=0.17,<0.20', '0.20.0': 'outside'}
    for version, message in refused.items():
        monkeypatch.setattr(compat, 'core_version', lambda version=version: version)
        with pytest.raises(RuntimeError, match=message):
            compat.require_supported_core()


@pytest.mark.parametrize('address', [None, 'node001'])
@pytest.mark.parametrize('variable', ['SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'])
def test_tasks_without_a_world_are_refused(variable, address, monkeypatch, tmp_path, capsys):
    """Each task would otherwise train alone and write the same checkpoint.

    Many batch scripts export MASTER_ADDR, which says where ranks meet and not how many.
    """
    from megatron_mhc.run import main

    for name in ('WORLD_SIZE', 'MASTER_ADDR', 'RANK'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, '2')
    if address is not None:
        monkeypatch.setenv('MASTER_ADDR', address)
    (tmp_path / 'script.py').write_text('')
    with pytest.raises(SystemExit):
        main([str(tmp_path / 'script.py')])
    assert f'{variable}=2 but WORLD_SIZE is not set' in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason='the refusal is about nodes without CUDA')
def test_one_node_without_cuda_does_not_join_the_others(monkeypatch):
    from megatron_mhc import bootstrap

    monkeypatch.setattr(bootstrap, '_require_early', lambda: None)
    monkeypatch.setenv('WORLD_SIZE', '16')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '8')
    with pytest.raises(RuntimeError, match='torch sees no CUDA device on .*--device cpu'):
        bootstrap.prepare('auto')


def test_quick_start_flags_for_gpus_need_no_optional_package(parse):
    """Megatron's config refuses fusions of packages that are not there."""
    import importlib.util
    import pathlib

    from megatron.training.arguments import core_transformer_config_from_args, validate_args

    path = pathlib.Path(__file__).parents[2] / 'tools' / 'quickstart_flags.py'
    spec = importlib.util.spec_from_file_location('quickstart_flags', path)
    flags = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flags)
    processes, parallel = flags.parallel(1)
    args = parse(*flags.MODEL, *flags.OPTIMIZER, *parallel, '--train-iters', '2')
    args.rank, args.world_size, args.padded_vocab_size = 0, processes, 256
    validate_args(args)
    config = core_transformer_config_from_args(args)
    assert not (config.apply_rope_fusion or config.masked_softmax_fusion)
    assert config.bf16 and not config.gradient_accumulation_fusion
