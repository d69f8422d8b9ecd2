# Sourced by the launchers with $root set: which interpreter runs, and where our packages lie.
# An active virtual or conda environment wins, then .venv, then python3.
python=python3
if [[ -n "${VIRTUAL_ENV:-}" && -x "$VIRTUAL_ENV/bin/python" ]]; then
    python="$VIRTUAL_ENV/bin/python"
elif [[ -n "${CONDA_PREFIX:-}" && "${CONDA_DEFAULT_ENV:-base}" != base && -x "$CONDA_PREFIX/bin/python" ]]; then
    python="$CONDA_PREFIX/bin/python"
elif [[ -x "$root/.venv/bin/python" ]]; then
    python="$root/.venv/bin/python"
fi

# Launchers call `python -P -m`: what lies in the caller's folder must not stand in for a package of ours.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

"$python" -c '
import importlib.util as modules, sys
sys.path = [place for place in sys.path if place]
missing = [name for name in ("omegaconf", "uvicorn", "rich", "torch") if modules.find_spec(name) is None]
sys.exit("lacks " + ", ".join(missing) if missing else "is too old" if sys.version_info < (3, 11) else 0)
' >/dev/null || {
    echo "error: $python cannot run this (see above): run \`make venv\` first, and leave other environments (deactivate)" >&2
    exit 1
}
