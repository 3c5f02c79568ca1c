"""Exact bytes of the tensors that a piece of code makes, on any device: nothing is sampled."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Bytes(NamedTuple):
    """Of all storages, and of those that owned functions made."""

    total: int
    owned: int


class StorageMeter(TorchDispatchMode):
    """Follows every storage made inside the ``with`` to its end, also after it.

    Storages made in a function that was ``owned`` are counted apart. Triton's interpreter leaves
    reference cycles behind that hold tensors; they are collected, so as not to be counted.
    """

    def __init__(self) -> None:
        super().__init__()
        # Of all others, and owned.
        self._alive, self._peak = [0, 0], [0, 0]
        self._peak_of_all = 0
        self._known: dict[int, tuple[bool, int]] = {}
        self._depth = 0

    def owned(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose storages are counted as owned."""

        @functools.wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            gc.collect(0)
            self._depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                gc.collect(0)

        return marked

    def alive(self) -> Bytes:
        """What exists now."""
        gc.collect()
        return Bytes(sum(self._alive), self._alive[True])

    def peak(self) -> Bytes:
        """The most that existed at a time since the last call, each of the two by itself."""
        most = Bytes(self._peak_of_all, self._peak[True])
        gc.collect()
        self._peak, self._peak_of_all = list(self._alive), sum(self._alive)
        return most

    def __enter__(self) -> StorageMeter:
        # With everything young between two collections, those of owned functions are cheap.
        gc.collect()
        self._collects = gc.isenabled()
        gc.disable()
        resize = torch.UntypedStorage.resize_

        def followed(storage: torch.UntypedStorage, nbytes: int) -> torch.UntypedStorage:
            result = resize(storage, nbytes)
            if storage._cdata in self._known:
                self._count(storage._cdata, storage.nbytes())
            return result

        self._resize = mock.patch.object(torch.UntypedStorage, 'resize_', followed)
        self._resize.start()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self._resize.stop()
        if self._collects:
            gc.enable()
        super().__exit__(*error)

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        leaves = tree_leaves((args, kwargs))
        given = {t.untyped_storage()._cdata for t in leaves if isinstance(t, torch.Tensor)}
        given |= {s._cdata for s in leaves if isinstance(s, torch.UntypedStorage)}
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address not in given and address not in self._known:
                self._known[address] = self._depth > 0, 0
                weakref.finalize(storage, self._forget, address).atexit = False
                self._count(address, storage.nbytes())
        return result

    def _count(self, address: int, nbytes: int) -> None:
        owned, before = self._known[address]
        self._known[address] = owned, nbytes
        self._alive[owned] += nbytes - before
        self._peak[owned] = max(self._peak[owned], self._alive[owned])
        self._peak_of_all = max(self._peak_of_all, sum(self._alive))

    def _forget(self, address: int) -> None:
        self._count(address, 0)
        del self._known[address]
