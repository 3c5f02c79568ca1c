"""Rank of an emulated world that runs several pretrain command lines one after another.

``python tests/cpu_loop_driver.py CASES.json OUT.json`` in a torchrun-like environment. CASES is a
list of ``[name, [argument, ...]]``; OUT receives name -> ``[loss, gradient norm]`` per iteration at
full precision, written by the last rank because losses exist on the last pipeline stage only.
``--with-float-parameters`` and ``--with-frozen-base`` are ours, see ``CHANGED``.
The flags of the package are there too, and its patches are taken back after a case that used them.
"""

import functools
import gc
import importlib.util
import json
import os
import pathlib
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# Left when a case has ended: each process group has three of gloo's.
MOST_THREADS = 30


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recording(train_step, into, chunks):
    def step(forward_step, batches, model, *args, **kwargs):
        chunks[:] = model
        result = train_step(forward_step, batches, model, *args, **kwargs)
        losses, grad_norm = result[0], result[5]
        into.append([float(losses.get('lm loss', 'nan')), float(grad_norm)])
        return result

    return step


def add_float_parameters(model_provider):
    """Give every layer an fp32 parameter that takes part in the loss and stays fp32 under bf16."""
    import torch

    def scale(layer, args, output):
        hidden, *rest = output
        return ((hidden.float() * layer.float_gain).to(hidden.dtype), *rest)

    def provide(*args, **kwargs):
        model = model_provider(*args, **kwargs)
        for layer in model.decoder.layers:
            layer.float_gain = torch.nn.Parameter(torch.ones(model.config.hidden_size))
            layer.register_forward_hook(scale)
        half = model.bfloat16

        def bfloat16():
            half()
            for layer in model.decoder.layers:
                layer.float_gain.data = layer.float_gain.data.float()
            return model

        model.bfloat16 = bfloat16
        return model

    return provide


def freeze_base(model_provider):
    """Train hyper-connections alone, as one may after a standard checkpoint was converted."""

    def provide(*args, **kwargs):
        model = model_provider(*args, **kwargs)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_('hyper_connection' in name)
        return model

    return provide


# Flag of a case -> what it does to the function that builds the model.
CHANGED = {'--with-float-parameters': add_float_parameters, '--with-frozen-base': freeze_base}


def read_docstrings_once():
    """Parse the source of each of Megatron's configuration classes once, not in every case."""
    from megatron.training import argument_utils

    factory = argument_utils.ArgumentGroupFactory
    read = functools.cache(functools.partial(factory._get_field_docstrings, factory))
    factory._get_field_docstrings = staticmethod(read)


def main(cases_path, out_path):
    from megatron_mhc.runtime import cpu_device

    cpu_device.install()
    from megatron_mhc.patches import engine
    from megatron_mhc.patches.arguments import ARGUMENTS_PATCH
    from megatron_mhc.patches.cpu_device import CPU_DEVICE_PATCHES
    from megatron_mhc.patches.dataset_helpers import DATASET_HELPERS_PATCH
    from megatron_mhc.patches.float_parameters import FLOAT_PARAMETER_PATCHES
    from megatron_mhc.patches.registry import ALL_PATCHES

    base = (DATASET_HELPERS_PATCH, *FLOAT_PARAMETER_PATCHES, ARGUMENTS_PATCH)
    engine.apply(CPU_DEVICE_PATCHES)
    import psutil
    import torch
    from megatron.training import training

    read_docstrings_once()
    script = load_script(REPOSITORY / 'examples' / 'pretrain_gpt.py')
    train_step, provider = training.train_step, script.model_provider
    store = torch.distributed.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']))
    results, threads, chunks = {}, [], []
    # What is there now stays; without its half a million objects each collection is quick.
    gc.freeze()
    for number, (name, arguments) in enumerate(json.loads(pathlib.Path(cases_path).read_text())):
        print(f'### {name}', flush=True)
        engine.revert(ALL_PATCHES)
        engine.apply(base)
        # All cases meet in the parent's store, each under a prefix of its own.
        meeting = torch.distributed.PrefixStore(str(number), store)
        script.pretrain = functools.partial(training.pretrain, store=meeting)
        training.train_step = recording(train_step, results.setdefault(name, []), chunks)
        script.model_provider = provider
        for change in CHANGED.keys() & arguments:
            script.model_provider = CHANGED[change](script.model_provider)
        sys.argv = [script.__file__, *(a for a in arguments if a not in CHANGED)]
        script.main()
        torch.distributed.barrier()
        training.destroy_global_state()
        torch.distributed.destroy_process_group()
        # Threads of its groups end with the last reference, which models hold in cycles; the hooks
        # on the gradients of experts are in one that the collector cannot see.
        for chunk in chunks:
            chunk.__dict__.clear()
        gc.collect()
        threads.append(psutil.Process().num_threads())
        assert max(threads) <= MOST_THREADS, f'threads left after each case: {threads}'
    if int(os.environ['RANK']) == int(os.environ['WORLD_SIZE']) - 1:
        pathlib.Path(out_path).write_text(json.dumps(results))


if __name__ == '__main__':
    main(*sys.argv[1:])
