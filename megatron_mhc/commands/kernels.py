"""``megatron-mhc kernels``: the options of its topics; what they need is torch and Triton."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from megatron_mhc.inputs.options import STREAMS, WithDefaults, add_option
from megatron_mhc.inputs.values import MOST_TOKENS, MOST_WIDTH, input_file, integer
from megatron_mhc.kernels.defaults import ACCURACY_SIZES, ARCHITECTURES, DTYPES, KERNEL_STREAMS
from megatron_mhc.kernels.peers import names as peer_names
from megatron_mhc.kernels.roofline.names import NAMES, RECORDED, known

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

RECORD = Path(__file__).parents[1] / 'kernels' / 'record.json'
_REPORT = """
Compiles the kernels of a training step with the Triton that Python finds, judges them (spills,
room, vector width, matrix units, occupancy and predicted speed beside kernels/record.json), then
prints what each form of the residual reads and writes (mHC, Table 2, and ours).
"""
_ACCURACY = """
Runs every op forward and backward on random inputs and prints the relative RMS error of each output
and gradient with its bound.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The topics of ``megatron-mhc kernels``."""
    topics = parser.add_subparsers(dest='topic', required=True)
    _add_report(topics)
    _add_accuracy(topics)


def _add_report(topics: Any) -> None:
    parser = topics.add_parser(
        'report',
        help='compile every kernel, without a GPU, and check what it takes',
        description=_REPORT,
        formatter_class=WithDefaults,
    )
    add = parser.add_argument
    add('--arch', type=_arch, nargs='+', default=[*ARCHITECTURES], help='compute capabilities')
    streams = {'dest': 'num_streams', 'type': _streams, 'nargs': '+', 'metavar': 'N'}
    add_option(add, STREAMS, default=[1, 2, 4], help='n', **streams)
    add('--hidden-size', type=integer(1, MOST_WIDTH), default=4096, help='C')
    add('--tokens', type=integer(1, MOST_TOKENS), default=8192, help='T, sequence times microbatch')
    add('--dtype', type=_dtype, default='bf16', help='of the streams: bf16, fp16 or fp32')
    add('--kernel', nargs='+', default=None, help='only rows that begin like this')
    add('--record', type=_record, default=str(RECORD), help='what each Triton version made')
    add('--roofline', action='store_true', help='print times on a GPU: predicted, not measured')
    add('--gpu', type=_gpu, help=f'of --roofline: {", ".join(NAMES)} (default: {RECORDED})')
    add(
        '--peers',
        nargs='+',
        type=_peer,
        metavar='PEER',
        help=f'of --roofline: predict these too, all or of {", ".join(peer_names.PEERS)}',
    )
    add('--json', action='store_true', help='print one JSON object')
    parser.set_defaults(answer='megatron_mhc.commands.kernels_report')


def _add_accuracy(topics: Any) -> None:
    parser = topics.add_parser(
        'accuracy', help='run every kernel and compare it with fp64', description=_ACCURACY
    )
    add = parser.add_argument
    devices = sorted(ACCURACY_SIZES)
    add('--device', choices=devices, help='default: cuda where there is one, else cpu')
    streams = sorted(KERNEL_STREAMS)
    add_option(
        add,
        STREAMS,
        dest='num_streams',
        metavar='N',
        type=integer(),
        choices=streams,
        default=4,
        help=f'n: {", ".join(map(str, streams))} (default: 4)',
    )
    add('--hidden-size', type=integer(1, 2**16), help='C (default: 4096, on the CPU 100)')
    add('--tokens', type=integer(1, 2**20), help='T (default: 2048, on the CPU 35)')
    add('--dtype', choices=sorted(DTYPES), default='bf16', help='of the streams (default: bf16)')
    add('--seed', type=integer(0, 2**63 - 1), help='of the inputs (default: a fresh one)')
    add('--json', action='store_true', help='print one JSON object')
    parser.set_defaults(answer='megatron_mhc.commands.kernels_accuracy')


def _arch(text: str) -> int:
    return _one_of(text, ARCHITECTURES, 'the kernels are checked for sm_80 and later')


def _streams(text: str) -> int:
    return _one_of(text, KERNEL_STREAMS, 'the kernels are written for some numbers of streams')


def _dtype(text: str) -> str:
    return _one_of(text, DTYPES, 'no kernel takes it')


def _gpu(text: str) -> str:
    try:
        return known(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _peer(text: str) -> str:
    try:
        return peer_names.known(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _one_of(text: str, known: Iterable[Any], why: str) -> Any:
    found = {str(value): value for value in known}
    if text not in found:
        raise argparse.ArgumentTypeError(f'{text}: {why}; take one of {" ".join(found)}')
    return found[text]


def _record(text: str) -> dict[str, Any]:
    path = input_file(text)
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f'{text}: {error}; leave it out') from None
    keys = {'triton', 'dtype', 'kernels', 'exceptions'}
    if not isinstance(record, dict) or not keys <= record.keys():
        wanted = ', '.join(sorted(keys))
        raise argparse.ArgumentTypeError(
            f'{text}: no record, which has the keys {wanted}; tools/kernel_record.py makes one'
        )
    predicted = record.get('predicted')
    keys = {'gpu', 'hidden_size', 'tokens', 'kernels'}
    if predicted and not (isinstance(predicted, dict) and keys <= predicted.keys()):
        wanted = ', '.join(sorted(keys))
        raise argparse.ArgumentTypeError(
            f'{text}: its predictions lack one of {wanted}; tools/kernel_record.py makes them'
        )
    return record
