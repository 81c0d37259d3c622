# Sourced by the commands beside it: `source launch/env.sh EXTRA` gives a Python with this project and its packages of EXTRA (train, test).
#
# Without an active virtual environment it makes one in .venv, with the versions of constraints.txt. An active one is used as it is: what
# is missing is added, and a torch that is there already (of any build) stays. A second start installs nothing.
# To choose a CPU or CUDA build of torch, see "Choosing a torch build" in README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z "${VIRTUAL_ENV:-}" ]]; then
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "Python 3.10 or newer is needed; name one with PYTHON=/path/to/python" >&2
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
    echo "== installing the packages for '$1' into $VIRTUAL_ENV (well under a minute where downloads are quick)"
    constraints=(--constraint constraints.txt)
    if [[ "$VIRTUAL_ENV" != "$PWD/.venv" ]] && python -c 'import torch' 2>/dev/null; then
        constraints=()  # the environment's own choice of versions
    fi
    python -m pip install --disable-pip-version-check --progress-bar on "${constraints[@]}" --editable ".[$1]"
    printf '%s' "$wanted" > "$stamp"
else
    echo "== packages for '$1' are installed in $VIRTUAL_ENV"
fi
