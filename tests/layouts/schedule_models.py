"""The models that run under schedules: what distinguishes each from a small standard GPT."""

from __future__ import annotations

from layout_cases import MIXERS, MOE

MHC = {'residual_type': 'mhc', 'init': 'identity'}
SINGLE = {**MHC, 'single_pass': True}
ENGRAM = {'layers': (2, 3), 'heads': 2, 'table_size': 50, 'dim': 16}
# Routers that count tokens over the batch, and move by it.
BIASED = {'moe_router_enable_expert_bias': True, 'moe_router_score_function': 'sigmoid'}
MTP = {'mtp_num_layers': 1, 'apply_rope_fusion': False}
HC = {'residual_type': 'hc'}
# Hybrid models of local layers.
LOCAL = {'is_hybrid_model': True, 'transformer_impl': 'local', **MIXERS}
STACK = {**MOE, **LOCAL}
MIXED_LAYERS = {'layers': 8, 'pattern': '*-M*E-EM', 'config': STACK}
PREDICTED = {'layers': 6, 'pattern': '*-M*E-/*E', 'config': {**STACK, **MTP}}

TIED = ('tied', 'mtp', 'mtp-tied')

# model -> what distinguishes it
MODELS = {
    'standard': {},
    'mhc': {'residual': MHC},
    'hc': {'residual': HC},
    'single': {'residual': SINGLE},
    'deep': {'layers': 8},
    'deep-mhc': {'residual': MHC, 'layers': 8},
    'odd': {'residual': MHC, 'layers': 6},
    'tied': {'residual': MHC, 'tied': True},
    'mtp': {'residual': MHC, 'config': MTP},
    'mtp-tied': {'residual': MHC, 'config': MTP, 'tied': True},
    'moe': {'residual': MHC, 'config': MOE},
    'bias': {'residual': MHC, 'config': {**MOE, **BIASED}},
    'engram': {'residual': MHC, 'engram': ENGRAM},
    'engram-moe': {'engram': ENGRAM, 'config': MOE},
    'hybrid-standard': MIXED_LAYERS,
    'hybrid-hc': {'residual': HC, **MIXED_LAYERS},
    'hybrid-mhc': {'residual': MHC, **MIXED_LAYERS},
    'hybrid-single': {'residual': SINGLE, **MIXED_LAYERS},
    'hybrid-tied': {'residual': MHC, 'layers': 4, 'pattern': '*-M-', 'tied': True, 'config': LOCAL},
    'hybrid-local': {'residual': MHC, 'layers': 6, 'pattern': '*-*E*E', 'config': STACK},
    'hybrid-mtp': {'residual': MHC, **PREDICTED},
    'hybrid-mtp-tied': {'residual': HC, **PREDICTED, 'tied': True},
    'hybrid-mtp-standard': PREDICTED,
    'hybrid-engram': {'engram': ENGRAM, 'layers': 4, 'pattern': '*-M-', 'config': LOCAL},
    'hybrid-mamba': {'residual': HC, 'layers': 6, 'pattern': 'MMMMMM', 'config': LOCAL},
}
