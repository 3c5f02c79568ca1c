#!/usr/bin/env bash
# Train the quick start's model, export it to Hugging Face and evaluate it with
# lm-evaluation-harness, on text that it has not been trained on. Nothing is downloaded but the
# harness itself (`make evaluate` installs it: pip install 'megatron-mhc[evaluate]').
#
#   make evaluate                                    # that is, this
#   OUTPUT=/tmp/runs examples/evaluate.sh --iters 50 # options of tools/quickstart.py train
#   LM_EVAL_ARGS='--limit 5' examples/evaluate.sh    # of lm_eval
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
OUTPUT=${OUTPUT:-runs}
MODEL=$OUTPUT/evaluate/model
TASK=$OUTPUT/evaluate/task

"$PYTHON" -c 'import lm_eval' 2>/dev/null || {
    echo "evaluate.sh: lm-evaluation-harness is not installed; pip install lm-eval, or make evaluate" >&2
    exit 1
}
"$PYTHON" tools/quickstart.py train --residual-type mhc --output "$OUTPUT" "$@"
mkdir -p "$OUTPUT/evaluate"
"$PYTHON" -m megatron_mhc convert "$OUTPUT/train/mhc/checkpoints" "$MODEL" --to hf --overwrite
"$PYTHON" examples/held_out_task.py --corpus "$OUTPUT/corpus" --model "$MODEL" --output "$TASK"
# 128 tokens: the sequence length that it was trained with.
# shellcheck disable=SC2086 # several options
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$PYTHON" -m lm_eval run --model hf \
    --model_args "pretrained=$MODEL,trust_remote_code=True,dtype=float32,max_length=128" \
    --tasks held_out --include_path "$TASK" --batch_size 16 --output_path "$OUTPUT/evaluate" \
    ${LM_EVAL_ARGS:-}
echo "bits_per_byte times 0.6931 is the loss in nats that Megatron logs."
