"""A run of a GPT model goes on as one of a hybrid model, and back, with no bit changed."""

from __future__ import annotations

import json
import pathlib
import pickle
import re
import shutil

import pytest
import torch
from launch import Running, start
from megatron.core.ssm.mamba_hybrid_layer_allocation import Symbols

from megatron_mhc import cli
from megatron_mhc.convert.complete import FUSED
from megatron_mhc.convert.conversion import convert
from megatron_mhc.convert.layouts import hybrid_layout, to_tensors
from megatron_mhc.convert.model_class import move
from megatron_mhc.convert.report import how_to_go_on
from megatron_mhc.convert.source import open_source
from megatron_mhc.convert.upcycle import upcycled

ROOT = pathlib.Path(__file__).parents[2]
# Gradients are not clipped: their norm is a sum in the order of parameters, which differs.
RUN = """
    --seq-length 32 --max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 4
    --mock-data --tokenizer-type NullTokenizer --vocab-size 255 --lr 1e-2 --min-lr 1e-3
    --train-iters 5 --eval-iters 0 --eval-interval 1000 --log-interval 1 --split 98,1,1
    --num-workers 0 --clip-grad 0 --save-interval 2 --ckpt-format torch_dist
    --dist-ckpt-optim-fully-reshardable
""".split()
MHC, DENSELY = '--residual-type mhc --mhc-init identity'.split(), '--residual-type mudd'.split()
SMALL = '--hidden-size 32 --num-attention-heads 4 --position-embedding-type rope'.split()
STAGES = '--pipeline-model-parallel-size 2'.split()
LINE = re.compile(r'iteration +(\d+)/.*lm loss: (\S+) .*?(?:mtp_1 loss: (\S+) .*)?grad norm: (\S+)')
# Tied embeddings, biases, dropout, two virtual stages on each of two ranks, states kept apart.
DENSE = [*SMALL, *'--num-layers 4 --use-distributed-optimizer --mhc-stream-merge learned'.split()]
# bf16 with fp32 weights in the optimizer, a dense layer, then one of experts, one of prediction.
EXPERTS = [
    *SMALL,
    *"""
    --num-layers 2 --num-experts 4 --moe-layer-freq ([0]+[1]) --moe-router-topk 2
    --moe-ffn-hidden-size 16 --moe-shared-expert-intermediate-size 16 --disable-bias-linear
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias
    --moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall --swiglu
    --normalization RMSNorm --untie-embeddings-and-output-weights --hidden-dropout 0
    --attention-dropout 0 --bf16 --mtp-num-layers 1
    """.split(),
]
# Dense connections, whose attention has three norms.
MUDD = [*SMALL, *'--num-layers 2'.split()]
# Latent attention, whose norm lies apart.
LATENT = [
    *SMALL,
    *"""
    --num-layers 2 --multi-latent-attention --kv-lora-rank 8 --qk-head-dim 8
    --qk-pos-emb-head-dim 4 --v-head-dim 8 --rope-type rope --no-rope-fusion --hidden-dropout 0
    --attention-dropout 0
    """.split(),
]
# Arguments of a run that was resumed, and what counting FLOPs makes of absent grouped queries.
OF_RESUMING = 'load save iteration use_checkpoint_args num_query_groups'.split()
# Megatron has another formula for a pattern, with other terms for prediction layers.
FLOPS = 'num_floating_point_operations_so_far'
KINDS = ('dense', 'experts', 'mudd')
LATENT_SYMBOL = '+' in Symbols.VALID_LAYERS
HYBRID = {'dense': '*-|*-|*-|*-', 'experts': '*-*E/*E', 'mudd': '*-*-'}


def train(world: int, kind: str, *flags: object, residual: list[str] = MHC) -> Running:
    script = ROOT / 'examples' / f'pretrain_{kind}.py'
    return start(world, '-m', 'megatron_mhc.run', script, *RUN, *residual, *flags)


def curve(run: Running) -> dict[int, tuple[str, str, str]]:
    """Iteration -> loss, that of predictions, and gradient norm, as they are printed."""
    done = run.result()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {int(i): values for i, *values in LINE.findall(done.stdout)}


