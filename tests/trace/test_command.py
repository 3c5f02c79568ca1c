"""``megatron-mhc schedule trace`` on made-up traces whose numbers are worked out by hand."""

import argparse
import gzip
import json
import sqlite3
from pathlib import Path

import pytest

from megatron_mhc.inputs.refusal import OneLineParser
from megatron_mhc.kernels.profiler_names import FUSED_EDGE, POST_KERNELS, POST_RANGE
from megatron_mhc.trace import answer
from megatron_mhc.trace import command as schedule_trace
from megatron_mhc.trace.events import Kernel, Range, read_trace
from megatron_mhc.trace.overlap import kind_of, overlap, union

SENDRECV = 'ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)'
GATHER = 'ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)'
POST_F, POST_B = POST_KERNELS
MAIN, AUTOGRAD = 100, 200
# Kernels (name, start, end, stream, host thread, launched) and ranges (name, start, end, thread),
# all times in us. On compute, GEMMs run at 0-100, 90-160 (another stream) and 300-400: 260 of 1000
# us have compute.
#   send   50-200: 40 of 150 bare
#   recv  350-450: 50 of 100 bare; both: 90 of 250
#   all-to-all 140-180: 20 of 40 bare, and 20 more at 500-520 that DeepEP runs: 40 of 60
#   all-gather 380-420 and, at once, 400-460: 60 of 80 bare
# F_post,res, forward at 165, launched early, 5 us after the GEMM of the same thread ended; backward
# at 470 on the other thread, whose input is the message of 450; one in a fused edge: not counted.
KERNELS = [
    ('gemm', 0, 100, 7, MAIN, 0),
    ('gemm', 90, 160, 9, MAIN, 20),
    (POST_F, 165, 165, 20, MAIN, 30),
    (SENDRECV, 50, 200, 30, MAIN, 34),
    (SENDRECV, 350, 450, 31, MAIN, 44),
    (SENDRECV, 140, 180, 32, MAIN, 54),
    ('void deep_ep::intranode::dispatch<8>(int)', 500, 520, 33, MAIN, 64),
    (GATHER, 380, 420, 34, MAIN, 74),
    (GATHER, 400, 460, 35, MAIN, 75),
    ('gemm', 300, 400, 7, AUTOGRAD, 10),
    (POST_B, 470, 470, 20, AUTOGRAD, 90),
    (POST_B, 400, 400, 7, AUTOGRAD, 95),
    ('adam', 1000, 1000, 7, MAIN, 900),
]
RANGES = [
    ('(0F1;7B2)FUSE', 0, 33, MAIN),
    ('3SEND_F5', 33, 35, MAIN),
    ('c10d::recv_', 43, 45, MAIN),
    # Ends on another thread, long after; what is launched meanwhile is not part of it.
    ('nccl:recv 0<-1', 44, 460, MAIN),
    ('c10d::alltoall_base_', 53, 55, MAIN),
    ('WriteReadBackward', 94, 96, AUTOGRAD),
]


def chrome(kernels=KERNELS, ranges=RANGES, rank=3, device=0, launches=True, priority=-1) -> dict:
    events = [{'ph': 'M', 'name': 'process_name', 'pid': 1, 'args': {'name': 'python'}}]
    for number, (name, start, end, stream, thread, launched) in enumerate(kernels):
        args = {'device': device, 'stream': stream, 'correlation': number}
        if stream == 20 and priority is not None:
            args['priority'] = priority
        common = {'ph': 'X', 'ts': start, 'dur': end - start}
        events.append(
            common | {'cat': 'kernel', 'name': name, 'pid': device, 'tid': stream, 'args': args}
        )
        launch = {
            'cat': 'cuda_runtime',
            'name': 'cudaLaunchKernel',
            'args': {'correlation': number},
        }
        launch |= {'ph': 'X', 'pid': 1, 'tid': thread, 'ts': launched, 'dur': 1}
        events += [launch] * launches
    for name, start, end, thread in ranges:
        category = 'cpu_op' if name.startswith('c10d') else 'user_annotation'
        span = {'ph': 'X', 'cat': category, 'name': name, 'ts': start, 'dur': end - start}
        events.append(span | {'pid': 1, 'tid': thread})
    found = {'schemaVersion': 1, 'traceEvents': events}
    return found | ({'distributedInfo': {'rank': rank}} if rank is not None else {})


