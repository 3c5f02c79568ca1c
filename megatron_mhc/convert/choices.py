"""What the command offers, apart from what needs torch."""

from __future__ import annotations

STANDARD = 'standard'
# Names of ``LAYOUTS``.
TARGETS = (
    'mhc',
    'megatron-main',
    'megatron-dev',
    'deepseek-v4',
    'deepseek-v4.1',
    'glm-5.3',
    'hy4',
    'megatron-bridge',
)
# How what is made ``mhc`` may compute: as we do, or as a layout does.
NUMERICS = ('paper', 'megatron-main', 'megatron-dev', 'deepseek-v4', 'glm-5.3', 'hy4')
# Residuals that a standard model may get beside ``mhc``.
RESIDUALS = ('gated', 'attention')
# The class of the model, whatever its connections are.
MODEL_CLASSES = ('hybrid', 'gpt')
OWN = 'own'
# For the transformers of Hugging Face, and back from them as it is.
HF, MEGATRON = 'hf', 'megatron'
# Argument -> flag of the command.
FLAGS = {
    'num_streams': '--mhc-num-residual-streams',
    'iterations': '--mhc-sinkhorn-iterations',
    'stream_merge': '--mhc-stream-merge',
    'norm_eps': '--mhc-norm-eps',
    'init_gating_factor': '--mhc-init-gating-factor',
    'noise': '--break-symmetry',
    'gated_rank': '--gated-residual-rank',
    'attention_block_size': '--attention-residual-block-size',
}
