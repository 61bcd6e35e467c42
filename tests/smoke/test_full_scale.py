"""The full-scale recipes are what was published: networks, grid, vocabulary and objective, built without memory."""

from __future__ import annotations

from importlib import resources
from typing import NamedTuple

import pytest
import torch
from torch import nn

from latticode.core import registry
from latticode.core.registry import build, check
from latticode.engine import load_config
from latticode.engine.config import complete, read_recipe, recipe_names


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
    "uvim-coco-panoptic": Published((16, 16), (4375,)),
    "uvim-imagenet-colorization": Published((16, 16), (4375,)),
    "uvim-nyu-depth": Published((16, 16), (4375,)),
    "vitvqgan-imagenet": Published((32, 32), (8192,)),
    "vqgan-imagenet": Published((16, 16), (16384,), 29_298_176, 42_449_795),
    "vqvae-imagenet": Published((32, 32), (512,)),
    "vqvae2-ffhq": Published((32, 32), (512,) * 21),
    "vqvae2-imagenet": Published((32, 32), (512,) * 5),
}


class PublishedPrior(NamedTuple):
    """The tokenizer's recipe and the parameters, over ImageNet's 1,000 classes unless the recipe says otherwise, and
    `within` as above.

    Of HQ-Transformer and UViM they are summed over the layers of the authors' code; of the others they are the paper's
    millions and one table of codes, as the recipe's header says.
    """

    tokenizer: str
    parameters: float
    within: float


PRIORS = {
    "dalle-imagetext": PublishedPrior("dvae-imagenet", 12e9, 0.03),
    "igpt-s-imagenet": PublishedPrior("palette-imagenet", 76e6, 0.01),
    "maskgit-imagenet": PublishedPrior("maskgit-vqgan-imagenet", 174e6, 0.01),  # of a port of the authors' code
    "maskgit-magvit2-ucf101": PublishedPrior("magvit2-ucf101", 307e6, 0.01),
    "mage-imagenet": PublishedPrior("maskgit-vqgan-imagenet", 176e6 - 30_478_339, 0.01),  # theirs with the decoder's
    "muse-cc3m": PublishedPrior("vqvae2-imagenet", 632e6 + 268e6 + 27.3e6, 0.01),  # and the reader's
    "rqtransformer-imagenet": PublishedPrior("rqvae-imagenet", 480e6 + 16384 * 1536, 0.005),
    "contextual-rq-imagenet": PublishedPrior("rqvae-imagenet", 821e6 + 16384 * 1536, 0.005),
    "hqtransformer-imagenet": PublishedPrior("hqvae-imagenet", 530.7e6, 0.05),
}
VIT_L = 304.3e6
GUIDE = VIT_L + 24 * 16 * 1024**2 + 2 * 4375 * 1024  # blocks with attention to themselves and to the image, and tables
PRIORS |= {
    f"{name}-guide": PublishedPrior(name, GUIDE, 0.01)
    for name in ("uvim-coco-panoptic", "uvim-imagenet-colorization", "uvim-nyu-depth")
}
SIZES = {
    "image": ("size", "size"),
    "dense": ("size", "size"),
    "video": ("frames", "size", "size"),
    "audio": ("length",),
}


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_recipe_that_opens_with_a_published_number_is_in_the_table() -> None:
    folder = resources.files("latticode") / "recipes"
    opening = {name: (folder / f"{name}.yaml").read_text().split("\nabout:")[0] for name in recipe_names()}
    full = {name for name, text in opening.items() if text.startswith("# Published: ")}
    assert full == set(TABLE) | set(PRIORS)
    for name in full:
        assert "Not run by us" in " ".join(opening[name].replace("\n# ", " ").split()), name
        assert f"latticode.cli train {name}" in opening[name] or f"latticode train {name}" in opening[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_the_recipe_is_as_published(name: str) -> None:
    published = TABLE[name]
    config = complete(load_config(name), classes=1000)
    with torch.device("meta"):
        tokenizer = build(config.model)
        objective = build({key: spec for key, spec in config.objective.items() if key != "perceptual"})  # a file
    assert tokenizer.grid([getattr(config.data, axis) for axis in SIZES[config.data.kind]]) == published.grid
    assert tokenizer.vocab == published.vocab
    parts = [getattr(tokenizer, part, nn.Identity()) for part in ("encoder", "decoder")]
    networks = (published.encoder, published.decoder), parts
    for expected, network, within in zip(*networks, published.within, strict=True):
        if expected is not None:
            assert parameters(network) == pytest.approx(expected, rel=within, abs=0)
    check(config.objective)
    assert set(objective.players(tokenizer)) <= {"tokenizer", "discriminator"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
def test_the_prior_is_as_published(name: str) -> None:
    published, recipe = PRIORS[name], read_recipe(name)
    codes = TABLE[published.tokenizer]
    given = {"vocab": codes.vocab, "grid": codes.grid, "classes": 1000}
    with torch.device("meta"):
        known = registry.parameters_of(registry.resolve(recipe["prior"]["type"]))
        own = recipe["prior"].get("digits") == "own"
        more = {"digits": build(read_recipe(published.tokenizer)["tokenizer"]).radix} if own else {}
        prior = build({**{key: given[key] for key in given if key in known}, **recipe["prior"], **more})
    assert parameters(prior) == pytest.approx(published.parameters, rel=published.within)
    check(recipe["objective"])
