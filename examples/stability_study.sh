#!/usr/bin/env bash
# Train one deep, narrow GPT with each residual topology and draw their stability on one page: loss
# gap, gradient norm, gains of single and composite H_res (mHC, arXiv 2512.24880, Figures 2 to 7).
# 48 layers, 96 sublayers, on two CPU cores in minutes; the same model, data and seed for all three.
#
#   examples/stability_study.sh                     # after `make train`, which makes the environment
#   ITERS=300 OUTPUT=/tmp/study examples/stability_study.sh
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
ITERS=${ITERS:-120}
LAYERS=${LAYERS:-48}
OUTPUT=${OUTPUT:-runs/stability}

# Later flags win over those of the quick start, which brings the corpus and the training loop.
MODEL_ARGS=(
    --num-layers "$LAYERS" --hidden-size 32 --num-attention-heads 2
    --seq-length 64 --max-position-embeddings 64
)
TRAINING_ARGS=(
    --micro-batch-size 4 --global-batch-size 8
    --lr 4e-3 --min-lr 4e-4
    --log-interval 1 --eval-iters 4
)
MONITOR_ARGS=(--mhc-monitor --mhc-monitor-interval 5 --mhc-monitor-tokens 256)
declare -A RESIDUAL_ARGS=(
    [standard]=''
    [hc]="${MONITOR_ARGS[*]}"
    [mhc]="${MONITOR_ARGS[*]} --mhc-init identity"
)

folders=()
for residual in standard hc mhc; do
    # shellcheck disable=SC2086 # flags without spaces in them
    "$PYTHON" tools/quickstart.py train --residual-type "$residual" --iters "$ITERS" \
        --output "$OUTPUT" -- "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" ${RESIDUAL_ARGS[$residual]}
    folders+=("$residual=$OUTPUT/train/$residual/tensorboard")
done
"$PYTHON" -m megatron_mhc report "${folders[@]}" --output "$OUTPUT/stability.png"
