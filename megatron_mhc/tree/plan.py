"""What ``megatron-mhc patch`` would change in a tree, and how that is shown."""

from __future__ import annotations

import collections
import difflib
import pathlib
import sys
from collections.abc import Iterator, Mapping

from megatron_mhc.tree.edit import add_seams, fingerprint, lines_of, seam_line, without_our_lines
from megatron_mhc.tree.scan import Finding, Tree, known_releases

EDITED = (
    'a line of megatron-mhc was edited here; restore it, e.g. `@mhc_seam("p2p")  # megatron-mhc`, '
    'or delete it'
)
# File -> contents now and then.
Plan = Mapping[pathlib.Path, tuple[bytes, bytes]]


def plan_additions(tree: Tree, findings: list[Finding], untested: bool) -> Plan:
    """The seams that are not there yet.

    Raises:
        ValueError: something does not fit, and ``untested`` does not allow for it.
    """
    _refuse_edited(tree)
    if not (tree.is_tested or untested):
        raise ValueError(
            f'{tree.root} is megatron-core {tree.version}, and tested are {known_releases()}; '
            '--check compares its signatures, --untested goes on without'
        )
    misfits = [f for f in findings if f.state in ('differs', 'missing', 'renamed')]
    for finding in misfits:
        if finding.placed or finding.state == 'renamed' or not untested:
            raise ValueError(
                f'{len(misfits)} of {len(findings)} seams do not fit megatron-core '
                f'{tree.version} ({", ".join(misfit.seam["id"] for misfit in misfits)}); '
                f'{finding.where}: {finding.detail}'
            )
    wanted = collections.defaultdict(list)
    for finding in findings:
        if finding.function is None:
            print(f'left out: {finding.seam["id"]}: {finding.detail}', file=sys.stderr)
        elif finding.state != 'applied':
            # Signatures of a tested release are known without being written down.
            known = tree.is_tested and finding.state == 'ready'
            accept = None if known else fingerprint(finding.function)
            line = seam_line(finding.seam['id'], accept)
            wanted[tree.root / finding.path].append((finding.function, line))
    plan = {}
    for path, seams in wanted.items():
        source = path.read_bytes()
        try:
            plan[path] = source, add_seams(source, seams)
        except ValueError as error:
            raise ValueError(f'{tree.relative(path)}: {error}') from error
    _refuse_outside(tree, plan)
    return plan


def plan_removal(tree: Tree) -> Plan:
    """All lines of ours out, whatever put them there; raises ValueError where one was edited."""
    _refuse_edited(tree)
    plan = {path: (source, without_our_lines(source)) for path, source in tree.touched.items()}
    plan = {path: (old, new) for path, (old, new) in plan.items() if old != new}
    _refuse_outside(tree, plan)
    return plan


def _refuse_outside(tree: Tree, plan: Plan) -> None:
    """A link may lead to files that belong to another tree, or to an installed wheel."""
    for path in plan:
        target = path.resolve()
        if not target.is_relative_to(tree.root.resolve()):
            raise ValueError(
                f'{tree.relative(path)}: a link leads to {target}, outside of {tree.root}, where '
                'nothing is written; put a copy in its place, or patch that tree itself'
            )


def _refuse_edited(tree: Tree) -> None:
    if edited := tree.edited():
        raise ValueError(f'{edited[0]}: {EDITED}')


def header(tree: Tree, findings: list[Finding], plan: Plan) -> Iterator[str]:
    """What each edit is for, in lines that ``git apply`` and ``patch`` skip."""
    seams = [f for f in findings if tree.root / f.path in plan and f.state != 'applied']
    yield (
        f'# megatron-mhc patch: {len(seams)} seams in {len(plan)} files of megatron-core '
        f'{tree.version}'
    )
    yield '# Each passes calls on unchanged until a flag of megatron-mhc needs it.'
    yield '# To undo: megatron-mhc patch TREE --reverse'
    for finding in seams:
        yield f'# {finding.where} {finding.seam["id"]} ({finding.seam["needed_by"]})'
        yield f'#   {finding.seam["reason"]}'


def diff(tree: Tree, plan: Plan) -> Iterator[bytes]:
    """A unified diff with paths relative to the tree."""
    for path, contents in plan.items():
        name = tree.relative(path).encode()
        yield b'diff --git a/%b b/%b\n' % (name, name)
        before, after = map(lines_of, contents)
        for line in difflib.diff_bytes(
            difflib.unified_diff, before, after, b'a/' + name, b'b/' + name, n=3
        ):
            yield line if line.endswith(b'\n') else line + b'\n\\ No newline at end of file\n'
