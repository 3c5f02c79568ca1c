"""Fine-tune a frozen model with low-rank adapters (LoRA) of PEFT, in Megatron's own training loop.

    torchrun --nproc-per-node 1 -m megatron_mhc.run examples/lora.py --lora-base RUN --lora-rank 8 \
        --lora-out ADAPTERS --transformer-impl local ...

``RUN`` is what ``--load`` would name: a ``torch_dist`` checkpoint of the whole model, whose flags
are repeated. Checkpoints of this run have the weights of the base under their own names, and the
adapters beside them; ``ADAPTERS`` gets the adapters alone at the end, in PEFT's format.

PEFT 0.21 has a class for Megatron's layers (``LoraConfig.megatron_config``), but choosing it fails,
and it takes what they return, a pair, for a tensor. So here is one that does not, in the place that
PEFT has for custom layers. Data parallelism is Megatron's own. Refused: tensor and pipeline
parallelism, for an adapter here is whole and numbered as its rank numbers layers; layers of
Transformer Engine, most of which norm their input within, so that an adapter beside them would read
what is not normed.
"""

import argparse
import pathlib
import sys

import torch
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

LAYERS = (ColumnParallelLinear, RowParallelLinear)
# Of attention and of the MLP; add linear_q_up_proj and the like for latent attention.
TARGETS = ('linear_qkv', 'linear_proj', 'linear_fc1', 'linear_fc2')
WEIGHTS = 'adapter_model.safetensors'


class MegatronLora(Linear):
    """Adapters beside a linear layer that returns its output and a bias that is yet to be added."""

    def forward(self, x, *args, **kwargs):
        y, bias = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y, bias
        for name in self.active_adapters:
            down, up = self.lora_A[name], self.lora_B[name]
            added = up(down(self.lora_dropout[name](x.to(down.weight.dtype)))) * self.scaling[name]
            y = y + added.to(y.dtype)
        return y, bias

    def sharded_state_dict(self, prefix='', sharded_offsets=(), metadata=None):
        """The base under the names that it has without adapters, and these beside it."""
        own = self.base_layer.sharded_state_dict(prefix, sharded_offsets, metadata)
        # The loop loads what it saved into the module, which knows the base by another name.
        own = {prefix + 'base_layer.' + name.removeprefix(prefix): t for name, t in own.items()}
        for name, value in self.state_dict(keep_vars=True).items():
            if not name.startswith('base_layer.'):
                own[prefix + name] = _replicated(prefix + name, value, sharded_offsets)
        return own


def _replicated(name, value, sharded_offsets):
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    sharded = make_sharded_tensors_for_checkpoint({name: value}, '', {}, sharded_offsets)
    return sharded[name]


def add_lora(model, rank, alpha=None, targets=TARGETS, dropout=0.0):
    """Freeze ``model`` and put adapters of ``rank`` beside its ``targets``; they start at 0.

    Args:
        alpha: their outputs are multiplied by alpha / rank; 2 * rank if None.

    Raises:
        ValueError: the model is split over ranks, or a target is no local layer.
    """
    config = model.config
    for flag, ranks in (
        ('--tensor-model-parallel-size', config.tensor_model_parallel_size),
        ('--pipeline-model-parallel-size', config.pipeline_model_parallel_size),
    ):
        if ranks > 1:
            raise ValueError(f'{flag} {ranks}: adapters here are whole; train them with {flag} 1')
    for name, module in model.named_modules():
        if name.rpartition('.')[2] in targets and not isinstance(module, LAYERS):
            raise ValueError(
                f'{name} is a {type(module).__name__}: only local layers take adapters here, for '
                'others may norm their input within; use --transformer-impl local'
            )
    settings = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
    )
    settings._register_custom_module(dict.fromkeys(LAYERS, MegatronLora))
    inject_adapter_in_model(settings, model)
    return settings


def save_adapters(model, settings, folder):
    """The adapters alone, as PEFT saves them."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings.save_pretrained(folder)
    state = get_peft_model_state_dict(model)
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / WEIGHTS)


def load_adapters(model, folder):
    """Into a model that ``add_lora`` changed; raises RuntimeError if any is missing."""
    state = load_file(pathlib.Path(folder) / WEIGHTS)
    wanted = get_peft_model_state_dict(model)
    if state.keys() != wanted.keys():
        raise RuntimeError(f'{folder} has other adapters than this model: {len(state)} tensors')
    set_peft_model_state_dict(model, state)


def merge_adapters(model):
    """Add each product of two to the weight beside it, and leave the layers as they were."""
    for _, owner in list(model.named_modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, MegatronLora):
                child.merge()
                setattr(owner, name, child.get_base_layer())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="All else are Megatron's flags and ours: megatron-mhc docs flags",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    folder = {'type': pathlib.Path, 'metavar': 'FOLDER'}
    parser.add_argument(
        '--lora-base',
        required=True,
        help='checkpoint of the whole model, as --load names it',
        **folder,
    )
    parser.add_argument(
        '--lora-rank', default=8, type=int, metavar='R', help='rank of each adapter (default: 8)'
    )
    parser.add_argument(
        '--lora-out', help="gets the adapters at the end, in PEFT's format", **folder
    )
    own, sys.argv[1:] = parser.parse_known_args()
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    import pretrain_gpt

    from megatron_mhc.checkpoints.files import iteration_folder

    base = iteration_folder(own.lora_base, None, '--lora-base')
    if base is None:
        raise SystemExit(f'--lora-base {own.lora_base}: none there; name what --load would')
    built = []

    def provider(*args, **kwargs):
        model = pretrain_gpt.model_provider(*args, **kwargs)
        # Before anything is added that the checkpoint has not.
        common = dist_checkpointing.load_common_state_dict(str(base))
        metadata = common.get('content_metadata')
        wanted = model.sharded_state_dict(metadata=metadata)
        model.load_state_dict(dist_checkpointing.load({'model': wanted}, str(base))['model'])
        built.append((model, add_lora(model, own.lora_rank)))
        return model

    pretrain_gpt.main(provider)
    if own.lora_out and torch.distributed.get_rank() == 0:
        save_adapters(*built[0], own.lora_out)


if __name__ == '__main__':
    main()
