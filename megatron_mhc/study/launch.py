"""The best layout of every number of GPUs as scripts: one for torchrun, one for Slurm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_mhc.recipes.recipe import Flags
from megatron_mhc.recipes.script import (
    LAUNCHER,
    Bash,
    bash_script,
    slurm_script,
    torchrun_flags,
)
from megatron_mhc.settings.queues import CONNECTIONS, connections
from megatron_mhc.study.hardware import Hardware
from megatron_mhc.study.model import Model
from megatron_mhc.study.points import Point
from megatron_mhc.study.scaling import BEST, Curve

LOGGING: Flags = {
    'log-interval': 10,
    'log-throughput': True,
    'eval-interval': 1000,
    'eval-iters': 10,
}
PYTHON = Bash('"${PYTHON:-python}"')


def launch_scripts(model: Model, curves: Iterable[Curve], hardware: Hardware) -> dict[str, str]:
    """File name -> text, of every point of the best curves.

    ``PYTHON`` and ``PRETRAIN`` name the interpreter and the pretrain script; what a script is
    given behind its name goes to Megatron, after its own flags.
    """
    found = {}
    for curve in curves:
        for point in curve.points if curve.schedule == BEST else ():
            gpus = point.layout.gpus
            name, ranks = f'gpus-{gpus}-n{curve.streams}', hardware.ranks_per_host
            found[f'{name}.sh'] = _script(model, point, hardware)
            found[f'{name}.slurm'] = slurm_script(f'mhc-{gpus}', f'{name}.sh', gpus, ranks)
    return found


def _script(model: Model, point: Point, hardware: Hardware) -> str:
    layout = point.layout
    title = (
        f'{model.name} on {layout.gpus} x {hardware.name}, batch {point.global_batch}: modelled '
        f'{point.step_s:.3g} s a step, {point.memory_gib:.0f} GiB; PYTHON and PRETRAIN name '
        'interpreter and script'
    )
    topics: dict[str, Flags | Sequence[str]] = {
        LAUNCHER: torchrun_flags(layout.gpus, hardware.ranks_per_host),
        # First, so that somebody's own line may say otherwise.
        'LOGGING_ARGS': LOGGING,
        **({'MODEL_LINE': model.line} if model.line else {}),
        **model.flags(point),
        **({'DATA_ARGS': model.data} if model.data else {}),
    }
    # Megatron ends a run where it demands 1; elsewhere a site's own value may be as good.
    value = connections(point.one_queue)
    export = f'{CONNECTIONS}=' + (value if value == '1' else f'"${{{CONNECTIONS}:-{value}}}"')
    kind = 'hybrid' if model.shape.pattern else 'gpt'
    script = Bash(f'"${{PRETRAIN:-pretrain_{kind}.py}}"')
    return bash_script(title, [export], topics, PYTHON, script, [])
