"""The recipes without Megatron: their figures, layouts, command line and the scripts they print."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from megatron_mhc import ResidualConfig
from megatron_mhc.recipes.recipe import LAYOUTS, RECIPES, recipe_flags, scaled_down, words
from megatron_mhc.recipes.script import LAUNCHER, bash_script, torchrun_flags
from megatron_mhc.schedules.inverted_v import holder_of
from megatron_mhc.settings.queues import CONNECTIONS
from megatron_mhc.sizing.divides import check_model
from megatron_mhc.sizing.flops import residual_flops, step_flops, token_flops
from megatron_mhc.sizing.memory import Layout, edge_bytes, rank_memory, stages_of
from megatron_mhc.sizing.size import parameters, summary

ROOT = pathlib.Path(__file__).parents[2]
CASES = [(name, layout) for name in RECIPES for layout in LAYOUTS[name]]


@pytest.fixture(scope='module')
def launcher():
    """``examples/recipe.py`` as a module."""
    spec = importlib.util.spec_from_file_location('recipe', ROOT / 'examples' / 'recipe.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def show(answer):
    return lambda words: answer(f'recipe {words}')


@pytest.mark.parametrize(
    ('name', 'vocabulary', 'billions', 'tokens'),
    [
        ('3b', 331, 2.97, 39.3e9),
        ('9b', 496, 9.18, 105e9),
        ('27b', 662, 27.0, 262e9),
        ('3b-1t', 331, 2.97, 1.05e12),
    ],
)
def test_table_5(name, vocabulary, billions, tokens):
    recipe = RECIPES[name]
    parts = parameters(recipe.shape())
    assert round((parts['embedding'] + parts['head']) / 1e6) == vocabulary
    assert float(f'{parts.total() / 1e9:.3g}') == billions
    assert float(f'{recipe.tokens:.3g}') == tokens


def test_flops_of_one_sublayer_written_out():
    """n = 4, C = 8, two Sinkhorn passes: each product of matrices as 2 x rows x inner x columns."""
    residual = ResidualConfig('mhc', sinkhorn_iterations=2)
    projection, squares = 2 * 1 * 32 * 24, 2 * 32
    sinkhorn = 2 * 2 * (16 + 16)  # passes x (columns, rows) x (sums, divisions)
    read, mix, write = 2 * 1 * 4 * 8, 2 * 4 * 4 * 8, 2 * 4 * 1 * 8
    one = projection + squares + sinkhorn + read + mix + write
    mean = 4 * 8
    assert residual_flops(residual, 8, 3) == 3 * one + mean
    assert residual_flops(ResidualConfig('standard'), 8, 3) == 0


def test_flops_of_a_step_are_six_a_parameter_and_token_and_attention():
    """The rule of thumb, for what a token multiplies with; norms and biases multiply nothing."""
    recipe = RECIPES['27b']
    shape = recipe.shape('standard')
    matrices = summary(shape)['active'] - parameters(shape)['norms']
    core = 3 * token_flops(shape)['attention_core']
    tokens = recipe.batch * recipe.sequence
    assert step_flops(shape, recipe.batch) == tokens * (6 * matrices + core)


@pytest.mark.parametrize(('name', 'layout'), CASES)
def test_layouts_are_legal(name, layout):
    recipe, layout = RECIPES[name], LAYOUTS[name][layout]
    shape = recipe.shape()
    check_model(shape, layout)
    assert layout.microbatches(recipe.batch) >= 2 * layout.pp
    stages = stages_of(shape, layout.pp, layout.placement, layout.chunks)
    held = [layer for rank in stages for stage in rank for layer in stage]
    assert sorted(held) == list(range(shape.layers))
    topics = recipe_flags(recipe, layout)
    flags = topics['PARALLEL_ARGS']
    if shape.pattern:
        parts = topics['MODEL_ARGS']['hybrid-layer-pattern'].split('|')
        assert ''.join(parts) == shape.pattern
        assert [len(part) for part in parts] == [len(stage) for rank in stages for stage in rank]
        return
    text = flags.get('pipeline-model-parallel-layout')
    if text is None:
        assert recipe.layers % (2 * layout.pp) == 0 or layout.pp == 1
        return
    # What Megatron is told is what memory was estimated for.
    for stage, layers in enumerate(text.strip('EL').split('|')):
        rank, chunk = holder_of(stage, layout.pp)
        assert len(stages_of(recipe.shape(), layout.pp)[rank][chunk]) == len(layers)


@pytest.mark.parametrize(('pp', 'ep'), [(1, 1), (2, 1), (4, 2)])
def test_ranks_share_all_parameters(pp, ep):
    recipe = RECIPES['9b']
    layout = Layout(8, pp=pp, ep=ep)
    ranks = rank_memory(recipe.shape(), layout, recipe.batch)
    parts = parameters(recipe.shape())
    split = parts.total() - parts['routed_experts'] * (ep - 1) // ep
    assert sum(rank.gradients for rank in ranks) == 4 * split
    assert sum(rank.weights for rank in ranks) == 2 * (split + parts['mhc'])
    if ep == 1:
        states = 12 * parts.total() - 4 * parts['mhc']
        assert abs(sum(rank.optimizer for rank in ranks) - states / layout.dp) < 100


def test_more_ranks_hold_less_and_recomputation_helps():
    recipe = RECIPES['27b']
    ranks = {name: rank_memory(recipe.shape(), one, 1280) for name, one in LAYOUTS['27b'].items()}
    fullest = {name: max(rank.total_recompute for rank in r) for name, r in ranks.items()}
    assert fullest['64gpu'] < fullest['8gpu'] < fullest['1gpu']
    assert all(rank.total_recompute < rank.total for r in ranks.values() for rank in r)
    stock = rank_memory(recipe.shape('standard'), LAYOUTS['27b']['8gpu'], 1280)
    assert stock[0].kept <= ranks['8gpu'][0].kept_recompute < ranks['8gpu'][0].kept


def test_what_block_recomputation_keeps():
    """3B on one GPU, L = 24, L_r = 4: 144 C a token become 6 segments x 4 C, and 24 C at a time."""
    one = rank_memory(RECIPES['3b'].shape(), Layout(1), 320)[0]
    token = 2 * 4096 * 1280
    assert one.kept - one.kept_recompute == (144 - 24) * token and one.rebuilt == 24 * token


def test_the_last_pipeline_rank_has_both_ends():
    """And fewest layers, where they do not divide: 30 on 4 ranks are 8, 8, 8 and 6."""
    recipe, layout = RECIPES['27b'], LAYOUTS['27b']['64gpu']
    ranks = rank_memory(recipe.shape(), layout, recipe.batch)
    assert [rank.logits > 0 for rank in ranks] == [False, False, False, True]
    held = [sum(map(len, stages)) for stages in stages_of(recipe.shape(), layout.pp)]
    assert held == [8, 8, 8, 6] and ranks[3].kept < ranks[0].kept
    matrix = recipe.vocab * recipe.hidden
    assert ranks[3].gradients > 4 * 2 * matrix


def test_messages_are_n_streams_wide():
    layout = Layout(8, pp=2, ep=4)
    wide, stock = (edge_bytes(RECIPES['27b'].shape(kind), layout) for kind in ('mhc', 'standard'))
    assert stock == 2 * 4096 * 2560 and wide == 4 * stock
    single = dataclasses.replace(RECIPES['27b'].shape(), residual=ResidualConfig(single_pass=True))
    # H_pre in bf16 streams: four values of fp32, each as three of 16 bits.
    assert edge_bytes(single, layout) == wide + 4096 * 4 * 3 * 2
    fp32 = dataclasses.replace(single, value_bytes=4)
    assert edge_bytes(fp32, layout) == 2 * wide + 4096 * 4 * 4


def test_what_can_make_a_message_shorter():
    """The table of ``docs/schedules.md``, in MiB."""
    shape = RECIPES['27b'].shape()

    def mib(layout, **changes):
        return round(edge_bytes(dataclasses.replace(shape, **changes), layout) / 2**20, 1)

    line = Layout(8, pp=2)
    assert mib(line, residual=ResidualConfig('standard')) == 20 and mib(line) == 80
    assert mib(line, residual=ResidualConfig(single_pass=True)) == 80.1
    assert mib(line, value_bytes=4) == 160
    assert mib(line, residual=ResidualConfig(num_residual_streams=2)) == 40
    assert mib(Layout(8, pp=2, tp=2)) == mib(Layout(8, pp=2, cp=2)) == 40


def test_show_prints_one_object(show):
    status, out, err = show('show 27b --layout 64gpu --json')
    found = json.loads(out)
    assert (status, err) == (0, '')
    assert all(type(found[key]) is int for key in ('total', 'active', 'mhc'))
    assert found['total'] == sum(found['parameters'].values())
    assert found['layout']['microbatches'] == 80 and len(found['memory']) == 4
    assert found['fits'] == ['80 GB', '141 GB']


def test_show_for_people(show):
    status, out, _ = show('show 27b --layout 1gpu')
    assert status == 0 and '27,048,278,100' in out
    assert 'fits GPUs of 80 GB: no and 141 GB: no' in out


@pytest.mark.parametrize(
    ('manifold', 'rows'),
    [
        ('sinkhorn', 24),
        ('permutation', 32),
        ('kronecker', 12),
        ('orthogonal', 14),
        ('diagonal', 12),
        ('identity', 8),
    ],
)
def test_show_sizes_up_a_manifold(manifold, rows, show):
    """phi has n C = 10240 columns and that many rows; 60 sublayers."""
    found = json.loads(show(f'show 27b --mhc-manifold {manifold} --json')[1])
    alphas = 2 + (manifold != 'identity')
    assert found['mhc'] == 60 * (rows * 10240 + rows + alphas)
    assert found['manifold'] == {
        'name': manifold,
        'logits': rows - 8,
        'parameter_bytes': 4 * found['mhc'],
        'token_bytes': 4 * (rows + 24),
    }


@pytest.mark.parametrize(
    ('name', 'gpus', 'tp', 'schedule'),
    [
        ('27b', 512, 1, 'dualpipev-w'),
        ('27b', 1024, 1, 'zb-v'),
        ('27b', 8192, 8, 'zb-v'),
        ('9b', 256, 1, 'dualpipev-w'),
        ('3b-1t', 4096, 4, 'dualpipev-w'),
        ('nemotron-h-8b', 1024, 2, '1f1b'),
    ],
)
def test_layouts_beyond_those_with_a_name(show, launcher, capsys, name, gpus, tp, schedule):
    """1280 sequences on 256 replicas are 5 microbatches, fewer than 2 x pp = 8."""
    status, out, _ = show(f'show {name} --gpus {gpus} --json')
    layout = json.loads(out)['layout']
    assert status == 0 and (layout['gpus'], layout['tp']) == (gpus, tp)
    assert layout['schedule'] == schedule
    assert layout['pp'] == LAYOUTS[name]['64gpu'].pp and layout['ep'] == LAYOUTS[name]['64gpu'].ep
    assert launcher.main([name, '--gpus', str(gpus), '--print']) == 0
    script = capsys.readouterr().out
    assert f'--pipeline-schedule {schedule}\n' in script
    assert f'--nnodes {gpus // 8}\n' in script and f':-{32 if tp == 1 else 1}}}' in script


def test_a_hybrid_recipe_prints_flags_of_its_layout(show):
    """On a pipeline that no layout has by name."""
    status, out, _ = show('show nemotron-h-8b --layout 1gpu --gpus 4 --pp 4')
    assert status == 0 and '--pipeline-schedule 1f1b' in out
    words = shlex.split(out[out.index('--hybrid-layer-pattern') :].replace('\\\n', ' '))
    assert words[1].count('|') == 3 and '--mhc-recompute-layer-num' in words
    assert '--mhc-' not in show('show nemotron-h-8b --residual-type standard')[1]


def test_list_names_every_recipe(show):
    assert [row['name'] for row in json.loads(show('list --json')[1])] == list(RECIPES)
    assert all(name in show('list')[1] for name in RECIPES)


@pytest.mark.parametrize(
    ('line', 'said'),
    [
        ('show 27b --pp 16 --gpus 64 --ep 1', 'use at most 15 pipeline ranks'),
        ('show 27b --cp 3 --gpus 24', 'the sequence does not divide by 2 x cp x tp; choose a'),
        ('show 27b --tp 5 --gpus 40 --dp 4', '--tp 5 --cp 1 --ep 4: the attention heads'),
        ('show 27b --gpus 12', '12 ranks are no multiple of tp x pp x ep = 8'),
        ('show 3b --dp 4 --gpus 16', '--dp 4 x tp x pp = 8 ranks, but --gpus 16; drop one'),
        ('show 3b --dp 4 --cp 2 --gpus 4', '--dp 4 x tp x cp x pp = 16 ranks, but --gpus 4'),
        ('show 3b --dp 3 --ep 3', 'a batch of 320 sequences is no multiple of 1'),
        ('show 3b --dp 160', 'needs at least 2 x pp = 4 microbatches'),
        ('show 3b --ep 0', 'argument --ep: 0: wanted an integer from 1'),
        ('show 27b --gpus 16384', '1280 sequences is no multiple of 1 a microbatch x 4096'),
        ('show 27b --gpus 96', 'change one of them; tried with --tp 1, 2, 4, 8'),
        ('show 27b --gpus 96 --tp 1', '1 a microbatch x 24 data-parallel ranks; change one of'),
        ('show 4b', "invalid choice: '4b'"),
        ('show 3b --mhc-manifold birkhoff', 'choose one of sinkhorn, permutation'),
        ('show 3b --residual-type hc --mhc-manifold identity', 'has no effect with'),
    ],
)
def test_wrong_input_is_one_line(show, line, said):
    status, out, err = show(line)
    assert (status, out) == (2, '') and said in err and err.count('\n') == 1


BARE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('megatron', 'torch', 'triton'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Absent())
from megatron_mhc.recipes import answer
from megatron_mhc.recipes.recipe import LAYOUTS, RECIPES
print(answer.describe(RECIPES['3b'], LAYOUTS['3b']['8gpu'])['total'])
"""


