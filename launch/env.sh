# Sourced by the scripts of this folder: `source launch/env.sh EXTRA` activates a Python environment with this project
# and the packages of EXTRA (train, test, ...).
#
# If no virtual environment is active, it makes one in .venv, with the versions of constraints.txt. In an active one it
# installs what is missing and keeps an existing torch, of any build. A second run installs nothing.
# To choose a CPU or CUDA build of torch, see "Choosing a torch build" in docs/install.md.
set -euo pipefail
called_from=$PWD
CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z "${VIRTUAL_ENV:-}" ]]; then
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "Python 3.10 or newer is needed; set PYTHON=/path/to/python" >&2
        exit 2
    fi
    if [[ ! -x .venv/bin/python ]]; then
        echo "== making a virtual environment in .venv"
        "$python" -m venv .venv
    fi
    source .venv/bin/activate
fi

stamp="$VIRTUAL_ENV/.partial_fc-$1"
wanted=$(cat pyproject.toml constraints.txt | cksum; pwd)
if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
    echo "== installing the packages for '$1' into $VIRTUAL_ENV (less than a minute with a fast connection)"
    constraints=(--constraint constraints.txt)
    if [[ "$VIRTUAL_ENV" != "$PWD/.venv" ]] && python -c 'import torch' 2>/dev/null; then
        constraints=()  # keep the versions of the environment
    fi
    python -m pip install --disable-pip-version-check --progress-bar on "${constraints[@]}" --editable ".[$1]"
    printf '%s' "$wanted" > "$stamp"
else
    echo "== packages for '$1' are already installed in $VIRTUAL_ENV"
fi
