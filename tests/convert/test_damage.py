"""Sources that lack something, damaged ones, and every way in which Megatron reads an output."""

from __future__ import annotations

import pathlib
import pickle
import re
import shutil

import pytest
import torch
from launch import launch

from megatron_mhc.convert import complete, worker
from megatron_mhc.convert.conversion import convert
from megatron_mhc.convert.source import open_source

ROOT = pathlib.Path(__file__).parents[2]
MODEL = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --position-embedding-type rope --transformer-impl local
    --tokenizer-type NullTokenizer --vocab-size 256 --untie-embeddings-and-output-weights
    --swiglu --normalization RMSNorm
""".split()
# A dense layer, one of experts, and one of prediction, with latent attention: as DeepSeek-V3.
EXPERTS = """
    --num-experts 4 --moe-layer-freq ([0]+[1]) --moe-router-topk 2 --moe-ffn-hidden-size 16
    --moe-shared-expert-intermediate-size 16 --moe-router-score-function sigmoid
    --moe-router-enable-expert-bias --moe-router-load-balancing-type none
    --moe-token-dispatcher-type alltoall --disable-bias-linear --mtp-num-layers 1
    --multi-latent-attention --q-lora-rank 16 --kv-lora-rank 8 --qk-head-dim 8
    --qk-pos-emb-head-dim 4 --v-head-dim 8 --qk-layernorm --rope-type rope --no-rope-fusion
""".split()
KINDS = """
    .experts.linear_fc1.weight .experts.linear_fc2.weight .router.weight .router.expert_bias
    .shared_experts.linear_fc1.weight .shared_experts.linear_fc2.weight
    .linear_q_down_proj.weight .linear_q_up_proj.weight .linear_kv_down_proj.weight
    .linear_kv_up_proj.weight .q_layernorm.weight .kv_layernorm.weight
    mtp.layers.0.eh_proj.weight mtp.layers.0.enorm.weight mtp.layers.0.hnorm.weight
""".split()
TRAINING = """
    --micro-batch-size 1 --global-batch-size 4 --mock-data --split 98,1,1 --num-workers 0 --lr 1e-2
    --eval-iters 1 --eval-interval 100 --log-interval 1
