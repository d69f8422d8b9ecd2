#!/usr/bin/env bash
# Start the retriever in the foreground. Stop it with Ctrl-C. Every flag goes to the server, which reads its
# variables itself; a flag wins over its variable.
set -euo pipefail

usage() {
    cat <<'TEXT'
Start the retriever: an index, or a search engine, behind POST /retrieve.

  bash retrieval_launch.sh                      the embedded world on http://127.0.0.1:8000
  bash retrieval_launch.sh --port 8001          all flags go to retrieval_server.py
  INDEX_PATH=e5_Flat.index CORPUS_PATH=wiki-18.jsonl RETRIEVER_MODEL=intfloat/e5-base-v2 \
      bash retrieval_launch.sh --faiss_gpu      Wikipedia, as published by Search-R1
  bash retrieval_launch.sh --retriever_name mock    an online engine that makes all answers up

Variables, used where the flag is not given: RETRIEVER_HOST  RETRIEVER_PORT  RETRIEVER_NAME  INDEX_PATH
  CORPUS_PATH  RETRIEVER_MODEL  TOPK  RETRIEVER_TOKEN, and what is named behind each flag below

Ready?   curl -s localhost:8000/health
Ask it:  curl -s localhost:8000/retrieve -H 'Content-Type: application/json' \
             -d '{"query": "Who wrote Hamlet?", "topk": 3, "return_scores": true}'

TEXT
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$root/scripts/python.sh"

for argument in "$@"; do
    if [[ "$argument" == --help || "$argument" == -h ]]; then
        usage
        break
    fi
done

exec "$python" -P -m search_r1.search.retrieval_server "$@"
