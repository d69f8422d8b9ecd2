"""What the plan assumes about hardware, libraries and episodes, each with its source.

Bytes are in units of 1, GB are 10^9 bytes. "H200": measured on one by `make gpu-check` or a quickstart, with
torch 2.11 (docs/scale.md). A number without a measurement on a GPU says "computed": correct
it here when `make gpu-check` or a run has measured it, and nowhere else; `make bench-scale BENCH_ARGS=plan`
prints the table of docs/scale.md, which a test compares.
"""

from __future__ import annotations

GB = 1e9

# ----------------------------------------------------------------------------------------------------- memory

USABLE_SHARE = 0.95
"""Of a GPU's memory; the rest is lost to fragments of the allocators (computed)."""
CONTEXT_BYTES = 0.9 * GB
"""Of each process on a GPU: CUDA context, cuBLAS workspace, buffers of NCCL (0.5 + 0.1 + 0.3, computed)."""
ASLEEP_BYTES = 1.5 * GB
"""What an engine keeps while it sleeps: its context and CUDA graphs (vLLM logs 1 to 2 GiB "still in use")."""
ENGINE_BYTES = 1.5 * GB
"""Of an engine's share, beside weights, cache and activations: its context and CUDA graphs (computed)."""
ENGINE_TOKENS = 8192
ENGINE_INTERMEDIATES = 2.0
ENGINE_HIDDENS = 4.0
"""Tokens that an engine computes at once unless `rollout.max_num_batched_tokens` says how many, and their
activations in one layer, in units of its sizes."""
ENTAILMENT_BYTES = 4.75 * GB
"""Of the IG service beside its engine: deberta-v2-xlarge in bfloat16 and its activations (4.13 on an H200), a
context (0.62)."""
RETRIEVER_BYTES = 1.7 * GB
"""Of the retriever beside its index: the query encoder, the scores of a batch, a context (computed)."""

SAVED_PER_TOKEN = 1.0
"""Activations that checkpointing keeps per layer, in units of the hidden size: the layer's input."""
LAYER_INTERMEDIATES = 6.0
LAYER_HIDDENS = 13.0
"""Activations of one layer in its backward pass, in units of the intermediate and the hidden size: gate, up,
activation, product and two gradients; norms (partly float32), q, k, v, attention, residuals (counted in the
code of transformers 5.19)."""
FORWARD_INTERMEDIATES = 3.0
FORWARD_HIDDENS = 6.0
"""The same of a forward pass without gradients."""
CHUNK_BYTES = 1.25 * GB
"""Buffer through which an engine gets weights, as in `verl.workers.weight_chunks`; the engine copies it."""
BROADCAST_BYTES = 0.5 * GB
"""After which a broadcast of weights ends, as in `verl.workers.weight_nccl`."""
LOGITS_PER_CHUNK = 2**27
"""Float32 logits of one chunk, as in `verl.workers.model`."""
LOGITS_COPIES = 5.5
"""Chunks in memory at once: bfloat16 logits, float32, divided by the temperature, log-softmax, probabilities,
gradient."""

# ---------------------------------------------------------------------------------------------------- seconds

TRAIN_SHARE = 0.38
"""Of peak FLOP/s in update and log-probs (H200, 3 billion parameters: 0.380 and 0.392; 1.5 billion: 0.339 and
0.328)."""
LORA_TRAIN_SHARE = 0.24
"""The same with adapters (H200, 1.5 billion parameters, rank 32: 0.231 and 0.248)."""
PREFILL_SHARE = 0.5
BANDWIDTH_SHARE = 0.6
"""Of peak FLOP/s when an engine reads prompts (H200: 0.53), of memory bandwidth when it decodes
(computed)."""
ENGINE_STEP_S, ENGINE_TOKEN_S = 0.0019, 0.000045
"""Of vLLM's processes in each decoding step, and for each sequence of it: scheduler, sampler, log-probs and
text (a line through what an H200 with 16 cores and 1.5 billion parameters took: 4.6 to 5.7 ms with 64
sequences, 13.2 to 13.4 with 256)."""
COMPUTED_UPDATE = 0.97
COMPUTED_LOG_PROBS = 0.9
"""Tokens that the slowest rank computes per token of its share, in mini-batches of 64 and in one batch:
waiting for it adds, prompts that a group shares save (scripts/scale/packing.py, 8 ranks)."""
DRIVER_EPISODE_S, DRIVER_COMPLETION_S = 0.0003, 0.0001
"""Of the trainer's one thread while episodes run, per episode and per completion: calls of engines, gains
(rounded up from what scripts/scale/step.py measures on a CPU, as the three below)."""
BATCH_EPISODE_S, BATCH_COMPLETION_S = 0.00012, 0.00004
"""The same for scores, credit, and dealing the batch to the ranks."""
RECORD_COMPLETION_S = 0.00018
"""The same for metrics and records, which take nothing else per episode."""
AGENT_COMPLETION_S = 0.002
"""Of the thread of an engine's agents, with its calls of the engine and of tools (measured on a CPU)."""
CPU_SEARCHES_PER_S = 1000.0
"""ivf_pq over 21 million passages on the CPUs of a GPU node: 63 MB of codes per query (computed)."""
GPU_SEARCHES_PER_S = 2800.0
"""Exact search by torch over 21 million passages, per GPU among which they are divided (H200: 2,868 of
encoded queries)."""
GAIN_FLOPS = 23e-3 * 989e12
"""Of one gain, at the peak of the GPU: 23 ms of a whole H100 to read the passages and sample 10 answers by a
generator of 3 billion parameters (computed)."""
GAIN_LATENCY_S = 1.0
"""From the end of the last episode to its gain."""
FILE_BYTES_PER_S = 0.5 * GB
"""Weights through a file in memory: gathered, copied to the host, written, read by the engines
(H200: 0.525)."""
IPC_BYTES_PER_S = 15.0 * GB
"""Weights through a buffer on the GPU: gathered over NVLink, copied in and out, chunk by chunk (H200:
16.2 into an engine, the copies alone 519)."""
NCCL_BYTES_PER_S = 10.0 * GB
"""Weights to engines on other GPUs: gathered over NVLink, packed, broadcast, loaded (computed)."""
SLEEP_S = 0.5
"""Sleep and wake of an engine, which drops weights and cache and maps their memory again (H200: 0.49 with 1.5
billion parameters and half of its memory)."""
HOST_BYTES_PER_S = 25.0 * GB
"""Between a GPU and page-locked host memory while all GPUs of a node copy (half of PCIe 5, computed;
an H200 alone: 55)."""

# --------------------------------------------------------------------------------------------------- episodes

PROMPT_TOKENS = 150
COMPLETION_TOKENS = 110
PASSAGE_TOKENS = 150
"""Means of questions of NQ and HotpotQA with passages of 100 words; the limits of `data` cap them."""
SEARCHED_SHARE = 0.65
"""Searches of an episode as a share of `max_turns`."""
