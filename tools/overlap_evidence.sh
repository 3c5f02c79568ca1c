#!/usr/bin/env bash
# How much communication each pipeline schedule hides, measured on this node's GPUs (two or more).
#
#   tools/overlap_evidence.sh                         all GPUs as pipeline stages
#   GPUS=4 HIDDEN=4096 OUT=evidence4 tools/overlap_evidence.sh
#   EXTRA='--num-experts 8 --moe-token-dispatcher-type alltoall' tools/overlap_evidence.sh
#
# Trains a small GPT with mHC residuals on made-up data under 1f1b, dualpipev and dualpipev-w, each
# with F_post,res on the compute stream and on one of high priority, traces two iterations with
# torch's profiler, and hands the traces to `megatron-mhc schedule trace`. Some minutes.
#
# It should print one table like this (numbers differ by machine; these show the shape, not a claim):
#
#   run                   rank    ms   idle  SEND/RECV  send   recv  ...  F_post,res  delay us ...
#   1f1b-compute             0    ..     ..         ..    ..     ..               ..        ..
#   ...
#   dualpipev-w-high       all    ..     ..         ..    ..     ..               ..        ..
#
# and what to look for in it:
#   - SEND/RECV (share of its time that no compute covers) falls from 1f1b to dualpipev to
#     dualpipev-w; so does idle. What is left at dualpipev is mostly recv in warm-up and drain: with
#     few microbatches the pipeline bubble is exposed by nature. Raise MICROBATCHES to see it fall.
#   - high: F_post,res has streams of its own, in brackets with a priority below 0 where the
#     profiler knows it; its delay stays at a few us. compute: one stream, shared with all else.
#   - ms of the runs compares them: the same work is done in all.
# Lines under the table say what to do where a number is bad.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
OUT=${OUT:-overlap-evidence}
SCHEDULES=${SCHEDULES:-1f1b dualpipev dualpipev-w}
POST_STREAMS=${POST_STREAMS:-compute high}

found=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null) || {
    echo "overlap_evidence: error: PYTHON=$PYTHON cannot run or has no torch; name one that has" >&2
    exit 2
}
GPUS=${GPUS:-$found}
if ((GPUS < 2 || found < GPUS)); then
    echo "overlap_evidence: error: this takes 2 or more GPUs on one node; asked for $GPUS," \
        "torch finds $found" >&2
    exit 2
fi

# One pipeline of all GPUs. Two chunks a rank: layers are a multiple of 2 * GPUS, and there are at
# least 2 * GPUS microbatches.
LAYERS=${LAYERS:-$((4 * GPUS))}
MICROBATCHES=${MICROBATCHES:-$((4 * GPUS))}
HIDDEN=${HIDDEN:-2048}
HEADS=${HEADS:-16}
SEQUENCE=${SEQUENCE:-2048}
MICRO_BATCH=${MICRO_BATCH:-1}
STREAMS=${STREAMS:-4}
# Traced are two iterations, after the first ones have compiled kernels and connected ranks.
WARM_UP=${WARM_UP:-6}
EXTRA=${EXTRA:-}

model=(
    --num-layers "$LAYERS" --hidden-size "$HIDDEN" --num-attention-heads "$HEADS"
    --seq-length "$SEQUENCE" --max-position-embeddings "$SEQUENCE"
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --attention-dropout 0 --hidden-dropout 0 --untie-embeddings-and-output-weights --bf16
    --residual-type mhc --mhc-num-residual-streams "$STREAMS"
)
# Transformer Engine and Apex may not be there.
if ! "$PYTHON" -c 'import transformer_engine.pytorch' 2>/dev/null; then
    model+=(--transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm
        --no-rope-fusion --no-masked-softmax-fusion)
fi
training=(
    --mock-data --tokenizer-type NullTokenizer --vocab-size 32000
    --micro-batch-size "$MICRO_BATCH" --global-batch-size $((MICRO_BATCH * MICROBATCHES))
    --pipeline-model-parallel-size "$GPUS" --lr 1e-4 --seed 1
    --train-iters $((WARM_UP + 3)) --eval-iters 0 --eval-interval 1000 --log-interval 1
    --profile --use-pytorch-profiler
    --profile-step-start "$WARM_UP" --profile-step-end $((WARM_UP + 2))
)
# With 1, all streams would share one hardware queue, and nothing could overlap.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-32}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

traces=()
for schedule in $SCHEDULES; do
    for post in $POST_STREAMS; do
        run=$OUT/$schedule-$post
        echo "$run ($LAYERS layers, $MICROBATCHES microbatches on $GPUS GPUs; log in $run/train.log)"
        rm -rf "$run/torch_profile"
        mkdir -p "$run/tensorboard"
        # shellcheck disable=SC2086  # EXTRA holds several words
        if ! "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" \
            -m megatron_mhc.run examples/pretrain_gpt.py "${model[@]}" "${training[@]}" \
            --pipeline-schedule "$schedule" --mhc-post-stream "$post" \
            --tensorboard-dir "$run/tensorboard" $EXTRA >"$run/train.log" 2>&1; then
            # The launcher's own summary stands last and names no cause.
            grep -E '[Ee]rror: ' "$run/train.log" | grep -v ChildFailedError | head -n 5 >&2 || true
            echo "overlap_evidence: error: $run failed; all output is in $run/train.log" >&2
            exit 1
        fi
        # Megatron writes them beside the folder of TensorBoard.
        traces+=("$run"/torch_profile/rank-*.json.gz)
    done
done

echo
"$PYTHON" -m megatron_mhc schedule trace "${traces[@]}"
