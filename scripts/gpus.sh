# Sourced by the launchers: how many GPUs a run gets, and which recipe fits them.

# The GPUs that a program here sees; 0 without a driver. CUDA_VISIBLE_DEVICES=-1 or NoDevFiles (Slurm) hides all.
count_gpus() {
    local visible="${CUDA_VISIBLE_DEVICES-all}"
    if ! command -v nvidia-smi >/dev/null; then
        echo 0
    elif [[ "$visible" == all ]]; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c "^GPU " || true
    else
        tr , '\n' <<<"$visible" | grep -cE "^ *([0-9]|GPU-|MIG-)" || true
    fi
}

# The recipe for so many GPUs; that for 8 where there is none, which says what it lacks.
gpu_recipe() {
    case "$1" in
    1) echo gpu_1 ;;
    2 | 3) echo gpu_2 ;;
    [4-7]) echo gpu_4 ;;
    *) echo gpu ;;
    esac
}
