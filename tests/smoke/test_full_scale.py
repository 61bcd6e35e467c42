"""The full-scale recipes are what was published: networks, grid, vocabulary and objective, built without memory."""

from __future__ import annotations

from importlib import resources
from typing import NamedTuple

import pytest
import torch
from torch import nn

from latticode.engine import load_config
from latticode.engine.config import complete, recipe_names
from latticode.registry import build, check


class Published(NamedTuple):
    """Codes at the positions of the (coarsest) grid and, where known, the parameters of both networks.

    Parameters are summed over the published checkpoint's or, for HQ-VAE, SimVQ and DALL-E's decoder, over the layers of
    the authors' code. `within` is the greatest relative difference of ours: 0 where the networks are the same, and
    otherwise due to what the recipe's header says.
    """

    grid: tuple[int, ...]
    vocab: tuple[int, ...]
    encoder: int | None = None
    decoder: int | None = None
    within: tuple[float, float] = (0.0, 0.0)


TABLE = {
    "bsq-imagenet": Published((32, 32), (2**18,), 86_005_266, 88_810_944, (1e-4, 0.04)),
    "dac-44khz": Published((33,), (1024,) * 9, 22_307_968, 54_104_162),
    "dvae-imagenet": Published((32, 32), (8192,), 53_786_240, 43_829_766, (0.1, 0.15)),
    "fsq-imagenet": Published((16, 16), (1000,), 23_775_104, 30_478_339),
    "hqvae-imagenet": Published((8, 8), (8192,) * 5, 35_309_312, 53_953_923, (0.07, 0.0)),
    "magvit2-ucf101": Published((5, 16, 16), (2**18,)),
    "maskgit-vqgan-imagenet": Published((16, 16), (1024,), 23_775_104, 30_478_339),
    "palette-imagenet": Published((32, 32), (512,), 0, 0),
    "rqvae-imagenet": Published((8, 8), (16384,) * 4, 41_101_312, 58_974_595),
    "simvq-imagenet": Published((16, 16), (65536,), 24_282_496, 39_851_907, (0.03, 0.3)),
    "simvq-libritts": Published((75,), (4096,)),
    "vitvqgan-imagenet": Published((32, 32), (8192,)),
    "vqgan-imagenet": Published((16, 16), (16384,), 29_298_176, 42_449_795),
    "vqvae-imagenet": Published((32, 32), (512,)),
    "vqvae2-ffhq": Published((32, 32), (512,) * 21),
    "vqvae2-imagenet": Published((32, 32), (512,) * 5),
}
SIZES = {"image": ("size", "size"), "video": ("frames", "size", "size"), "audio": ("length",)}


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_recipe_that_opens_with_a_published_number_is_in_the_table() -> None:
    folder = resources.files("latticode") / "recipes"
    opening = {name: (folder / f"{name}.yaml").read_text().split("\nabout:")[0] for name in recipe_names()}
    full = {name for name, text in opening.items() if text.startswith("# Published: ")}
    assert full == set(TABLE)
    for name in full:
        assert "Not run by us" in " ".join(opening[name].replace("\n# ", " ").split()), name
        assert f"latticode.cli train {name}" in opening[name] or f"latticode train {name}" in opening[name]


@pytest.mark.parametrize("name", TABLE)
def test_the_recipe_is_as_published(name: str) -> None:
    published = TABLE[name]
    config = complete(load_config(name), classes=1000)
    with torch.device("meta"):
        tokenizer = build(config.model)
        objective = build({**config.objective, "perceptual": None})  # whose weights are files
    assert tokenizer.grid([getattr(config.data, axis) for axis in SIZES[config.data.kind]]) == published.grid
    assert tokenizer.vocab == published.vocab
    networks = (published.encoder, published.decoder), (tokenizer.encoder, tokenizer.decoder)
    for expected, network, within in zip(*networks, published.within, strict=True):
        if expected is not None:
            assert parameters(network) == pytest.approx(expected, rel=within, abs=0)
    check(config.objective)
    assert set(objective.players(tokenizer)) <= {"tokenizer", "critic"}
