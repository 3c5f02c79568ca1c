#!/bin/sh
# Print a Python that Megatron-Core accepts, or say in one line what to install.
#
# $PYTHON alone if it is set; else python3.12, 3.13, 3.14 on PATH or among pyenv's versions (oldest
# first: it is what the tests run on), else python3. Each candidate is run, because a name on PATH
# may be a shim that refuses to start. The smallest version stands in megatron_mhc/compat.py.
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

# Every one of that name on PATH, one a line, then pyenv's.
candidates() {
    echo "$PATH" | tr ':' '\n' | sed "s,\$,/$1,"
    printf '%s\n' "$pyenv_root"/versions/3.*/bin/"$1"
}

for name in python3.12 python3.13 python3.14 python3 python; do
    found=$(candidates "$name" | while read -r path; do
        [ -x "$path" ] && usable "$path" && echo "$path" && break
    done)
    [ -n "$found" ] && echo "$found" && exit 0
done

echo "No Python >= 3.12 found: install one (apt install python3.12 python3.12-venv, or brew" \
    "install python@3.12, or pyenv install 3.12) or name it (make train PYTHON=/path/to/python)." >&2
exit 1
