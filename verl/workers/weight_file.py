"""Hand weights to engines through a safetensors file in the memory of each node."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from verl.trainer.config.schema import ModelConfig
from verl.utils.shutdown import close_quietly
from verl.workers.lora import write_adapters
from verl.workers.model_io import engine_adapters
from verl.workers.parallel import ParallelContext, wait_for_ranks
from verl.workers.tensor_files import Readable, write_weights
from verl.workers.weight_folder import WeightFolder, is_in_memory

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class FileSource(Protocol):
    """The part of the policy that writes files."""

    async def export_weights(self) -> Sequence[str]:
        """Write the weights once on each node; return the folder on each, which `drop_weights` removes."""
        ...

    async def drop_weights(self) -> None: ...


class FileReceiver(Protocol):
    """The part of an engine that reads a file."""

    node: int
    """Index of the node that the engine is on."""

    async def load_weights(self, folder: str, version: int) -> None:
        """Load the `*.safetensors` of the folder: weights, or an adapter where the engine has room for one.

        Completions carry `version` from then on.
        """
        ...


class FileTransfer:
    """Implements `verl.workers.weight_sync.WeightTransfer`."""

    def __init__(self, policy: FileSource, receivers: Sequence[FileReceiver]) -> None:
        self._policy = policy
        self._receivers = tuple(receivers)
        self._has_warned = False

    async def send(self, version: int) -> None:
        """Write the files, have every engine read that of its node, remove them."""
        async with AsyncExitStack() as stack:
            close_quietly(stack, self._policy.drop_weights)
            folders = await self._policy.export_weights()
            self._warn_of_disk(folders)
            await asyncio.gather(
                *(receiver.load_weights(folders[receiver.node], version) for receiver in self._receivers)
            )

    def _warn_of_disk(self, folders: Sequence[str]) -> None:
        """Warn once if weights travel over the disk: containers often have 64 MiB of shared memory."""
        slow = [folder for folder in folders if not is_in_memory(folder)]
        if slow and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "/dev/shm has no room for the weights: they travel over the disk (%s), which is slower; "
                "give it more (docker run --shm-size)",
                slow[0],
            )


class FileSender:
    """One rank's side of a publish; the first rank of each node writes."""

    def __init__(
        self, weights: Readable, *, context: ParallelContext, write: Callable[..., object] | None = None
    ) -> None:
        """Read `weights` by gathering them over the ranks; `write`: None for `write_weights`."""
        self._weights = weights
        self._context = context
        self._write = write or partial(write_weights, max_bytes=sys.maxsize)
        self._folder: WeightFolder | None = None

    @classmethod
    def of_adapters(
        cls, model: PreTrainedModel, *, config: ModelConfig, context: ParallelContext
    ) -> FileSender:
        """Send the adapters of a model alone."""
        adapters = partial(engine_adapters, model)
        return cls(adapters, context=context, write=partial(write_adapters, config=config))

    def num_bytes(self) -> int:
        """Return the size of what is sent."""
        layout, _ = self._weights()
        return sum(tensor.nbytes for tensor in layout.values())

    def export(self) -> str | None:
        """Write the files; return their folder, None on ranks that do not lead a node. Collective."""
        layout, read = self._weights()
        if self._context.leads_node:
            self._folder = WeightFolder(self.num_bytes())
        try:
            self._write(
                Path() if self._folder is None else self._folder.path,
                layout,
                lambda name: read(name).cpu(),
                is_writer=self._folder is not None,
            )
        except BaseException:
            self.drop()
            raise
        wait_for_ranks(self._context)
        return None if self._folder is None else str(self._folder.path)

    def drop(self) -> None:
        """Remove what `export` wrote."""
        if self._folder is not None:
            self._folder.remove()
            self._folder = None
