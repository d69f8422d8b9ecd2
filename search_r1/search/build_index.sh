#!/usr/bin/env bash
# Build the index of a corpus; all arguments go to index_builder.py (try --help).
#   bash search_r1/search/build_index.sh --model_path intfloat/e5-base-v2 --corpus_path wiki-18.jsonl --save_dir index
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python=python3
if [[ -x "$root/.venv/bin/python" && -z "${VIRTUAL_ENV:-}" && "${CONDA_DEFAULT_ENV:-base}" == base ]]; then
    python="$root/.venv/bin/python"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m search_r1.search.index_builder "$@"
