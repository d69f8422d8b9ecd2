"""One rank of the policy, or of its frozen reference: log-probs, updates, export and load of weights.

A plain class without actors, engines or rewards. With several ranks every method is collective: all ranks
call it, each with its own shard.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from serving.files import FileRecord
from verl.branches import Tree, pack
from verl.forest import Forest
from verl.trainer.config.schema import ADAPTER, ActorRolloutRefConfig
from verl.types import FloatArray, IntArray
from verl.utils.timing import Span
from verl.workers.attention import AttentionBlocks
from verl.workers.batch import MiniBatch, TrainBatch, pack_rows, pack_whole
from verl.workers.lora import adapters_switched, init_adapters, is_adapter, perturb_adapters
from verl.workers.model import PolicyNetwork, compute_dtype, is_tied, packs_rows, resolve_model_folder
from verl.workers.model_io import (
    build_model,
    count_perturbations,
    engine_weights,
    fill_model,
    perturb_weights,
    sharding_units,
)
from verl.workers.objective import MAXIMA, SUMS, micro_batch_loss
from verl.workers.offload import Residence
from verl.workers.optimizer import learning_rate, make_optimizer
from verl.workers.parallel import (
    Placement,
    gather_tensor,
    init_distributed,
    reduce_over_ranks,
    reshard_model,
    shard_model,
)
from verl.workers.profile import Profile, profiled
from verl.workers.rank_state import StagedState, export_state, read_state, stage_state, write_state
from verl.workers.weight_file import FileSender
from verl.workers.weight_ipc import ChunkSender
from verl.workers.weight_nccl import BroadcastSender

logger = logging.getLogger(__name__)


class PolicyWorker:
    """Holds a model (or this rank's part of it) and, if trainable, its optimizer."""

    def __init__(
        self,
        config: ActorRolloutRefConfig,
        placement: Placement,
        *,
        total_steps: int,
        seed: int,
        trainable: bool,
    ) -> None:
        if placement.num_threads is not None:
            torch.set_num_threads(placement.num_threads)
        torch.manual_seed(seed)
        model, device = config.model, placement.device
        self._actor, self._config = config.actor, model
        self._temperature = config.rollout.temperature
        self._total_steps = total_steps
        self._source = resolve_model_folder(model.path)
        self._dtype = compute_dtype(model, device=device)
        self._packs = packs_rows(model)
        fsdp_size = config.actor.fsdp_config.fsdp_size
        self._context = init_distributed(placement, fsdp_size=fsdp_size, dtype=self._dtype)
        self._model = build_model(model, device=device, trainable=trainable)
        self._network = PolicyNetwork(self._model)
        units = sharding_units(self._model)
        shard_model(self._network, context=self._context, units=units, dtype=self._dtype)
        fill_model(self._network, self._model, folder=self._source, device=self._context.device)
        init_adapters(self._model, seed=seed)
        self._parameters = [p for p in self._network.parameters() if p.requires_grad]
        self._optimizer = make_optimizer(self._parameters, config=config.actor.optim) if trainable else None
        offload = config.actor.fsdp_config if trainable else config.ref.fsdp_config
        self._residence = Residence(
            self._network.parameters,
            self._optimizer,
            offloads_weights=offload.param_offload,
            offloads_optimizer=config.actor.fsdp_config.optimizer_offload,
        )
        self._residence.leave_frozen()
        self._step, self._seed = 0, seed
        self._staged: dict[str, StagedState] = {}
        self.profile: Profile | None = None
        # See prepare_engine_model: a tied head on the CPU goes to the engine as a tensor of its own.
        unties = device == "cpu" and is_tied(self._source)
        weights = partial(engine_weights, self._model, dtype=self._dtype, with_head=unties)
        self._sends_adapters = model.lora_transfer == ADAPTER
        self._file = (
            FileSender.of_adapters(self._model, config=model, context=self._context)
            if self._sends_adapters
            else FileSender(weights, context=self._context)
        )
        self._senders = {
            "ipc": ChunkSender(weights, device=self._context.device),
            "nccl": BroadcastSender(weights, context=self._context),
        }

    def num_parameters(self) -> int:
        """Return the number of parameters of the whole model, without adapters."""
        return sum(p.numel() for name, p in self._network.named_parameters() if not is_adapter(name))

    @profiled
    def log_probs(self, passes: Sequence[TrainBatch], *, adapters: bool = True) -> list[FloatArray]:
        """Return the log-probs of the policy tokens of each pass at the sampling temperature [N].

        Without its adapters a policy is the initial model.
        """
        with adapters_switched(self._model, on=adapters):
            return self._score([pack_rows(batch) for batch in passes], temperature=self._temperature)

    @profiled
    def tree_log_probs(self, passes: Sequence[Sequence[Tree]], *, adapters: bool = True) -> list[FloatArray]:
        """Return the log-probs of the scored tokens of each pass at the sampling temperature [N]."""
        with adapters_switched(self._model, on=adapters):
            return self._score([pack(trees) for trees in passes], temperature=self._temperature)

    def probe(self, ids: IntArray) -> FloatArray:
        """Return the log-prob of every token at temperature 1 [L]; position 0 holds 0."""
        (log_probs,) = self._score([pack_whole(ids)], temperature=1.0)
        return np.concatenate([np.zeros(1, dtype=np.float32), log_probs])

    @profiled
    def update(self, minis: Sequence[MiniBatch]) -> dict[str, float]:
        """Train on mini-batches, epoch after epoch, with one optimizer step each.

        A step whose loss or gradient is not finite is skipped: weights and optimizer do not change by a bit.
        It is counted in `num_updates` and `skipped_updates`, and left out of the means and maxima.
        """
        if self._optimizer is None:
            raise RuntimeError("a frozen reference cannot be updated")
        num_updates = self._actor.ppo_epochs * len(minis)
        if num_updates > 1 and any(b.old_log_probs is None for mini in minis for b in mini.micro_batches):
            raise ValueError(f"{num_updates} updates need old_log_probs; only a single one is on-policy")
        self._residence.load_for_update()
        lr = learning_rate(self._step, config=self._actor.optim, total_steps=self._total_steps)
        applied = []
        for _ in range(self._actor.ppo_epochs):
            for mini in minis:
                metrics = self._train_on(mini, lr=lr)
                if metrics is not None:
                    applied.append(metrics)
        self._step += 1
        self._residence.release_optimizer()
        self._release_memory()
        overall = {
            name: float((np.max if name in MAXIMA else np.mean)([m[name] for m in applied]))
            for name in (applied[0] if applied else ())
        }
        skipped = num_updates - len(applied)
        return {**overall, "lr": lr, "num_updates": float(num_updates), "skipped_updates": float(skipped)}

    def export_weights(self) -> str | None:
        """Write the weights for the engines of this node, see `FileSender`; `drop_weights` removes them."""
        self._residence.load_weights()
        folder = self._file.export()
        self._release_memory()
        return folder

    def drop_weights(self) -> None:
        """Remove what `export_weights` wrote."""
        self._file.drop()

    def export_bytes(self) -> int:
        """Return the number of bytes that an engine gets."""
        return self._file.num_bytes()

    def send(self, kind: str, method: str, /, *args: object) -> Any:
        """Return what a method of a sender (`ipc`, `nccl`) does, with the weights on the device."""
        self._residence.load_weights()
        return getattr(self._senders[kind], method)(*args)

    def num_perturbations(self) -> int:
        """Return how many perturbations together make every stale weight of an engine visible."""
        return 1 if self._sends_adapters else count_perturbations(self._model, dtype=self._dtype)

    def perturb(self, index: int, *, undo: bool = False) -> None:
        """Change what is sent visibly, as `perturb_weights` does; `undo` restores every bit."""
        self._residence.load_weights(changes=True)
        if self._sends_adapters:
            return perturb_adapters(self._model, undo=undo)
        perturb_weights(self._model, index, count=self.num_perturbations(), undo=undo)

    def release(self) -> None:
        """Make room for the engine on the same GPU: move weights that are offloaded to host memory."""
        reshard_model(self._network)
        self._residence.release_weights()
        self._release_memory()

    def stage(self, key: str) -> None:
        """Copy this rank's state to host memory for `write`; what was staged before is forgotten."""
        self._staged.clear()  # a copy that could not be written: two may not fit into memory
        self._staged[key] = self._stage(self._optimizer)

    def save(self, folder: str, *, weights_only: bool = False) -> None:
        """Write this rank's state, or its weights alone, before the next call."""
        staged = self._stage(None if weights_only else self._optimizer)
        write_state(Path(folder), staged, context=self._context)

    async def write(self, key: str, folder: str) -> dict[Path, FileRecord]:
        """Write what was staged under `key` on a thread, and forget it; return what the file must be."""
        staged = self._staged.pop(key)
        return await asyncio.to_thread(write_state, Path(folder), staged, context=self._context)

    async def export_hf(self, checkpoint: str, folder: str) -> dict[Path, FileRecord]:
        """Write the weights of a checkpoint on a thread as a folder that `from_pretrained` and vLLM load.

        With LoRA a folder `adapter` beside it gets the adapters alone.
        """
        export = partial(export_state, source=self._source, dtype=self._dtype, config=self._config)
        return await asyncio.to_thread(export, Path(checkpoint), Path(folder))

    def load(self, folder: str) -> None:
        """Restore the state of `stage`, exactly if on as many ranks; a frozen model takes the weights.

        Raises ConfigError if the model differs.
        """
        self._residence.load_all()
        self._step = read_state(
            Path(folder),
            self._model,
            optimizer=self._optimizer,
            source=self._source,
            context=self._context,
            seed=self._seed,
        )
        self._residence.release_optimizer()
        self._residence.leave_frozen()

    def _stage(self, optimizer: Optimizer | None) -> StagedState:
        return stage_state(
            self._model,
            optimizer=optimizer,
            step=self._step,
            source=self._source,
            context=self._context,
            copy=self._residence.copy,
        )

    def start_profile(self) -> None:
        """Record the passes from here on."""
        self.profile = Profile()

    def write_profile(self, folder: str, *, step: int, spans: Sequence[Span]) -> None:
        """Stop recording, and write a trace that also shows what the trainer did."""
        assert self.profile is not None
        rank, recorded, self.profile = self._context.rank, self.profile, None
        recorded.write(Path(folder) / f"step_{step}_rank_{rank}.json.gz", rank=rank, spans=spans)

    def _train_on(self, mini: MiniBatch, *, lr: float) -> dict[str, float] | None:
        """Take one optimizer step and return its metrics, or None if it was skipped."""
        assert self._optimizer is not None
        sums = torch.zeros(len(SUMS), device=self._context.device)
        maxima = torch.zeros(len(MAXIMA), device=self._context.device)
        for micro in mini.micro_batches:  # also an empty one: FSDP's collectives need every rank
            loss, micro_sums, micro_maxima = self._loss(micro, mini)
            loss.backward()
            sums += micro_sums
            maxima = torch.maximum(maxima, micro_maxima)
        for micro in mini.uncredited:
            with torch.no_grad():
                _, micro_sums, micro_maxima = self._loss(micro, mini)
            reshard_model(self._network)
            sums += micro_sums
            maxima = torch.maximum(maxima, micro_maxima)
        norm = gather_tensor(
            torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        )
        reduce_over_ranks(sums, context=self._context)
        reduce_over_ranks(maxima, context=self._context, maximum=True)
        # From here on every rank has the same numbers, so all of them skip a step or none does.
        metrics = dict(zip((*SUMS, *MAXIMA), [*sums.tolist(), *maxima.tolist()], strict=True))
        metrics["grad_norm"] = float(norm)
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            logger.warning("update skipped: loss %s, gradient norm %s", metrics["loss"], metrics["grad_norm"])
            self._optimizer.zero_grad(set_to_none=True)
            return None
        torch.nn.utils.clip_grads_with_norm_(self._parameters, self._actor.grad_clip, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if mini.micro_batches[0].ref_log_probs is None:
            del metrics["kl"]
        return metrics

    def _loss(self, micro: TrainBatch, mini: MiniBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a micro-batch adds to the mini-batch loss, its `SUMS` and its `MAXIMA`."""
        forest, needs_entropy = pack_rows(micro), self._actor.entropy_coeff > 0
        log_probs, entropy = self._forward(
            forest, temperature=self._temperature, entropy_has_gradient=needs_entropy
        )
        num_computed = len(forest.ids) if micro.num_trajectories else 0
        return micro_batch_loss(
            log_probs, entropy, micro, mini, config=self._actor, num_computed=num_computed
        )

    def _score(self, forests: Sequence[Forest], *, temperature: float) -> list[FloatArray]:
        """Return the log-probs of the scored tokens of each forest [N], a forward pass for each."""
        self._residence.load_weights()
        results = []
        for forest in forests:
            with torch.no_grad():
                log_probs, _ = self._forward(forest, temperature=temperature)
            reshard_model(self._network)
            results.append(log_probs.cpu().numpy())
        self._residence.leave_frozen()
        self._release_memory()
        return results

    def _forward(
        self, forest: Forest, *, temperature: float, entropy_has_gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.profile is not None:
            self.profile.begin_pass()
        # Trajectories that begin alike share tokens, and each asks for their log-probs.
        scored, places = np.unique(forest.scored, return_inverse=True)
        log_probs, entropy = self._network(
            self._tensor(forest.ids).long(),
            self._tensor(forest.positions).long(),
            self._tensor(forest.previous[scored]).long(),
            self._tensor(forest.ids[scored]).long(),
            blocks=AttentionBlocks(forest, device=self._context.device) if self._packs else None,
            temperature=temperature,
            entropy_has_gradient=entropy_has_gradient,
        )
        index = self._tensor(places)
        return log_probs[index], entropy[index]

    def _tensor(self, array: np.ndarray) -> Tensor:
        # A copy, because arrays from Ray's object store are read-only.
        return torch.tensor(array, device=self._context.device)

    def _release_memory(self) -> None:
        """Free cached GPU memory, which the engine on the same GPU needs."""
        if self._context.device.type == "cuda":
            torch.cuda.empty_cache()
