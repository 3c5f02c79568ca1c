"""What ``megatron-mhc patch`` does: check, show, apply or take out."""

from __future__ import annotations

import argparse
import collections
import json
import sys

from megatron_mhc.inputs.refusal import refuse
from megatron_mhc.inputs.table import table
from megatron_mhc.tree.plan import EDITED, Plan, diff, header, plan_additions, plan_removal
from megatron_mhc.tree.scan import Finding, Tree, known_releases
from megatron_mhc.tree.write import replace_all, uncommitted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    # Plain values, and the same in lines.
    Answer = tuple[dict[str, Any], list[str]]

# Sources may hold any bytes, and so does a diff of them.
_BYTES = ('utf-8', 'surrogateescape')


def main(options: argparse.Namespace) -> int:
    """Run one mode; 1 where ``--check`` finds something in the way, else 0."""
    try:
        tree = Tree(options.tree)
        run = {'check': _check, 'diff': _diff, 'apply': _apply, 'reverse': _reverse}[options.mode]
        found, lines = run(tree, options)
    except (ValueError, OSError) as error:
        refuse('megatron-mhc patch', str(error))
    if options.json:
        about = {'mode': options.mode, 'tree': str(tree.root), 'megatron_core': tree.version}
        print(json.dumps(about | found, indent=2))
    else:
        sys.stdout.writelines(f'{line}\n' for line in lines)
        if options.mode == 'diff' and found['diff']:
            sys.stdout.flush()
            sys.stdout.buffer.write(found['diff'].encode(*_BYTES))
    return int(not found.get('ok', True))


def _seam(finding: Finding) -> dict[str, str]:
    """A seam as plain values."""
    keys = ('id', 'needed_by', 'reason')
    return {key: finding.seam[key] for key in keys} | {
        'state': finding.state,
        'where': finding.where,
        'detail': finding.detail,
    }


def _check(tree: Tree, options: argparse.Namespace) -> Answer:
    findings, edited = tree.findings(), tree.edited()
    states = collections.Counter(finding.state for finding in findings)
    lines = [f'megatron-core {tree.version} in {tree.root}']
    if not tree.is_tested:
        lines.append(
            f'tested are {known_releases()}; signatures are compared with those of {tree.minor}'
        )
    rows = table((f.seam['id'], f.state, f.where, f.seam['reason']) for f in findings)
    for line, finding in zip(rows, findings, strict=True):
        lines.append(line)
        if finding.detail:
            lines.append(f'    {finding.detail}')
    lines += [f'{place}: {EDITED}' for place in edited]
    lines.append(', '.join(f'{count} {state}' for state, count in states.items()))
    ok = not edited and tree.is_tested and not states.keys() - {'ready', 'applied'}
    found = {'tested': tree.is_tested, 'seams': [*map(_seam, findings)], 'edited': edited, 'ok': ok}
    return found, lines


def _added(tree: Tree, options: argparse.Namespace) -> tuple[Plan, dict[str, Any], list[str]]:
    """The edits that are missing, what they are as plain values, and the lines on them."""
    findings = tree.findings()
    plan = plan_additions(tree, findings, options.untested)
    if not plan:
        applied = sum(finding.placed for finding in findings)
        print(f'already applied: {applied} seams', file=sys.stderr)
    new = [f for f in findings if tree.root / f.path in plan and f.state != 'applied']
    found = {'files': [tree.relative(path) for path in plan], 'seams': [*map(_seam, new)]}
    return plan, found, [*header(tree, findings, plan)] if plan else []


def _diff(tree: Tree, options: argparse.Namespace) -> Answer:
    plan, found, lines = _added(tree, options)
    return found | {'diff': b''.join(diff(tree, plan)).decode(*_BYTES)}, lines


def _apply(tree: Tree, options: argparse.Namespace) -> Answer:
    plan, found, lines = _added(tree, options)
    if not plan:
        return found | {'git': None}, lines
    dirty = uncommitted(tree.root, found['files'])
    if dirty and not options.allow_dirty:
        raise ValueError(
            f'{len(dirty)} files to change have uncommitted changes ({", ".join(dirty[:3])}); '
            'commit or stash them, or add --allow-dirty'
        )
    replace_all({path: new for path, (_, new) in plan.items()})
    if dirty is None:
        lines.append(
            'no git here: the added lines tell themselves apart, and --reverse finds them by it'
        )
    return found | {'git': dirty is not None}, lines


def _reverse(tree: Tree, options: argparse.Namespace) -> Answer:
    plan = plan_removal(tree)
    replace_all({path: new for path, (_, new) in plan.items()})
    removed = sum(old.count(b'\n') - new.count(b'\n') for old, new in plan.values())
    words = f'{removed} lines taken out of {len(plan)} files' if plan else 'nothing to take out'
    return {'files': [tree.relative(path) for path in plan], 'lines': removed}, [words]
