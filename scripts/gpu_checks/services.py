"""What the services compute on a GPU: entailment of pairs of texts, and exact search."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from gpu_checks.recorder import Bench
from IG.entailment import EntailmentModel, Pair
from search_r1.search.scan import Best, scan
from verl.trainer.plan.assumptions import ENTAILMENT_BYTES, GB

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_WORDS = 1000
_WORDS_PER_TEXT = 25
"""Of a question and a short answer."""
_BATCH_SIZE = 256
_QUERIES, _TOPK = 256, 67
"""3 passages and the spare candidates of the retriever."""
_WIKIPEDIA, _PASSAGES, _DIM = 21_000_000, 2_625_000, 768
"""The index of a retriever, of which one of 8 GPUs holds an eighth."""


def check_entailment(bench: Bench) -> None:
    """Judge pairs with a model in the shape of deberta-v2-xlarge, in bfloat16 and float32."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    sizes = {"hidden_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 24, "vocab_size": 128_100}
    if bench.is_tiny:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 1100}
    config = DebertaV2Config(
        **sizes,
        intermediate_size=4 * sizes["hidden_size"],
        attention_head_size=sizes["hidden_size"] // sizes["num_attention_heads"],
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        conv_kernel_size=3,
        conv_act="gelu",
        num_labels=3,
    )
    with torch.device(bench.device):
        model = DebertaV2ForSequenceClassification(config).eval()
    tokenizer = _word_tokenizer()
    for dtype, num_pairs in ((torch.float32, 512), (torch.bfloat16, 2048)):
        pairs = _random_pairs(8 if bench.is_tiny else num_pairs)
        judge = EntailmentModel(
            model.to(dtype), tokenizer=tokenizer, entailment_index=0, batch_size=_BATCH_SIZE, num_threads=1
        )
        judge.probabilities(pairs[:_BATCH_SIZE])
        bench.forget_peak()
        seconds = bench.seconds(lambda judge=judge, pairs=pairs: judge.probabilities(pairs))  # type: ignore[misc]
        name = str(dtype).removeprefix("torch.")
        bench.record(
            f"{name}_pairs_per_s", len(pairs) / seconds, unit=f"pairs/s of {2 * _WORDS_PER_TEXT} tokens"
        )
    bench.record(
        "bfloat16_peak_gb",
        bench.peak_gb(),
        unit="GB, without a context",
        planned=ENTAILMENT_BYTES / GB,
        assumption="ENTAILMENT_BYTES",
    )


def check_search(bench: Bench) -> None:
    """Search exactly among the passages that one of 8 GPUs holds, as the retriever does."""
    count = 5000 if bench.is_tiny else _PASSAGES
    vectors = torch.empty((count, _DIM), dtype=torch.float16, device=bench.device).normal_(std=0.04)
    queries = vectors[:: count // _QUERIES][:_QUERIES].clone()

    def search() -> tuple[torch.Tensor, torch.Tensor]:
        best = Best(len(queries), count=_TOPK, device=bench.device)
        scan(vectors, queries, best=best)
        return best.take()

    _, rows = search()
    own = torch.arange(len(queries)) * (count // _QUERIES)
    if not torch.equal(rows[:, 0], own):
        raise AssertionError("a vector is not the nearest one of itself")
    seconds = bench.seconds(search, repeats=1 if bench.is_tiny else 10)
    bench.record(
        "searches_per_s",
        len(queries) / seconds * count / _WIKIPEDIA,
        unit=f"searches/s of 21 million, in batches of {_QUERIES}, without encoding",
        assumption="GPU_SEARCHES_PER_S",
    )
    bench.record("read_bytes_per_s", vectors.nbytes / seconds, unit="bytes/s")


def check_device(bench: Bench) -> None:
    """Name device and versions, and measure what products and copies reach of the peak."""
    import transformers

    bench.record("torch", torch.__version__)
    bench.record("transformers", transformers.__version__)
    bench.record("cuda", torch.version.cuda)
    size = 64 if bench.is_tiny else 8192
    dtype = torch.float32 if bench.is_tiny else torch.bfloat16
    first, second = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    torch.mm(first, second)
    seconds = bench.seconds(lambda: torch.mm(first, second), repeats=20)
    flops = 2 * size**3 / seconds
    bench.record("product_flops_per_s", flops, unit=f"FLOP/s of {size} x {size} matrices")
    bench.record("product_share", bench.share_of_peak(flops), unit="of peak FLOP/s: no policy reaches more")
    source = torch.empty(1000 if bench.is_tiny else 2 * 10**9, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    target.copy_(source)
    moved = 2 * source.nbytes / bench.seconds(lambda: target.copy_(source), repeats=20)
    share = moved / bench.gpu.bandwidth if bench.gpu.bandwidth else None
    bench.record("copy_share", share, unit="of the memory's bandwidth: no engine reaches more")
    if bench.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        used = (total - free - torch.cuda.memory_reserved()) / GB
        bench.record("context_gb", used, unit="GB beside tensors; CONTEXT_BYTES has buffers of NCCL besides")
        bench.record("memory_gb", total / GB, unit="GB")


def _random_pairs(count: int) -> list[Pair]:
    words = np.random.default_rng(0).integers(0, _WORDS, (count, 2, _WORDS_PER_TEXT))
    texts = [[" ".join(f"w{word}" for word in text) for text in pair] for pair in words]
    return [(premise, hypothesis) for premise, hypothesis in texts]


def _word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words w0, w1, ...: the model's own is on the hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *(f"w{number}" for number in range(_WORDS))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512
    )
