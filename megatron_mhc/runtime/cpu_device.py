"""A CUDA device emulated on the CPU: enough of ``torch.cuda`` for Megatron's real training loop.

For machines without CUDA only: laptops and CI. Tensors asked for on ``cuda`` are made on the CPU,
streams and events are synchronous, every "CUDA" generator is the CPU generator and collectives run
over gloo. It tests function, not speed and not stream order. ``torch.cuda.is_available()`` stays
False, because torch itself takes a True at its word and calls the driver.

Each name is patched by a function object of its own: a ``TorchFunctionMode`` would be shorter, but
it is switched off inside ``torch.autograd.backward``, and dynamo's rule table refuses at import two
torch names that share one object.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import logging
import os
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_mhc.inputs.refusal import is_first_rank

# Values that a run needs before torch compiles anything or Megatron reads its arguments. dynamo is
# off because inductor costs tens of seconds here and draws other random numbers; one connection is
# what Megatron demands for tensor parallelism.
ENVIRONMENT = {
    'TORCHDYNAMO_DISABLE': '1',
    'OMP_NUM_THREADS': '1',
    'CUDA_DEVICE_MAX_CONNECTIONS': '1',
}

NOTICE = (
    '[megatron-mhc] no CUDA here: a CUDA device is emulated on the CPU over gloo, for functional '
    'runs only. Command-line defaults changed: --transformer-impl local --distributed-backend gloo '
    '--no-gradient-accumulation-fusion --no-persist-layer-norm --no-rope-fusion '
    '--no-masked-softmax-fusion'
)

_FACTORIES = (
    'arange as_tensor asarray empty empty_like empty_permuted empty_strided eye full full_like '
    'linspace logspace ones ones_like rand rand_like randint randint_like randn randn_like '
    'randperm tensor tril_indices triu_indices zeros zeros_like'
).split()
_TENSOR_METHODS = 'to new_empty new_empty_strided new_full new_ones new_tensor new_zeros'.split()

PATIENCE = 10.0  # seconds

_installed = False
_current_device = 0


def is_installed() -> bool:
    """Whether this process emulates a CUDA device on the CPU."""
    return _installed


def install() -> None:
    """Emulate the CUDA device for the rest of this process; a second call does nothing.

    Raises:
        RuntimeError: a real CUDA device is present, or Megatron was imported before (it binds names
            of ``torch.cuda`` at import, so the emulation would be incomplete).
    """
    global _installed, _current_device
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            'the CPU device was asked for on a machine with CUDA, where it would shadow the real '
            'device: use --device cuda, or hide the GPUs with CUDA_VISIBLE_DEVICES= first.'
        )
    if 'megatron.core' in sys.modules:
        raise RuntimeError(
            'the CPU device was installed after megatron.core, which has already bound the real '
            'torch.cuda names: call install() before any megatron import.'
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    if 'torch._dynamo' in sys.modules and os.environ['TORCHDYNAMO_DISABLE'] == '1':
        sys.modules['torch._dynamo'].config.disable = True
    _current_device = int(os.environ.get('LOCAL_RANK', '0'))
    _patch_device()
    _patch_streams()
    _patch_memory()
    _patch_random()
    _patch_tensors()
    _patch_data_loader()
    _installed = True
    if is_first_rank():
        print(NOTICE, flush=True)


def end_collectives() -> None:
    """Leave the process groups of a run that has come to its end; nothing on a real device.

    Megatron leaves them to the interpreter's exit. A thread of gloo's that drops the last reference
    to a tensor then waits for an interpreter that is gone, and aborts a run that was done. What is
    still under way after PATIENCE seconds, for a peer that is gone, is left to the exit after all.
    """
    if _installed and torch.distributed.is_initialized():
        leaving = threading.Thread(target=torch.distributed.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(PATIENCE)


def _device_count() -> int:
    # Zero would make Megatron skip the set-up of its parallel groups.
    return int(os.environ.get('LOCAL_WORLD_SIZE') or os.environ.get('WORLD_SIZE') or 1)


def _cpu_if_cuda(device):
    """``device`` with every spelling of a CUDA device replaced by the CPU."""
    if isinstance(device, bool):
        return device
    if isinstance(device, int):
        return 'cpu'
    if isinstance(device, str) and device.partition(':')[0] == 'cuda':
        return 'cpu'
    if isinstance(device, torch.device) and device.type == 'cuda':
        return torch.device('cpu')
    return device


def _constant(value) -> Callable[..., Any]:
    """A new function that takes anything and returns ``value``."""
    return lambda *args, **kwargs: value


# --- device ---------------------------------------------------------------------------------------


class _Device(contextlib.AbstractContextManager[Callable[[int], Any]]):
    """Stand-in for the ``torch.cuda.device`` context."""

    def __init__(self, device=None):
        self.idx = 0

    def __exit__(self, *exc):
        return None


def _set_device(device) -> None:
    global _current_device
    index = device if isinstance(device, int) else torch.device(device).index
    _current_device = index if index is not None else 0


def _patch_device() -> None:
    cuda = torch.cuda
    # Capability 8.0 keeps Megatron on the paths every supported GPU takes.
    properties = types.SimpleNamespace(
        name='CPU (emulated)', major=8, minor=0, total_memory=1 << 34, multi_processor_count=1
    )
    cuda.device = _Device
    cuda.device_count = _device_count
    cuda.current_device = lambda: _current_device
    cuda.set_device = _set_device
    cuda._lazy_init = _constant(None)
    cuda.init = _constant(None)
    cuda.synchronize = _constant(None)
    cuda.get_device_properties = _constant(properties)
    cuda.get_device_capability = _constant((properties.major, properties.minor))
    cuda.get_device_name = _constant(properties.name)
    cuda.is_current_stream_capturing = _constant(False)
    cuda.nvtx.range_push = _constant(0)
    cuda.nvtx.range_pop = _constant(0)


# --- streams --------------------------------------------------------------------------------------


class _Event:
    """Stand-in for ``torch.cuda.Event``: work is done when it is issued."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False, external=False):
        self._time = time.perf_counter()

    def record(self, stream=None):
        self._time = time.perf_counter()

    def wait(self, stream=None):
        return None

    def synchronize(self):
        return None

    def query(self):
        return True

    def elapsed_time(self, end_event):
        return (end_event._time - self._time) * 1e3


