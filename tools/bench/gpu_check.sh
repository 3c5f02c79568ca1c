#!/usr/bin/env bash
# Everything that only a GPU can tell, in under 25 minutes, what is worth most first.
#
#   tools/bench/gpu_check.sh [FOLDER]    default: results/check-<date>; MINUTES=25 is the budget
#   tools/bench/gpu_check.sh --rehearse  every step on a machine without a GPU: kernels interpreted,
#                                        tiny shapes, an emulated device, no figures; a minute or two
#
# Resumable: a step that ended well leaves FOLDER/.done/STEP and is not run again; remove that file
# to run it again. Every step has a limit of its own, and none runs past the budget: what is left is
# listed, and the same command goes on with it. Needs torch and Triton; pytest, compute-sanitizer,
# Megatron-Core and Transformer Engine where they are. Peers of the bench: tools/bench/README.md.
set -uo pipefail
cd "$(dirname "$0")/../.."
rehearse=
if [ "${1-}" = --rehearse ]; then
    rehearse=1
    shift
fi
case "${1-}" in -*)
    echo "gpu_check.sh: error: $1: no such option; give a folder, or --rehearse" >&2
    exit 2
    ;;
esac
python=${PYTHON:-python3}
if ! "$python" -c 'import torch' 2>/dev/null; then
    echo "gpu_check.sh: error: PYTHON=$python cannot run or has no torch; name one that has" >&2
    exit 2
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
budget=$((60 * ${MINUTES:-25}))
if [ -n "$rehearse" ]; then
    out=${1:-$(mktemp -d)}
    device=cpu
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
    # One tiny shape each.
    accuracy=(--hidden-size 32 --tokens 8)
    kernels=(--hidden-size 32 --tokens 8)
    bench=(--hidden-sizes 32 --tokens 8 --num-streams 2 --ours torch --ops layer pre)
    small=(--hidden-sizes 32 --tokens 1 2 --num-streams 2 --ours torch --ops layer)
    tests=(tests/kernels/test_sinkhorn_range.py)
    runs=(mhc-bf16 standard-fp8)
    posts=(post-high)
else
    out=${1:-tools/bench/results/check-$(date +%Y-%m-%d)}
    device=cuda
    unset TRITON_INTERPRET
    accuracy=()
    kernels=()
    bench=(--budget-minutes 5 --num-streams 4)
    small=(--budget-minutes 2 --num-streams 4 --hidden-sizes 4096 --tokens 64 256 1024
        --ops layer sublayer)
    tests=(tests/kernels)
    runs=(standard-bf16 mhc-bf16 standard-fp8 mhc-fp8)
    posts=(post-compute post-high)
fi
mkdir -p "$out/.done"
failed=() left=() absent=()

# step NAME SECONDS COMMAND...: run it once, within its own limit and the budget.
step() {
    local name=$1 limit=$2 remaining=$((budget - SECONDS))
    shift 2
    if [ -e "$out/.done/$name" ]; then
        printf '\n=== %s: done before (%s)\n' "$name" "$(cat "$out/.done/$name")"
        return
    fi
    if ((remaining < 10)); then
        left+=("$name")
        return
    fi
    if ((limit > remaining)); then limit=$remaining; fi
    if [ -n "$rehearse" ]; then limit=$((10 * limit)); fi
    printf '\n=== %s (after %d s, at most %d s): %s\n' "$name" "$SECONDS" "$limit" "$*"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.txt"
    local status=${PIPESTATUS[0]}
    case $status in
        0) date -u '+%Y-%m-%d %H:%M UTC' >"$out/.done/$name" ;;
        124 | 137) failed+=("$name (stopped after $limit s)") ;;
        *) failed+=("$name (exit status $status)") ;;
    esac
}

missing() {
    absent+=("$1")
    printf '\n=== %s: %s is not installed, left out\n' "$1" "$2" | tee "$out/$1.txt"
}

