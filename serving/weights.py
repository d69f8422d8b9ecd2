"""Keep the weights of models in the memory of this process."""

from __future__ import annotations

from itertools import chain

import torch


def copy_weights(model: torch.nn.Module) -> None:
    """Copy the weights from the file that they may be mapped from.

    transformers maps safetensors: a file that is cut short later would kill the process (SIGBUS), one that is
    rewritten would change the model. Tied weights stay tied.
    """
    for tensor in chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.clone()
