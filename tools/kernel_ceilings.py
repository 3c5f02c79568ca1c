"""Make kernels/ceilings.json anew from reports, after tiles have changed on purpose.

    megatron-mhc kernels report --num-streams 1 2 4 8 --json > a.json    # with each Triton version
    python tools/kernel_ceilings.py a.json b.json

A ceiling is the largest value of all reports with a little headroom: 8 registers, and shared memory
up to the next KiB. The exceptions, which a person wrote with their reasons, stay as they are.
"""

import argparse
import json
from pathlib import Path

from megatron_mhc.argument_types import input_file
from megatron_mhc.refusal import OneLineParser, refuse

CEILINGS = Path(__file__).resolve().parents[1] / 'kernels' / 'ceilings.json'
# Words of the report -> constants. Bias and dropout share the ceiling of their kernel.
CONSTANTS = {'mix': 'MIX', 'g': 'HAS_G', 'u': 'HAS_U', 'dx': 'WRITE_DX'}


def largest(reports: list[dict]) -> dict:
    """kernel -> n -> sm -> registers, shared_bytes and matrix instructions."""
    found: dict = {}
    for report in reports:
        for row in report['kernels']:
            if 'registers' not in row:
                raise ValueError(f'{row["kernel"]} sm_{row["arch"]}: {"; ".join(row["problems"])}')
            name, *words = row['kernel'].split()
            kernel = ' '.join([name, *(CONSTANTS[word] for word in words if word in CONSTANTS)])
            ways = found.setdefault(kernel, {}).setdefault(str(row['num_streams']), {})
            seen = ways.setdefault(
                str(row['arch']), {'registers': 0, 'shared_bytes': 0, 'mma': set()}
            )
            for key in ('registers', 'shared_bytes'):
                seen[key] = max(seen[key], row[key])
            seen['mma'].update(row['mma'].split())
    return found


def with_headroom(seen: dict) -> dict:
    return {
        'registers': min(255, (seen['registers'] + 15) // 8 * 8),
        'shared_bytes': -(-seen['shared_bytes'] // 1024) * 1024,
        'mma': ' '.join(sorted(seen['mma'])),
    }


def read(path: Path) -> dict:
    try:
        report = json.loads(path.read_text())
        dtype, _ = report['dtype'], report['kernels']
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{path}: no report ({error!r}); write it with --json') from error
    if dtype != 'bf16':
        raise ValueError(f'{path}: dtype {dtype}: ceilings are kept for bf16 streams only; drop it')
    return report


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        prog='kernel_ceilings.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('reports', nargs='+', type=input_file, help='JSON reports, all for bf16')
    try:
        found = largest([read(path) for path in parser.parse_args(argv).reports])
    except ValueError as error:
        refuse(parser.prog, str(error))
    kernels = {
        kernel: {n: {arch: with_headroom(a) for arch, a in sorted(ways.items())} for n, ways in ns}
        for kernel, ns in sorted((k, sorted(v.items())) for k, v in found.items())
    }
    exceptions = json.loads(CEILINGS.read_text())['exceptions']
    found = {'dtype': 'bf16', 'exceptions': exceptions, 'kernels': kernels}
    CEILINGS.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
    main()
