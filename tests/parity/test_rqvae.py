"""RQ-VAE and RQ-Transformer against the authors' code.

`rqvae.npz` holds outputs of kakaobrain/rq-vae-transformer at 341395e, run once in float32 with torch 2.13 on a CPU:
RQTransformer with embed_dim 16, four heads, two blocks in body and head, block_size (3, 2, 4), vocab_size 11, five
classes, shared_tok_emb, shared_cls_emb, cumsum_depth_ctx, and embeddings of codes from a table behind identity
matrices (ours has the table alone); RQBottleneck((4, 4, 6), (4, 4, 3), 20, shared_codebook=True), with get_soft_codes
at temperature 0.5; and VQEmbedding(12, 4, restart_unused_codes=False) after three steps of training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drawn import close, drawn, golden, integers, load, normal
from latticode import GPT, VQ, Residual

EXPECTED = golden("rqvae")


def stack(theirs: str) -> dict[str, Tensor]:
    """The weights of two blocks under our names."""
    width, named = 16, {}
    for i in range(2):
        at = f"rqt.{theirs}.blocks.{i}"
        parts = {"norm1": "ln1", "norm2": "ln2", "attention.out": "attn.proj", "mlp.up": "mlp.0", "mlp.down": "mlp.2"}
        shapes = {"mlp.up": (64, 16), "mlp.down": (16, 64), "attention.out": (16, 16)}
        for ours, name in parts.items():
            shape = shapes.get(ours, (width,))
            named[f"blocks.{i}.{ours}.weight"] = drawn(f"{at}.{name}.weight", shape)
            named[f"blocks.{i}.{ours}.bias"] = drawn(f"{at}.{name}.bias", shape[:1])
        for kind, shape in (("weight", (width, width)), ("bias", (width,))):
            qkv = [drawn(f"{at}.attn.{part}.{kind}", shape) for part in ("query", "key", "value")]
            named[f"blocks.{i}.attention.qkv.{kind}"] = torch.cat(qkv)
    return named


@torch.no_grad()
def test_transformer() -> None:
    """Without the norm between its transformers ours is theirs; theirs has no label for 'none'."""
    prior = GPT(
        [11] * 4, [3, 2], 5, width=16, depth=2, heads=4, dropout=0, inner_depth=2, shared=True, norm_between=False
    )
    start, places = drawn("rqt.pos_emb_cond", (1, 1, 16)), drawn("rqt.pos_emb_hw", (1, 6, 16))
    tensors = {
        "place": torch.cat([start, places], 1)[0, :-1],
        "label.weight": torch.cat([drawn("rqt.cond_emb.weight", (5, 16)), torch.zeros(1, 16)]),
        "embedding.weight": normal("rqt.codebook", (11, 16)),
        "head.slot": drawn("rqt.pos_emb_d", (1, 4, 16)),
        "head.transformer.norm.weight": drawn("rqt.classifier.layer_norm.weight", (16,)),
        "head.transformer.norm.bias": drawn("rqt.classifier.layer_norm.bias", (16,)),
        "head.heads.0.weight": drawn("rqt.classifier.linear.weight", (11, 16)),
        "head.heads.0.bias": drawn("rqt.classifier.linear.bias", (11,)),
    }
    tensors |= {f"transformer.{k}": v for k, v in stack("body_transformer").items()}
    tensors |= {f"head.transformer.{k}": v for k, v in stack("head_transformer").items()}
    load(prior, tensors)
    codes = integers("rqt.codes", 11, (3, 3, 2, 4))
    logits = prior.logits(prior.symbols.split(codes).flatten(1, -2), torch.tensor([0, 3, 4]))
    close(torch.stack(logits, 2).unflatten(1, (3, 2)), EXPECTED["logits"], 2e-5)


def test_residual_quantizer() -> None:
    book = VQ(20, 6, kmeans=False)
    quantizer = Residual(book, 3).eval()
    with torch.no_grad():
        book.embedding.weight.copy_(normal("rq.book", (20, 6)))
    z = normal("rq.z", (2, 4, 4, 6), 2.0).requires_grad_()
    out = quantizer(z)
    out.losses["commitment"].backward()
    assert torch.equal(out.codes, EXPECTED["codes"])
    close(out.latents, EXPECTED["latents"])
    close(out.losses["commitment"], EXPECTED["commitment"])
    assert z.grad is not None
    close(z.grad, EXPECTED["gradient"])
    soft = quantizer.soften(z.detach(), 0.5).p
    close(soft[..., 0, :], EXPECTED["soft"][..., 0, :])  # of later stages, ours are given the codes that were drawn


@torch.no_grad()
def test_averaged_codebook() -> None:
    """Three steps of the averages. They divide by counts smoothed to a like sum; ours by the counts, so that a code is
    exactly the mean of its tokens: with the smoothing undone they are equal."""
    quantizer = VQ(12, 4, kmeans=False, restart=0.0).train()
    book = quantizer.embedding
    book.weight.copy_(drawn_book := normal("ema.book", (12, 4)))
    book.total.copy_(drawn_book * 3)
    book.count.fill_(3.0)
    for step in range(3):
        quantizer(normal(f"ema.x{step}", (50, 4)))
    close(book.count, EXPECTED["ema_count"])
    count, eps = EXPECTED["ema_count"], 1e-5
    smoothed = count.sum() * (count + eps) / (count.sum() + len(count) * eps)
    close(book.weight, EXPECTED["ema_weight"] * (smoothed / count)[:, None])
