"""Two pipeline stages started with different settings: ``torchrun edge_worker.py OUT``.

Each rank writes what it raised for (a) another stream count on rank 1, (b) rank 1 in stock form.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import sys

from megatron_mhc import ResidualConfig
from megatron_mhc.runtime import cpu_device

cpu_device.install()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from megatron_mhc.patches.edge_check import agree_on_edges  # noqa: E402


class Config:
    pipeline_model_parallel_size = 2
    hidden_size = 32


def raised(residual: ResidualConfig) -> str:
    try:
        Config.residual_config = residual
        agree_on_edges(Config, datetime.timedelta(seconds=3))
    except RuntimeError as error:
        return str(error)
    return ''


def main() -> None:
    torch.distributed.init_process_group('gloo')
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    rank = torch.distributed.get_rank()
    said = {
        'equal': raised(ResidualConfig()),
        'streams': raised(ResidualConfig(num_residual_streams=4 - 2 * rank)),
        'stock': raised(ResidualConfig()) if rank == 0 else '',
    }
    (pathlib.Path(sys.argv[1]) / f'{rank}.json').write_text(json.dumps(said))
    torch.distributed.barrier()


if __name__ == '__main__':
    main()
