"""The runs of a report: read from their folders, those of several seeds under one name."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mhc.inputs.values import shown
from megatron_mhc.monitor.events import read_events, scalars
from megatron_mhc.monitor.names import BY_SUBLAYER, CHECKED, COMPOSITE, H_RES, LOSS, PREFIX, ROWS

SEED = re.compile(r'seed-(\d+)')
# What of the run's command line, which Megatron writes as texts, a verdict asks for.
# By its name, and by that before 0.18.
PATTERNS = 'hybrid_layer_pattern', 'hybrid_override_pattern'
OPTIONS = (
    *('residual_type', 'mhc_alarm_gain', 'mhc_alarm_saturation', 'mhc_alarm_rank'),
    *PATTERNS,
)


class Run(NamedTuple):
    """What is judged and drawn of one log folder.

    Args:
        name: of all runs that differ in the seed only.
        seed: ``seed-1234``; empty where the folder is not called so.
        scalars: tag -> iteration -> value.
        options: of OPTIONS those that the run was given.
        iteration: of the last whole report; None where maps were not monitored, and then there are
            no maps and nothing by sublayer.
        h_res: iteration -> ``[L, n, n]``, means over the tokens.
        composite: the same of ``H_res[L-1] ... H_res[l]``, of the last report.
        by_sublayer: name of ROWS -> iteration -> ``[L]``.
    """

    name: str
    seed: str
    scalars: dict[str, dict[int, float]]
    options: dict[str, str]
    iteration: int | None
    h_res: dict[int, Any]
    composite: Any
    by_sublayer: dict[str, dict[int, Any]]

    @property
    def label(self) -> str:
        """The name and, where there is one, the seed."""
        return f'{self.name}, {self.seed}' if self.seed else self.name

    @property
    def pattern(self) -> str:
        """The layers of a hybrid model; empty for another."""
        given = (self.options.get(name, 'None') for name in PATTERNS)
        return next((pattern for pattern in given if pattern != 'None'), '')

    @property
    def last(self) -> int:
        """The last iteration of which a loss was written."""
        return max(self.scalars[LOSS])


def read_runs(words: list[str]) -> dict[str, list[Run]]:
    """Name -> its runs, one a seed, in the order of the command line's ``[NAME=]LOGDIR``.

    Raises:
        ValueError: a folder cannot be read, holds no run, or several that are not seeds, or two
            runs are called alike.
        RuntimeError: TensorBoard is not installed.
    """
    groups: dict[str, list[Run]] = {}
    for word in words:
        # A folder whose path has the sign is not NAME=LOGDIR.
        whole = ('', '', word)
        given, equals, path = whole if os.path.isdir(word) else word.partition('=')
        try:
            _add(groups, given if equals else '', Path(path or given))
        except OSError as error:
            why = error.strerror or str(error)
            raise ValueError(
                f'LOGDIR {shown(_printable(word))}: {why}; name a folder that can be read'
            ) from error
    return groups


def _add(groups: dict[str, list[Run]], given: str, logdir: Path) -> None:
    """Read the runs in ``logdir``, called ``given``, or as their path is."""
    for folder in _seeds_in(logdir):
        name, seed = _named(folder)
        run = read_run(folder, _printable(given or name), seed)
        seeds = groups.setdefault(run.name, [])
        if seed in (other.seed for other in seeds):
            raise ValueError(
                f'LOGDIR {_printable(str(folder))}: there is a run {run.label!r} already; name '
                'it otherwise: NAME=LOGDIR'
            )
        seeds.append(run)


def _seeds_in(folder: Path) -> list[Path]:
    """The folders ``seed-N`` in it, by number; itself where there are none."""
    found = {p: SEED.fullmatch(p.name) for p in folder.glob('seed-*') if p.is_dir()}
    seeds = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(seeds, key=lambda path: seeds[path]) or [folder]


def _named(folder: Path) -> tuple[str, str]:
    """The part of a path before ``seed-N``, and that; the path, and nothing."""
    for above in (folder, *folder.parents):
        if SEED.fullmatch(above.name):
            return str(above.parent), above.name
    return str(folder), ''


def _printable(name: str) -> str:
    """A name on one line that every encoding of Unicode can write."""
    return ''.join(c if c.isprintable() else '\N{REPLACEMENT CHARACTER}' for c in name)


def read_run(folder: Path, name: str, seed: str = '') -> Run:
    """Read the events below ``folder``.

    Raises:
        ValueError: it holds no events, or those of several runs.
        RuntimeError: TensorBoard is not installed.
    """
    where = f'LOGDIR {_printable(str(folder))}'
    events = read_events(folder, where)
    from tensorboard.util.tensor_util import make_ndarray

    def tensors(tag: str) -> dict[int, Any]:
        """Iteration -> the tensor as it was written last."""
        return {event.step: event.tensor_proto for event in events.Tensors(tag)}

    written = {*events.Tags()['tensors']}
    options = {}
    for option in OPTIONS:
        for proto in tensors(tag).values() if (tag := f'{option}/text_summary') in written else ():
            options[option] = make_ndarray(proto).item().decode()
    bare = Run(name, seed, scalars(events), options, None, {}, None, {})
    # A run that was killed may have left some of them only, or some of its last report.
    tags = (H_RES, COMPOSITE, BY_SUBLAYER)
    if not {*tags} <= written:
        return bare
    h_res, composite, rows = map(tensors, tags)
    whole = sorted(h_res.keys() & composite.keys() & rows.keys())
    if not whole:
        return bare
    last = whole[-1]
    maps = {step: make_ndarray(h_res[step]) for step in whole}
    table = {step: make_ndarray(rows[step]).astype(float) for step in whole}
    product, shape = make_ndarray(composite[last]), maps[last].shape
    if (
        [len(shape), *shape[2:]] != [3, *shape[1:2]]
        or product.shape != shape
        or any(array.shape != shape for array in maps.values())
        or any(array.shape != (len(ROWS), shape[0]) for array in table.values())
    ):
        raise ValueError(f'{where}: {H_RES} is not as --mhc-monitor writes it; name another')
    by_sublayer = {
        row: {step: values[number] for step, values in table.items()}
        for number, row in enumerate(ROWS)
    }
    return bare._replace(iteration=last, h_res=maps, composite=product, by_sublayer=by_sublayer)


def present(run: Run) -> list[int]:
    """The sublayers that the model has, of two a layer: a hybrid model has one in each.

    An absent one has no map, and nothing in it was found not to be finite.
    """
    assert run.iteration is not None
    maps = run.h_res[run.iteration]
    tables = (run.by_sublayer.get(f'nonfinite-{name}', {}) for name in CHECKED)
    counts = [table[run.iteration] for table in tables if run.iteration in table]
    return [
        sublayer
        for sublayer, h_res in enumerate(maps)
        if any(map(math.isfinite, h_res.ravel())) or any(count[sublayer] for count in counts)
    ]


def own(run: Run, name: str) -> dict[int, float]:
    """Iteration -> a scalar of ours, over all sublayers."""
    return run.scalars.get(PREFIX + name, {})


def is_hc(run: Run) -> bool:
    """Whether H_res is not constrained; runs that do not say are taken for mHC."""
    return run.options.get('residual_type') == 'hc'


def is_gated(run: Run) -> bool:
    """Whether its H_res is the identity, with nothing to learn."""
    return run.options.get('residual_type') == 'gated'
