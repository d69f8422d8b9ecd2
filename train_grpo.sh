#!/usr/bin/env bash
# Train in the foreground. Stop it with Ctrl-C; the same command goes on from the newest checkpoint.
set -euo pipefail

usage() {
    cat <<'TEXT'
Train a search agent with GRPO and information-gain reward.

  bash train_grpo.sh                            the embedded world, with the quickstart's settings
  BASE_MODEL=Qwen/Qwen2.5-3B DATA_DIR=data/nq_hotpotqa_train bash train_grpo.sh
                                                the 8-GPU recipe (also chosen where nvidia-smi is found)
  bash train_grpo.sh max_turns=4 trainer.save_freq=10
                                                all arguments are overrides of verl/trainer/config/ppo_trainer.yaml;
                                                relative paths in them start at the repository, those in variables
                                                where you stand

Start the services first, each in a terminal of its own: bash retrieval_launch.sh, bash IG_service_launch.sh

Variables (what you export wins over the recipe; an override on the command line wins over both):
  BASE_MODEL       model folder or hub id           DATA_DIR         folder with train.parquet and test.parquet
  N_GPUS           GPUs to train on (8)             TP_SIZE          GPUs per vLLM engine (4)
  EXPERIMENT_NAME  name of the run, and of its folder
  RECIPE           world | gpu, instead of guessing
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

# A text in the grammar of Hydra's overrides: in quotes, where a backslash counts before a quote only.
q() {
    local text
    text="$(sed -E "s/(\\\\+)('|\$)/\\1\\1\\2/g; s/'/\\\\'/g" <<<"$1")"
    printf "'%s'" "$text"
}

if [[ -z "${RECIPE:-}" ]]; then
    RECIPE=world
    if [[ -n "${BASE_MODEL:-}${DATA_DIR:-}" ]] || command -v nvidia-smi >/dev/null; then
        RECIPE=gpu
    fi
fi

# Paths are relative to where the caller stands; everything below runs in the repository's root.
[[ "${DATA_DIR:-}" == "~"?(/*) ]] && DATA_DIR="$HOME${DATA_DIR:1}"
[[ "${BASE_MODEL:-}" == "~"?(/*) ]] && BASE_MODEL="$HOME${BASE_MODEL:1}"
[[ -n "${DATA_DIR:-}" ]] && DATA_DIR="$(realpath -m "$DATA_DIR")"
[[ -d "${BASE_MODEL:-}" ]] && BASE_MODEL="$(realpath "$BASE_MODEL")"

settings=()
case "$RECIPE" in
world)
    # The quickstart owns these settings.
    listed="$("$python" "$root/scripts/quickstart.py" --print-overrides)"
    mapfile -t settings <<<"$listed"
    settings+=(trainer.experiment_name=world)
    [[ -n "${BASE_MODEL:-}" ]] && settings+=("actor_rollout_ref.model.path=$(q "$BASE_MODEL")")
    [[ -n "${DATA_DIR:-}" ]] && settings+=(
        "data.train_files=$(q "$DATA_DIR/train.parquet")" "data.val_files=$(q "$DATA_DIR/test.parquet")"
    )
    ;;
gpu)
    export IG_BATCH_SIZE="${IG_BATCH_SIZE:-512}" IG_TIMEOUT="${IG_TIMEOUT:-120}"
    settings=(
        "actor_rollout_ref.model.path=$(q "${BASE_MODEL:-Qwen/Qwen2.5-3B}")"
        "data.train_files=$(q "${DATA_DIR:-data/nq_hotpotqa_train}/train.parquet")"
        "data.val_files=$(q "${DATA_DIR:-data/nq_hotpotqa_train}/test.parquet")"
        data.train_batch_size=512
        data.max_prompt_length=4096
        data.max_start_length=2048
        data.max_response_length=500
        data.max_obs_length=500
        actor_rollout_ref.model.enable_gradient_checkpointing=true
        actor_rollout_ref.actor.optim.lr=1e-6
        actor_rollout_ref.actor.optim.lr_warmup_steps_ratio=0.285
        # Trajectories per update: 512 questions with 3 each make 24 updates.
        actor_rollout_ref.actor.ppo_mini_batch_size=64
        actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384
        actor_rollout_ref.actor.clip_ratio_low=0.2
        actor_rollout_ref.actor.clip_ratio_high=0.2
        actor_rollout_ref.actor.use_kl_loss=true
        actor_rollout_ref.actor.kl_loss_coef=0.001
        actor_rollout_ref.actor.kl_loss_type=low_var_kl
        actor_rollout_ref.actor.entropy_coeff=0.001
        actor_rollout_ref.rollout.n_agent=3
        actor_rollout_ref.rollout.temperature=1.0
        "actor_rollout_ref.rollout.tensor_model_parallel_size=${TP_SIZE:-4}"
        actor_rollout_ref.rollout.gpu_memory_utilization=0.5
        max_turns=2
        retriever.topk=3
        reward.gain_weight=0.6
        reward.answer_rule=published
        trainer.device=cuda
        "trainer.n_gpus_per_node=${N_GPUS:-8}"
        trainer.val_before_train=false
        trainer.total_epochs=15
        trainer.total_training_steps=1005
        trainer.save_freq=50
        trainer.test_freq=20
        trainer.experiment_name=nq-hotpotqa-grpo-gain
    )
    ;;
*)
    echo "error: RECIPE must be world or gpu, got $RECIPE" >&2
    exit 2
    ;;
esac

[[ -n "${EXPERIMENT_NAME:-}" ]] && settings+=("trainer.experiment_name=$(q "$EXPERIMENT_NAME")")

cd "$root"
exec "$python" -P -m verl.trainer.main_ppo "${settings[@]}" "$@"