@pytest.fixture(scope='module')
def gpt(tmp_path_factory):
    """Five iterations of each model, saved after two; their curves."""
    folder = tmp_path_factory.mktemp('gpt')
    virtual = (*STAGES, '--num-layers-per-virtual-pipeline-stage', 1)
    runs = {
        'dense': train(2, 'gpt', *DENSE, *virtual, '--save', folder / 'dense'),
        'experts': train(1, 'gpt', *EXPERTS, '--save', folder / 'experts'),
        'mudd': train(1, 'gpt', *MUDD, '--save', folder / 'mudd', residual=DENSELY),
    }
    if LATENT_SYMBOL:
        runs['latent'] = train(1, 'gpt', *LATENT, '--save', folder / 'latent')
    return folder, {name: curve(run) for name, run in runs.items()}


@pytest.fixture(scope='module')
def hybrid(gpt):
    """What they are as hybrid models after two iterations, with what the command tells."""
    folder, _ = gpt
    made = folder.parent / 'hybrid'
    made.mkdir()
    return made, {name: move(folder / name, made / name, 'hybrid', step=2) for name in KINDS}


def contents(path: pathlib.Path) -> dict:
    """Every tensor and every opaque state, of the model and of the run."""
    source = open_source(path)
    return {
        name: source.opaque(name).getvalue() if entry.shape is None else source.tensor(name)
        for name, entry in (source.entries | source.run).items()
        if not name.startswith('common_state')
    }


def assert_same(path: pathlib.Path, other: pathlib.Path, *unlike: str) -> None:
    """All that two checkpoints hold, but for arguments that are ``unlike``."""
    a, b = contents(path), contents(other)
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = value == b[name] if isinstance(value, bytes) else torch.equal(value, b[name])
        assert same, name
    first, second = (open_source(where).state for where in (path, other))
    assert first.keys() == second.keys()
    for name in first.keys() - {'args', *({FLOPS} & {*unlike})}:
        assert str(first[name]) == str(second[name]), name
    first, second = (vars(state['args']) for state in (first, second))
    assert {k for k in first.keys() | second.keys() if first.get(k) != second.get(k)} <= {*unlike}


@pytest.fixture(scope='module')
def resumed(gpt, hybrid):
    """The last three iterations as hybrid models; the dense one also on one rank."""
    made, _ = hybrid
    load = {name: ('--load', made / name, '--save', made / f'{name} on') for name in KINDS}
    dense = ('--use-checkpoint-args', *DENSE[6:])
    runs = {
        'dense': train(2, 'hybrid', *dense, *STAGES, *load['dense']),
        'experts': train(1, 'hybrid', *EXPERTS, '--use-checkpoint-args', *load['experts']),
        'mudd': train(1, 'hybrid', '--use-checkpoint-args', *load['mudd'], residual=DENSELY),
    }
    return made, {name: curve(run) for name, run in runs.items()}


@pytest.mark.parametrize('name', KINDS)
def test_a_run_goes_on_as_if_unbroken(gpt, resumed, tmp_path, name):
    """Losses as they are printed; then every bit of what it saves, of what the GPT run saved."""
    folder, curves = gpt
    made, after = resumed
    # Megatron averages the first two losses that it prints after a start.
    assert sorted(after[name]) == [3, 4, 5]
    assert all(after[name][i] == curves[name][i] for i in (3, 5))
    assert all(bool(predicted) == (name == 'experts') for _, predicted, _ in after[name].values())
    move(folder / name, tmp_path / 'last', 'hybrid', unchecked=True)
    assert_same(tmp_path / 'last', made / f'{name} on', *OF_RESUMING, FLOPS)


@pytest.mark.parametrize('name', KINDS)
def test_and_back(gpt, hybrid, tmp_path, name):
    made, reports = hybrid
    assert reports[name].pattern == HYBRID[name] and reports[name].iteration == 2
    assert reports[name].states > 2 * reports[name].weights - 5
    back = move(made / name, tmp_path / 'back', 'gpt', verify=True)
    assert back.verified['difference'] == 0 < back.verified['largest']
    # Two sequences; predictions too.
    assert back.verified['compared'] == (2 if name == 'experts' else 1) * 2 * 32 * 256
    assert_same(tmp_path / 'back', gpt[0] / name / 'iter_0000002')


