"""What a run says at its start of a checkpoint folder that it cannot, or should not, load."""

from __future__ import annotations

import argparse
import json
import pathlib
import pickle
import shutil
from collections import OrderedDict

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

FLAGS = '--residual-type mhc --mhc-kernel-backend torch --transformer-impl local'
TRACKER = 'latest_checkpointed_iteration.txt'
ARGS = {
    'residual_type': 'mhc',
    'mhc_num_residual_streams': 4,
    'mhc_norm_eps': 1e-6,
    'mhc_sinkhorn_iterations': 20,
    'mhc_stream_merge': 'mean',
    'num_layers': 2,
    'hidden_size': 32,
    'tensor_model_parallel_size': 1,
    'pipeline_model_parallel_size': 1,
    'expert_model_parallel_size': 1,
    'transformer_impl': 'local',
}
NAMED = argparse.Namespace(**ARGS)


class Planted:
    """Runs code of the author of a checkpoint as it is unpickled: touches a file."""

    def __init__(self, sentinel: pathlib.Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return pathlib.Path.touch, (self.sentinel,)


def write_one(root: pathlib.Path, name: str = 'mp_rank_00', chunks=('model',), **values) -> None:
    """Of the ``torch`` format, a file of one rank."""
    file = root / 'iter_0000003' / name / 'model_optim_rng.pt'
    file.parent.mkdir(parents=True, exist_ok=True)
    model = {key: OrderedDict(a=torch.ones(2)) for key in chunks}
    args = argparse.Namespace(**{**ARGS, **values})
    torch.save({'args': args, 'iteration': 3, 'checkpoint_version': 3.0, **model}, file)
    (root / TRACKER).write_text('3')


def write_distributed(root: pathlib.Path, state: object = None) -> None:
    """Of the ``torch_dist`` format, with ``common.pt`` as releases before 0.19 have it."""
    folder = root / 'iter_0000003'
    folder.mkdir(parents=True)
    tensors = {'decoder.layers.mlp.linear_fc1.weight': torch.ones(2, 8, 4)}
    save(tensors, storage_writer=FileSystemWriter(folder), no_dist=True)
    torch.save({'args': NAMED, 'iteration': 3} if state is None else state, folder / 'common.pt')
    config = {'sharded_backend': 'torch_dist', 'sharded_backend_version': 1}
    (folder / 'metadata.json').write_text(json.dumps(config))
    (root / TRACKER).write_text('3')


@pytest.fixture
def both(tmp_path) -> tuple[pathlib.Path, pathlib.Path]:
    """A checkpoint of either format."""
    write_one(tmp_path / 'one')
    write_distributed(tmp_path / 'dist')
    return tmp_path / 'one', tmp_path / 'dist'


TRACKERS = {
    '': "holds ''",
    'garbage': "holds 'garbage'",
    '../../..': "holds '../../..'",
    '-5': "holds '-5'",
    '3.0': "holds '3.0'",
    '9': 'iter_0000009, which is not there; it has iter_0000003',
    'release': 'names release, which is not there',
}


@pytest.mark.parametrize('written', TRACKERS)
def test_tracker_files(both, refused, written):
    for root in both:
        (root / TRACKER).write_text(written)
        said = refused(f'{FLAGS} --load {root}')
        assert f'--load {root}: ' in said and TRACKERS[written] in said


def test_a_binary_tracker_file_and_a_folder_in_its_place(both, parse, refused):
    (both[0] / TRACKER).write_bytes(b'\xff\xfe3')
    assert 'wanted is an iteration' in refused(f'{FLAGS} --load {both[0]}')
    (both[1] / TRACKER).unlink()
    (both[1] / TRACKER).mkdir()
    # As Megatron has it: no tracker file, no checkpoint.
    assert parse(*f'{FLAGS} --load {both[1]}'.split()).load


def test_steps(both, parse, refused, tmp_path):
    for root in both:
        assert '--ckpt-step -5: iterations' in refused(f'{FLAGS} --load {root} --ckpt-step -5')
        said = refused(f'{FLAGS} --load {root} --ckpt-step 7')
        assert '--ckpt-step 7 names iter_0000007, which is not there; it has iter_0000003' in said
        (root / TRACKER).write_text('9')
        assert parse(*f'{FLAGS} --load {root} --ckpt-step 3'.split()).ckpt_step == 3
    # A folder without a tracker file starts from scratch, as Megatron says; without a folder too.
    (tmp_path / 'empty').mkdir()
    for name in ('empty', 'absent'):
        assert parse(*f'{FLAGS} --load {tmp_path / name}'.split()).load
        said = refused(f'{FLAGS} --load {tmp_path / name} --ckpt-step 3')
        assert 'it has no iteration' in said


def test_what_is_no_checkpoint(both, refused, tmp_path):
    file = tmp_path / 'file'
    file.write_text('3')
    assert f'--load {file}: it is a file' in refused(f'{FLAGS} --load {file}')
    empty = tmp_path / 'empty'
    (empty / 'iter_0000003').mkdir(parents=True)
    (empty / TRACKER).write_text('3')
    assert 'holds no checkpoint' in refused(f'{FLAGS} --load {empty}')
    write_one(tmp_path / 'weightless', chunks=())
    assert 'has no "model"' in refused(f'{FLAGS} --load {tmp_path / "weightless"}')
    said = refused(f'{FLAGS} --pretrained-checkpoint {tmp_path / "nowhere"}')
    assert f'--pretrained-checkpoint {tmp_path / "nowhere"}: there is no {TRACKER}' in said


DAMAGE = {
    'metadata.json': (lambda f: (f / 'metadata.json').write_text('{'), 'metadata.json cannot be'),
    'metadata.json, a list': (
        lambda f: (f / 'metadata.json').write_text('[]'),
        'metadata.json cannot be read (TypeError',
    ),
    '.metadata gone': (lambda f: (f / '.metadata').unlink(), 'has no .metadata'),
    '.metadata cut': (lambda f: cut(f / '.metadata'), '.metadata cannot be read'),
    '.metadata empty': (lambda f: (f / '.metadata').write_bytes(b''), '.metadata cannot be read'),
    '.metadata of another kind': (
        lambda f: (f / '.metadata').write_bytes(pickle.dumps([1, 2])),
        '.metadata',
    ),
    'data gone': (lambda f: next(f.glob('*.distcp')).unlink(), 'distcp, which is not there'),
    'data cut': (lambda f: cut(next(f.glob('*.distcp'))), 'bytes where it lists'),
    'common.pt gone': (lambda f: (f / 'common.pt').unlink(), 'neither common.pt'),
    'common.pt cut': (lambda f: cut(f / 'common.pt'), 'common.pt cannot be read'),
    'common.pt empty': (lambda f: (f / 'common.pt').write_bytes(b''), 'common.pt cannot be read'),
    'common.pt flipped': (lambda f: flip(f / 'common.pt'), 'is damaged: the checksum'),
}


def cut(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: pathlib.Path) -> None:
    """A bit of a word that is in the arguments."""
    data = file.read_bytes()
    where = data.index(b'residual_type')
    file.write_bytes(data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :])


