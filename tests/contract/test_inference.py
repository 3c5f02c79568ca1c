"""Inference with a KV cache: token by token what the whole sequence at once computes."""

from __future__ import annotations

import pytest
import torch

BATCH, SEQUENCE, PROMPT, VOCABULARY = 3, 16, 5, 64
RESIDUALS = {
    'standard': None,
    'hc': {'residual_type': 'hc'},
    'mhc': {'residual_type': 'mhc', 'init': 'identity', 'kernel_backend': 'torch'},
    'mhc-kernels': {'kernel_backend': 'triton'},
    'mhc-single-pass': {'residual_type': 'mhc', 'single_pass': True},
    'engram': None,
    'engram-mhc': {'residual_type': 'mhc', 'single_pass': True},
    'mudd': {'residual_type': 'mudd'},
    'gated': {'residual_type': 'gated', 'gated_rank': 3},
    'mhc-learned': {'residual_type': 'mhc', 'stream_merge': 'learned'},
    'mamba-mhc': {'residual_type': 'mhc', 'init': 'identity', 'kernel_backend': 'torch'},
    'hybrid-mhc': {'residual_type': 'mhc', 'init': 'identity', 'kernel_backend': 'torch'},
}
PATTERNS = {'hybrid-mhc': '*-*-', 'mamba-mhc': 'M-*M'}
MEMORY = {'layers': (1, 3), 'heads': 2, 'table_size': 50, 'dim': 16}
MAMBA = {'mamba_state_dim': 8, 'mamba_head_dim': 8, 'mamba_num_groups': 2}


@pytest.fixture(autouse=True)
def no_engine_left():
    """Since 0.18 an engine switches the whole process to inference."""
    yield
    from megatron.core.inference import utils

    if hasattr(utils, 'InferenceMode'):
        utils.InferenceMode.unset_active()


@pytest.fixture(params=RESIDUALS)
def model(request, build, random_seed):
    if request.param in PATTERNS:
        from hybrid_models import hybrid_model

        model = hybrid_model(PATTERNS[request.param], RESIDUALS[request.param], **MAMBA)
    else:
        norm = {'normalization': 'RMSNorm'} if request.param == 'gated' else {}
        memory = {'engram': MEMORY} if request.param.startswith('engram') else {}
        model = build(RESIDUALS[request.param], **norm, **memory)
    generator = torch.Generator().manual_seed(random_seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if 'hyper_connection' in name or 'stream_merge' in name or 'engram' in name:
                parameter.add_(0.3 * noise)
            # Weights of whole outputs: their size multiplies from layer to layer.
            if 'dense_aggregates' in name:
                parameter.add_(0.1 * noise)
    return model.eval()


def whole(model, tokens):
    """Logits ``[b, s, V]`` without a cache."""
    length = tokens.shape[1]
    positions = torch.arange(length).expand(len(tokens), -1)
    mask = torch.ones(length, length).triu(1).bool()[None, None]
    return model(tokens, positions, mask, runtime_gather_output=True)


# Megatron's engines run in inference mode; a caller of its own may not.
@pytest.mark.parametrize('mode', [torch.inference_mode, torch.no_grad])
def test_prefill_and_decoding_equal_the_whole_sequence(model, mode):
    from megatron.core.inference.contexts import StaticInferenceContext

    if any('.mixer.' in name for name, _ in model.named_parameters()):
        from megatron.core.inference import utils

        # A Mamba layer has a cache where an engine says so, which engines of 0.17 need not.
        if hasattr(utils, 'InferenceMode'):
            utils.InferenceMode.set_active()
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE))
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    context = StaticInferenceContext(BATCH, SEQUENCE)
    logits = []
    with mode():
        for start, stop in ((0, PROMPT), *((t, t + 1) for t in range(PROMPT, SEQUENCE))):
            mask = torch.ones(stop - start, stop).triu(1).bool()[None, None] if start == 0 else None
            inputs = tokens[:, start:stop], positions[:, start:stop], mask
            # Of a prompt, 0.17 computes the last token's logits only.
            logits.append(
                model(*inputs, inference_context=context, runtime_gather_output=True)[:, -1:]
            )
            context.sequence_len_offset += stop - start
            context.enable_decode_mode()
        expected = whole(model, tokens)[:, PROMPT - 1 :]
    # Sums in another order, which a norm after a cancellation enlarges; logits are about 0.4.
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-5, atol=2e-5)


class Letters:
    """What the text generation controller asks of a tokenizer."""

    vocab_size, eod, bos = VOCABULARY, VOCABULARY - 1, None

    def tokenize(self, text):
        return [ord(letter) - 32 for letter in text]

    def detokenize(self, tokens, **others):
        return ''.join(chr(token + 32) for token in tokens)

    def offsets(self, tokens, text):
        return list(range(len(tokens)))


def test_megatrons_text_generation_picks_the_likeliest_tokens(model):
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines import StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
        GPTInferenceWrapper,
    )
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )
    from megatron.core.transformer.enums import AttnBackend

    model.config.attention_backend = AttnBackend.local
    wrapper = GPTInferenceWrapper(model, StaticInferenceContext(2, SEQUENCE))
    engine = StaticInferenceEngine(
        TextGenerationController(wrapper, Letters()), max_batch_size=2, legacy=True
    )
    prompts = ['MEGA', 'TRON!']
    settings = SamplingParams(top_k=1, num_tokens_to_generate=8)
    requests = engine.generate(prompts, sampling_params=settings)
    for prompt, request in zip(prompts, requests, strict=True):
        tokens = torch.tensor([Letters().tokenize(prompt)])
        for _ in range(8):
            with torch.no_grad():
                following = whole(model, tokens)[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, following], 1)
        generated, expected = list(request.generated_tokens), tokens[0, -8:].tolist()
        # Nothing, where the end of the document is the likeliest of all.
        assert generated or expected[0] == Letters.eod
        assert generated == expected[: len(generated)]
