#!/usr/bin/env bash
# Build the index of a corpus; all arguments go to index_builder.py (try --help).
#   bash search_r1/search/build_index.sh --model_path intfloat/e5-base-v2 --corpus_path wiki-18.jsonl --save_dir index
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$root/scripts/python.sh"
exec "$python" -P -m search_r1.search.index_builder "$@"
