"""LlamaGen's GPT against the authors' code.

`llamagen.npz` holds logits of FoundationVision/LlamaGen at ce98ec4, autoregressive/models/gpt.py, run once in float32
with torch 2.13 on a CPU: Transformer(ModelArgs(dim=32, n_layer=2, n_head=2, multiple_of=1, num_classes=5,
vocab_size=19, block_size=9)) without dropout, on 3 x 3 codes under the labels 0, 4 and none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drawn import close, drawn, golden, integers, load
from latticode import GPT

HIDDEN = int(2 * 4 * 32 / 3)  # of their SwiGLU


def block(i: int) -> dict[str, Tensor]:
    parts: dict[str, tuple[str, tuple[int, ...]]] = {
        "norm1.weight": ("attention_norm.weight", (32,)),
        "norm2.weight": ("ffn_norm.weight", (32,)),
        "attention.qkv.weight": ("attention.wqkv.weight", (96, 32)),
        "attention.out.weight": ("attention.wo.weight", (32, 32)),
        "mlp.gate.weight": ("feed_forward.w1.weight", (HIDDEN, 32)),
        "mlp.up.weight": ("feed_forward.w3.weight", (HIDDEN, 32)),
        "mlp.down.weight": ("feed_forward.w2.weight", (32, HIDDEN)),
    }
    return {
        f"transformer.blocks.{i}.{ours}": drawn(f"llama.layers.{i}.{theirs}", shape)
        for ours, (theirs, shape) in parts.items()
    }


@torch.no_grad()
def test_logits() -> None:
    """Their head has no bias, and their 'no label' is the last row, as ours."""
    prior = GPT([19], [3, 3], 5, width=32, depth=2, heads=2, dropout=0, places="llamagen", style="llama")
    load(
        prior,
        {
            "label.weight": drawn("llama.cls_embedding.embedding_table.weight", (6, 32)),
            "embedding.weight": drawn("llama.tok_embeddings.weight", (19, 32)),
            "transformer.norm.weight": drawn("llama.norm.weight", (32,)),
            "head.head.weight": drawn("llama.output.weight", (19, 32)),
            "head.head.bias": torch.zeros(19),
            **block(0),
            **block(1),
        },
    )
    codes = integers("llama.codes", 19, (3, 9))
    (logits,) = prior.logits(codes[..., None], torch.tensor([0, 4, -1]))
    close(logits, golden("llamagen")["logits"])
