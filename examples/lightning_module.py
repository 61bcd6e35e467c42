"""The same tokenizer in Lightning (`pip install lightning`, which latticode does not need).

    python examples/lightning_module.py --steps 300

A `Tokenizer` is an ordinary module, so that the LightningModule around it is short. Ranks need nothing either: losses
and codebooks are pooled over them by the quantizers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L  # pyright: ignore[reportMissingImports]
import torch
import torch.nn.functional as F
from own_quantizer import PatchDecoder, PatchEncoder, Ternary, disks
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import latticode


class TokenizerModule(L.LightningModule):
    """A tokenizer, its weighted losses and its optimizer."""

    def __init__(self, tokenizer: latticode.Tokenizer, weights: dict[str, float], lr: float = 3e-3):
        super().__init__()
        self.tokenizer, self.weights, self.lr = tokenizer, weights, lr

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (images,) = batch
        result = self.tokenizer(images)
        terms = {"mse": F.mse_loss(result.output, images), **result.losses}
        self.log_dict(terms)
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        (images,) = batch
        self.log("val/mse", F.mse_loss(self.tokenizer(images).output, images))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main(steps: int, folder: Path) -> None:
    """Train and save with `save_pretrained`, so that `latticode.load` and the command line read it."""
    L.seed_everything(0)
    tokenizer = latticode.Tokenizer(PatchEncoder(), Ternary(6), PatchDecoder())
    module = TokenizerModule(tokenizer, {"mse": 1.0, "commitment": 0.25})
    trainer = L.Trainer(max_steps=steps, logger=False, enable_checkpointing=False, default_root_dir=folder)
    training = DataLoader(TensorDataset(disks(1024)), batch_size=64, shuffle=True)
    trainer.fit(module, training, DataLoader(TensorDataset(disks(128)), batch_size=64))
    print(f"saved in {tokenizer.eval().save_pretrained(folder)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    given = parser.parse_args()
    main(given.steps, given.out)
