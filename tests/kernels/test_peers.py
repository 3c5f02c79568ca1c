"""Other projects' kernels in the model: what is recorded of them, and what the report says."""

import json

import pytest
from reporting import compiling, reports

pytest.importorskip('triton')

import te_wheel  # noqa: E402

from megatron_mhc.kernels.peers.names import PEERS  # noqa: E402
from megatron_mhc.kernels.roofline.predict import LABEL  # noqa: E402

# A peer with a tuned kernel that has a loop, and with one torch kernel.
FAKE = """
import torch
import triton
import triton.language as tl

from megatron_mhc.kernels.peers.contender import Contender


@triton.autotune(
    configs=[
        triton.Config({'BLOCK': size}, num_warps=warps)
        for size, warps in ((128, 1), (1024, 4), (1 << 21, 4))
    ],
    key=['C'],
)
@triton.jit
def tuned_kernel(x_ptr, u_ptr, C, n: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    for start in range(0, tl.cdiv(C, BLOCK)):
        columns = start * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for stream in tl.static_range(n):
            total += tl.load(
                x_ptr + (row * n + stream) * C + columns, mask=columns < C, other=0.0
            ).to(tl.float32)
        tl.store(u_ptr + row * C + columns, total.to(u_ptr.dtype.element_ty), mask=columns < C)


class Fake(Contender):
    name = 'fake'

    def read(self, x, params):
        u = torch.empty(x.shape[0], 1, self.case.hidden, dtype=x.dtype, device=x.device)
        tuned_kernel[lambda meta: (x.shape[0],)](x, u, self.case.hidden, n=self.case.streams)
        return u.requires_grad_(), x

    def write(self, y, state):
        return state.clone()
"""
# In the process itself, with one CPU: three small kernels; then Transformer Engine's launches.
PREDICT = """
import contextlib, json, os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import fake_peer
from megatron_mhc.kernels.peers.contender import Case
from megatron_mhc.kernels.roofline import peers
from megatron_mhc.kernels.roofline.gpus import GPUS
from megatron_mhc.kernels.roofline.loops import loop_counts

gpu, case = GPUS['h200'], Case(4096, 8192, 4)
meter = lambda total: contextlib.nullcontext(lambda done: None)
kernels, eager = peers.sublayer_of(fake_peer.Fake, case, gpu, meter)
((started, _),), _ = peers.added(fake_peer.Fake, case, gpu)
counts = [[count.passes for count in loop_counts(form)] for form in started.forms]
print(json.dumps([peers.as_fields(kernels, eager, gpu), counts]))

alone = []
for config in fake_peer.tuned_kernel.configs[:2]:
    fake_peer.tuned_kernel.configs = [config]
    (kernel,), _ = peers.sublayer_of(fake_peer.Fake, case, gpu, meter)
    alone.append([config.kwargs['BLOCK'], round(kernel.prediction.seconds * 1e6, 1)])
print(json.dumps(alone))

for kind in (peers.TransformerEngine, peers.Ours):
    started, eager = peers.added(kind, case, gpu)
    found = {one.forms[0].name: [times, len(one.forms)] for one, times in started}
    print(json.dumps([found, eager.count, eager.moved]))
"""
VECTOR = 8192 * 4096 * 2  # bytes of a C-wide bf16 vector of every token


