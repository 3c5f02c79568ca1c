"""``megatron-mhc schedule trace``: how much communication a traced run hid, by rank.

Reads one file for each rank: Chrome traces of torch's profiler, which Megatron
writes with "--profile --use-pytorch-profiler" to "torch_profile/rank-N.json.gz"
beside --tensorboard-dir, or exports of "nsys export --type sqlite". A file
covers the steps that were traced, from its first kernel to its last.

What it looks for:

- SEND and RECV are NCCL's SendRecv kernels. All-to-all runs in kernels of the
  same name; it is told apart by what torch or NVTX says of the launch, or by
  the kernel being DeepEP's. A ring exchange of context parallelism counts as
  SEND and RECV. Other NCCL kernels are collectives.
- Everything else that is a kernel is compute. Communication is *exposed* while
  no compute kernel runs beside it, given as a share of its own time; *idle* is
  the share of all time without one. A RECV kernel runs from when it may until
  the message is there, so a pipeline bubble is exposed.
- F_post,res are the Triton kernels "post_res_forward_kernel" and
  "post_res_backward_kernel", or all kernels launched in a range
  "mhc/F_post_res": of the torch backend the forward only. Where it is one pass
  with the next sublayer's read (operator "WriteRead"), it follows its input on
  the same stream and does not count.
- Its *delay* runs from the end of what produced its input to its start. A trace
  does not name that kernel: it is taken to be the one that the same host thread
  launched before. If other threads launched something in between, and it is no
  communication, a new pass has begun: then it is the last message that arrived
  since, and the call is not measured if there was none. Needs the launches in
  the trace (CPU activity, or "nsys profile --trace cuda,nvtx").
- Operations of a plan, such as "3F5", "3SEND_F5" or "(0F1;7B2)FUSE", are ranges
  on the host: "3SEND_F5" tells a SEND from a RECV where torch does not.
"""

from __future__ import annotations

import argparse

from megatron_mhc.inputs.values import flag_of, input_file, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SHARE, _DELAY = number(0, 1, 'give a share such as 0.1 for 10 %'), number(0)
# Option, what it limits, unit.
LIMITS = {
    'p2p': ('SEND/RECV exposed', 'share'),
    'all_to_all': ('all-to-all exposed', 'share'),
    'collectives': ('collectives exposed', 'share'),
    'idle': ('idle', 'share'),
    'post_delay': ('F_post,res delay, 90th percentile', 'us'),
}
OPTIONS = {
    name: flag_of(('max_exposed_' if words.endswith('exposed') else 'max_') + name)
    for name, (words, _) in LIMITS.items()
}


def add_parser(topics: Any) -> None:
    """Add ``trace`` to the subcommands of ``megatron-mhc schedule``."""
    parser = topics.add_parser(
        'trace',
        help='how much communication a traced run on GPUs hid under compute',
        description=__doc__.partition('\n\n')[2],
        epilog='Exit status: 0, 1 where a limit is exceeded on any rank, 2 for wrong input.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'files', type=input_file, nargs='+', metavar='FILE', help='one for each rank'
    )
    parser.add_argument('--json', action='store_true', help='print one JSON object')
    limits = parser.add_argument_group('limits, for every rank')
    for name, (words, unit) in LIMITS.items():
        if unit == 'share':
            limits.add_argument(OPTIONS[name], type=_SHARE, metavar='X', help=f'{words}, 0 to 1')
        else:
            limits.add_argument(OPTIONS[name], type=_DELAY, metavar='US', help=f'{words}, in us')
    parser.set_defaults(answer='megatron_mhc.trace.answer')
