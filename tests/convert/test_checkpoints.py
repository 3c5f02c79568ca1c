"""Checkpoints of real runs, converted and trained on: under other layouts, and from bad input."""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import re
import shutil
import signal

import pytest
import safetensors.torch
import torch
from launch import Running, start

from megatron_mhc import cli
from megatron_mhc.checkpoints.check import check_checkpoint
from megatron_mhc.convert import conversion, output
from megatron_mhc.convert.conversion import convert
from megatron_mhc.convert.output import Content
from megatron_mhc.convert.source import open_source
from megatron_mhc.settings.residual import ResidualConfig

ROOT = pathlib.Path(__file__).parents[2]
MODEL = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --position-embedding-type rope --transformer-impl local
    --micro-batch-size 4 --global-batch-size 4 --mock-data --tokenizer-type NullTokenizer
    --vocab-size 255 --eval-iters 1 --eval-interval 1000 --log-interval 1 --split 98,1,1
    --num-workers 0 --hidden-dropout 0 --attention-dropout 0 --swiglu --normalization RMSNorm
    --untie-embeddings-and-output-weights --ckpt-format torch_dist
""".split()
LOSS = re.compile(r'iteration +\d+/.*lm loss: (\S+)')


def launch(world: int, *flags: object) -> Running:
    script = ROOT / 'examples' / 'pretrain_gpt.py'
    return start(world, '-m', 'megatron_mhc.run', script, *MODEL, *flags)


def losses(run: Running) -> list[float]:
    done = run.result()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [float(loss) for loss in LOSS.findall(done.stdout)]


@pytest.fixture(scope='module')
def standard(tmp_path_factory) -> pathlib.Path:
    """Twelve steps of a standard model on two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp('standard') / 'run'
    flags = ('--tensor-model-parallel-size', 2, '--train-iters', 12, '--lr', 1e-2)
    losses(launch(2, *flags, '--save', folder, '--save-interval', 12))
    return folder


@pytest.fixture(scope='module')
def upcycled(standard) -> pathlib.Path:
    """Random mapping parameters, as if trained, so that nothing is symmetric."""
    destination = standard.parent / 'random'
    with pytest.MonkeyPatch.context() as patch:
        exact = conversion.upcycled

        def random(*args, **kwargs):
            torch.manual_seed(1)
            streams = exact(*args, **kwargs)
            for parameters in (p for layer in streams.layers for p in layer):
                for tensor in parameters:
                    tensor.normal_()
            return streams

        patch.setattr(conversion, 'upcycled', random)
        convert(standard, destination)
    return destination


@pytest.fixture
def copied(upcycled, tmp_path) -> pathlib.Path:
    """A copy to be damaged."""
    return shutil.copytree(upcycled, tmp_path / 'copy') / 'release'


def contents(path: pathlib.Path) -> dict:
    source = open_source(path)
    return {
        name: source.opaque(name).getvalue() if entry.shape is None else source.tensor(name)
        for name, entry in source.entries.items()
    }


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = value == b[name] if isinstance(value, bytes) else torch.equal(value, b[name])
        assert same, name


def test_an_upcycled_model_is_the_old_one_and_trains_on(standard, tmp_path):
    """Equal logits; then fifty steps on one rank, beside the standard model's own."""
    new = tmp_path / 'new'
    report = convert(standard, new, verify=True)
    assert report.verified['difference'] < 3e-6 < 0.1 < report.verified['largest']
    steps = ('--train-iters', 50, '--lr', 2e-3)
    old = ('--load', standard, '--finetune', '--no-load-optim', '--no-load-rng')
    runs = launch(1, *steps, *old), launch(1, *steps, '--load', new, '--residual-type', 'mhc')
    stayed, widened = map(losses, runs)
    assert len(stayed) == len(widened) == 50
    assert abs(stayed[0] - widened[0]) < 1e-5
    assert max(abs(a - b) for a, b in zip(stayed, widened, strict=True)) < 0.05
    # They were not frozen: phi and the biases have learned something of their own.
    assert stayed[-1] != widened[-1]


def test_all_other_tensors_keep_every_bit(standard, tmp_path, tensors):
    """Each of two parts, written by two ranks, and read here by torch alone."""
    convert(standard, tmp_path / 'new')
    before, after = tensors(standard / 'iter_0000012'), tensors(tmp_path / 'new' / 'release')
    before = {name: value for name, value in before.items() if not name.startswith('optimizer.')}
    added = {name for name in after if '_hyper_connection.' in name}
    assert before and len(added) == 10 and before.keys() == after.keys() - added
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    parts = open_source(tmp_path / 'new').entries['decoder.layers.mlp.linear_fc1.weight'].chunks
    assert len(parts) > 1
    run, release = (open_source(path).args for path in (standard, tmp_path / 'new'))
    assert (run.consumed_train_samples, release.consumed_train_samples) == (48, 0)


