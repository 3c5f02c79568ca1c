"""Tests run anywhere: without CUDA, Megatron finds the emulated device, kernels the interpreter."""

import argparse
import atexit
import gc
import importlib.util
import os
import pathlib
import secrets
import sys

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from megatron_mhc.runtime import cpu_device

# What several tests share; pytest imports tests by path.
sys.path += [str(pathlib.Path(__file__).parent / folder) for folder in ('layouts', 'te', 'launch')]

if not torch.cuda.is_available():
    # Triton reads this when it is imported; the kernels are then interpreted on CPU tensors.
    os.environ.setdefault('TRITON_INTERPRET', '1')
    cpu_device.install()
if os.environ.get('TRITON_INTERPRET') == '1' and importlib.util.find_spec('triton'):
    import interpreter_bf16

    interpreter_bf16.install()


# Folders whose files launch whole trainings: a minute each, so none may be the last to begin.
LONG = ('layouts', 'pipeline', 'te', 'monitor', 'examples', 'convert', 'runtime', 'recipes', 'tree')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; within a file, and among the others, the order stays."""
    items.sort(key=lambda item: item.path.parent.name not in LONG)
    # Half a million objects of the libraries stay to the end; collections need not look at them.
    gc.freeze()
    # Triton 3.9 would call them leaked.
    atexit.register(gc.unfreeze)


MINIMAL = ['--num-layers', '2', '--hidden-size', '32', '--num-attention-heads', '4']


@pytest.fixture(scope='module')
def parse():
    """``parse(flags)`` through Megatron's own parser with the argument patch in place."""
    from megatron.training import arguments

    from megatron_mhc.patches import engine
    from megatron_mhc.patches.arguments import ARGUMENTS_PATCH
    from megatron_mhc.patches.registry import ALL_PATCHES

    engine.apply((ARGUMENTS_PATCH,))
    parser = arguments.add_megatron_arguments(
        argparse.ArgumentParser(prog='pretrain', allow_abbrev=False)
    )

    def run(*flags):
        return parser.parse_args([*MINIMAL, *flags])

    yield run
    engine.revert(ALL_PATCHES)


@pytest.fixture
def refused(parse, capsys):
    """``refused(flags)``: the one line with which the parser ends the run."""

    def run(flags: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            parse(*flags.split())
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert error.count('\n') == 1 and error.startswith('pretrain: error: ')
        return error

    return run


@pytest.fixture
def answer(capsys):
    """``answer(words)``: exit status, stdout and stderr of ``megatron-mhc words``."""
    from megatron_mhc.cli import main

    def run(words: str):
        with pytest.raises(SystemExit) as ended:
            main(words.split())
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def random_seed() -> int:
    """A fresh seed per run, printed when the test fails; REPEAT_SEED repeats one."""
    seed = int(os.environ.get('REPEAT_SEED') or secrets.randbits(32))
    print(f'REPEAT_SEED={seed}')
    torch.manual_seed(seed)
    return seed


@pytest.fixture(scope='session')
def tensors():
    """``tensors(path)``: all tensors of a distributed checkpoint, whole, without Megatron."""

    def read(path: pathlib.Path) -> dict[str, torch.Tensor]:
        reader = FileSystemReader(path)
        state = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in reader.read_metadata().state_dict_metadata.items()
            if hasattr(entry, 'size')
        }
        load(state, storage_reader=reader, no_dist=True)
        return state

    return read
