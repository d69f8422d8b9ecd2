"""The section `placement`."""

from __future__ import annotations

from dataclasses import dataclass

from verl.trainer.config.fields import not_negative, positive, setting


@dataclass
class PlacementConfig:
    """The GPUs and what shares them with the trainer; read by the memory plan alone."""

    gpu: str | None = None
    """See `verl.trainer.plan.gpus`; None: as nvidia-smi reports."""
    ig_service_gpus: int = not_negative(0)
    ig_service_memory: float = setting(0.15, lambda value: 0 < value < 1, "in (0, 1)")
    retriever_gpus: int = not_negative(0)
    retriever_index_gb: float = positive(32.3)