@pytest.mark.parametrize('to', ['megatron-main', 'megatron-dev', 'deepseek-v4'])
def test_round_trips_are_bitwise(upcycled, tmp_path, to):
    there = convert(upcycled, tmp_path / 'there', to)
    assert there.origin == 'mhc' and there.differences['H_res'] > 0
    back = convert(tmp_path / 'there', tmp_path / 'back', 'mhc', numerics='paper')
    assert back.origin == to and back.differences == there.differences
    before, after = contents(upcycled), contents(tmp_path / 'back')
    assert_same(before, after)
    args = [vars(open_source(path).args) for path in (upcycled, tmp_path / 'back')]
    assert args[0] == args[1]


@pytest.mark.parametrize('to', ['megatron-main', 'megatron-dev', 'deepseek-v4'])
def test_what_comes_from_a_layout_computes_as_it_did(upcycled, tmp_path, to):
    """With its numerics, which are saved; and goes back as it came."""
    convert(upcycled, tmp_path / 'there', to)
    megatrons = to.startswith('megatron')
    back = convert(tmp_path / 'there', tmp_path / 'back', verify=megatrons)
    assert max(back.differences.values()) < 1e-6
    if megatrons:
        assert back.verified['difference'] < 1e-5 < 0.1 < back.verified['largest']
    args = open_source(tmp_path / 'back').args
    merge = 'mean' if to == 'megatron-main' else 'learned'
    assert (args.mhc_numerics, args.mhc_stream_merge) == (to, merge)
    again = convert(tmp_path / 'back', tmp_path / 'again', to)
    assert max(again.differences.values()) < 1e-6
    assert_same(contents(tmp_path / 'there'), contents(tmp_path / 'again'))
    with pytest.raises(ValueError, match=f'is a {to} checkpoint; choose {to}, under which'):
        convert(tmp_path / 'there', tmp_path / 'new', numerics='glm-5.3')


def test_parts_of_a_large_model_are_found_again(upcycled, tmp_path, monkeypatch):
    """As Hugging Face splits it: names with numbers, and an index of which tensor is where."""
    monkeypatch.setattr(output, 'SHARD_BYTES', 50_000)
    convert(upcycled, tmp_path / 'v4', 'deepseek-v4')
    files = sorted(tmp_path.glob('v4/*.safetensors'))
    index = json.loads((tmp_path / 'v4' / 'model.safetensors.index.json').read_text())
    assert len(files) > 2 and files[0].name == f'model-00001-of-{len(files):05d}.safetensors'
    assert {file.name for file in files} == set(index['weight_map'].values())
    assert index['metadata']['total_size'] > 50_000
    convert(tmp_path / 'v4', tmp_path / 'back', 'mhc', numerics='paper')
    assert_same(contents(upcycled), contents(tmp_path / 'back'))


def test_what_the_command_says_and_writes(standard, tmp_path, capsys, monkeypatch):
    destination = tmp_path / 'new'

    def command(*flags):
        with pytest.raises(SystemExit) as ended:
            cli.main(['convert', str(standard), str(destination), *flags])
        return ended.value.code, capsys.readouterr()

    status, said = command('--to', 'megatron-dev', '--dry-run', '--mhc-num-residual-streams', '2')
    assert status == 0 and not list(tmp_path.iterdir())
    assert 'standard -> megatron-dev: 4 layers, n = 2, C = 32' in said.out
    assert 'decoder.hc_head_fn' in said.out and 'nothing was written' in said.out
    status, said = command('--to', 'megatron-dev', '--dry-run', '--num-streams', '2', '--json')
    found = json.loads(said.out)
    assert status == 0 and (found['from'], found['to']) == ('standard', 'megatron-dev')
    assert (found['num_residual_streams'], found['layers'], found['load']) == (2, 4, None)
    assert 'decoder.hc_head_fn' in {row['target'] for row in found['mapping']}
    status, said = command('--to', 'mhc', '--json')
    assert status == 0 and '--residual-type mhc' in json.loads(said.out)['load']
    assert [p.name for p in tmp_path.iterdir()] == ['new']
    status, said = command('--to', 'mhc')
    assert status == 2 and said.err.count('\n') == 1 and 'add --overwrite' in said.err
    marker = destination / 'mine'
    marker.touch()
    assert command('--to', 'mhc', '--overwrite', '--break-symmetry', '0.1')[0] == 0
    assert not marker.exists() and [p.name for p in tmp_path.iterdir()] == ['new']