def test_figures_need_neither_torch_nor_megatron(tmp_path):
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run(
        [sys.executable, '-c', BARE], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == summary(RECIPES['3b'].shape())['total']


@pytest.mark.parametrize(('name', 'layout'), CASES)
def test_the_printed_script_starts_exactly_the_recipe(
    launcher, name, layout, tmp_path, monkeypatch, capsys
):
    """Run it with a Python that writes down its arguments."""
    python = tmp_path / 'my python'
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$CUDA_DEVICE_MAX_CONNECTIONS" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(python))
    assert launcher.main([name, '--layout', layout, '--print', '--', '--seed', '5 6']) == 0
    script = capsys.readouterr().out
    env = {'PATH': os.environ['PATH'], 'MASTER_ADDR': 'node-1'}
    done = subprocess.run(
        ['bash', '-s', '--', '--exit-interval', '7'],
        input=script,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    connections, *seen = done.stdout.splitlines()
    recipe, layout = RECIPES[name], LAYOUTS[name][layout]
    kind = 'hybrid' if recipe.shape().pattern else 'gpt'
    topics = recipe_flags(recipe, layout)
    flags = [word for topic in topics.values() for line in words(topic) for word in line]
    start = seen.index('-m', seen.index('-m') + 1)
    assert seen[start : start + 3] == ['-m', 'megatron_mhc.run', str(launcher.PRETRAIN[kind])]
    assert seen[start + 3 :][: len(flags)] == flags
    assert seen[-4:] == ['--seed', '5 6', '--exit-interval', '7']
    assert connections == ('32' if layout.tp == 1 else '1')
    ranks = int(seen[seen.index('--nproc-per-node') + 1])
    nodes = int(seen[seen.index('--nnodes') + 1]) if layout.gpus > 8 else 1
    assert ranks * nodes == layout.gpus
    assert ('node-1:29500' in seen) == (nodes > 1)


@pytest.mark.parametrize(
    ('extra', 'connections', 'tp'),
    [
        ([], '32', '1'),
        (['--tensor-model-parallel-size', '2', '--expert-model-parallel-size', '2'], '1', '2'),
        (['--context-parallel-size=2'], '1', '1'),
    ],
)
def test_megatron_gets_the_one_connection_that_it_demands(launcher, extra, connections, tp, capsys):
    """Tensor and context parallelism before Blackwell; a stream of its own then hides nothing."""
    assert launcher.main(['27b', '--layout', '8gpu', '--print', '--', *extra]) == 0
    script = capsys.readouterr().out
    assert f'export {CONNECTIONS}="${{{CONNECTIONS}:-{connections}}}"' in script
    assert f'--tensor-model-parallel-size {tp}\n' in script
    assert ('--mhc-post-stream high' in script) == (connections == '32')
    assert ('--sequence-parallel' in script) == (tp == '2')


def test_what_a_user_gives_is_no_bash(tmp_path):
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    model = '"x y"; touch z'
    topics = {LAUNCHER: torchrun_flags(16, 8), 'DATA_ARGS': {'tokenizer-model': model}}
    text = bash_script('one\ntouch two', [], topics, str(python), '"$(touch three)"', ['"$4"'])
    done = subprocess.run(
        ['bash', '-s'],
        input=text,
        cwd=tmp_path,
        env={'PATH': os.environ['PATH'], 'MASTER_ADDR': 'node-1'},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [path.name for path in tmp_path.iterdir()] == ['python']
    seen = done.stdout.splitlines()
    assert {model, '"$(touch three)"', '"$4"', 'node-1:29500', 'recipe'} <= {*seen}


def test_wrong_ranks_behind_the_dashes_are_one_line(launcher, capsys):
    with pytest.raises(SystemExit) as ended:
        launcher.main(['27b', '--print', '--', '--tensor-model-parallel-size', 'two'])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count('\n') == 1
    assert '--tensor-model-parallel-size: two: wanted an integer from 1' in error


def test_no_number_of_gpus_is_scaled_down(launcher, capsys):
    with pytest.raises(SystemExit) as ended:
        launcher.main('27b --gpus 1024 --scale-down --print'.split())
    out, error = capsys.readouterr()
    assert ended.value.code == 2 and not out and error.count('\n') == 1
    assert '--gpus 1024 has no effect with --scale-down; drop one' in error


def test_nodes_of_a_launch_have_as_many_ranks_each():
    assert torchrun_flags(12, 8) | {'rdzv-id': 0, 'rdzv-endpoint': 0} == {
        **{'nnodes': 2, 'nproc-per-node': 6, 'rdzv-backend': 'c10d'},
        **{'rdzv-id': 0, 'rdzv-endpoint': 0},
    }
    assert torchrun_flags(4, 8) == {'standalone': True, 'nproc-per-node': 4}


def test_several_nodes_need_an_address(launcher, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv('MASTER_ADDR', raising=False)
    assert launcher.main(['9b', '--layout', '64gpu']) != 0
    assert 'MASTER_ADDR: set it to the first of the nodes' in capfd.readouterr().err


@pytest.mark.parametrize('residual_type', ['standard', 'hc', 'mhc'])
def test_baselines_get_no_flag_in_vain(residual_type):
    flags = recipe_flags(RECIPES['3b'], Layout(1), residual_type)['RESIDUAL_ARGS']
    names = shlex.join(flags)
    assert flags['residual-type'] == residual_type
    # A flag of ours that has no effect is refused.
    assert ('mhc-num-residual-streams' in names) == (residual_type != 'standard')
    assert ('sinkhorn' in names) == (residual_type == 'mhc')


@pytest.mark.parametrize(('name', 'layout'), CASES)
def test_scaled_down_recipes_keep_their_flags(name, layout):
    recipe, layout = RECIPES[name], LAYOUTS[name][layout]
    small, fewer = scaled_down(recipe, layout)
    whole, reduced = recipe_flags(recipe, layout), recipe_flags(small, fewer)
    for topic in whole:
        lost = set(whole[topic]) ^ set(reduced[topic])
        assert lost <= {'moe-grouped-gemm', 'pipeline-model-parallel-layout'}
    assert fewer.gpus <= 4 and fewer.microbatches(small.batch) >= 2 * fewer.pp
    assert summary(small.shape())['total'] < 1e6 and small.steps == 20


def test_the_slurm_file_starts_the_recipe_on_every_node(tmp_path):
    """With srun and scontrol played: the name of the first node and a port of the job arrive."""
    played = {
        'scontrol': 'printf "node-7\\nnode-8\\n"',
        'srun': 'shift; exec "$@"',
        'python': 'echo "$MASTER_ADDR $MASTER_PORT $@"',
    }
    for name, body in played.items():
        (tmp_path / name).write_text(f'#!/bin/sh\n{body}\n')
        (tmp_path / name).chmod(0o755)
    env = {
        'PATH': f'{tmp_path}:{os.environ["PATH"]}',
        'SLURM_JOB_NODELIST': 'node-[7-8]',
        'SLURM_JOB_ID': '123456',
    }
    done = subprocess.run(
        ['bash', str(ROOT / 'examples' / 'recipe.slurm'), '27b', '--layout', '64gpu'],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == 'node-7 23456 examples/recipe.py 27b --layout 64gpu'.split()
