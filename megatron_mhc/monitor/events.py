"""What a run wrote for TensorBoard, read back."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from megatron_mhc.monitor.names import LOSS

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_events(folder: pathlib.Path, where: str) -> EventAccumulator:
    """The events of the one run below ``folder``: all scalars and tensors.

    Args:
        folder: that of ``--tensorboard-dir``, or one above it.
        where: what messages begin with.

    Raises:
        ValueError: it holds no losses, or those of several runs.
        RuntimeError: TensorBoard is not installed.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError as error:
        raise RuntimeError(
            'reading TensorBoard events needs tensorboard, which is not installed; '
            'pip install tensorboard'
        ) from error
    if not folder.is_dir():
        raise ValueError(f'{where}: no such folder; name the folder of --tensorboard-dir')
    folders = {file.parent for file in folder.rglob('*tfevents*') if file.is_file()}
    if not folders:
        raise ValueError(f'{where}: no TensorBoard events; name the folder of --tensorboard-dir')
    # 0 keeps every point instead of a random sample.
    guidance = {'scalars': 0, 'tensors': 0}
    try:
        loaded = [
            EventAccumulator(str(f), size_guidance=guidance).Reload() for f in sorted(folders)
        ]
    # What a damaged file raises depends on where it is damaged.
    except Exception as error:
        raise ValueError(
            f'{where}: its events cannot be read ({type(error).__name__}: {error}); name a run '
            'whose files are whole'
        ) from error
    training = [events for events in loaded if LOSS in events.Tags()['scalars']]
    if not training:
        raise ValueError(f'{where}: its events have no {LOSS!r}; name a run of Megatron')
    if len(training) > 1:
        raise ValueError(
            f'{where}: {len(training)} folders below it hold runs; name one of them: '
            f'{", ".join(events.path for events in training)}'
        )
    return training[0]


def scalars(events: EventAccumulator) -> dict[str, dict[int, float]]:
    """Tag -> iteration -> value, by iteration.

    A resumed run repeats iterations, and Megatron validates once more at the end of training: the
    value that was written last counts.
    """
    found = {}
    for tag in events.Tags()['scalars']:
        written = sorted(events.Scalars(tag), key=lambda event: event.wall_time)
        found[tag] = dict(sorted({event.step: event.value for event in written}.items()))
    return found
