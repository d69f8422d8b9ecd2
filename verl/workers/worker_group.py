"""All ranks of one model behind one object: shard the batch, call every rank, merge the results."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from serving.files import FileRecord
from verl.branches import Tree, TreeLogProbs, split, unpack
from verl.errors import TrainingHaltedError
from verl.trainer.config.schema import ActorConfig, ActorRolloutRefConfig
from verl.types import FloatArray, IntArray
from verl.utils.actors import Actor, ActorError, Launcher, Node, interface_of
from verl.utils.timing import Span
from verl.workers.batch import TrainBatch, count_mini_batches, deal_rows, deal_trees, make_mini_batches
from verl.workers.model import packs_rows
from verl.workers.parallel import Placement, Rendezvous
from verl.workers.policy import PolicyWorker
from verl.workers.weight_chunks import Chunk
from verl.workers.weight_ipc import Handles

logger = logging.getLogger(__name__)

_Pass = TypeVar("_Pass")

_GRACE_S = 10.0
"""When a rank dies the others fail in a collective; wait for its own error, which is more specific."""


class WorkerGroup:
    """The policy, or its frozen reference, on as many actors as there are ranks."""

    def __init__(
        self,
        actors: Sequence[Actor],
        *,
        config: ActorConfig,
        packs: bool,
        rendezvous: Rendezvous,
        address: str,
    ) -> None:
        """Take `packs`: can a pass hold several trajectories, see `packs_rows`; `address`: of rank 0."""
        self._actors = tuple(actors)
        self._address = address
        self._config = config
        self._packs = packs
        self._max_tokens = config.ppo_max_token_len_per_gpu if packs else 1
        self._rendezvous = rendezvous  # kept: it ends with its last owner

    @classmethod
    def launch(
        cls,
        launcher: Launcher,
        config: ActorRolloutRefConfig,
        placement: Placement,
        *,
        name: str,
        rendezvous: Rendezvous,
        total_steps: int,
        seed: int,
        trainable: bool,
    ) -> WorkerGroup:
        """Start `placement.world_size` ranks without waiting for them: see `wait_until_ready`.

        Ranks are dealt to the launcher's nodes in order; on GPUs the i-th rank of a node takes the i-th GPU.
        Several ranks need processes of their own, see `validate`.
        """
        packs = packs_rows(config.model)
        if not packs:
            logger.info(
                "%s computes one trajectory per forward pass: layers do not attend to the whole context",
                config.model.path,
            )
        placement = replace(
            placement,
            ranks_per_node=placement.world_size // len(launcher.nodes),
            rendezvous=rendezvous.new_group(),
        )
        shared = {"config": config, "total_steps": total_steps, "seed": seed, "trainable": trainable}
        # Not waited for: the ranks find each other in their constructors, so all must run at the same time.
        ranks = [replace(placement, rank=rank) for rank in range(placement.world_size)]
        actors = [
            launcher.launch(
                PolicyWorker,
                kwargs={**shared, "placement": rank},
                name=f"{name}-{rank.rank}",
                env=_make_environment(rank, launcher.nodes),
                node=rank.node,
            )
            for rank in ranks
        ]
        address = launcher.nodes[0].address
        return cls(actors, config=config.actor, packs=packs, rendezvous=rendezvous, address=address)

    async def wait_until_ready(self) -> int:
        """Return the number of parameters once all ranks are built. Raises what a constructor raised."""
        counts: list[int] = await self._call_all("num_parameters")
        return counts[0]

    async def log_probs(self, batch: TrainBatch, *, adapters: bool = True) -> FloatArray:
        """Return the log-prob of every policy token at the sampling temperature [N]."""
        plan = deal_rows(batch, num_ranks=len(self._actors), max_tokens=self._max_tokens)
        passes = [[batch.select(rows) for rows in of_rank] for of_rank in plan]
        answers = await self._call_all("log_probs", [(of_rank,) for of_rank in passes], adapters=adapters)
        found: dict[int, FloatArray] = {}
        for rows, of_pass, log_probs in _zip_passes(plan, passes, answers):
            found.update(zip(rows.tolist(), of_pass.split(log_probs), strict=True))
        return np.concatenate([found[row] for row in range(batch.num_trajectories)])

    async def tree_log_probs(
        self, trees: Sequence[Tree], *, shared: bool = True, adapters: bool = True
    ) -> list[TreeLogProbs]:
        """Return the log-probs of each tree at the sampling temperature, in order.

        `shared` computes a common prefix once; without it every branch has a pass of its own. The results are
        equal up to rounding, and do not depend on order or batch.
        """
        parts_of = [[tree] if shared and self._packs else split(tree) for tree in trees]
        # A tree in which nothing is scored needs no forward pass.
        scored_of = [[part for part in parts if part.num_scored] for parts in parts_of]
        scored = [part for parts in scored_of for part in parts]
        if not scored:
            return [unpack(tree, np.zeros(0, np.float32)) for tree in trees]
        limit = self._max_tokens if shared else 1  # a pass has at least one tree
        plan = deal_trees(scored, num_ranks=len(self._actors), max_tokens=limit)
        passes = [[[scored[i] for i in of_pass] for of_pass in of_rank] for of_rank in plan]
        arguments = [(of_rank,) for of_rank in passes]
        answers = await self._call_all("tree_log_probs", arguments, adapters=adapters)
        found: dict[int, FloatArray] = {}
        for index, of_pass, log_probs in _zip_passes(plan, passes, answers):
            ends = np.cumsum([tree.num_scored for tree in of_pass], dtype=np.int64)
            found.update(zip(index.tolist(), np.split(log_probs, ends)[:-1], strict=True))
        in_order = iter([found[i] for i in range(len(scored))])
        return [
            unpack(tree, np.concatenate([np.zeros(0, np.float32), *(next(in_order) for _ in parts)]))
            for tree, parts in zip(trees, scored_of, strict=True)
        ]

    def is_on_policy(self, num_trajectories: int) -> bool:
        """Return whether one update takes all trajectories: no old log-probs are needed, all ratios are 1."""
        minis = count_mini_batches(num_trajectories, mini_batch_size=self._config.ppo_mini_batch_size)
        return self._config.ppo_epochs * minis == 1

    async def update(self, batch: TrainBatch) -> dict[str, float]:
        """Train on the batch; return metrics without a prefix, see `PolicyWorker.update`."""
        has_kl = self._config.use_kl_loss and self._config.kl_loss_coef > 0
        shards = make_mini_batches(
            batch,
            num_ranks=len(self._actors),
            mini_batch_size=self._config.ppo_mini_batch_size,
            max_tokens=self._max_tokens,
            only_advantages=not (has_kl or self._config.entropy_coeff),
        )
        metrics: list[dict[str, float]] = await self._call_all("update", [(shard,) for shard in shards])
        return metrics[0]

    async def probe(self, ids: IntArray) -> FloatArray:
        """Return the log-prob of every token at temperature 1 [L]; position 0 holds 0."""
        scores: list[FloatArray] = await self._call_all("probe", [(ids,)] * len(self._actors))
        return scores[0]

    async def export_weights(self) -> list[str]:
        """Write `model.safetensors` for the engines; return its folder on each node."""
        folders: list[str | None] = await self._call_all("export_weights")
        return [folder for folder in folders if folder is not None]

    async def share_weights(self) -> tuple[list[Chunk], Handles]:
        """Allocate a buffer on every rank; return its chunks, and the handles of all."""
        shared: list[tuple[list[Chunk], Handles]] = await self._call_all(
            "send", [("ipc", "share")] * len(self._actors)
        )
        handles: Handles = {}
        for _, of_rank in shared:
            handles |= of_rank
        return shared[0][0], handles

    async def fill_chunk(self, index: int) -> None:
        """Gather the tensors of a chunk into the buffers."""
        await self._call_all("send", [("ipc", "fill", index)] * len(self._actors))

    async def unshare_weights(self) -> None:
        """Free the buffers."""
        await self._call_all("send", [("ipc", "unshare")] * len(self._actors))

    async def find_endpoint(self) -> tuple[str, int]:
        """Return the address of the first node, and the port on which its first rank then listens."""
        port: int = await self._actors[0].call("send", "nccl", "listen", self._address)
        return self._address, port

    async def connect_engines(self, info: Mapping[str, object]) -> None:
        """Join the group of the engines as its rank 0."""
        await self._call_all("send", [("nccl", "connect", info)] * len(self._actors))

    async def describe_weights(self) -> dict[str, object]:
        """Return what `broadcast_weights` sends, in its order."""
        found: list[dict[str, object]] = await self._call_all(
            "send", [("nccl", "describe")] * len(self._actors)
        )
        return found[0]

    async def broadcast_weights(self) -> None:
        """Gather the weights and broadcast them to the engines."""
        await self._call_all("send", [("nccl", "send")] * len(self._actors))

    async def export_bytes(self) -> int:
        """Return the number of bytes that `export_weights` writes on a node."""
        sizes: list[int] = await self._call_all("export_bytes")
        return sizes[0]

    async def drop_weights(self) -> None:
        """Remove what `export_weights` wrote."""
        await self._call_all("drop_weights")

    async def num_perturbations(self) -> int:
        """Return how many perturbations together make every stale weight of an engine visible."""
        counts: list[int] = await self._call_all("num_perturbations")
        return counts[0]

    async def perturb(self, index: int, *, undo: bool = False) -> None:
        """Change weights visibly; `undo` restores every bit, see `PolicyWorker.perturb`."""
        await self._call_all("perturb", [(index,)] * len(self._actors), undo=undo)

    async def release(self) -> None:
        """Make room on the GPUs, see `PolicyWorker.release`."""
        await self._call_all("release")

    async def stage(self, key: str) -> None:
        """Copy the state to host memory for `write`; what was staged before is forgotten."""
        await self._call_all("stage", [(key,)] * len(self._actors))

    async def write(self, key: str, folder: Path, *, export: Path | None = None) -> dict[Path, FileRecord]:
        """Write what was staged under `key`, one file per rank, while the ranks may do other work.

        `export` also gets the weights, as a folder that `from_pretrained` and vLLM load. Returns what the
        large files must be. Raises the first error of a rank; the group stays.
        """
        calls = [actor.call("write", key, str(folder)) for actor in self._actors]
        results = await asyncio.gather(*calls, return_exceptions=True)
        records: dict[Path, FileRecord] = {}
        for result in results:
            if isinstance(result, BaseException):
                raise result
            records |= result
        if export is not None:
            records |= await self._actors[0].call("export_hf", str(folder), str(export))
        return records

    async def save(self, folder: Path, *, weights_only: bool = False) -> None:
        """Write what `load` needs to continue exactly, or to have the same weights.

        Does not wait for a `write` that is going on.
        """
        await self._call_all("save", [(str(folder),)] * len(self._actors), weights_only=weights_only)

    async def load(self, folder: Path) -> None:
        """Continue where the state was staged. Raises ConfigError, see `PolicyWorker.load`."""
        await self._call_all("load", [(str(folder),)] * len(self._actors))

    async def start_profile(self) -> None:
        """Record what the ranks compute from here on."""
        await self._call_all("start_profile")

    async def write_profile(self, folder: Path, *, step: int, spans: Sequence[Span]) -> None:
        """Stop recording, and write a trace per rank, `step_N_rank_R.json.gz`, with these spans in it."""
        arguments = [(str(folder),)] * len(self._actors)
        await self._call_all("write_profile", arguments, step=step, spans=spans)

    def shutdown(self) -> None:
        """Kill the ranks."""
        for actor in self._actors:
            actor.kill()

    async def _call_all(
        self, method: str, arguments: Sequence[tuple[object, ...]] | None = None, **shared: object
    ) -> list[Any]:
        """Call every rank, with arguments of its own and `shared` ones.

        A failure ends the group: the other ranks would wait for it in a collective.
        """
        arguments = arguments or [()] * len(self._actors)
        calls = [
            asyncio.ensure_future(actor.call(method, *of_rank, **shared))
            for actor, of_rank in zip(self._actors, arguments, strict=True)
        ]
        done, pending = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
        errors = [error for call in done if (error := call.exception())]
        if not errors:
            return [call.result() for call in calls]
        if pending:
            late, pending = await asyncio.wait(pending, timeout=_GRACE_S)
            errors += [error for call in late if (error := call.exception())]
        for call in pending:
            call.cancel()
        if len(self._actors) > 1:
            self.shutdown()
        first = next((error for error in errors if isinstance(error, ActorError)), errors[0])
        if isinstance(first, torch.OutOfMemoryError):
            raise TrainingHaltedError(
                f"a GPU has too little memory for {method!r}: {first}; plan=true prints what every phase "
                "takes; lower actor_rollout_ref.actor.ppo_max_token_len_per_gpu or "
                "actor_rollout_ref.rollout.gpu_memory_utilization, or set param_offload and "
                "optimizer_offload below actor_rollout_ref.actor.fsdp_config, and repeat the command"
            ) from first
        raise first


def _zip_passes(
    plan: list[list[IntArray]], passes: list[list[_Pass]], answers: list[list[FloatArray]]
) -> Iterator[tuple[IntArray, _Pass, FloatArray]]:
    """Yield the rows of each pass of each rank, the pass, and what the rank answered."""
    for of_rank in zip(plan, passes, answers, strict=True):
        yield from zip(*of_rank, strict=True)


def _make_environment(placement: Placement, nodes: Sequence[Node]) -> dict[str, str]:
    """Return the environment of a rank: its GPUs, and the interface on which the ranks talk."""
    node, interface = nodes[placement.node], interface_of(nodes, placement.node)
    if placement.device == "cpu":
        # Threads that spin would take the cores from the other processes.
        return {"GLOO_SOCKET_IFNAME": interface, "OMP_WAIT_POLICY": "passive"}
    return node.gpu_environment(range(placement.node_size)) | {"NCCL_SOCKET_IFNAME": interface}
