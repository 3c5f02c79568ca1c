"""Make kernels/ceilings.json anew from reports, after tiles have changed on purpose.

    megatron-mhc kernels report --num-streams 1 2 4 8 --json > a.json    # with each Triton version
    python tools/kernel_ceilings.py a.json b.json

A ceiling is the largest value of all reports with a little headroom: 8 registers, and shared memory
up to the next KiB. The exceptions, which a person wrote with their reasons, stay as they are.
"""

import argparse
import json
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('reports', nargs='+', type=Path, help='JSON reports, all for bf16')
    reports = [json.loads(path.read_text()) for path in parser.parse_args().reports]
    for report in reports:
        if report['dtype'] != 'bf16':
            raise SystemExit(f'dtype {report["dtype"]}: ceilings are kept for bf16 streams only')
    kernels = {
        kernel: {n: {arch: with_headroom(a) for arch, a in sorted(ways.items())} for n, ways in ns}
        for kernel, ns in sorted((k, sorted(v.items())) for k, v in largest(reports).items())
    }
    exceptions = json.loads(CEILINGS.read_text())['exceptions']
    found = {'dtype': 'bf16', 'exceptions': exceptions, 'kernels': kernels}
    CEILINGS.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
    main()
