"""Megatron's real pretrain loop on the emulated CPU device, compared across parallel layouts."""

import argparse

import pytest
import torch
from launch import launch
from loop_cases import resume, spawn

from megatron_mhc.compat import core_version
from megatron_mhc.patches.cpu_arguments import CPU_ARGUMENTS_PATCH, DEFAULTS

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or core_version() is None,
    reason='the CPU device stands in for CUDA under megatron-core',
)

DROPOUT = '--hidden-dropout 0.1 --attention-dropout 0.1 '
MOE = (
    '--num-layers 2 --num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 1e-2 --swiglu '
    '--moe-router-load-balancing-type aux_loss --moe-token-dispatcher-type alltoall '
    '--disable-bias-linear '
)
OVERLAP = '--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather '
FLOAT = '--bf16 --with-float-parameters '
INTERLEAVED = '--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 '


def weights(path):
    return f'--load {path} --ckpt-step 3 --no-load-optim --finetune '


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('cpu_device')


@pytest.fixture(scope='module')
def alone(folder):
    dense, moe, dropout, half = (folder / n for n in ('dense', 'moe', 'dropout', 'half'))
    return spawn(
        folder,
        1,
        {
            'dense': f'--save {dense}',
            'dense resumed': resume(dense),
            'dense recomputed': resume(dense)
            + '--recompute-granularity selective --recompute-modules layernorm',
            'dense weights': weights(dense),
            'dropout': f'{DROPOUT} --save {dropout}',
            'dropout resumed': f'{DROPOUT} --load {dropout} --ckpt-step 3',
            'moe': f'{MOE} --save {moe}',
            'moe weights': MOE + weights(moe),
            'half': f'{FLOAT} --save {half}',
            'half resumed': FLOAT + resume(half),
            'latent attention': '--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 16 '
            '--qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 8 --position-embedding-type rope',
        },
    )


@pytest.fixture(scope='module')
def pair(folder, alone):
    dense, moe, half = (folder / name for name in ('dense', 'moe', 'half'))
    sharded, flat = folder / 'sharded', folder / 'flat'
    return spawn(
        folder,
        2,
        {
            'pp2 vpp2': INTERLEAVED + resume(dense),
            'tp2 sp': '--tensor-model-parallel-size 2 --sequence-parallel ' + resume(dense),
            'dp2': resume(dense),
            'dp2 overlap': OVERLAP + weights(dense),
            'ep2': '--expert-model-parallel-size 2 ' + MOE + weights(moe),
            'half pp2 vpp2': INTERLEAVED + FLOAT + resume(half),
            'half sharded': f'{FLOAT} {OVERLAP} --save {sharded}',
            'half sharded resumed': FLOAT + OVERLAP + resume(sharded),
            'half flat': f'{FLOAT} {OVERLAP} --dist-ckpt-optim-fully-reshardable --save {flat}',
            'half flat resumed': f'{FLOAT} {OVERLAP} --dist-ckpt-optim-fully-reshardable '
            + resume(flat),
            'mtp pp2 vpp2': INTERLEAVED + '--mtp-num-layers 1 --position-embedding-type rope',
        },
    )


@pytest.fixture(scope='module')
def four(folder, alone):
    return spawn(folder, 4, {'pp2 vpp2 dp2': INTERLEAVED + OVERLAP + weights(folder / 'dense')})


def assert_close(run, reference, loss=3e-7, grad_norm=5e-6):
    assert len(run) == len(reference) > 1
    for (l1, g1), (l0, g0) in zip(run, reference, strict=True):
        assert l1 == pytest.approx(l0, rel=loss)
        assert g1 == pytest.approx(g0, rel=grad_norm)


@pytest.mark.parametrize('name', ['dense', 'moe', 'half', 'latent attention'])
def test_loss_falls(alone, name):
    losses = [loss for loss, _ in alone[name]]
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize('name', ['dense', 'dropout', 'half'])
def test_resume_is_bit_exact(alone, name):
    assert alone[f'{name} resumed'] == alone[name][3:]


@pytest.mark.parametrize('name', ['half sharded', 'half flat'])
def test_distributed_optimizer_resume_is_bit_exact(pair, name):
    assert pair[f'{name} resumed'] == pair[name][3:]