@pytest.mark.parametrize('ending', ['signal', 'full disk', 'damaged'])
def test_nothing_is_left_of_a_conversion_that_ends_early(standard, tmp_path, monkeypatch, ending):
    destination = tmp_path / 'new'
    (destination / 'config.json').parent.mkdir()
    (destination / 'config.json').write_text('mine')
    taken, chunk = [], Content.chunk

    def stop(self, name, part):
        taken.append(name)
        if len(taken) == 5:
            # The writing has begun.
            assert len(list(tmp_path.iterdir())) == 2
            if ending == 'signal':
                signal.raise_signal(signal.SIGTERM)
            elif ending == 'full disk':
                raise OSError(28, 'No space left on device')
            raise ValueError('a part is missing')
        return chunk(self, name, part)

    monkeypatch.setattr(Content, 'chunk', stop)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main(['convert', str(standard), str(destination), '--to', 'mhc', '--overwrite'])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == (128 + signal.SIGTERM if ending == 'signal' else 2)
    assert [p.name for p in tmp_path.iterdir()] == ['new']
    assert (destination / 'config.json').read_text() == 'mine'


class Malicious:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.sentinel),)


def test_pickles_that_run_code_are_refused(copied, tmp_path):
    """In the arguments, in ``.metadata``, in a file of the ``torch`` format; none of them ran."""
    import pickle

    sentinel = tmp_path / 'ran'
    evil = {'args': argparse.Namespace(a=Malicious(str(sentinel)))}
    torch.save(evil, copied / 'common.pt')
    file = tmp_path / 'file' / 'mp_rank_00' / 'model_optim_rng.pt'
    file.parent.mkdir(parents=True)
    torch.save(evil, file)
    other = shutil.copytree(copied, tmp_path / 'other')
    (other / '.metadata').write_bytes(pickle.dumps(Malicious(str(sentinel))))
    for path in (copied, other, tmp_path / 'file'):
        with pytest.raises(ValueError, match='holds more than plain values') as refused:
            convert(path, tmp_path / 'new')
        assert '\n' not in str(refused.value)
    assert not sentinel.exists()


def edit(folder: pathlib.Path, **values) -> None:
    """Change saved arguments; None deletes."""
    common = torch.load(folder / 'common.pt', weights_only=False)
    for name, value in values.items():
        setattr(common['args'], name, value)
    torch.save(common, folder / 'common.pt')


