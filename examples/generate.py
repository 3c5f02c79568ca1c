"""Continue a prompt with a trained model, by Megatron-Core's own inference engine.

Runs on one pipeline stage of 0.17, 0.18 and 0.19, whatever layout the checkpoint was written in.
The model's flags are read from the checkpoint; after ``make train``:

    python -m megatron_mhc.run examples/generate.py --load runs/train/mhc/checkpoints \\
        --use-checkpoint-args --vocab-size 256 --residual-type mhc --prompt 'def main('
"""

import argparse
from inspect import signature

from megatron.core import mpu
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.training import get_args
from megatron.training.checkpointing import load_checkpoint
from megatron.training.initialize import initialize_megatron
from pretrain_gpt import model_provider

from megatron_mhc.inputs.values import integer, number

# What Megatron demands of every run; nothing is trained here.
DEFAULTS = {'micro_batch_size': 1, 'no_load_optim': True, 'no_load_rng': True, 'bf16': False}


class Bytes:
    """The quick start's tokens: one byte of UTF-8 each; 255, of which there is none, is the end."""

    vocab_size, eod, bos = 256, 255, None

    def tokenize(self, text):
        return list(text.encode())

    def detokenize(self, tokens, **others):
        return bytes(token for token in tokens if token < self.eod).decode(errors='replace')

    def offsets(self, tokens, text):
        return list(range(len(tokens)))


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group('generation')
    group.add_argument('--prompt', nargs='+', default=['def '], help='texts to continue')
    group.add_argument('--tokens', type=integer(1), default=80, help='to add to each (default: 80)')
    group.add_argument(
        '--temperature', type=number(0, above=True), default=0.8, help='of sampling (default: 0.8)'
    )
    group.add_argument('--greedy', action='store_true', help='always take the likeliest token')
    return parser


def initialize():
    """Parse the command line and set up this process as the installed release expects."""
    options = {'extra_args_provider': add_arguments, 'args_defaults': DEFAULTS}
    if 'args_defaults' not in signature(initialize_megatron).parameters:
        from megatron.training.arguments import parse_and_validate_args

        parse_and_validate_args(**options)
        options = {}
    initialize_megatron(**options)
    return get_args()


def main():
    args = initialize()
    model = model_provider().to('cuda')
    if args.bf16 or args.fp16:
        model = Float16Module(model.config, model)
    load_checkpoint([model], None, None)
    if args.transformer_impl == 'local':
        # The local attention wants a mask, which Transformer Engine makes by itself.
        model.config.attention_backend = AttnBackend.local
    tokenizer = Bytes() if args.tokenizer_type == 'NullTokenizer' else build_tokenizer(args)
    context = StaticInferenceContext(len(args.prompt), args.max_position_embeddings)
    controller = TextGenerationController(GPTInferenceWrapper(model, context), tokenizer)
    engine = StaticInferenceEngine(controller, random_seed=args.seed, legacy=True)
    sampling = {'top_k': 1} if args.greedy else {'temperature': args.temperature}
    settings = SamplingParams(num_tokens_to_generate=args.tokens, **sampling)
    for request in engine.generate(args.prompt, sampling_params=settings):
        if mpu.get_tensor_model_parallel_rank() == 0:
            print(f'--- {request.prompt}{request.generated_text}', flush=True)


if __name__ == '__main__':
    main()
