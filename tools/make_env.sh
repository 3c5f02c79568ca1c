#!/usr/bin/env bash
# Make or update the virtual environment $1: this package (editable), its extras, and a stamp.
#
# $PIP_ARGS goes to pip, e.g. PIP_ARGS='--index-url URL' for a smaller torch without CUDA.
set -euo pipefail
env=$1
start=$SECONDS

if [ -e "$env/.made-here" ] && [ ! -e "$env/.installed" ]; then
    echo "$env was left half made; it is made again."
    rm -rf "$env"
fi
# An environment that was there before is installed into, never removed.
if [ ! -e "$env" ]; then
    python=$("$(dirname "$0")/find_python.sh")
    cat <<END
Making the environment $env with $("$python" --version) ($python):
  torch, megatron-core[training], tensorboard, matplotlib, pytest, ruff, and this folder (editable).
  About 6 GB of disk; 2 to 5 minutes on a fast connection. Done once.
END
    "$python" -m venv "$env"
    touch "$env/.made-here"
elif [ ! -x "$env/bin/python" ]; then
    echo "VENV=$env exists but is no virtual environment; name another folder." >&2
    exit 1
fi

# shellcheck disable=SC2086  # PIP_ARGS holds several words
"$env/bin/python" -m pip install --progress-bar off --disable-pip-version-check \
    -e '.[training,test]' ${PIP_ARGS:-} | sed -u -n -e '/^Installing/s/:.*/ .../p' \
    -e '/^Collecting/{s/^Collecting /  fetching /;s/ (from .*//;p;}'

# What cannot be imported must not count as installed. Complaints about optional libraries are of
# no interest unless the import fails.
if ! said=$("$env/bin/python" -c 'import megatron.training, megatron_mhc' 2>&1); then
    echo "$said" >&2
    exit 1
fi
touch "$env/.installed"
echo "Environment ready after $((SECONDS - start)) s."
