#!/usr/bin/env bash
# Evaluate a model in the foreground. Stop it with Ctrl-C; the same command asks what is not answered yet.
set -euo pipefail

usage() {
    cat <<'TEXT'
Ask a search agent held-out questions, and score its answers. No training, no IG service.

  bash evaluate.sh                              the shipped model on world/test.parquet, into runs/evaluation
  MODEL_PATH=runs/NAME OUTPUT_DIR=runs/NAME_test bash evaluate.sh
                                                the newest checkpoint of a run
  MODEL_PATH=Qwen/Qwen2.5-3B-Instruct TEST_FILES=data/nq_hotpotqa_train/test.parquet bash evaluate.sh
                                                a model of the hub on your questions
  bash evaluate.sh --protocol search_r1         the settings of a paper, so that a number can be set beside its numbers;
                                                what differs is an error: see docs/evaluation.md
  bash evaluate.sh evaluation.n=8 evaluation.temperature=1.0 evaluation.max_questions=100
                                                all other arguments are overrides of verl/trainer/config/ppo_trainer.yaml;
                                                relative paths in them start at the repository, those in variables
                                                where you stand

Start the retriever first, in a terminal of its own: bash retrieval_launch.sh

Variables (an override on the command line wins):
  MODEL_PATH       run folder (its newest checkpoint), checkpoint, model folder or hub id
  TEST_FILES       parquet files, separated by commas
  OUTPUT_DIR       folder of the results: settings.json, results.jsonl, trajectories.jsonl, metrics.json
  EVAL_LOG_PATH    file of the log; evaluation.log in the folder of the results
  MAX_TURNS        completions of an episode, at least 2: all but the last may call tools
  RECIPE           settings to begin with: world, or with MODEL_PATH or TEST_FILES, and GPUs here, the recipe for
                   so many: gpu_1, gpu_2, gpu_4 or gpu (8)
Variables that are read also without this script:
  RETRIEVER_URL    http://127.0.0.1:8000/retrieve   RETRIEVER_TOKEN  its token, where it wants one

All keys of the configuration: bash evaluate.sh --cfg job
TEXT
}

for argument in "$@"; do
    if [[ "$argument" == --help || "$argument" == -h ]]; then
        usage
        exit 0
    fi
done

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$root/scripts/python.sh"
source "$root/scripts/gpus.sh"

# Print a path of the caller, who may stand in another folder, as an absolute one.
absolute() {
    local path="$1"
    [[ "$path" == "~"?(/*) ]] && path="$HOME${path:1}"
    realpath -m -- "$path"
}

# Print a value in the quotes of Hydra, in which only a quote and a backslash before it are escaped.
quoted() {
    local value="$1"
    value="${value//\"/\\\"}"
    printf '"%s"' "$value"
}

settings=()
if [[ -n "${MODEL_PATH:-}" ]]; then
    model="$(absolute "$MODEL_PATH")"
    [[ -d "$model" ]] || model="$MODEL_PATH" # a model of the hub
    settings+=("actor_rollout_ref.model.path=$(quoted "$model")")
fi
if [[ -n "${TEST_FILES:-}" ]]; then
    IFS=, read -ra given <<<"$TEST_FILES"
    files=""
    for file in "${given[@]}"; do
        files+="${files:+,}$(quoted "$(absolute "$file")")"
    done
    settings+=("data.val_files=[$files]")
fi
[[ -n "${OUTPUT_DIR:-}" ]] && settings+=("evaluation.output_dir=$(quoted "$(absolute "$OUTPUT_DIR")")")
[[ -n "${EVAL_LOG_PATH:-}" ]] && settings+=("evaluation.log_file=$(quoted "$(absolute "$EVAL_LOG_PATH")")")
if [[ -n "${MAX_TURNS:-}" ]]; then
    if ! [[ "$MAX_TURNS" =~ ^[0-9]+$ ]] || ((10#$MAX_TURNS < 2)); then
        echo "error: MAX_TURNS must be a whole number of at least 2 (one tool call and the answer), got '$MAX_TURNS'" >&2
        exit 1
    fi
    settings+=("max_turns=$((10#$MAX_TURNS - 1))")
fi

if [[ -z "${RECIPE:-}" ]]; then
    RECIPE=world
    gpus="$(count_gpus)"
    if [[ -n "${MODEL_PATH:-}${TEST_FILES:-}" ]] && ((gpus > 0)); then
        RECIPE="$(gpu_recipe "$gpus")"
    fi
fi
recipe=("recipe=$RECIPE")
for argument in "$@"; do
    [[ "$argument" == recipe=* ]] && recipe=()
done

cd "$root"
# What comes last wins, so that the arguments override the variables.
exec "$python" -P -m verl.trainer.main_eval "${recipe[@]}" ${settings[@]+"${settings[@]}"} "$@"
