"""``examples/pretrain_gpt.py`` in which one layer breaks: ``MHC_POISON=kind:layer:iteration``.

Kinds: ``attention`` and ``mlp`` make a weight of that sublayer NaN, ``map`` makes a bias of the
mapping before its MLP NaN, ``explode`` adds 500 to the static H_res of that mapping (hc). In mhc
``saturate`` multiplies its static logits by 100; ``collapse`` makes the streams equal behind it.
"""

import os
import pathlib
import runpy

import torch
from megatron.training import training

KIND, LAYER, ITERATION = os.environ['MHC_POISON'].split(':')
train_step = training.train_step


@torch.no_grad()
def poison(model):
    for layer in (layer for chunk in model for layer in chunk.module.decoder.layers):
        if layer.layer_number != int(LAYER):
            continue
        connection = layer.mlp_hyper_connection
        if KIND == 'attention':
            layer.self_attention.linear_proj.weight.fill_(float('nan'))
        elif KIND == 'mlp':
            layer.mlp.linear_fc2.weight[0] = float('nan')
        elif KIND == 'map':
            connection.bias[-1] = float('nan')
        elif KIND == 'collapse':
            connection.bias.zero_()
            connection.mapping_proj.weight.zero_()
        else:
            static = connection.bias[2 * connection.num_streams :]
            static.copy_(100 * static if KIND == 'saturate' else static + 500)


def breaking(forward_step_func, data_iterator, model, *args, iteration=None, **kwargs):
    if iteration + 1 == int(ITERATION):
        poison(model)
    return train_step(forward_step_func, data_iterator, model, *args, iteration=iteration, **kwargs)


training.train_step = breaking
script = pathlib.Path(__file__).parents[2] / 'examples' / 'pretrain_gpt.py'
runpy.run_path(str(script), run_name='__main__')
