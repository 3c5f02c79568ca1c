"""What profilers call F_post,res and the fused edge, for ``megatron-mhc schedule trace``."""

from __future__ import annotations

# Around F_post,res of an MLP sublayer, whatever computes it.
POST_RANGE = 'mhc/F_post_res'
POST_KERNELS = ('post_res_forward_kernel', 'post_res_backward_kernel')
# Autograd's name of the fused edge begins like this.
FUSED_EDGE = 'WriteRead'
