#!/bin/sh
# Print a Python that Megatron-Core accepts, or say in one line what to install.
#
# $PYTHON alone if it is set; else python3.12, 3.13, 3.14 on PATH or among pyenv's versions (oldest
# first: it is what the tests run on) or uv's, else python3; else one that uv fetches. Each candidate
# is run, because a name on PATH may be a shim that refuses to start. The smallest version stands in
# megatron_mhc/compat.py.
compat=$(dirname "$0")/../megatron_mhc/compat.py

usable() {
    "$1" - "$compat" 2>/dev/null <<'END'
import runpy, sys
import ensurepip, venv  # Debian packs them apart; without them no environment can be made.
sys.exit(sys.version_info[:2] < runpy.run_path(sys.argv[1])['PYTHON_MIN'])
END
}

if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" && command -v "$PYTHON" && exit 0
    echo "PYTHON=$PYTHON cannot be used: it does not run, is older than 3.12, or lacks the venv" \
        "module; name another one, or unset PYTHON to have one looked for." >&2
    exit 1
fi

pyenv_root=${PYENV_ROOT:-$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")}

uv_root=${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}

# Every one of that name on PATH, one a line, then pyenv's and uv's.
candidates() {
    echo "$PATH" | tr ':' '\n' | sed "s,\$,/$1,"
    printf '%s\n' "$pyenv_root"/versions/3.*/bin/"$1" "$uv_root"/cpython-3.*/bin/"$1"
}

look() {
    for name in python3.12 python3.13 python3.14 python3 python; do
        candidates "$name" | while read -r path; do
            # A loop behind a pipe is a shell of its own.
            if [ -x "$path" ] && usable "$path"; then echo "$path" && exit 3; fi
        done
        [ $? -eq 3 ] && return 0
    done
    return 1
}

# bounded SECONDS COMMAND...: not every system has timeout(1).
bounded() {
    left=$1
    shift
    "$@" >/dev/null 2>&1 </dev/null &
    while kill -0 $! 2>/dev/null; do
        [ "$left" -gt 0 ] || kill -9 $!
        left=$((left - 1))
        sleep 1
    done
    wait $! 2>/dev/null
}

# A Python of uv's, which any older Python's pip can bring along; nothing else is installed.
fetch() {
    private=$(mktemp -d) || return 1
    uv=$(command -v uv) || {
        uv=$private/bin/uv
        bounded 120 python3 -m pip install --target "$private" uv
    }
    UV_PYTHON_INSTALL_DIR=$uv_root UV_NO_PROGRESS=1 bounded 300 "$uv" python install 3.12
    rm -rf "$private"
}

look && exit 0
echo "No Python >= 3.12 found: fetching one with uv, 30 MB, into $uv_root." >&2
fetch
look && exit 0

echo "No Python >= 3.12 found: install one (apt install python3.12 python3.12-venv, or brew" \
    "install python@3.12, or pyenv install 3.12) or name it (make train PYTHON=/path/to/python)." >&2
exit 1