@pytest.fixture(scope='module')
def predicted(tmp_path_factory):
    """What ``PREDICT`` printed, with the wheel of Transformer Engine, which is Python, on the path.

    It is fetched where it is absent.
    """
    folder = tmp_path_factory.mktemp('peer')
    (folder / 'fake_peer.py').write_text(FAKE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(te_wheel.unpacked()))
        patch.syspath_prepend(str(folder))
        done = compiling(PREDICT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_tuned_kernel_counts_at_its_fastest(predicted):
    (found, counts), alone, *_ = predicted
    (row,) = found['kernels']
    # 4096 channels in 32 and 4 blocks; the third configuration is more than Triton takes.
    assert counts == [[32.0], [4.0], [1.0]]
    assert row['configurations'] == 3 and row['failed'] == 1 and row['times'] == 1
    block, fastest = min(alone, key=lambda one: one[1])
    assert len(alone) == 2 and alone[0][1] != alone[1][1]
    assert row['microseconds'] == fastest and row['chosen'].startswith(f'BLOCK={block} ')
    # Streams and u, and a copy of the streams: read and written.
    assert found['megabytes'] == pytest.approx(13 * VECTOR / 1e6)
    assert found['torch_kernels'] == 1
    assert found['torch_us'] == pytest.approx(8 * VECTOR / (4.8e6 * 0.896) + 2)
    assert found['predicted_us'] == pytest.approx(row['microseconds'] + found['torch_us'], abs=0.1)
    assert found['spilling'] == []


def test_what_transformer_engine_and_ours_start(predicted):
    """Nothing of it runs, and nothing compiles."""
    found, count, moved = predicted[2]
    assert all(times == 1 for times, _ in found.values()) and len(found) == 10
    # Its pruning leaves 18 of the projection, 12 of F_post,res.
    assert found['_mhc_projection_fwd_fused'][1] == 18
    assert found['_mhc_expand_combine_fwd'][1] == 12
    # Two sums of three gradients of the streams: two reads and a write of n vectors each, at least.
    assert count > 10 and moved > 24 * VECTOR
    ours, count, moved = predicted[3]
    assert all(configurations == 1 for _, configurations in ours.values())
    assert len(ours) <= 8 and count <= 4 and moved < VECTOR


def test_peers_and_measured_times_in_the_report(tmp_path):
    """Absent ones are a line each; ours is left out where kernels of it were not asked for."""
    run = {'gpu': 'h200', 'hidden_size': 4096, 'tokens': 8192, 'dtype': 'bf16', 'triton': '3.8.0'}
    run |= {'date': '2026-12-01', 'microseconds': {'pre_forward 4': 91.7}}
    folder = tmp_path / 'results' / 'made-up'
    folder.mkdir(parents=True)
    (folder / 'kernels.json').write_text(json.dumps(run))
    hidden = (
        'from pathlib import Path\n'
        'from megatron_mhc.commands import kernels_roofline\n'
        f'kernels_roofline.BENCH = Path({str(tmp_path)!r})\n'
        'import importlib.util as u\n'
        'find = u.find_spec\n'
        'u.find_spec = lambda name, *rest: None if name.startswith(("transformer", "liger"))'
        ' else find(name, *rest)\n'
    )
    some = ('--roofline', '--num-streams', '4', '--kernel', 'pre_forward', '--peers')
    text, wrong, apart = reports(
        (*some, 'te', 'liger'), ('--roofline', '--peers', 'flash'), ('--peers', 'te'), code=hidden
    )
    assert text.returncode == 0, text.stdout + text.stderr
    assert f'a sublayer of each, forward + backward: {LABEL}' in text.stdout
    for line in ('te, n = 4: absent: not installed', 'liger, n = 4: absent', 'ours, n = 4: no sum'):
        assert line in text.stdout, text.stdout
    (row,) = (line for line in text.stdout.splitlines() if line.startswith('pre_forward'))
    assert row.endswith('92 (made-up, Triton 3.8.0)'), row
    for result, words in (
        (wrong, ('--peers: flash', 'liger', 'megatron')),
        (apart, ('--peers: te', '--roofline')),
    ):
        assert result.returncode == 2 and not result.stdout
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert all(word in result.stderr for word in words), result.stderr


def test_names_are_those_of_the_kinds():
    from megatron_mhc.kernels.roofline.peers import KINDS

    assert tuple(kind.name for kind in KINDS) == PEERS
    assert all(kind.__doc__ for kind in KINDS)
