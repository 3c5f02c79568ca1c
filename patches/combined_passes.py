"""Patch: ``--overlap-moe-expert-parallel-comm`` for layers with n streams or a memory.

Megatron's stock schedules then run the forward of one microbatch and the backward of another as one
combined pass, which takes layers to pieces and adds the residual by hand. Here both are Megatron's
own whole passes, as two lanes that hand over where dispatch and combine run on a side stream
(``moe_lanes``), so that a layer may be whatever it is. The schedule around them stays stock: none
without a pipeline, and interleaved 1F1B.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules

from megatron_mhc.patches.engine import Patch, applied
from megatron_mhc.patches.moe_lanes import MOE_LANE_PATCHES, combines
from megatron_mhc.schedules.executor_lanes import run_lanes


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def combined_forward_backward_step(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if not combines(bound.arguments['config']):
            return original(*args, **kwargs)
        return _in_lanes(**bound.arguments)

    return combined_forward_backward_step


def _in_lanes(
    *,
    forward_step_func,
    data_iterator,
    f_model,
    num_microbatches,
    input_tensor,
    forward_data_store,
    b_model,
    b_input_tensor,
    b_output_tensor,
    b_output_tensor_grad,
    config,
    f_model_chunk_id,
    pre_forward,
    pre_backward,
    post_forward,
    post_backward,
    collect_non_loss_data,
    is_first_microbatch,
    current_microbatch,
    **others,
):
    """Output of the forward, its number of tokens, and the gradient of the backward's input."""

    def forward():
        return schedules.forward_step(
            forward_step_func,
            data_iterator,
            f_model,
            num_microbatches,
            input_tensor,
            forward_data_store,
            config,
            cp_group_size=parallel_state.get_context_parallel_world_size(),
            collect_non_loss_data=collect_non_loss_data,
            is_first_microbatch=is_first_microbatch,
            current_microbatch=current_microbatch,
            vp_stage=f_model_chunk_id,
            is_last_stage=parallel_state.is_pipeline_last_stage(
                ignore_virtual=f_model_chunk_id is None, vp_stage=f_model_chunk_id
            ),
        )

    def backward():
        return schedules.backward_step(
            b_input_tensor, b_output_tensor, b_output_tensor_grad, config
        )

    (output, tokens), gradient = (None, None), None
    # Messages in the order of the stock schedule: awaited before both passes, sent after both.
    if f_model is not None and pre_forward is not None:
        pre_forward()
    if b_model is not None and pre_backward is not None:
        pre_backward()
    if f_model is None:
        gradient = backward()
    elif b_model is None:
        output, tokens = forward()
    else:
        (output, tokens), gradient = run_lanes(forward, backward)
    if f_model is not None and post_forward is not None:
        post_forward(output)
    if b_model is not None and post_backward is not None:
        post_backward(gradient)
    return output, tokens, gradient


def require_lanes(config: Any) -> None:
    """Raise RuntimeError for a model whose combined passes would lose its streams."""
    if combines(config) and COMBINED_PASSES_PATCHES[0].id not in applied():
        raise RuntimeError(
            'overlap_moe_expert_parallel_comm: the patches that combine passes of layers with n '
            'streams or a memory are not in place; apply COMBINED_PASSES_PATCHES, or set it on the '
            'command line'
        )


COMBINED_PASSES_PATCHES = (
    Patch(
        id='combined-passes',
        target='megatron.core.pipeline_parallel.combined_1f1b:combined_forward_backward_step',
        wrap=_wrap,
        reason='the stock schedules give it a forward and a backward that are to overlap',
        fingerprints={'0.17': '32679ab4', '0.18': 'c8203410', '0.19': 'c8203410'},
        reads=tuple(inspect.signature(_in_lanes).parameters)[:-1],
    ),
    *MOE_LANE_PATCHES,
)
