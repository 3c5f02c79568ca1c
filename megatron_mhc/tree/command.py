"""``megatron-mhc patch``: put our seams into a user's own Megatron tree, or take them out again."""

from __future__ import annotations

import argparse
import collections
import pathlib
import sys

from megatron_mhc.inputs.refusal import refuse
from megatron_mhc.inputs.table import table
from megatron_mhc.tree.plan import EDITED, Plan, diff, header, plan_additions, plan_removal
from megatron_mhc.tree.scan import Finding, Tree, known_releases
from megatron_mhc.tree.write import replace_all, uncommitted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``megatron-mhc patch``."""
    parser.set_defaults(run=main)
    parser.add_argument(
        'tree', metavar='TREE', type=pathlib.Path, help='the folder that holds megatron/'
    )
    modes = parser.add_mutually_exclusive_group()
    parser.set_defaults(mode='check')
    for mode, text in (
        ('check', 'print where every seam belongs and whether it fits (default)'),
        ('diff', 'print the change that --apply would make, for git apply'),
        ('apply', 'put the seams in, in all files or none; commits nothing'),
        ('reverse', 'take out exactly the lines that --apply put in'),
    ):
        modes.add_argument(f'--{mode}', dest='mode', action='store_const', const=mode, help=text)
    parser.add_argument(
        '--untested',
        action='store_true',
        help='go on with a megatron-core that was never tested or a signature that no release has; '
        'seams whose place is not found are left out',
    )
    parser.add_argument(
        '--allow-dirty',
        action='store_true',
        help='change files whose own changes are not committed, too',
    )


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
