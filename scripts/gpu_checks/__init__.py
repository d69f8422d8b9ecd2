"""The checks of scripts/gpu_check.py: each measures figures on one GPU, or at a tiny size on the CPU."""