class _Stream:
    """Stand-in for ``torch.cuda.Stream``: everything runs in program order."""

    def __init__(self, device=None, priority=0, **kwargs):
        self.device = torch.device('cpu')
        self.priority = priority
        self.cuda_stream = 0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None

    def record_event(self, event=None):
        event = _Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event):
        return None

    def wait_stream(self, stream):
        return None

    def synchronize(self):
        return None

    def query(self):
        return True

    @staticmethod
    def priority_range():
        return (0, -1)


class _StreamContext(contextlib.AbstractContextManager[Callable[[int], Any]]):
    """Stand-in for ``torch.cuda.stream``; keeps ``current_stream`` truthful."""

    current = _Stream()
    default = current

    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        self._previous = _StreamContext.current
        if self.stream is not None:
            _StreamContext.current = self.stream

    def __exit__(self, *exc):
        _StreamContext.current = self._previous


def _patch_streams() -> None:
    cuda = torch.cuda

    def set_stream(stream):
        if stream is not None:
            _StreamContext.current = stream

    cuda.Event = _Event
    cuda.Stream = _Stream
    cuda.ExternalStream = type('_ExternalStream', (_Stream,), {})
    cuda.stream = _StreamContext
    cuda.StreamContext = _StreamContext
    cuda.set_stream = set_stream
    cuda.current_stream = lambda device=None: _StreamContext.current
    cuda.default_stream = lambda device=None: _StreamContext.default
    torch.Tensor.record_stream = lambda self, stream: None


# --- memory ---------------------------------------------------------------------------------------


def _patch_memory() -> None:
    # The log indexes single statistics, so the table has to answer any key.
    answers = {
        'memory_stats': lambda device=None: collections.defaultdict(int),
        'mem_get_info': lambda device=None: (1 << 34, 1 << 34),
        'empty_cache': lambda: None,
        'reset_peak_memory_stats': lambda device=None: None,
        'reset_accumulated_memory_stats': lambda device=None: None,
        'reset_max_memory_allocated': lambda device=None: None,
        'device_memory_used': lambda device=None: 0,
    }
    for name, answer in answers.items():
        for owner in (torch.cuda, torch.cuda.memory):
            if hasattr(owner, name):
                setattr(owner, name, answer)


