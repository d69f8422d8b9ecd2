#!/usr/bin/env bash
# Start the retriever in the foreground. Stop it with Ctrl-C.
set -euo pipefail

usage() {
    cat <<'TEXT'
Start the retriever: a dense Faiss index behind POST /retrieve.

  bash retrieval_launch.sh                      the embedded world on http://127.0.0.1:8000
  bash retrieval_launch.sh --port 8001          all flags go to retrieval_server.py
  INDEX_PATH=e5_Flat.index CORPUS_PATH=wiki-18.jsonl RETRIEVER_MODEL=intfloat/e5-base-v2 \
      bash retrieval_launch.sh --faiss_gpu      Wikipedia, as published by Search-R1

Variables, used where they are set and the flag is not given:
  RETRIEVER_HOST  RETRIEVER_PORT  INDEX_PATH  CORPUS_PATH  RETRIEVER_MODEL  TOPK

Ready?   curl -s localhost:8000/health
Ask it:  curl -s localhost:8000/retrieve -H 'Content-Type: application/json' \
             -d '{"query": "Who wrote Hamlet?", "topk": 3, "return_scores": true}'

TEXT
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$root/scripts/python.sh"

flags=()
[[ -n "${RETRIEVER_HOST:-}" ]] && flags+=(--host "$RETRIEVER_HOST")
[[ -n "${RETRIEVER_PORT:-}" ]] && flags+=(--port "$RETRIEVER_PORT")
[[ -n "${INDEX_PATH:-}" ]] && flags+=(--index_path "$INDEX_PATH")
[[ -n "${CORPUS_PATH:-}" ]] && flags+=(--corpus_path "$CORPUS_PATH")
[[ -n "${RETRIEVER_MODEL:-}" ]] && flags+=(--retriever_model "$RETRIEVER_MODEL")
[[ -n "${TOPK:-}" ]] && flags+=(--topk "$TOPK")

for argument in "$@"; do
    if [[ "$argument" == --help || "$argument" == -h ]]; then
        usage
        break
    fi
done

exec "$python" -P -m search_r1.search.retrieval_server "${flags[@]}" "$@"