@pytest.mark.parametrize('case', DAMAGE)
def test_damaged_distributed_checkpoints(both, refused, case):
    damage, message = DAMAGE[case]
    damage(both[1] / 'iter_0000003')
    said = refused(f'{FLAGS} --load {both[1]}')
    assert f'--load {both[1]}: ' in said and message in said


def test_only_the_first_rank_looks_at_the_length_of_every_file(both, parse, refused, monkeypatch):
    """Thousands of ranks share a file system; one that is gone is seen in its folder's listing."""
    file = next((both[1] / 'iter_0000003').glob('*.distcp'))
    cut(file)
    monkeypatch.setattr('megatron_mhc.checkpoints.check.is_first_rank', lambda: False)
    assert parse(*f'{FLAGS} --load {both[1]}'.split()).load
    file.unlink()
    assert 'which is not there' in refused(f'{FLAGS} --load {both[1]}')


def test_one_rank_of_a_node_reads_the_checkpoint(both, parse, refused, monkeypatch):
    """What it refuses ends the others of its node."""
    cut(both[1] / 'iter_0000003' / '.metadata')
    monkeypatch.setenv('RANK', '11')
    monkeypatch.setenv('LOCAL_RANK', '3')
    assert parse(*f'{FLAGS} --load {both[1]}'.split()).load
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setattr('megatron_mhc.inputs.refusal.PATIENCE', 0)
    with pytest.raises(SystemExit):
        parse(*f'{FLAGS} --load {both[1]}'.split())


