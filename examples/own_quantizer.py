"""A quantizer of one's own in an autoencoder of one's own, trained by a plain PyTorch loop, saved and loaded.

    python examples/own_quantizer.py --steps 300

The quantizer has three short methods that see clean float32 tokens only; masks, broken values, precision and ranks are
the base class's business. Encoder and decoder are any modules with the attributes of `latticode.autoencoders.contract`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import latticode
from latticode.autoencoders import try_out
from latticode.quantizers.base import Step, Tokens, token_mean
from latticode.quantizers.gradients import straight_through


class Ternary(latticode.Quantizer):
    """Each of `dim` channels becomes -1, 0 or 1: 3^dim codes, nothing to learn."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim, self.vocab = dim, (3**dim,)  # an argument stays as an attribute: from these a spec is read
        self.register_buffer("powers", 3 ** torch.arange(dim), persistent=False)

    def _encode(self, x: Tensor) -> Tensor:  # (..., D) -> (..., 1)
        return ((self._rounded(x) + 1).long() * self.powers).sum(-1, keepdim=True)

    def _decode(self, codes: Tensor) -> Tensor:  # (..., 1) -> (..., D)
        return (codes // self.powers % 3 - 1).to(torch.float32)

    def _quantize(self, tokens: Tokens) -> Step:
        q = self._rounded(tokens.values)
        losses = {"commitment": token_mean((tokens.target - q).square(), tokens.keep)}
        return Step(straight_through(tokens.values, q), self._encode(tokens.values), losses)

    def _rounded(self, x: Tensor) -> Tensor:
        return x.round().clamp(-1, 1)


class PatchEncoder(nn.Module):
    """(B, in_channels, H, W) -> (B, latent, H / stride, W / stride): every patch by itself."""

    def __init__(self, in_channels: int = 1, latent: int = 32, stride: int = 4):
        super().__init__()
        self.in_channels, self.latent, self.stride = in_channels, latent, stride
        self.patches = nn.Conv2d(in_channels, latent, stride, stride)
        self.mix = nn.Conv2d(latent, latent, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(F.silu(self.patches(x)))


class PatchDecoder(nn.Module):
    """(B, latent, h, w) -> (B, out_channels, h stride, w stride)."""

    def __init__(self, out_channels: int = 1, latent: int = 32, stride: int = 4):
        super().__init__()
        self.out_channels, self.latent, self.stride = out_channels, latent, stride
        self.mix = nn.Conv2d(latent, latent, 3, padding=1)
        self.pixels = nn.ConvTranspose2d(latent, out_channels, stride, stride)

    @property
    def last_layer(self) -> Tensor:  # only an adversarial loss with an adaptive weight asks for it
        return self.pixels.weight

    def forward(self, z: Tensor) -> Tensor:
        return self.pixels(F.silu(self.mix(z)))


# Files hold names, not code: whoever loads the model registers them too, or installs a package that does
# (examples/latticode-cube).
latticode.register("ternary", Ternary)
latticode.register("patch_encoder", PatchEncoder)
latticode.register("patch_decoder", PatchDecoder)


def disks(count: int, size: int = 16) -> Tensor:
    """Pictures (count, 1, size, size) in [-1, 1] of one soft disk each."""
    x, y, radius = torch.rand(3, count, 1, 1) * size
    line = torch.arange(size)
    away = ((line[:, None] - y).square() + (line - x).square()).sqrt()
    return (2 * torch.sigmoid(radius / 2 + 1 - away) - 1)[:, None]


def main(steps: int, folder: Path) -> float:
    """Train, save and load; returns the PSNR in dB of pictures that were not trained on."""
    torch.manual_seed(0)
    tokenizer = latticode.Tokenizer(PatchEncoder(), Ternary(6), PatchDecoder())
    try_out(tokenizer.encoder, tokenizer.decoder)  # says what of the contract is broken, if anything is
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=3e-3)
    for step in range(steps):
        images = disks(64)
        result = tokenizer(images)
        loss = F.mse_loss(result.output, images) + 0.25 * result.losses["commitment"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    images, trained = disks(256), tokenizer.eval()
    loaded = latticode.load(trained.save_pretrained(folder))
    codes = loaded.encode(images)  # (256, 4, 4, 1) int64
    assert torch.equal(codes, trained.encode(images))
    with torch.no_grad():
        error = F.mse_loss(loaded.decode(codes, (16, 16)), images).item()
    psnr = 10 * math.log10(4 / error)
    used = len(codes.unique())
    print(f"{loaded.bits:.1f} bits per position, {used} codes used, PSNR {psnr:.2f} dB; saved in {folder}")
    return psnr


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/own-quantizer"))
    given = parser.parse_args()
    main(given.steps, given.out)
