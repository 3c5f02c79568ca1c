"""What ``megatron-mhc report`` answers: a verdict on every run, and the page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_mhc.inputs.refusal import refuse
from megatron_mhc.monitor.finding import Finding
from megatron_mhc.monitor.heat_maps import chosen_sublayers
from megatron_mhc.monitor.page import write_page
from megatron_mhc.monitor.picture import new_figure, write_picture
from megatron_mhc.monitor.runs import Run, read_runs
from megatron_mhc.monitor.verdict import level, line, verdict

PROGRAM = 'megatron-mhc report'


def main(options: argparse.Namespace) -> int:
    """Print the verdicts and write the page; wrong input is one line."""
    try:
        _check(options.output)
        text = _report(options)
    except OSError as error:
        why = f'--output {options.output}: {error.strerror}; name a file that can be written'
        refuse(PROGRAM, why)
    except (RuntimeError, ValueError) as error:
        refuse(PROGRAM, str(error))
    print(text)
    return 0


def _check(output: Path) -> None:
    """Raise ValueError unless a page of this name can be drawn, before anything is read."""
    formats = ('.html', *(f'.{name}' for name in new_figure(1, 1).canvas.get_supported_filetypes()))
    if output.suffix not in formats:
        raise ValueError(
            f'--output {output}: unknown format {output.suffix or "(none)"}; name an .html, .png, '
            '.svg or .pdf file'
        )
    if not output.absolute().parent.is_dir():
        raise ValueError(f'--output {output}: no such folder; name one that is there')


def _report(options: argparse.Namespace) -> str:
    """Write the page; what is to be printed."""
    groups = read_runs(options.folders)
    runs = [run for seeds in groups.values() for run in seeds]
    findings = [(run, verdict(run)) for run in runs]
    # Of several seeds the maps of the first are drawn.
    first: dict[str, tuple[Run, list[Finding]]] = {}
    for run, found in findings:
        if run.iteration is not None:
            first.setdefault(run.name, (run, found))
    mapped = [(r, chosen_sublayers(r, options.sublayers, found)) for r, found in first.values()]
    lines = [line(run, found) for run, found in findings]
    answer = {
        'page': str(options.output),
        'runs': [
            {
                'name': run.name,
                'seed': run.seed,
                'iteration': run.last,
                'last_report': run.iteration,
                'level': level(found),
                'verdict': said,
                'findings': [finding.as_dict(run.pattern) for finding in found],
            }
            for (run, found), said in zip(findings, lines, strict=True)
        ],
    }
    if options.output.suffix == '.html':
        write_page(options.output, groups, findings, mapped, answer)
    else:
        write_picture(options.output, groups, lines, mapped)
    if options.json:
        return json.dumps(answer, indent=2)
    return '\n'.join([*lines, str(options.output)])