def test_damaged_files(both, refused):
    file = both[0] / 'iter_0000003' / 'mp_rank_00' / 'model_optim_rng.pt'
    whole = file.read_bytes()
    for part in (0, 1, len(whole) // 2, len(whole) - 9):
        file.write_bytes(whole[:part])
        assert 'model_optim_rng.pt cannot be read' in refused(f'{FLAGS} --load {both[0]}')


@pytest.mark.parametrize('value', [None, {'num_layers': 2}, 'arguments', 3, [NAMED]])
def test_arguments_of_another_type(refused, tmp_path, value):
    write_distributed(tmp_path / 'dist', {'args': value, 'iteration': 3})
    file = tmp_path / 'one' / 'iter_0000003' / 'mp_rank_00' / 'model_optim_rng.pt'
    write_one(tmp_path / 'one')
    torch.save({'args': value, 'model': {}}, file)
    for name in ('dist', 'one'):
        for flags in (FLAGS, ''):
            said = refused(f'{flags} --load {tmp_path / name}')
            assert f'saved arguments are a {type(value).__name__}' in said


def test_arguments_that_are_absent(parse, refused, tmp_path):
    """A standard run loads such a checkpoint, as in stock Megatron."""
    write_distributed(tmp_path / 'dist', {'iteration': 3})
    assert 'has no saved arguments' in refused(f'{FLAGS} --load {tmp_path / "dist"}')
    assert parse('--load', str(tmp_path / 'dist')).load
    for number, state in enumerate(([1], 'text', None)):
        root = tmp_path / str(number)
        write_one(root)
        torch.save(state, root / 'iter_0000003' / 'mp_rank_00' / 'model_optim_rng.pt')
        assert 'and no checkpoint of Megatron' in refused(f'--load {root}')


def test_arguments_of_no_sense(refused, tmp_path):
    for number, values in enumerate(
        ({'mhc_num_residual_streams': 'x'}, {'residual_type': 7}, {'mhc_fixed_mappings': 3})
    ):
        write_one(tmp_path / str(number), **values)
        said = refused(f'{FLAGS} --load {tmp_path / str(number)}')
        assert f'--load {tmp_path / str(number)}: its saved arguments cannot be' in said


@pytest.mark.parametrize('flags', [FLAGS, '', '--finetune'])
def test_no_code_of_a_checkpoint_runs(both, refused, tmp_path, flags):
    """Planted in each file in turn, and reached through every flag that names a checkpoint."""
    sentinel = tmp_path / 'ran'
    planted = Planted(sentinel)
    file = both[0] / 'iter_0000003' / 'mp_rank_00' / 'model_optim_rng.pt'
    torch.save({'args': argparse.Namespace(a=planted), 'model': {}}, file)
    folder = both[1] / 'iter_0000003'
    other = shutil.copytree(both[1], tmp_path / 'other')
    torch.save({'args': NAMED, 'iteration': planted}, folder / 'common.pt')
    (other / 'iter_0000003' / '.metadata').write_bytes(pickle.dumps(planted))
    bare = tmp_path / 'bare'
    shutil.copytree(both[0], bare)
    (bare / 'iter_0000003' / 'mp_rank_00' / 'model_optim_rng.pt').write_bytes(pickle.dumps(planted))
    apart = '--non-persistent-ckpt-type global --non-persistent-global-ckpt-dir'
    good = tmp_path / 'good'
    write_distributed(good)
    shutil.copytree(both[1], good / 'non_persistent')
    residual = flags.replace('--finetune', '')
    for root in (both[0], both[1], other, bare):
        for way in (
            f'--load {root}',
            f'--load {root} --ckpt-step 3',
            f'--pretrained-checkpoint {root}',
            f'--load {root} --use-checkpoint-args',
            f'--load {good} {apart} {root}' if residual else f'--load {root}',
        ):
            said = refused(f'{flags} {way}')
            assert 'holds more than plain values' in said or 'cannot be read' in said
            assert 'add_safe_globals' not in said
    if residual:
        said = refused(f'{flags} --load {good} --non-persistent-ckpt-type global')
        assert 'holds more than plain values' in said
    assert not sentinel.exists()


PLACED = {
    'more chunks': (
        {},
        '--pipeline-model-parallel-size 1 --num-virtual-stages-per-pipeline-rank 2',
        'saved with virtual pipeline stages 1, but this run has 2',
    ),
    'fewer chunks': ({'chunks': ('model0', 'model1')}, '', 'virtual pipeline stages 2, but'),
    'more ranks': (
        {},
        '--tensor-model-parallel-size 2',
        '--tensor-model-parallel-size 1, but this run has 2',
    ),
    'fewer ranks': (
        {'pipeline_model_parallel_size': 2},
        '',
        '--pipeline-model-parallel-size 2, but this run has 1',
    ),
    'another layout': (
        {'pipeline_model_parallel_size': 2, 'pipeline_model_parallel_layout': 'Et|tL'},
        '--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout E|ttL',
        'saved with --pipeline-model-parallel-layout Et|tL',
    ),
    'files that are gone': (
        {'tensor_model_parallel_size': 2},
        '--tensor-model-parallel-size 2',
        'has no mp_rank_01/model_optim_rng.pt',
    ),
    'other names': (
        {'transformer_impl': 'transformer_engine'},
        '--transformer-impl local',
        '--transformer-impl transformer_engine, but',
    ),
    'prediction layers': (
        {'hybrid_layer_pattern': '*-'},
        '--hybrid-layer-pattern *-/*- --position-embedding-type rope',
        '--hybrid-layer-pattern *-, but this run has *-/*-',
    ),
    'a bias': ({'add_bias_linear': False}, '', '--add-bias-linear False, but this run has True'),
    'positions': (
        {'position_embedding_type': 'rope'},
        '',
        '--position-embedding-type rope, but this run has learned_absolute',
    ),
}


@pytest.mark.parametrize('case', PLACED)
@pytest.mark.parametrize('residual', [FLAGS, ''])
def test_files_that_would_leave_weights_untouched(refused, tmp_path, case, residual):
    values, flags, message = PLACED[case]
    values = (
        {}
        if residual
        else {'residual_type': 'standard'}
        | {name: None for name in ARGS if name.startswith('mhc_')}
    )
    write_one(tmp_path / 'one', **values, **PLACED[case][0])
    said = refused(f'{residual} --transformer-impl local {flags} --load {tmp_path / "one"}')
    assert 'torch on disk' in said or 'has no mp_rank' in said
    assert message in said


def test_a_v_loads_no_numbered_chunks(refused, tmp_path):
    """Whatever the flag says: the files tell."""
    for chunks in (('model',), ('model0', 'model1')):
        root = tmp_path / chunks[-1]
        for rank in range(2):
            write_one(root, f'mp_rank_00_{rank:03d}', chunks, pipeline_model_parallel_size=2)
        said = refused(
            f'{FLAGS} --pipeline-model-parallel-size 2 --pipeline-schedule dualpipev '
            f'--micro-batch-size 1 --global-batch-size 8 --load {root}'
        )
        assert 'of the format torch on disk' in said and '--ckpt-convert-format torch_dist' in said


def test_a_flag_that_contradicts_the_disk(parse, refused, both):
    said = refused(f'{FLAGS} --load {both[1]} --ckpt-format torch')
    assert 'of the format torch_dist on disk; add --auto-detect-ckpt-format' in said
    accepted = f'{FLAGS} --load {both[1]} --ckpt-format torch --auto-detect-ckpt-format'
    assert parse(*accepted.split()).load


def test_the_same_layout_is_accepted(parse, tmp_path):
    write_one(tmp_path / 'one')
    assert parse(*f'{FLAGS} --load {tmp_path / "one"}'.split()).load
    chunks = ('model0', 'model1')
    for rank in range(2):
        write_one(
            tmp_path / 'vpp', f'mp_rank_00_{rank:03d}', chunks, pipeline_model_parallel_size=2
        )
    ranks = '--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2'
    assert parse(*f'{FLAGS} {ranks} --load {tmp_path / "vpp"}'.split()).load
