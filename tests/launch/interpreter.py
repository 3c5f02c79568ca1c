"""Triton's interpreter without half of its work."""

from __future__ import annotations

import functools
from typing import Any


def patch_language_once() -> None:
    """Let a function called by a kernel take the language as it has been made already.

    The interpreter puts its own functions into ``triton.language`` when a kernel starts, and again,
    by looking through all its members, whenever the kernel calls a function. They are there by then
    unless that function names the language by another module.
    """
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    @functools.cache
    def modules(function: Any) -> list[Any]:
        names = (language, language.core)
        return [value for value in function.__globals__.values() if value in names]

    def once(function: Any) -> Any:
        if any(language.core.is_builtin(module.load) for module in modules(function)):
            return patch(function)
        return None

    interpreter._patch_lang = once
