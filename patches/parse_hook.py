"""Check parsed arguments inside ``parse_args``, before Megatron acts on them."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

from megatron_mhc.inputs.refusal import refuse

Check = Callable[[argparse.Namespace, list[str]], None]


def after_parsing(parser: argparse.ArgumentParser, check: Check) -> None:
    """Have ``parser`` call ``check(namespace, unknown)``; what it raises ends the run in one line.

    Several checks may be added to one parser; the first one added runs first.
    """
    # On this instance alone.
    parser.parse_known_args = functools.partial(  # type: ignore[method-assign]
        _parse, parser, parser.parse_known_args, check
    )


def _parse(
    parser: argparse.ArgumentParser, original: Callable[..., Any], check: Check, *args, **kwargs
):
    namespace, unknown = original(*args, **kwargs)
    try:
        check(namespace, unknown)
    except (ValueError, RuntimeError) as error:
        refuse(parser.prog, str(error))
    return namespace, unknown