def truncate(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DEV = {'to': 'megatron-dev'}
MUTE = dict.fromkeys(
    ('mhc_num_residual_streams', 'mhc_manifold', 'mhc_sinkhorn_iterations', 'mhc_stream_merge')
)
BAD = {
    'data cut short': (lambda f: truncate(next(f.glob('*.distcp'))), DEV, 'cannot be read'),
    'metadata cut short': (lambda f: truncate(f / '.metadata'), DEV, r'\.metadata cannot be read'),
    'metadata gone': (lambda f: (f / '.metadata').unlink(), DEV, r'\.metadata cannot be read'),
    'data gone': (lambda f: next(f.glob('*.distcp')).unlink(), DEV, 'cannot be read'),
    'common state gone': (lambda f: (f / 'common.pt').unlink(), DEV, 'neither common.pt'),
    'other n': (lambda f: edit(f, mhc_num_residual_streams=2), DEV, 'has shape .* call for'),
    'other C': (lambda f: edit(f, hidden_size=64), DEV, 'has shape .* call for'),
    'other depth': (lambda f: edit(f, num_layers=5), DEV, 'has shape .* call for'),
    'a merge that is missing': (
        lambda f: edit(f, mhc_stream_merge='learned'),
        DEV,
        'stream_merge.* is missing',
    ),
    'streams of which the arguments are mute': (
        lambda f: edit(f, residual_type='standard', **MUTE),
        {},
        'hyper_connection.* has no place in the standard layout .* --from',
    ),
    'hc': (lambda f: edit(f, residual_type='hc'), DEV, 'connections of type hc, which no other'),
    'mudd': (lambda f: edit(f, residual_type='mudd'), DEV, 'of type mudd, which no other layout'),
    'a memory': (lambda f: edit(f, engram_layers=[2]), DEV, r'a memory \(--engram-layers\)'),
    'single pass': (
        lambda f: edit(f, mhc_single_pass=True, mhc_stream_merge='pre'),
        DEV,
        '--mhc-single-pass, which that layout has not; choose deepseek-v4.1',
    ),
    'another manifold': (
        lambda f: edit(f, mhc_manifold='permutation', mhc_sinkhorn_iterations=None),
        DEV,
        '--mhc-manifold permutation, which no other layout has',
    ),
    'the layout it has': (lambda f: None, {}, 'is in that layout already'),
    'a contradiction': (lambda f: None, {**DEV, 'origin': 'standard'}, 'leave out --from'),
    'no GPT model': (
        lambda f: edit(f, residual_type='standard', hybrid_layer_pattern='M*-', **MUTE),
        DEV,
        'only GPT models .* first --to gpt',
    ),
    'an unknown layout': (lambda f: None, {'to': 'v5'}, '--to v5: unknown layout'),
    'numerics for a layout': (lambda f: None, {**DEV, 'numerics': 'paper'}, 'no effect with --to'),
    'new streams for old': (
        lambda f: None,
        {**DEV, 'upcycling': {'num_streams': 2}},
        '--mhc-num-residual-streams: only a standard model gets new streams',
    ),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_line(case, copied, tmp_path):
    damage, options, message = BAD[case]
    damage(copied)
    with pytest.raises(ValueError, match=message) as refused:
        convert(copied, tmp_path / 'new', **options)
    assert '\n' not in str(refused.value)
    assert {p.name for p in tmp_path.iterdir()} == {'copy'}


def test_a_newer_main_is_refused(upcycled, tmp_path):
    """With its flag and the learned head that it has since gained, --from could not help."""
    newer = tmp_path / 'newer'
    convert(upcycled, newer, 'megatron-dev')
    edit(newer / 'release', enable_mhc_connections=True, mhc_num_residual_streams=4)
    with pytest.raises(ValueError, match='hc_head.* no place in the megatron-main .*August 2026'):
        convert(newer, tmp_path / 'new')


def test_where_not_to_write(standard, upcycled, tmp_path):
    (tmp_path / 'home').mkdir()
    (tmp_path / 'home' / 'letter').touch()
    for source, destination, message in (
        (tmp_path / 'nowhere', tmp_path / 'new', 'no such folder'),
        (tmp_path / 'home', tmp_path / 'new', 'is no checkpoint that is read'),
        (standard, tmp_path / 'a' / 'b', 'there is no folder'),
        (standard, standard, 'lie within each other'),
        (standard, standard / 'new', 'lie within each other'),
        (standard, standard.parent, 'lie within each other'),
        (standard, tmp_path / 'home', 'is no checkpoint, so it stays'),
    ):
        with pytest.raises(ValueError, match=message):
            convert(source, destination, overwrite=True)
    with pytest.raises(ValueError, match='leave out --from|name no number of streams'):
        convert(standard, tmp_path / 'new', 'mhc', origin='megatron-dev')
    assert (tmp_path / 'home' / 'letter').exists()


def test_a_checkpoint_of_one_file(standard, tmp_path):
    """The ``torch`` format names layers one by one; it stays, and goes to safetensors and back."""
    source = open_source(standard)
    model = {}
    for name, value in contents(standard).items():
        if isinstance(value, torch.Tensor) and name.startswith('decoder.layers.'):
            rest = name.removeprefix('decoder.layers.')
            model |= {f'decoder.layers.{i}.{rest}': part for i, part in enumerate(value)}
        elif isinstance(value, torch.Tensor):
            model[name] = value
    file = tmp_path / 'one' / 'mp_rank_00' / 'model_optim_rng.pt'
    file.parent.mkdir(parents=True)
    torch.save({**source.common, 'model': model, 'optimizer': {}, 'iteration': 7}, file)
    convert(tmp_path / 'one', tmp_path / 'mhc')
    written = tmp_path / 'mhc' / 'release' / 'mp_rank_00' / 'model_optim_rng.pt'
    state = torch.load(written, weights_only=False)
    assert state['iteration'] == 0 and 'optimizer' not in state
    bias = 'decoder.layers.3.mlp_hyper_connection.bias'
    assert state['model'][bias].shape == (24,)
    assert_same(model, {name: state['model'][name] for name in model})
    convert(tmp_path / 'mhc', tmp_path / 'v4', 'deepseek-v4')
    convert(tmp_path / 'v4', tmp_path / 'back', numerics='paper')
    assert_same(contents(tmp_path / 'mhc'), contents(tmp_path / 'back'))


@pytest.mark.parametrize('prefix', ['', 'model.'])
def test_a_deepseek_v4_that_megatron_never_saw(tmp_path, prefix):
    """As transformers saves it, and as it was released; what is not mHC's keeps its name."""
    n, width = 4, 8
    parameters = {'fn': (24, n * width), 'base': (24,), 'scale': (3,)}
    tensors = {
        f'{prefix}layers.{layer}.hc_{kind}_{name}': torch.randn(shape)
        for layer in range(2)
        for kind in ('attn', 'ffn')
        for name, shape in parameters.items()
    }
    head = {'fn': (n, n * width), 'base': (n,), 'scale': (1,)}
    tensors |= {f'{prefix}hc_head_{name}': torch.randn(shape) for name, shape in head.items()}
    tensors |= {'mtp.0.hc_attn_fn': torch.randn(3), 'embed.weight': torch.randn(4).bfloat16()}
    source = tmp_path / 'v4'
    source.mkdir()
    safetensors.torch.save_file(tensors, source / 'model.safetensors')
    config = {'num_hidden_layers': 2, 'hidden_size': width, 'hc_mult': n, 'hc_sinkhorn_iters': 20}
    (source / 'config.json').write_text(json.dumps(config))
    convert(source, tmp_path / 'mhc')
    saved = contents(tmp_path / 'mhc')
    bias = saved['decoder.layers.mlp_hyper_connection.bias'][1]
    stored = tensors[f'{prefix}layers.1.hc_ffn_base']
    assert torch.equal(bias[8:].view(4, 4).T.flatten(), stored[8:])
    assert saved['embed.weight'].dtype == torch.bfloat16 and 'mtp.0.hc_attn_fn' in saved
    convert(tmp_path / 'mhc', tmp_path / 'back', 'deepseek-v4')
    plain = {name.removeprefix(prefix): value for name, value in tensors.items()}
    assert_same(plain, contents(tmp_path / 'back'))
    assert open_source(tmp_path / 'mhc').args.mhc_numerics == 'deepseek-v4'
    for wrong in ({'rms_norm_eps': 'x'}, {'hc_eps': 1e-5}):
        (source / 'config.json').write_text(json.dumps({**config, **wrong}))
        with pytest.raises(ValueError, match=f'{next(iter(wrong))}.* config.json'):
            convert(source, tmp_path / 'new')
    (source / 'config.json').write_text(json.dumps({**config, 'rms_norm_eps': 1e-5}))
    other = convert(source, tmp_path / 'other')
    assert max(other.differences.values()) < 1e-6
    assert open_source(tmp_path / 'other').args.mhc_norm_eps == 1e-5
    (source / 'config.json').write_text(json.dumps({**config, 'hc_mult': 2}))
    with pytest.raises(ValueError, match='hc_attn_fn has shape'):
        convert(source, tmp_path / 'new')
    (source / 'config.json').write_text('{}')
    with pytest.raises(ValueError, match='config.json cannot be read .*num_hidden_layers'):
        convert(source, tmp_path / 'new')
    truncate(source / 'model.safetensors')
    (source / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='model.safetensors cannot be read'):
        convert(source, tmp_path / 'new')


def test_refusals_of_a_run_name_the_command(standard):
    saved = open_source(standard).args
    with pytest.raises(ValueError, match='`megatron-mhc convert X NEW --to mhc`'):
        check_checkpoint(saved, ResidualConfig(), 'X')
    asked = ResidualConfig(num_residual_streams=2, stream_merge='learned')
    flags = '--mhc-num-residual-streams 2 --mhc-stream-merge learned'
    with pytest.raises(ValueError, match=f'NEW --to mhc {flags}`'):
        check_checkpoint(saved, asked, 'X')
    for other in ({'manifold': 'identity'}, {'single_pass': True}, {'num_residual_streams': 1}):
        with pytest.raises(ValueError, match="repeat the checkpoint's flags"):
            check_checkpoint(saved, ResidualConfig(**other), 'X')
    theirs = copy.copy(saved)
    theirs.enable_hyper_connections = True
    with pytest.raises(ValueError, match='`megatron-mhc convert X NEW --to mhc`'):
        check_checkpoint(theirs, ResidualConfig(), 'X')