""".split()
ITERATION = 'iter_0000002'


def run(script: str, *flags: object) -> str:
    done = launch(0, '-m', 'megatron_mhc.run', ROOT / 'examples' / script, *flags)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope='module', params=['torch_dist', 'torch'])
def saved(request, tmp_path_factory) -> pathlib.Path:
    """Two steps of a standard model."""
    disk, _, more = request.param.partition(' ')
    folder = tmp_path_factory.mktemp(disk) / 'run'
    flags = ('--train-iters', 2, '--save', folder, '--save-interval', 2, '--ckpt-format', disk)
    run('pretrain_gpt.py', *MODEL, *(EXPERTS if more else ()), *TRAINING, *flags)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> pathlib.Path:
    """A copy to be damaged: the folder of its iteration."""
    return shutil.copytree(saved, tmp_path / 'copy') / ITERATION


def is_distributed(folder: pathlib.Path) -> bool:
    return (folder / '.metadata').exists()


def edit(folder: pathlib.Path, change) -> None:
    """``change(metadata)`` of a distributed checkpoint, which is ours, so that pickle may read."""
    metadata = pickle.loads((folder / '.metadata').read_bytes())
    change(metadata)
    (folder / '.metadata').write_bytes(pickle.dumps(metadata))


def refused(folder: pathlib.Path, message: str) -> None:
    new = folder.parent.parent / 'new'
    with pytest.raises(ValueError, match=message) as said:
        convert(folder.parent, new)
    assert '\n' not in str(said.value) and not new.exists()


@pytest.mark.parametrize('saved', ['torch_dist', 'torch', 'torch_dist experts'], indirect=True)
def test_every_weight_must_be_there(copy, request):
    """Each name in turn: any one of them is called missing; none is trained without."""
    names = [name for name, entry in open_source(copy).entries.items() if entry.shape is not None]
    assert len(names) > 10
    file = copy / 'mp_rank_00' / 'model_optim_rng.pt'
    distributed = is_distributed(copy)
    whole = (copy / '.metadata' if distributed else file).read_bytes()
    for name in names:
        if distributed:
            (copy / '.metadata').write_bytes(whole)
            edit(copy, lambda metadata, name=name: metadata.state_dict_metadata.pop(name))
        else:
            file.write_bytes(whole)
            state = torch.load(file, weights_only=False)
            del state['model'][name]
            torch.save(state, file)
        refused(copy, f'{re.escape(name)} is missing')
    if 'experts' in request.node.name:
        assert all(any(kind in name for name in names) for kind in KINDS)
    (copy / '.metadata' if distributed else file).write_bytes(whole)
    assert convert(copy.parent, copy.parent.parent / 'new').carried >= len(names)


def recorded_as(metadata, name: str, dtype: torch.dtype) -> None:
    entry = metadata.state_dict_metadata[name]
    properties = entry.properties
    metadata.state_dict_metadata[name] = type(entry)(
        type(properties)(dtype=dtype), entry.size, entry.chunks
    )


# A file of the other format has whole tensors.
@pytest.mark.parametrize('saved', ['torch_dist'], indirect=True)
def test_parts_shapes_and_dtypes(saved, tmp_path):
    name = 'decoder.layers.mlp.linear_fc1.weight'

    def part_gone(metadata):
        del metadata.state_dict_metadata[name].chunks[0]

    def part_twice(metadata):
        chunks = metadata.state_dict_metadata[name].chunks
        chunks[0] = chunks[1]

    def smaller(metadata):
        entry = metadata.state_dict_metadata[name]
        entry.size = torch.Size([1, *entry.size[1:]])
        entry.chunks[:] = [chunk for chunk in entry.chunks if chunk.offsets[0] == 0]

    changes = {
        'parts of it are missing': part_gone,
        'overlap': part_twice,
        'has shape .* where its model has': smaller,
        'recorded as torch.int32 where': lambda m: recorded_as(m, name, torch.int32),
        'recorded as torch.float64': lambda m: recorded_as(m, name, torch.float64),
        'a file outside of its folder': lambda m: setattr(
            next(iter(m.storage_data.values())), 'relative_path', '../other'
        ),
    }
    for number, (message, change) in enumerate(changes.items()):
        folder = shutil.copytree(saved, tmp_path / str(number) / 'copy') / ITERATION
        edit(folder, change)
        refused(folder, message)


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob('*') if path.is_file())


def test_files_that_are_cut(copy):
    """At any length: whether or not the part that is gone would have been read."""
    for file in files_of(copy):
        whole = file.read_bytes()
        for length in (0, 1, len(whole) // 2, len(whole) * 99 // 100):
            file.write_bytes(whole[:length])
            refused(copy, 'cannot be read|is no checkpoint|bytes where it lists')
        file.write_bytes(whole)
    convert(copy.parent, copy.parent.parent / 'whole')


def test_a_flipped_bit_of_a_weight(copy):
    """Of every tensor that is carried: its checksum tells."""
    source = open_source(copy)
    distributed = is_distributed(copy)
    file = next(copy.glob('*.distcp')) if distributed else copy / 'mp_rank_00/model_optim_rng.pt'
    whole = file.read_bytes()
    flipped = 0
    for name, entry in source.entries.items():
        if entry.shape is None:
            continue
        stored = source.chunk(name, entry.chunks[-1]).contiguous().numpy().tobytes()
        # Ones and zeros, such as a norm's, are found in other tensors first.
        if whole.count(stored) != 1:
            continue
        data = bytearray(whole)
        data[whole.index(stored) + len(stored) // 2] ^= 1
        file.write_bytes(data)
        refused(copy, 'is damaged: the checksum of .* differs')
        flipped += 1
    assert flipped > 5


def test_a_file_is_no_destination(saved, tmp_path):
    letter = tmp_path / 'letter'
    letter.write_text('mine')
    for overwrite in (False, True):
        with pytest.raises(ValueError, match='DST .* exists'):
            convert(saved, letter, overwrite=overwrite)
    assert letter.read_text() == 'mine'


def test_a_model_that_cannot_be_compared(saved, tmp_path, monkeypatch):
    """Said, and converted where that is asked for."""
    source = open_source(saved)
    monkeypatch.setattr(source.args, 'position_embedding_type', 'none of them')

    def fails(*words):
        raise worker.NoAnswer('KeyError: none of them')

    monkeypatch.setattr(worker, 'answer', fails)
    with pytest.raises(ValueError, match=r'cannot be built here \(KeyError.*add --unchecked'):
        complete.check_model(source, 'auto')
    assert convert(saved, tmp_path / 'new', unchecked=True).carried > 10


def test_every_way_to_read_an_output(saved, tmp_path):
    """The flags with which Megatron reads a checkpoint, and text from it."""
    new = tmp_path / 'new'
    convert(saved, new)
    disk = ('--ckpt-format', 'torch_dist' if is_distributed(new / 'release') else 'torch')
    residual = ('--residual-type', 'mhc')
    steps = (*MODEL, *TRAINING, '--train-iters', 1, *disk, *residual)
    losses = set()
    for flags in (
        ('--load', new),
        ('--load', new, '--use-checkpoint-args'),
        ('--load', new, '--ckpt-step', 5),
        ('--load', new, '--finetune'),
        ('--load', new, '--no-load-optim', '--no-load-rng'),
        ('--pretrained-checkpoint', new),
        ('--load', new, '--auto-detect-ckpt-format'),
    ):
        said = run('pretrain_gpt.py', *steps, *flags)
        assert 'successfully loaded checkpoint' in said, flags
        losses.add(re.search(r'iteration +1/.*lm loss: (\S+)', said)[1])
    assert len(losses) == 1
    loaded = (*('--load', new, '--use-checkpoint-args'), *MODEL, *disk, *residual)
    assert '--- def ' in run('generate.py', *loaded, '--tokens', 4)
