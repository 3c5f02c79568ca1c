#!/usr/bin/env bash
# Make or update the virtual environment $1: this package (editable), its extras, and a stamp.
#
# $PIP_ARGS goes to pip, e.g. PIP_ARGS='--index-url URL' for a smaller torch without CUDA.
set -euo pipefail
env=$1
start=$SECONDS

here=$(cd "$(dirname "$0")/.." && pwd -P)
# An environment whose package is another checkout, which would find itself replaced.
other=$("$env/bin/python" -I - <<'END' 2>/dev/null || true
import importlib.metadata, json, pathlib, urllib.parse, urllib.request
origin = importlib.metadata.distribution('megatron-mhc').read_text('direct_url.json')
url = urllib.parse.urlparse(json.loads(origin)['url'])
root = pathlib.Path(urllib.request.url2pathname(url.path)).resolve()
if (root / 'megatron_mhc').is_dir():
    print(root)
END
)
if [ -n "$other" ] && [ "$other" != "$here" ]; then
    echo "VENV=$env has megatron-mhc from $other, not from $here: name another VENV, or hand it" \
        "over with $env/bin/python -m pip uninstall --yes megatron-mhc" >&2
    exit 1
fi

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