@pytest.mark.skipif(not LATENT_SYMBOL, reason='latent attention has no symbol in this release')
def test_without_optimizer_state(gpt, tmp_path):
    """As the GPT run goes on without: the same weights, at the same iteration, with new moments."""
    source, new = gpt[0] / 'latent', tmp_path / 'new'
    report = move(source, new, 'hybrid', step=2, optimizer=False)
    assert (report.pattern, report.states, report.iteration) == ('+-+-', 0, 2)
    norm = 'pre_mlp_layernorm.weight', 'mlp.linear_fc1.layer_norm_weight'
    assert (f'decoder.layers.{norm[0]}', f'decoder.layers.{{2i+1}}.{norm[1]}') in report.names
    move(new, tmp_path / 'back', 'gpt')
    wanted, found = contents(source / 'iter_0000002'), contents(tmp_path / 'back')
    assert found.keys() == {name for name in wanted if not name.startswith('optimizer.')}
    assert all(torch.equal(found[name], wanted[name]) for name in found if 'weight' in name)
    fresh = ('--no-load-optim', '--use-checkpoint-args', *LATENT)
    runs = (
        train(1, 'gpt', *fresh, '--load', source, '--ckpt-step', 2),
        train(1, 'hybrid', *fresh, '--load', new),
    )
    wanted, found = map(curve, runs)
    assert sorted(found) == [3, 4, 5] and found == wanted
    assert wanted[5] != gpt[1]['latent'][5]


def test_the_format_of_one_file(gpt, tmp_path):
    """Names of modules; its optimizer state is numbered, and cannot be carried."""
    source = open_source(gpt[0] / 'dense' / 'iter_0000002')
    model = {}
    for name, entry in source.entries.items():
        if entry.shape is None:
            continue
        value, rest = source.tensor(name), name.removeprefix('decoder.layers.')
        for apart, joined in FUSED:
            rest = rest.replace(joined.lstrip('.'), apart.lstrip('.'))
        layers = enumerate(value) if rest != name else ()
        model |= {f'decoder.layers.{i}.{rest}': part.clone() for i, part in layers}
        if rest == name:
            model[name] = value
    file = tmp_path / 'one' / 'iter_0000002' / 'mp_rank_00' / 'model_optim_rng.pt'
    file.parent.mkdir(parents=True)
    (tmp_path / 'one' / 'latest_checkpointed_iteration.txt').write_text('2')
    torch.save({**source.state, 'model': model}, file)
    with pytest.raises(ValueError, match='numbered in the order of one model.*--no-optim'):
        move(tmp_path / 'one', tmp_path / 'new', 'hybrid')
    move(tmp_path / 'one', tmp_path / 'new', 'hybrid', optimizer=False, verify=True)
    state = torch.load(next(tmp_path.glob('new/iter_0000002/*/*.pt')), weights_only=False)
    assert state['iteration'] == 2 and 'optimizer' not in state
    norm = model['decoder.layers.3.pre_mlp_layernorm.weight']
    assert torch.equal(state['model']['decoder.layers.7.pre_mlp_layernorm.weight'], norm)
    move(tmp_path / 'new', tmp_path / 'back', 'gpt', unchecked=True)
    back = torch.load(next(tmp_path.glob('back/iter_0000002/*/*.pt')), weights_only=False)
    assert back['model'].keys() == model.keys()
    assert all(torch.equal(value, back['model'][name]) for name, value in model.items())


