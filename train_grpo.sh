#!/usr/bin/env bash
# Train in the foreground. Stop it with Ctrl-C; the same command continues from the newest checkpoint.
set -euo pipefail

usage() {
    cat <<'TEXT'
Train a search agent with GRPO and information-gain reward.

  bash train_grpo.sh                            the embedded world, with the quickstart's settings
  BASE_MODEL=Qwen/Qwen2.5-3B DATA_DIR=data/nq_hotpotqa_train bash train_grpo.sh
                                                your model and data, on all GPUs of this machine: recipe gpu_1,
                                                gpu_2, gpu_4 or gpu (8), whichever is for so many
  bash train_grpo.sh recipe=gpu_4               another recipe: a file of verl/trainer/config/recipe; add plan=true
                                                to see the memory and seconds that it takes
  bash train_grpo.sh search_r1                  another method, as algorithm=search_r1: see docs/methods.md
  bash train_grpo.sh max_turns=4 trainer.save_freq=10
                                                all arguments are overrides of verl/trainer/config/ppo_trainer.yaml;
                                                relative paths in them start at the repository, those in variables
                                                where you stand

Start the services first, each in a terminal of its own: bash retrieval_launch.sh, bash IG_service_launch.sh

Variables (what you export wins over the recipe; an override on the command line wins over both):
  BASE_MODEL       model folder or hub id           DATA_DIR         folder with train.parquet and test.parquet
  N_GPUS           GPUs to train on                 TP_SIZE          GPUs per vLLM engine (1)
                   (all visible; 1, 2 or 4 with recipe=gpu_1, gpu_2, gpu_4)
  EXPERIMENT_NAME  name of the run, and of its folder
  RECIPE           name of the recipe, as recipe=NAME on the command line. Without it: world, or with BASE_MODEL or
                   DATA_DIR the one for N_GPUS
Variables that the trainer reads, also when it is started without this script:
  RETRIEVER_URL    http://127.0.0.1:8000/retrieve   IG_SERVICE_URL   http://127.0.0.1:8310
  IG_BATCH_SIZE    items per request                IG_TIMEOUT       seconds a step may wait for its gains
  IG_TOKEN, RETRIEVER_TOKEN                         the services' tokens, where they want one
  WANDB_PROJECT    project name, also as WAND_PROJECT

All keys of the configuration: bash train_grpo.sh --cfg job
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

named="${RECIPE:-}"
for argument in "$@"; do
    [[ "$argument" == recipe=* ]] && named="${argument#recipe=}"
done
if [[ -z "${N_GPUS:-}" ]]; then
    N_GPUS="$(count_gpus)"
    # The recipes for 1, 2 and 4 GPUs take so many, also where there are more.
    [[ "$named" == gpu_[124] ]] || ((N_GPUS == 0)) || export N_GPUS
fi
# A GPU alone is no request to train a large model on data that this machine may not have.
if [[ -z "${RECIPE:-}" ]]; then
    RECIPE=world
    [[ -z "${BASE_MODEL:-}${DATA_DIR:-}" ]] || RECIPE="$(gpu_recipe "$N_GPUS")"
fi

# Paths are relative to the current folder of the caller; everything below runs in the repository's root.
[[ "${DATA_DIR:-}" == "~"?(/*) ]] && DATA_DIR="$HOME${DATA_DIR:1}"
[[ "${BASE_MODEL:-}" == "~"?(/*) ]] && BASE_MODEL="$HOME${BASE_MODEL:1}"
[[ -n "${DATA_DIR:-}" ]] && DATA_DIR="$(realpath -m "$DATA_DIR")"
[[ -d "${BASE_MODEL:-}" ]] && BASE_MODEL="$(realpath "$BASE_MODEL")"
export DATA_DIR="${DATA_DIR:-}" BASE_MODEL="${BASE_MODEL:-}"

# The recipe reads the variables; one named on the command line takes the place of $RECIPE.
recipe=("recipe=$RECIPE")
for argument in "$@"; do
    [[ "$argument" == recipe=* ]] && recipe=()
done

# A bare word is a method: search_r1 means algorithm=search_r1. After a flag of Hydra it is the flag's value.
arguments=()
previous=""
for argument in "$@"; do
    if [[ "$argument" =~ ^[a-z][a-z0-9_]*$ && ! "$previous" =~ ^(--(cfg|info|package|config-.*)|-(c|i|p|cn|cp|cd))$ ]]; then
        argument="algorithm=$argument"
    fi
    previous="$argument"
    arguments+=("$argument")
done

cd "$root"
exec "$python" -P -m verl.trainer.main_ppo "${recipe[@]}" ${arguments[@]+"${arguments[@]}"}