def test_selective_recompute_is_bit_exact(alone):
    assert alone['dense recomputed'] == alone['dense resumed']


@pytest.mark.parametrize('layout', ['pp2 vpp2', 'tp2 sp', 'dp2'])
def test_layouts_agree_with_one_rank(alone, pair, layout):
    assert_close(pair[layout], alone['dense resumed'])


def test_distributed_optimizer_with_overlap_agrees(alone, pair):
    assert_close(pair['dp2 overlap'], alone['dense weights'])


def test_expert_parallel_alltoall_agrees(alone, pair):
    assert_close(pair['ep2'], alone['moe weights'])


def test_half_precision_with_float_parameters_agrees(alone, pair):
    # bf16 rounding differs by layout from the second iteration on.
    assert_close(pair['half pp2 vpp2'], alone['half resumed'], loss=1e-3, grad_norm=1e-2)


def test_multi_token_prediction_runs_interleaved(pair):
    assert pair['mtp pp2 vpp2'][-1][0] < pair['mtp pp2 vpp2'][0][0]


def test_pipeline_and_sharded_optimizer_together_agree(alone, four):
    assert_close(four['pp2 vpp2 dp2'], alone['dense weights'])


EMULATED = """
from megatron_mhc.runtime import cpu_device
cpu_device.install()
cpu_device.install()
import torch
assert cpu_device.is_installed() and not torch.cuda.is_available()
assert torch.cuda.device_count() == 1 and torch.cuda.current_device() == 0
x = torch.zeros(2, device='cuda:0', pin_memory=True)
assert x.device.type == 'cpu' and x.type() == 'torch.cuda.FloatTensor'
assert x.to('cuda', torch.bfloat16).cuda().type() == 'torch.cuda.BFloat16Tensor'
assert torch.empty_like(x, device=0).new_zeros(3, device='cuda').device.type == 'cpu'
assert torch.nn.Linear(2, 2).to(0).weight.to(device=torch.device('cuda')).device.type == 'cpu'
side = torch.cuda.Stream()
with torch.cuda.stream(side):
    assert torch.cuda.current_stream() is side
assert torch.cuda.current_stream() is torch.cuda.default_stream()
side.record_event().synchronize()
assert torch.cuda.memory_stats()['allocated_bytes.all.peak'] == 0
state = torch.cuda.get_rng_state()
first = torch.rand(3)
torch.cuda.set_rng_state(state)
assert torch.equal(first, torch.rand(3, device='cuda'))
before = torch.get_rng_state()
next(iter(torch.utils.data.DataLoader([1, 2], pin_memory=True)))
assert torch.equal(before, torch.get_rng_state())
"""


def test_emulation_answers_like_a_device():
    done = launch(0, '-c', EMULATED)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and 'emulated' in done.stdout


@pytest.mark.parametrize(
    ('before', 'said'),
    [
        ('import megatron.core', 'before any megatron import'),
        ('import torch; torch.cuda.is_available = lambda: True', 'on a machine with CUDA'),
    ],
)
def test_install_refuses(before, said):
    install = 'from megatron_mhc.runtime import cpu_device\ncpu_device.install()'
    done = launch(0, '-c', f'{before}\n{install}')
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]


def parser():
    def add_megatron_arguments(parser):
        parser.add_argument('--transformer-impl', default='transformer_engine')
        parser.add_argument('--distributed-backend', default='nccl')
        parser.add_argument('--context-parallel-size', type=int, default=1)
        return parser

    return CPU_ARGUMENTS_PATCH.wrap(add_megatron_arguments)(argparse.ArgumentParser(prog='train'))


def test_defaults_suit_the_cpu():
    args = parser().parse_args([])
    assert {name: getattr(args, name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    ('flag', 'value', 'reason'),
    [
        ('--distributed-backend', 'nccl', 'gloo'),
        ('--transformer-impl', 'transformer_engine', 'CUDA'),
        ('--context-parallel-size', '2', 'attention'),
    ],
)
def test_what_the_cpu_cannot_do_is_refused_in_one_line(capsys, flag, value, reason):
    with pytest.raises(SystemExit):
        parser().parse_args([flag, value])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'train: error: {flag} {value}: ') and reason in line