def test_what_is_refused_before_anything_is_written(gpt, hybrid, tmp_path, capsys):
    source, other = gpt[0] / 'experts', hybrid[0] / 'experts'

    def command(*words: object) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(['convert', *map(str, words)])
        said = capsys.readouterr()
        assert ended.value.code == (0 if said.out else 2)
        assert said.out or said.err.count('\n') == 1
        return said.out or said.err

    new = tmp_path / 'new'
    assert 'it is a hybrid model already' in command(other, new, '--to', 'hybrid')
    assert 'it has no --hybrid-layer-pattern' in command(source, new, '--to', 'gpt')
    assert 'first --to gpt' in command(other, new, '--to', 'megatron-dev')
    assert '--from: --to gpt keeps' in command(other, new, '--to', 'gpt', '--from', 'mhc')
    assert '--no-optim: --to mhc leaves' in command(source, new, '--to', 'mhc', '--no-optim')
    said = command(source, new, '--to', 'hybrid', '--dry-run')
    assert "--hybrid-layer-pattern '*-*E/*E'" in said and 'nothing was written' in said
    assert 'decoder.layers.{2i+1}.pre_mlp_layernorm.weight' in said
    said = how_to_go_on(hybrid[1]['dense'], new)
    assert '--use-checkpoint-args, from a script that builds a HybridModel; on other' in said
    found = json.loads(command(other, new, '--to', 'gpt', '--dry-run', '--json'))
    assert (found['to'], found['iteration'], found['load']) == ('gpt', 2, None)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_model(gpt, tmp_path):
    """One that is missing, and one that the other class has no place for."""
    source = shutil.copytree(gpt[0] / 'experts', tmp_path / 'copy') / 'iter_0000005'
    common = open_source(source).state
    common['args'].add_qkv_bias = True
    torch.save(common, source / 'common.pt')
    with pytest.raises(ValueError, match='linear_qkv.bias is missing'):
        move(source, tmp_path / 'new', 'hybrid')
    common['args'].add_qkv_bias, common['args'].mtp_num_layers = False, None
    torch.save(common, source / 'common.pt')
    with pytest.raises(ValueError, match=r'mtp\.layers\.0\..* has no place in the hybrid model'):
        move(source, tmp_path / 'new', 'hybrid')
    assert move(source, tmp_path / 'new', 'hybrid', unchecked=True, dry_run=True).weights > 30
    assert [path.name for path in tmp_path.iterdir()] == ['copy']


@pytest.fixture(scope='module')
def standard(gpt):
    """The GPT run with experts, as if it had never had streams."""
    folder = shutil.copytree(gpt[0] / 'experts' / 'iter_0000005', gpt[0].parent / 'standard')
    common = open_source(folder).state
    for name in [*vars(common['args'])]:
        if name.startswith(('mhc_', 'residual_type')):
            delattr(common['args'], name)
    torch.save(common, folder / 'common.pt')
    metadata = pickle.loads((folder / '.metadata').read_bytes())
    for name in [name for name in metadata.state_dict_metadata if 'hyper_connection' in name]:
        del metadata.state_dict_metadata[name]
    (folder / '.metadata').write_bytes(pickle.dumps(metadata))
    return folder


def test_streams_for_a_standard_hybrid_model(standard, tmp_path):
    """Exact; and the same whether streams come first or the class does."""
    plain, streams = tmp_path / 'plain', {'stream_merge': 'learned', 'num_streams': 3}
    assert move(standard, plain, 'hybrid', unchecked=True).pattern == '*-*E/*E'
    report = convert(plain, tmp_path / 'widened', upcycling=streams, verify=True)
    assert report.verified['difference'] < 3e-6 < 0.1 < report.verified['largest']
    assert {row.target.split('.')[3] for row in report.rows[:6]} == {
        'self_attention_hyper_connection',
        'mlp_hyper_connection',
    }
    convert(standard, tmp_path / 'gpt', upcycling=streams, unchecked=True)
    move(tmp_path / 'gpt', tmp_path / 'other', 'hybrid', unchecked=True)
    assert_same(tmp_path / 'widened', tmp_path / 'other')
    with pytest.raises(ValueError, match='only GPT models are converted .* first --to gpt'):
        convert(plain, tmp_path / 'new', 'deepseek-v4')


def test_every_sublayer_of_a_pattern_gets_streams():
    """Mamba too, whose layers are none of a GPT model's."""
    layout = hybrid_layout('M*-ME')
    made = to_tensors(upcycled(5, 8, sublayers=1), layout, stacked=False)
    biases = [name for name in made if name.endswith('.bias')]
    kinds = ('mixer', 'self_attention', 'mlp', 'mixer', 'mlp')
    assert biases == [
        f'decoder.layers.{i}.{kind}_hyper_connection.bias' for i, kind in enumerate(kinds)
    ]
    homes = [made[name][:4].argmax().item() for name in biases]
    assert homes == [0, 1, 2, 3, 0]
