#!/usr/bin/env bash
# Makes or completes .venv in the checkout. Called by `make env`; nothing is written outside the checkout.
#
#   PYTHON       interpreter to use; by default the first of python3, python3.13 ... 3.11 that is 3.11 or newer
#   EXTRAS       extras of setup.py; by default `vllm,dev` with an NVIDIA GPU and `cpu,dev` without. `te` among them
#                builds Transformer Engine's part for torch, which needs the CUDA toolkit (nvcc) and takes minutes
#   TORCH_INDEX  where a machine without a GPU gets torch's CPU build from, if not from PyTorch's own index
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${EXTRAS:?set by the Makefile}
te_pin=$(sed -n 's/.*"\(transformer-engine[^"]*==[0-9.]*\)".*/\1/p' setup.py)
torch_pin=$(sed -n 's/.*"\(torch==[0-9.]*\)".*/\1/p' setup.py)
wheels=.cache/wheels
export UV_CACHE_DIR=${UV_CACHE_DIR:-$PWD/.cache/uv} UV_PYTHON_INSTALL_DIR=${UV_PYTHON_INSTALL_DIR:-$PWD/.cache/python}
export PIP_DISABLE_PIP_VERSION_CHECK=1

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

say() { printf 'env: %s\n' "$*"; }
die() { printf 'env: error: %s\n' "$*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if is_new_enough "$candidate"; then echo "$candidate"; return; fi
    done
}

make_venv() {
    local python
    python=$(find_python)
    if [ -n "$python" ]; then
        say "making .venv with $("$python" --version)"
        "$python" -m venv .venv >/dev/null || die "'$python -m venv' failed: install the venv module (Debian: apt install python3-venv)"
    else
        say "vLLM needs Python 3.11 or newer: uv finds one, or fetches one into .cache/python"
        "${PYTHON:-python3}" -m venv .cache/bootstrap >/dev/null ||
            die "'${PYTHON:-python3} -m venv' failed: install Python 3.11 or newer with its venv module"
        .cache/bootstrap/bin/python -m pip install -qq --constraint constraints.txt uv
        .cache/bootstrap/bin/uv venv --quiet --seed --python 3.11 .venv
    fi
}

# The CPU build of torch carries a local version (+cpu) that the default package index does not have. A wheel that the
# machine already offers (pip's find-links) comes first, then TORCH_INDEX, then the index that uv knows as `cpu`.
fetch_cpu_torch() {
    local pip=(.venv/bin/python -m pip download -qq --no-deps --dest "$wheels" "$torch_pin")
    if compgen -G "$wheels/torch-*+cpu-*.whl" >/dev/null; then return; fi
    if [ -n "${TORCH_INDEX:-}" ]; then
        "${pip[@]}" --index-url "$TORCH_INDEX" || die "TORCH_INDEX=$TORCH_INDEX has no $torch_pin for this machine"
    else
        "${pip[@]}" --no-index >/dev/null 2>&1 || true
    fi
}

# Transformer Engine's build imports torch, so that it cannot be isolated from the environment that it is for.
build_transformer_engine() {
    say "building $te_pin (some minutes)"
    VIRTUAL_ENV=$PWD/.venv .venv/bin/python -m uv pip install --quiet setuptools wheel packaging pybind11 ninja
    VIRTUAL_ENV=$PWD/.venv .venv/bin/python -m uv pip install --quiet --no-build-isolation --constraint constraints.txt \
        --override overrides.txt "$te_pin" || die "Transformer Engine was not built: it needs a CUDA toolkit of torch's \
version with cuDNN's headers (CUDA_HOME, CUDNN_PATH), or start from an image that has it and leave te out of EXTRAS"
}

with_te=
if [[ ",$extras," == *,te,* ]]; then
    [[ ",$extras," != *,cpu,* ]] || die "EXTRAS=$extras: Transformer Engine is for a machine with CUDA, leave te or cpu out"
    command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] ||
        die "EXTRAS=$extras: Transformer Engine is built with nvcc, which is not in PATH: install the CUDA toolkit or set CUDA_HOME"
    with_te=1 extras=$(tr , '\n' <<<"$extras" | grep -vx te | paste -sd,)
fi

mkdir -p "$wheels"
if ! [ -x .venv/bin/python ]; then make_venv; fi
is_new_enough .venv/bin/python || die ".venv holds an older Python than 3.11: remove it and run make again"
.venv/bin/python -m uv --version >/dev/null 2>&1 || .venv/bin/python -m pip install -qq --constraint constraints.txt uv

arguments=(--quiet --find-links "$wheels" --constraint constraints.txt --override overrides.txt -e ".[$extras]")
if [[ ",$extras," == *,cpu,* ]]; then
    fetch_cpu_torch
    arguments+=(--override overrides-cpu.txt)
    compgen -G "$wheels/torch-*.whl" >/dev/null || arguments+=(--torch-backend cpu)
fi
say "installing .[$extras]"
VIRTUAL_ENV=$PWD/.venv .venv/bin/python -m uv pip install "${arguments[@]}" || die "the installation failed. \
Without a GPU, torch's CPU build must be within reach: TORCH_INDEX=<url of a package index that has it>"
[ -z "$with_te" ] || build_transformer_engine
if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then
    # Container images often set it. Every process would then compile torch, transformers and vLLM again: 26 s instead of
    # 11 to import Megatron-Core. Files that are of a later Python fail, and are not needed.
    say "compiling the libraries once, as PYTHONDONTWRITEBYTECODE keeps Python from doing so"
    .venv/bin/python -m compileall -q -j 0 .venv/lib/python3*/site-packages >/dev/null 2>&1 || true
fi
say "ready: .venv/bin/opd-megatron --help"
