"""What ``megatron-mhc patch`` does: check, show, apply or take out."""

from __future__ import annotations

import argparse
import collections
import sys

from megatron_mhc.inputs.refusal import refuse
from megatron_mhc.inputs.table import table
from megatron_mhc.tree.plan import EDITED, Plan, diff, header, plan_additions, plan_removal
from megatron_mhc.tree.scan import Finding, Tree, known_releases
from megatron_mhc.tree.write import replace_all, uncommitted


def main(options: argparse.Namespace) -> int:
    """Run one mode; 1 where ``--check`` finds something in the way, else 0."""
    try:
        tree = Tree(options.tree)
        if options.mode == 'reverse':
            return _reverse(tree)
        findings = tree.findings()
        if options.mode == 'check':
            return _check(tree, findings)
        plan = plan_additions(tree, findings, options.untested)
        if not plan:
            applied = sum(finding.placed for finding in findings)
            print(f'already applied: {applied} seams', file=sys.stderr)
        elif options.mode == 'diff':
            print('\n'.join(header(tree, findings, plan)), flush=True)
            sys.stdout.buffer.writelines(diff(tree, plan))
        else:
            _apply(tree, findings, plan, options.allow_dirty)
        return 0
    except (ValueError, OSError) as error:
        refuse('megatron-mhc patch', str(error))


def _check(tree: Tree, findings: list[Finding]) -> int:
    print(f'megatron-core {tree.version} in {tree.root}')
    if not tree.is_tested:
        print(f'tested are {known_releases()}; signatures are compared with those of {tree.minor}')
    lines = table((f.seam['id'], f.state, f.where, f.seam['reason']) for f in findings)
    for line, finding in zip(lines, findings, strict=True):
        print(line)
        if finding.detail:
            print(f'    {finding.detail}')
    edited = tree.edited()
    for place in edited:
        print(f'{place}: {EDITED}')
    states = collections.Counter(finding.state for finding in findings)
    print(', '.join(f'{count} {state}' for state, count in states.items()))
    return int(bool(edited or not tree.is_tested or states.keys() - {'ready', 'applied'}))


def _apply(tree: Tree, findings: list[Finding], plan: Plan, allow_dirty: bool) -> None:
    dirty = uncommitted(tree.root, [tree.relative(path) for path in plan])
    if dirty and not allow_dirty:
        raise ValueError(
            f'{len(dirty)} files to change have uncommitted changes ({", ".join(dirty[:3])}); '
            'commit or stash them, or add --allow-dirty'
        )
    replace_all({path: new for path, (_, new) in plan.items()})
    print('\n'.join(header(tree, findings, plan)))
    if dirty is None:
        print('no git here: the added lines tell themselves apart, and --reverse finds them by it')


def _reverse(tree: Tree) -> int:
    plan = plan_removal(tree)
    replace_all({path: new for path, (_, new) in plan.items()})
    removed = sum(old.count(b'\n') - new.count(b'\n') for old, new in plan.values())
    print(f'{removed} lines taken out of {len(plan)} files' if plan else 'nothing to take out')
    return 0
