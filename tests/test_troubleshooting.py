"""Every message on the troubleshooting page is one that the code prints."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / 'megatron_mhc' / 'docs' / 'troubleshooting.md').read_text()
OURS = PAGE.partition('## No message of ours')[0]
QUOTED = re.findall(r'^\| `([^`]+)` \|', OURS, re.MULTILINE)


@pytest.fixture(scope='module')
def messages():
    """Every string of the package; what an f-string fills in is cut out."""
    found = []
    for folder in ('megatron_mhc', 'patches', 'schedules', 'kernels'):
        for file in (ROOT / folder).rglob('*.py'):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (getattr(part, 'value', '') for part in node.values)
                    found.append(''.join(p if isinstance(p, str) else '\0' for p in parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


@pytest.mark.parametrize('text', QUOTED)
def test_message_is_printed(text, messages):
    assert len(QUOTED) > 15
    assert any(text in message for message in messages)
