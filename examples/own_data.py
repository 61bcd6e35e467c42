"""Training on a Dataset of one's own with the engine: recipe, checkpoints, pictures, metrics, and exact resuming.

    python examples/own_data.py --steps 300
    python examples/own_data.py --steps 600 --resume

The Dataset draws its augmentation from the usual global generators; the engine seeds them for each example, so that an
interrupted run goes on as if nothing had been. A DataLoader works as well as a Dataset.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

import latticode
from latticode.engine import load_config, train


class Stripes(Dataset[tuple[Tensor, int]]):
    """Pictures (1, 16, 16) in [-1, 1] of stripes at one of four angles, which is their label, and of a random phase."""

    classes = ("-", "/", "|", "\\")

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = index % 4
        angle, phase = torch.tensor(label * torch.pi / 4), torch.rand(()) * 2 * torch.pi
        line = torch.arange(16.0)
        across = angle.cos() * line[:, None] + angle.sin() * line
        return torch.sin(across + phase)[None], label


def main(steps: int, folder: Path, resume: bool = False) -> Path:
    """Train, or go on; returns the run folder."""
    config = load_config(
        "fsq-tokenizer",
        [
            "about=A tokenizer of stripes",
            # the program gives the data; "stripes" is for people to read
            "data={source: given:stripes, size: 16, channels: 1, workers: 0}",
            "tokenizer.encoder={type: residual_encoder, latent: 16, hidden: 16, blocks: 1, stride: 4}",
            "tokenizer.decoder={type: residual_decoder, latent: 16, hidden: 16, blocks: 1, stride: 4}",
            "tokenizer.quantizer.levels=[5, 5, 5]",
            "batch_size=16",
            f"steps={steps}",
            "save_every=100",
        ],
    )
    run = train(config, folder, data=Stripes(256), held_out=Stripes(32), resume=resume)
    images = torch.stack([Stripes(4)[i][0] for i in range(4)])
    print(f"codes {tuple(latticode.load(run).encode(images).shape)} of images {tuple(images.shape)}; run in {run}")
    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/own-data"))
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    main(given.steps, given.out, given.resume)
