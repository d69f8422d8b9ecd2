"""Keep a model and its optimizer in host memory while a phase of a step does not need them.

The storage of a tensor is copied to host memory and emptied, and filled again before the next use. The tensor
objects stay, those of FSDP and their views among them, so that modules and optimizers need no rewiring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from verl.workers.parallel import local_part


@dataclass(frozen=True, slots=True)
class _Block:
    storage: torch.UntypedStorage
    host: Tensor
    """The bytes of the storage in host memory, page-locked for a GPU."""


class HostCopy:
    """Tensors that are on the device or, their memory freed, in host memory."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """Call `tensors` again at each release: an optimizer has no state before its first step."""
        self._tensors = tensors
        self._blocks: dict[int, _Block] = {}
        self._is_current = False
        """Whether the bytes in host memory are those of the tensors."""
        self.is_released = False

    def release(self) -> None:
        """Copy what may have changed to host memory, and free the memory of the device."""
        if self.is_released:
            return
        if not self._is_current:
            self._copy()
        for block in self._blocks.values():
            block.storage.resize_(0)
        self._is_current = self.is_released = True

    def load(self, *, changes: bool) -> None:
        """Take the memory of the device back; `changes`: the caller writes to the tensors."""
        if self.is_released:
            for block in self._blocks.values():
                block.storage.resize_(len(block.host))
                _bytes_of(block.storage).copy_(block.host, non_blocking=True)
            self.is_released = False
        self._is_current = self._is_current and not changes

    def find(self, local: Tensor) -> Tensor | None:
        """Return a released tensor as it is in host memory; None if it is not released."""
        block = self._blocks.get(local.untyped_storage()._cdata)
        if block is None or not self.is_released:
            return None
        place = (local.storage_offset(), local.size(), local.stride())
        return torch.empty(0, dtype=local.dtype).set_(block.host.untyped_storage(), *place)

    def _copy(self) -> None:
        known, self._blocks = self._blocks, {}
        for tensor in self._tensors():
            storage = local_part(tensor.detach()).untyped_storage()
            # A rank may have no part of a small tensor; tied ones share a storage.
            if not storage.nbytes() or storage._cdata in self._blocks:
                continue
            block = known.get(storage._cdata) or _Block(storage, _allocate_like(storage))
            block.host.copy_(_bytes_of(storage), non_blocking=True)
            self._blocks[storage._cdata] = block
        if any(block.storage.device.type == "cuda" for block in self._blocks.values()):
            torch.cuda.synchronize()


class Residence:
    """Decides what of one rank is on its device: weights when they are used, optimizer state in an update."""

    def __init__(
        self,
        parameters: Callable[[], Iterable[Tensor]],
        optimizer: Optimizer | None,
        *,
        offloads_weights: bool,
        offloads_optimizer: bool,
    ) -> None:
        """Move nothing of what is not offloaded. A frozen model has no `optimizer`."""
        self._is_frozen = optimizer is None
        self._frozen = self._trained = None
        if offloads_weights:
            # Apart: frozen weights, those below adapters too, are then copied to host memory only once.
            self._frozen = HostCopy(lambda: (p for p in parameters() if not p.requires_grad))
            self._trained = HostCopy(lambda: (p for p in parameters() if p.requires_grad))
        self._moments = None
        if optimizer is not None and offloads_optimizer:
            self._moments = HostCopy(lambda: _moments(optimizer))

    def load_weights(self, *, changes: bool = False) -> None:
        """Have the weights on the device; `changes`: the caller writes to them, to frozen ones, too."""
        _load(self._frozen, changes=changes)
        _load(self._trained, changes=changes)

    def load_for_update(self) -> None:
        """Have weights and optimizer state on the device, to write to what is trained."""
        _load(self._frozen, changes=False)
        _load(self._trained, changes=True)
        _load(self._moments, changes=True)

    def load_all(self) -> None:
        """Have weights and optimizer state on the device, to write to all of them."""
        self.load_weights(changes=True)
        _load(self._moments, changes=True)

    def release_optimizer(self) -> None:
        """Free the memory of the optimizer state."""
        if self._moments is not None:
            self._moments.release()

    def release_weights(self) -> None:
        """Free the memory of the weights."""
        for part in (self._frozen, self._trained):
            if part is not None:
                part.release()

    def leave_frozen(self) -> None:
        """Free the memory of the weights of a frozen model, which only log-probs need."""
        if self._is_frozen:
            self.release_weights()

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy of this rank's part of a tensor in host memory, wherever the tensor is."""
        for part in (self._frozen, self._trained, self._moments):
            if part is not None and (host := part.find(local_part(tensor.detach()))) is not None:
                return host.clone()
        return copy_to_host(tensor)


def _load(part: HostCopy | None, *, changes: bool) -> None:
    if part is not None:
        part.load(changes=changes)


def copy_to_host(tensor: Tensor) -> Tensor:
    """Return a copy of this rank's part of a tensor in host memory."""
    return local_part(tensor.detach()).to("cpu", copy=True)


def _moments(optimizer: Optimizer) -> Iterable[Tensor]:
    """Yield the state without the counts of steps, which are always on the CPU."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())


def _allocate_like(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
