#!/usr/bin/env bash
# Make .venv from a lock file: `make venv` runs this. Can be repeated; installs only what is missing.
#   bash scripts/install.sh [cpu|gpu]
set -euo pipefail

platform="${1:-cpu}"
lock="requirements/$platform.lock"
python="${PYTHON:-python3.11}"
# Not in the lock files: an environment is complete without it.
uv_version=0.13.9

fail() {
    printf '\nmake venv failed: %s\n' "$1" >&2
    exit 1
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -f "$lock" ]] || fail "there is no $lock; PLATFORM must be cpu or gpu"
command -v "$python" >/dev/null ||
    fail "$python was not found. Install it (Debian: apt install python3.11 python3.11-venv), or name another 3.11 or 3.12: make venv PYTHON=/path/to/python3.11"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' ||
    fail "$("$python" --version) does not fit: Python 3.11 or 3.12 is needed. Name one: make venv PYTHON=python3.11"

if [[ ! -x .venv/bin/python ]]; then
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv .venv || {
        rm -rf .venv
        fail "$python -m venv did not work; on Debian: apt install python3.11-venv"
    }
fi
for installed in .venv/.installed-*; do
    [[ ! -e "$installed" || "$installed" == ".venv/.installed-$platform" ]] ||
        fail ".venv holds the ${installed##*-} packages: remove it (rm -rf .venv), then make venv PLATFORM=$platform"
done
.venv/bin/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' ||
    fail ".venv holds $(.venv/bin/python --version): remove it (rm -rf .venv) and run make venv again"

# uv installs in a fraction of pip's time. Where uv cannot do it, for want of its wheel or because it does not
# understand a setting of pip, pip does.
pip=(.venv/bin/python -m pip --disable-pip-version-check install -qq --no-deps)
locked() { grep -E "^$1==" "$lock"; }
uv=""
if "${pip[@]}" --only-binary :all: "uv==$uv_version" 2>.venv/pip-uv.log; then
    uv=.venv/bin/uv
elif command -v uv >/dev/null; then
    uv="$(command -v uv)"
fi
# What torch was built for, such as 13.0; empty for the CPU. Read from its file: torch loads only with all its libraries.
torch_cuda() {
    .venv/bin/python -c 'import importlib.util, runpy
folder = importlib.util.find_spec("torch").submodule_search_locations[0]
print(runpy.run_path(f"{folder}/version.py")["cuda"] or "")'
}
install_torch() {
    "$@" --only-binary :all: "$torch" || return
    local cuda
    cuda="$(torch_cuda)"
    if [[ "$platform" == gpu && -n "$cuda" || "$platform" == cpu && -z "$cuda" ]]; then
        return
    fi
    echo "That torch is built for ${cuda:+CUDA }${cuda:-the CPU}, not for PLATFORM=$platform: removing it"
    .venv/bin/python -m pip --disable-pip-version-check uninstall -qq -y torch
    return 1
}
install() {
    if [[ -n "$uv" ]]; then
        .venv/bin/python scripts/uv_install.py "$uv" -q --no-deps "$@" 2>.venv/uv.log && return
        echo "uv could not install this, pip tries: $(tail -n 1 .venv/uv.log)"
    fi
    "${pip[@]}" "$@"
}

# Packages that come as source only are pure Python, and are built with the locked setuptools: no compiler.
install --only-binary :all: "$(locked setuptools)" || fail "nothing can be installed (see above): is there network?"
torch="$(locked torch)"
echo "Installing $torch"
# PyTorch's own index has a folder for each build, because all of them have the same version.
build="$(sed -nE 's/^nvidia-cuda-runtime==([0-9]+)\.([0-9]+).*/cu\1\2/p' "$lock")"
torch_index="${TORCH_INDEX:-https://download.pytorch.org/whl/${build:-cpu}}"
if ! install_torch install 2>.venv/pip-torch.log; then
    # An address may contain a password: it is shown without one, and passed on in the environment.
    echo "The configured registry has no $torch for PLATFORM=$platform; trying $(sed 's#//[^/]*@#//#' <<<"$torch_index")"
    PIP_INDEX_URL="$torch_index" install_torch "${pip[@]}" --retries 1 --timeout 30 || {
        tail -n 5 .venv/pip-torch.log >&2
        fail "$torch for PLATFORM=$platform (${build:-cpu}) could not be installed. Without network, or behind a mirror, point pip at a place that has this wheel: TORCH_INDEX=https://mirror/whl/${build:-cpu}, PIP_FIND_LINKS=/folder/with/wheels or PIP_EXTRA_INDEX_URL=..., then run make venv again"
    }
fi
echo "Installing $(grep -c '==' "$lock") packages from $lock with ${uv:-pip}"
install --no-build-isolation -r "$lock" ||
    fail "a package of $lock could not be installed (see above). Is there network, and does your registry have this version? What was installed stays: run make venv again"
install --no-build-isolation -e . || fail "pip install -e . did not work (see above)"

# vLLM's CPU build needs libnuma, which a minimal Debian lacks. Keep a copy for its engines (serving/vllm_rules.py):
# the system's, or from Debian's package, which apt fetches without root. Where neither works, the doctor names the
# fix.
copy_libnuma() {
    local scratch="$1" apt
    mkdir -p "$scratch/lists/partial" "$scratch/archives/partial" .venv/lib/libnuma
    apt=(apt-get -qq -o "Dir::State::Lists=$scratch/lists" -o "Dir::Cache=$scratch" -o APT::Sandbox::User=)
    .venv/bin/python -c 'import ctypes
ctypes.CDLL("libnuma.so.1")
print(next(line.split()[-1] for line in open("/proc/self/maps") if "libnuma" in line))' >"$scratch/found" ||
        (cd "$scratch" && "${apt[@]}" update && "${apt[@]}" download libnuma1 && dpkg-deb -x libnuma1_*.deb . &&
            find "$scratch" -name libnuma.so.1 >found)
    cp -L "$(<"$scratch/found")" .venv/lib/libnuma/libnuma.so.1
}
if [[ "$platform" == cpu && ! -e .venv/lib/libnuma/libnuma.so.1 ]]; then
    scratch="$(mktemp -d)"
    copy_libnuma "$scratch" >/dev/null 2>&1 || true
    rm -rf "$scratch"
fi

.venv/bin/python scripts/doctor.py --lock "$lock" ||
    fail "the environment is not in order; each line above that is not ok names its fix"
date >".venv/.installed-$platform"