# --- random numbers -------------------------------------------------------------------------------


class _AnyGenerator(type(torch.Generator)):
    def __instancecheck__(cls, instance) -> bool:
        return isinstance(instance, cls.__base__)


class _Generator(torch.Generator, metaclass=_AnyGenerator):
    """A generator for a CUDA device is made on the CPU: text generation samples from one."""

    def __new__(cls, device='cpu'):
        return super().__new__(cls, device=_cpu_if_cuda(device))


def _patch_random() -> None:
    def call_now(function, **kwargs):
        function()

    for owner in (torch.cuda, torch.cuda.random):
        owner._lazy_call = call_now
        owner._lazy_init = torch.cuda._lazy_init
        owner.device_count = torch.cuda.device_count
        owner.current_device = torch.cuda.current_device
    # CPU kernels draw from this generator only, so it has to be the one that Megatron's tracker
    # saves, forks and restores.
    torch.Generator = _Generator
    torch.cuda.default_generators = (torch.default_generator,) * _device_count()
    # The tracker logs that the CPU state moved while it had forked the CUDA state: true, and meant.
    logging.getLogger('megatron.core.tensor_parallel.random').addFilter(
        lambda record: 'CPU RNG state changed' not in record.getMessage()
    )


# --- tensors --------------------------------------------------------------------------------------


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def factory(*args, **kwargs):
        if 'device' in kwargs:
            kwargs['device'] = _cpu_if_cuda(kwargs['device'])
        # Pinning needs a driver.
        kwargs.pop('pin_memory', None)
        return function(*args, **kwargs)

    return factory


def _tensor_to(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def to(self, *args, **kwargs):
        if args:
            args = (_cpu_if_cuda(args[0]), *args[1:])
        if 'device' in kwargs:
            kwargs['device'] = _cpu_if_cuda(kwargs['device'])
        return function(self, *args, **kwargs)

    return to


def _tensor_type(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def type_(self, dtype=None, *args, **kwargs):
        if dtype is None:
            # Megatron's optimizers sort parameters by this string.
            name = function(self)
            return name.replace('torch.', 'torch.cuda.', 1) if self.device.type == 'cpu' else name
        if isinstance(dtype, str):
            dtype = dtype.replace('torch.cuda.', 'torch.')
        return function(self, dtype, *args, **kwargs)

    return type_


def _map_location(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def load(f, map_location=None, *args, **kwargs):
        if map_location is None or isinstance(map_location, (str, torch.device)):
            map_location = _cpu_if_cuda(map_location)
        return function(f, map_location, *args, **kwargs)

    return load


def _patch_tensors() -> None:
    # `with torch.device('meta')` knows torch's factories by identity: let it note the originals.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _TENSOR_METHODS:
        wrap = _tensor_to if name == 'to' else _on_cpu
        setattr(torch.Tensor, name, wrap(getattr(torch.Tensor, name)))
    torch.Tensor.type = _tensor_type(torch.Tensor.type)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.Tensor.is_pinned = lambda self, *args, **kwargs: False
    torch.nn.Module.to = _tensor_to(torch.nn.Module.to)
    torch.nn.Module.cuda = lambda self, device=None: self
    torch.load = _map_location(torch.load)


# --- data loader ----------------------------------------------------------------------------------


def _patch_data_loader() -> None:
    loader = torch.utils.data.DataLoader
    start = loader.__iter__
    construct = loader.__init__
    bind = inspect.signature(construct).bind

    @functools.wraps(start)
    def iterate(self):
        # A new iterator draws a seed from the CPU generator, which is the "CUDA" one too: without
        # this a resumed run would draw other dropout masks than an uninterrupted one.
        state = torch.get_rng_state()
        try:
            return start(self)
        finally:
            torch.set_rng_state(state)

    @functools.wraps(construct)
    def init(*args, **kwargs):
        bound = bind(*args, **kwargs)
        bound.arguments['pin_memory'] = False
        construct(*bound.args, **bound.kwargs)

    loader.__iter__ = iterate
    loader.__init__ = init