has() {
    "$python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec(sys.argv[1]))' "$1" \
        2>/dev/null
}

# sanitize TOOL: memory or race errors of every op, forward and backward.
sanitize() {
    local command=("$python" -m megatron_mhc kernels accuracy --device "$device")
    if [ -n "$rehearse" ]; then
        echo "rehearsal: compute-sanitizer --tool $1 is stood in for by the command alone"
        step "$1" 100 "${command[@]}" "${accuracy[@]}"
    elif command -v compute-sanitizer >/dev/null; then
        step "$1" 100 compute-sanitizer --tool "$1" --error-exitcode 1 "${command[@]}" \
            --tokens 67 --hidden-size 200
    else
        missing "$1" compute-sanitizer
    fi
}

# How F_post,res was delayed on either stream: traces of the runs of post-stream.
overlap() {
    local gpus
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    if [ -n "$rehearse" ]; then
        echo 'rehearsal: schedule trace reads kernels of a GPU; --help stands in for it'
        step overlap 60 "$python" -m megatron_mhc schedule trace --help
    elif [ "$gpus" -gt 1 ] 2>/dev/null; then
        step overlap 240 env PYTHON="$python" OUT="$out/overlap" tools/overlap_evidence.sh
    elif compgen -G "$out/train/post-*/torch_profile/rank-*.json.gz" >/dev/null; then
        step overlap 60 "$python" -m megatron_mhc schedule trace \
            "$out"/train/post-*/torch_profile/rank-*.json.gz
    else
        left+=('overlap (no trace: post-stream has to run first)')
    fi
}

arguments=()
if [ -n "$rehearse" ]; then arguments=(--rehearse); fi
step environment 60 "$python" tools/bench/bench_environment.py "$device" gpu_check.sh \
    "${arguments[@]}" "$out"
step accuracy-bf16 120 "$python" -m megatron_mhc kernels accuracy --device "$device" \
    --dtype bf16 "${accuracy[@]}"
# Beside the predictions of `megatron-mhc kernels report --roofline`.
step kernels 120 "$python" tools/bench/kernel_times.py --device "$device" "${kernels[@]}" \
    --output "$out"
step bench 330 "$python" tools/bench/bench.py --device "$device" "${bench[@]}" --output "$out/bench"
if has megatron.core; then
    step train 330 "$python" tools/bench/train_check.py --device "$device" --runs "${runs[@]}" \
        --output "$out/train"
else
    missing train Megatron-Core
fi
step bench-small 150 "$python" tools/bench/bench.py --device "$device" "${small[@]}" \
    --output "$out/bench-small"
if has megatron.core; then
    # What --mhc-cuda-graphs waits for.
    step graphs 240 "$python" tools/bench/graph_check.py --device "$device"
    step post-stream 150 "$python" tools/bench/train_check.py --device "$device" \
        --runs "${posts[@]}" --output "$out/train"
    overlap
else
    missing graphs Megatron-Core
    missing post-stream Megatron-Core
fi
if has pytest; then
    step tests 240 "$python" -m pytest -q -p no:cacheprovider "${tests[@]}"
else
    missing tests pytest
fi
sanitize memcheck
sanitize racecheck
step accuracy-fp32 120 "$python" -m megatron_mhc kernels accuracy --device "$device" \
    --dtype fp32 "${accuracy[@]}"
step profile 60 "$python" tools/bench/profile_layer.py --device "$device" \
    --output "$out/layer_trace.json"

printf '\n=== after %d s, results in %s\n' "$SECONDS" "$out"
if [ ${#absent[@]} -gt 0 ]; then printf 'not installed: %s\n' "${absent[*]}"; fi
if [ ${#left[@]} -gt 0 ]; then
    printf 'the budget of %d s is spent; left: %s\nthe same command with this folder goes on\n' \
        "$budget" "${left[*]}"
fi
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
if [ ${#left[@]} -gt 0 ]; then exit 3; fi
echo 'all passed'