def write(path: Path, trace: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(trace).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
    return path


def write_nsys(path: Path, kernels=KERNELS, ranges=RANGES, process=1 << 24) -> Path:
    names = sorted({kernel[0] for kernel in kernels} | {'c10d::recv_'})
    with sqlite3.connect(path) as database:
        database.executescript("""
            CREATE TABLE StringIds (id INTEGER, value TEXT);
            CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INT, end INT, deviceId INT, streamId INT,
                correlationId INT, globalPid INT, demangledName INT, shortName INT);
            CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INT, end INT, globalTid INT,
                correlationId INT, nameId INT);
            CREATE TABLE NVTX_EVENTS (start INT, end INT, eventType INT, text TEXT, globalTid INT,
                textId INT);
            CREATE TABLE TARGET_INFO_CUDA_STREAM (streamId INT, priority INT);
            INSERT INTO TARGET_INFO_CUDA_STREAM VALUES (7, 0), (20, -1);
        """)
        run = database.executemany
        run('INSERT INTO StringIds VALUES (?, ?)', enumerate(names))
        rows = [
            (start * 1000, end * 1000, stream, number, process, names.index(name))
            for number, (name, start, end, stream, _, _) in enumerate(kernels)
        ]
        run('INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, 0, ?, ?, ?, ?, 0)', rows)
        rows = [
            (launched * 1000, launched * 1000 + 9, process + thread, number)
            for number, (_, _, _, _, thread, launched) in enumerate(kernels)
        ]
        run('INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, ?, 0)', rows)
        rows = []
        for name, start, end, thread in ranges:
            registered = name in names
            text, text_id = (None, names.index(name)) if registered else (f'{name}, seq = 4', None)
            rows.append((start * 1000, end * 1000, text, process + thread, text_id))
        # A mark has no end.
        rows.append((5, None, 'mark', process + MAIN, None))
        run('INSERT INTO NVTX_EVENTS VALUES (?, ?, 59, ?, ?, ?)', rows)
    database.close()
    return path


def options(*arguments) -> argparse.Namespace:
    parser = OneLineParser()
    schedule_trace.add_parser(parser.add_subparsers(dest='topic'))
    return parser.parse_args(['trace', *map(str, arguments)])


def run(capsys, *arguments) -> tuple[int, dict]:
    code = answer.main(options('--json', *arguments))
    return code, json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        answer.main(options(*arguments))
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 1
    return err


def check_numbers(row: dict) -> None:
    assert row['kernels'] == len(KERNELS)
    assert row['span_ms'] == pytest.approx(1.0)
    assert row['idle'] == pytest.approx(1 - 0.26)
    for name, (number, time, bare) in {
        'p2p': (2, 250, 90),
        'send': (1, 150, 40),
        'recv': (1, 100, 50),
        'all_to_all': (2, 60, 40),
        'collectives': (2, 80, 60),
    }.items():
        assert row[name]['kernels'] == number, name
        assert row[name]['ms'] == pytest.approx(time / 1e3), name
        assert row[name]['exposed_ms'] == pytest.approx(bare / 1e3), name
        assert row[name]['exposed'] == pytest.approx(bare / time), name
    post = row['post_res']
    assert (post['calls'], post['measured'], post['launched_late']) == (2, 2, 0)
    assert post['delay_us'] == pytest.approx({'median': 12.5, '90th': 20.0, 'max': 20.0})
    assert post['streams'] == [{'stream': 20, 'priority': -1, 'calls': 2, 'shared': False}]


@pytest.mark.parametrize('name', ['a.json', 'a.json.gz'])
def test_chrome_trace(name, tmp_path, capsys):
    code, found = run(capsys, write(tmp_path / name, chrome()))
    assert code == 0 and found['ok'] and found['exceeded'] == []
    (row,) = found['ranks']
    assert row['rank'] == 3
    check_numbers(row)


def test_nsys_export(tmp_path, capsys):
    _, found = run(capsys, write_nsys(tmp_path / 'step_rank2.sqlite'))
    (row,) = found['ranks']
    assert row['rank'] == 2
    check_numbers(row)


def test_nsys_names_of_ranges(tmp_path):
    kernels = [(SENDRECV, 0, 1, 30, MAIN, 44), ('elementwise', 2, 3, 20, MAIN, 50)]
    spans = [('c10d::recv_', 43, 45, MAIN), (POST_RANGE, 49, 51, MAIN)]
    trace = read_trace(write_nsys(tmp_path / 'a.sqlite', kernels, spans))
    assert [[span.name for span in kernel.ranges] for kernel in trace.kernels] == [
        ['c10d::recv_'], [POST_RANGE],
    ]  # fmt: skip


def test_a_batch_is_neither_send_nor_recv(tmp_path, capsys):
    trace = chrome([(SENDRECV, 0, 9, 30, MAIN, 1)], [('nccl:send_recv', 0, 2, MAIN)])
    (row,) = run(capsys, write(tmp_path / 'a.json', trace))[1]['ranks']
    assert (row['p2p']['kernels'], row['send'], row['recv']) == (1, None, None)


def test_ranks_add_up_to_a_total_by_folder(tmp_path, capsys):
    # Half the send, nothing bare; no F_post,res.
    other = [('gemm', 0, 500, 7, MAIN, 0), (SENDRECV, 0, 250, 30, MAIN, 34)]
    files = [
        write(tmp_path / run_name / 'torch_profile' / f'rank-{rank}.json.gz', trace)
        for run_name, rank, trace in (
            ('v-high', 0, chrome(rank=None)),
            ('v-high', 1, chrome(other, rank=None)),
            ('1f1b', 0, chrome(other, rank=None)),
        )
    ]
    _, found = run(capsys, *files)
    assert [(row['run'], row['rank']) for row in found['ranks']] == [
        ('v-high', 0), ('v-high', 1), ('1f1b', 0),
    ]  # fmt: skip
    total, stock = found['totals']
    assert (total['run'], stock['run']) == ('v-high', '1f1b')
    assert total['p2p']['exposed'] == pytest.approx(90 / 500)
    assert total['idle'] == pytest.approx(1 - (260 + 500) / (1000 + 500))
    assert total['post_res']['calls'] == 2 and stock['post_res'] is None
    assert stock['p2p']['exposed'] == 0 and stock['all_to_all'] is None

    answer.main(options(*files))
    text = capsys.readouterr().out
    table = [line.split() for line in text.split('\n\n')[0].splitlines()]
    assert [row[:2] for row in table[1:]] == [
        ['v-high', '0'], ['v-high', '1'], ['v-high', 'all'], ['1f1b', '0'], ['1f1b', 'all'],
    ]  # fmt: skip
    assert table[1][2:] == (
        '1.0 74.0% 36.0% 26.7% 50.0% 66.7% 75.0% 2 12.5 20.0 1 (-1)'.split()
    )  # fmt: skip
    for advice in ('CUDA_DEVICE_MAX_CONNECTIONS', 'dualpipev-w', '--overlap-grad-reduce'):
        assert advice in text


def post_at(start, kernels=(), ranges=(), name=POST_F, launched=500):
    """One GEMM of the main thread until 100, more, then an F_post,res at ``start``."""
    first = ('gemm', 0, 100, 7, MAIN, 0)
    post = (name, start, start + 10, 20, MAIN, launched)
    return chrome([first, *kernels, post], ranges)


def delay_of(capsys, path, trace):
    _, found = run(capsys, write(path, trace))
    post = found['ranks'][0]['post_res']
    return post and (post['delay_us'] and post['delay_us']['max'])


def test_delay(tmp_path, capsys):
    def delay(trace):
        return delay_of(capsys, tmp_path / 'a.json', trace)

    other = ('gemm', 100, 900, 7, AUTOGRAD, 1)
    message = (SENDRECV, 400, 700, 30, AUTOGRAD, 2)
    sent = (SENDRECV, 400, 750, 31, AUTOGRAD, 3)
    own = ('gemm', 100, 800, 7, MAIN, 4)
    dispatch = ('ncclDevKernel_SendRecv()', 100, 600, 32, MAIN, 1)
    is_send, is_dispatch = ('c10d::send', 3, 3, AUTOGRAD), ('_AllToAll', 1, 1, MAIN)
    # Behind its own GEMM; what the same thread launched and is still running is no input.
    assert delay(post_at(105)) == 5
    assert delay(post_at(105, [own])) == 5
    assert delay(post_at(820, [own])) == 20
    # Another thread in between: a new pass, on what a message brought, if one arrived since.
    assert delay(post_at(950, [other])) is None
    assert delay(post_at(950, [other, message])) == 250
    assert delay(post_at(950, [other, message, sent], [is_send])) == 250
    assert delay(post_at(650, [other, message])) is None
    # After an all-to-all of its own, whatever the other thread did meanwhile.
    assert delay(post_at(950, [other, dispatch, message], [is_dispatch])) == 350
    # A message from before does not count.
    early = (SENDRECV, 10, 50, 30, AUTOGRAD, 2)
    assert delay(post_at(950, [other, early])) is None
    # Only within the range is it part of a fused edge.
    assert delay(post_at(105, (), [('WriteRead', 1, 2, MAIN)])) == 5
    assert delay(post_at(105, (), [('WriteRead', 1, 501, MAIN)])) is None
    # Nothing to tell by.
    assert delay(chrome(launches=False)) is None
    assert delay(chrome([('gemm', 0, 9, 7, MAIN, 0)])) is None


def test_range_of_the_torch_backend_is_one_call(tmp_path, capsys):
    pieces = [('elementwise', at, at + 5, 20, MAIN, at) for at in (130, 140, 150)]
    spans = [(POST_RANGE, 125, 155, MAIN), ('aten::mul', 129, 131, MAIN)]
    _, found = run(capsys, write(tmp_path / 'a.json', post_at(115, pieces, spans, 'gemm', 110)))
    post = found['ranks'][0]['post_res']
    assert post['calls'] == 1 and post['delay_us']['max'] == 5
    assert post['launched_late'] == 1


def test_advice_follows_what_delays_it(tmp_path, capsys):
    kernels = [('gemm', i, i + 1, 20, AUTOGRAD, 2 * i) for i in range(3)]
    for name, extra, expected in (
        ('a', kernels, '--mhc-post-stream high'),
        ('b', [], 'persistent'),
    ):
        path = write(tmp_path / f'{name}.json', post_at(300, extra, launched=0.5))
        answer.main(options(path))
        assert expected in capsys.readouterr().out


def test_streams_without_priority(tmp_path, capsys):
    _, found = run(capsys, write(tmp_path / 'a.json', chrome(priority=None)))
    assert found['ranks'][0]['post_res']['streams'][0]['priority'] is None


@pytest.mark.parametrize(
    ('name', 'labels', 'expected'),
    [
        ('gemm', ['c10d::send'], 'compute'),
        ('triton_poi_fused_all_to_all_single_0', [], 'compute'),
        (SENDRECV, [], 'p2p'),
        (SENDRECV, ['record_param_comms', 'c10d::alltoall_', '3SEND_F5'], 'all_to_all'),
        (SENDRECV, ['nccl:recv 0<-1', '_AllToAllBackward'], 'p2p'),
        (SENDRECV, ['c10d::gather_'], 'collectives'),
        ('ncclDevKernel_AlltoAll_LSA()', [], 'all_to_all'),
        (GATHER, ['c10d::send'], 'collectives'),
        ('ncclSymkDevKernel_AllReduce', [], 'collectives'),
        ('rcclGenericKernel', ['send'], 'p2p'),
    ],
)
def test_kinds(name, labels, expected):
    assert kind_of(Kernel(name, 0, 1, 0, ranges=tuple(Range(0, 1, x) for x in labels))) == expected


def test_collective_name_decides(tmp_path):
    trace = chrome([(SENDRECV, 0, 1, 7, MAIN, 0)], [('c10d::send', 0, 1, MAIN)])
    trace['traceEvents'][1]['args']['Collective name'] = 'all_to_allv'
    (kernel,) = read_trace(write(tmp_path / 'a.json', trace)).kernels
    assert kind_of(kernel) == 'all_to_all'


def test_interval_arithmetic():
    kernels = [Kernel('', *span, 0) for span in ((5, 9), (0, 4), (3, 6), (20, 30), (22, 25))]
    assert union(kernels) == [(0, 9), (20, 30)]
    assert overlap([(0, 9), (20, 30)], [(8, 21), (29, 40), (50, 60)]) == 1 + 1 + 1
    assert overlap([], [(0, 1)]) == 0


def test_kernel_names_are_the_shipped_ones():
    source = (Path(__file__).parents[2] / 'kernels/triton/post_res.py').read_text()
    fused_edge = (Path(__file__).parents[2] / 'kernels/autograd/fused_edge.py').read_text()
    assert all(f'def {name}(' in source for name in POST_KERNELS)
    assert f'class {FUSED_EDGE}(Function)' in fused_edge


@pytest.mark.parametrize(
    ('limit', 'below', 'above', 'words'),
    [
        ('--max-exposed-p2p', 0.35, 0.37, 'SEND/RECV exposed 36.0%'),
        ('--max-exposed-all-to-all', 0.6, 0.7, 'all-to-all exposed 66.7%'),
        ('--max-exposed-collectives', 0.7, 0.75, 'collectives exposed 75.0%'),
        ('--max-idle', 0.7, 0.75, 'idle 74.0%'),
        ('--max-post-delay', 19.9, 20.0, 'F_post,res delay, 90th percentile 20.0 us'),
    ],
)
def test_limits(limit, below, above, words, tmp_path, capsys):
    path = write(tmp_path / 'a.json', chrome())
    code, found = run(capsys, limit, above, path)
    assert code == 0 and found['ok']
    code, found = run(capsys, limit, below, path)
    assert code == 1 and not found['ok']
    (line,) = found['exceeded']
    assert words in line and str(path) in line
    assert answer.main(options(limit, below, path)) == 1
    assert f'exceeded: {line}' in capsys.readouterr().out


@pytest.mark.parametrize('limit', ['--max-exposed-p2p', '--max-post-delay'])
def test_a_limit_on_nothing_is_refused(limit, tmp_path, capsys):
    path = write(tmp_path / 'a.json', chrome([('gemm', 0, 9, 7, MAIN, 0)]))
    assert f'{limit}: nothing of that kind' in refusal(capsys, limit, 0.1, path)


@pytest.mark.parametrize('value', ['1.5', '-0.1', 'nan', 'x'])
def test_wrong_limit(value):
    with pytest.raises(SystemExit):
        options(f'--max-exposed-p2p={value}', 'a')


def test_bad_files(tmp_path, capsys):
    whole = write(tmp_path / 'whole.json.gz', chrome())
    two = chrome()['traceEvents'] + chrome(device=1)['traceEvents']
    processes = [event | ({'pid': 2} if event.get('tid') == MAIN else {})
                 for event in chrome()['traceEvents']]  # fmt: skip
    texts = {
        'short.json.gz': (whole.read_bytes()[:-40], 'the gzip file ends early'),
        'bad.json.gz': (whole.read_bytes()[:30] + b'x' * 30, 'damaged gzip'),
        'text.json': (b'hello', 'not JSON'),
        'cut.json': (json.dumps(chrome()).encode()[:-9], 'or cut off'),
        'binary.json': (b'\xff\xfe\x00', 'not JSON'),
        'other.json': (b'{"a": 1}', 'not a Chrome trace'),
        'number.json': (b'[1]', 'not a Chrome trace'),
        'cpu.json': (json.dumps(chrome([])).encode(), 'no GPU kernels'),
        'odd.json': (b'[{"ph": "X", "cat": "kernel", "args": {}}]', 'not as torch writes it'),
        'two.json': (json.dumps(two).encode(), 'several GPUs (0, 1)'),
        'processes.json': (json.dumps(processes).encode(), 'kernels of 2 processes'),
        'a.nsys-rep': (b'QDSTRM', 'nsys export --type sqlite'),
    }
    for name, (data, expected) in texts.items():
        path = tmp_path / name
        path.write_bytes(data)
        said = refusal(capsys, whole, path)
        assert expected in said and str(path) in said, (name, said)
    assert 'No such file' in refusal(capsys, tmp_path / 'missing.json')
    assert 'missing.json' in refusal(capsys, tmp_path / 'missing.json')


def test_bad_nsys_files(tmp_path, capsys):
    path = write_nsys(tmp_path / 'a.sqlite')
    with sqlite3.connect(path) as database:
        database.execute('UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET globalPid = 9 WHERE start = 0')
    assert 'kernels of 2 processes' in refusal(capsys, path)
    with sqlite3.connect(path) as database:
        database.execute('UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET deviceId = 1 WHERE start = 0')
    assert 'several GPUs' in refusal(capsys, path)
    with sqlite3.connect(path) as database:
        database.execute('DELETE FROM CUPTI_ACTIVITY_KIND_KERNEL')
    assert 'no GPU kernels' in refusal(capsys, path)
    with sqlite3.connect(path) as database:
        database.execute('DROP TABLE CUPTI_ACTIVITY_KIND_KERNEL')
    assert 'no GPU kernels' in refusal(capsys, path)
    with sqlite3.connect(path) as database:
        database.execute('DROP TABLE StringIds')
    assert 'not an export of nsys' in refusal(capsys, path)
    database.close()
    path.write_bytes(write_nsys(tmp_path / 'b.sqlite').read_bytes()[:5000])
    assert 'damaged' in refusal(capsys, path)
