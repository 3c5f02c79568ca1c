"""A report as one HTML page that needs nothing else: pictures and numbers are within it."""

from __future__ import annotations

import base64
import csv
import functools
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_mhc.monitor.curves import Curve, Groups, drawn_panels
from megatron_mhc.monitor.draw import colours, draw_panel
from megatron_mhc.monitor.finding import Finding
from megatron_mhc.monitor.heat_maps import (
    ENTRIES_HEIGHT,
    HEALTHY_ENTRIES,
    HEALTHY_MAPS,
    MAPS_HEIGHT,
    WIDTH,
    draw_entries,
    draw_maps,
)
from megatron_mhc.monitor.names import PREFIX, sublayer_name
from megatron_mhc.monitor.panels import Panel
from megatron_mhc.monitor.picture import new_figure
from megatron_mhc.monitor.runs import Run
from megatron_mhc.monitor.verdict import UNKNOWN, level

TEMPLATE = Path(__file__).with_name('page.html')


def write_page(
    output: Path,
    groups: Groups,
    findings: list[tuple[Run, list[Finding]]],
    mapped: list[tuple[Run, list[int]]],
    answer: dict[str, Any],
) -> None:
    """Write the page.

    Args:
        findings: of every run.
        mapped: the runs whose maps are drawn, and the sublayers of each.
        answer: what ``--json`` prints.

    Raises:
        RuntimeError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise RuntimeError(
            'an HTML page needs jinja2, which is not installed; pip install jinja2, or name a .png'
        ) from error
    base = next(iter(groups))
    sections: dict[str, list[dict[str, str]]] = {}
    for panel, found in drawn_panels(groups):
        shown = {
            'title': panel.title.format(base=base),
            'healthy': panel.healthy.format(base=base),
            'picture': _picture(5.4, 3.4, functools.partial(_draw_panel, panel, found, groups)),
        }
        sections.setdefault(panel.section, []).append(shown)
    maps = [
        {
            'title': f'{what} of {run.label}',
            'healthy': healthy,
            'picture': _picture(
                WIDTH * len(numbers), height, functools.partial(draw, run=run, sublayers=numbers)
            ),
        }
        for run, numbers in mapped
        for what, draw, height, healthy in (
            ('maps', draw_maps, MAPS_HEIGHT, HEALTHY_MAPS),
            ('entries of H_res', draw_entries, ENTRIES_HEIGHT, HEALTHY_ENTRIES),
        )
    ]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    wheel = colours(groups)
    text = environment.from_string(TEMPLATE.read_text(encoding='utf-8')).render(
        runs=[
            {
                'label': run.label,
                'colour': wheel[run.name],
                'level': level(found),
                'last': run.last,
                'findings': found,
                'unknown': UNKNOWN if run.iteration is None else '',
                'files': _files(run),
            }
            for run, found in findings
        ],
        banded=any(len(runs) > 1 for runs in groups.values()),
        sections=sections,
        maps=maps,
        answer=_data('application/json', json.dumps(answer, indent=1)),
    )
    output.write_text(text, encoding='utf-8')


def _draw_panel(panel: Panel, found: list[Curve], groups: Groups, figure: Any) -> None:
    draw_panel(figure.gca(), panel, found, groups)


def _picture(width: float, height: float, draw: Callable[[Any], object]) -> str:
    """What ``draw`` makes of a figure, as the address of an SVG picture."""
    import matplotlib

    figure, file = new_figure(width, height), io.StringIO()
    draw(figure)
    # The same runs give the same page.
    with matplotlib.rc_context({'svg.hashsalt': 'megatron-mhc'}):
        figure.savefig(file, format='svg', metadata={'Date': None})
    return _data('image/svg+xml', file.getvalue())


def _data(kind: str, text: str) -> str:
    return f'data:{kind};base64,{base64.b64encode(text.encode()).decode()}'


def _files(run: Run) -> dict[str, str]:
    """Name of a CSV file -> its address."""
    # Those of single sublayers would make the page hundreds of times as long; the events have them.
    # Megatron writes some over samples as well.
    tags = [
        tag
        for tag in run.scalars
        if '/' not in tag.removeprefix(PREFIX) and not tag.endswith(' vs samples')
    ]
    steps = sorted({step for tag in tags for step in run.scalars[tag]})
    rows = [[step, *(run.scalars[tag].get(step, '') for tag in tags)] for step in steps]
    files = {'scalars.csv': _csv(['iteration', *map(_no_formula, tags)], rows)}
    if run.iteration is not None:
        steps, count, streams = list(run.h_res), len(run.composite), run.composite.shape[-1]
        names = list(run.by_sublayer)
        called = [sublayer_name(number, run.pattern) for number in range(count)]
        table = [
            [step, called[number], *(run.by_sublayer[name][step][number] for name in names)]
            for step in steps
            for number in range(count)
        ]
        files['by-sublayer.csv'] = _csv(['iteration', 'sublayer', *names], table)
        entries = [f'{i},{j}' for i in range(streams) for j in range(streams)]
        last = run.h_res[run.iteration].reshape(count, -1)
        whole = [
            [kind, called[number], *maps[number]]
            for kind, maps in (('single', last), ('composite', run.composite.reshape(count, -1)))
            for number in range(count)
        ]
        files['maps.csv'] = _csv(['map', 'from sublayer', *entries], whole)
    return files


def _no_formula(text: str) -> str:
    """``text`` as a spreadsheet shows it: tags are anyone's, and these would be worked out."""
    return f"'{text}" if text.startswith(('=', '+', '-', '@', '\t', '\r')) else text


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(head)
    # Events are fp32, which nine digits tell apart.
    writer.writerows([f'{v:.9g}' if isinstance(v, float) else v for v in row] for row in rows)
    return _data('text/csv;charset=utf-8', file.getvalue())
