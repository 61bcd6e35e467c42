"""The second stage of UViM (arXiv 2205.10337): a prior of the guiding code, conditioned on the image alone.

B batch, S states of the image, C their width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from latticode.core.modules import described
from latticode.core.types import Conditioning
from latticode.priors.base import Condition, check_rates
from latticode.priors.gpt import GPT
from latticode.priors.symbols import Sequential


class Guide(GPT):
    """`GPT` whose blocks attend to what an encoder makes of an image. Logits start at zero.

    Args:
        vocab: the number of codes of each of the K code slots.
        grid: positions along each axis.
        encoder: images (B, 3, H, W) in [-1, 1] to (B, latent, h, w), any of the library, with the attributes
            `in_channels` and `latent`.
        width, depth, heads, mlp, style, digits, inner_depth, shared: of the decoder, as for `GPT`; the paper's and its
            encoder's are ViT-L's, 1024, 24 and 16.
        dropout: on the embeddings of codes and on each branch; the paper had none.
        image_dropout: probability that training drops the image, for classifier-free guidance and samples without one.
            With 0 there has to be an image always.

    Examples:
        >>> import torch
        >>> from latticode import Conditioning
        >>> from latticode.autoencoders.vit import ViTEncoder
        >>> encoder = ViTEncoder(latent=16, patch=8, width=32, depth=1, heads=2, side=4)
        >>> prior = Guide([64], [4, 4], encoder, width=32, depth=2, heads=4)
        >>> cond = Conditioning(images=torch.rand(2, 3, 32, 32) * 2 - 1)
        >>> prior.sample(2, cond, seed=1).shape
        torch.Size([2, 4, 4, 1])
    """

    sees = True

    def __init__(
        self,
        vocab: Sequence[int],
        grid: Sequence[int],
        encoder: nn.Module,
        width: int = 256,
        depth: int = 6,
        heads: int = 8,
        mlp: float = 4.0,
        dropout: float = 0.0,
        image_dropout: float = 0.0,
        style: str = "gpt",
        digits: Sequence[int] | None = None,
        inner_depth: int = 0,
        shared: bool = False,
    ) -> None:
        if encoder.in_channels != 3:
            raise ValueError(f"encoder must take images of 3 channels, got in_channels={encoder.in_channels}")
        check_rates(image_dropout=image_dropout)
        self.attends = int(encoder.latent)  # type: ignore[arg-type]
        super().__init__(
            vocab,
            grid,
            width=width,
            depth=depth,
            heads=heads,
            mlp=mlp,
            dropout=dropout,
            label_dropout=image_dropout,
            style=style,
            digits=digits,
            inner_depth=inner_depth,
            shared=shared,
        )
        self.encoder, self.image_dropout = encoder, image_dropout
        self.nothing = nn.Parameter(torch.randn(self.attends)) if image_dropout else None  # in place of each state
        for layer in [*self.head.heads] if isinstance(self.head, Sequential) else [self.head.head]:
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]

    def check_condition(self, cond: Conditioning | None, count: int) -> Condition:
        """As `Prior.check_condition`. Raises ValueError also for images of another number, shape or type, and for none
        if training always showed one."""
        condition = super().check_condition(cond, count)
        images = condition.images
        if images is None:
            if self.nothing is None:
                raise ValueError(f"the prior needs an image for each of {count} codes: image_dropout is 0, got none")
            return condition
        if images.shape[:2] != (count, 3) or images.ndim != 4 or not images.is_floating_point():
            raise ValueError(f"expected float images ({count}, 3, H, W), one for each code, got {described(images)}")
        return condition._replace(images=images.to(self.device))

    def states(self, condition: Condition) -> Tensor:
        """What the blocks attend to (B, S, C), `nothing` where the image is dropped or where there are none."""
        rows = len(condition.labels)
        if condition.images is None:
            assert self.nothing is not None
            return self.nothing.expand(rows, 1, -1)
        states_BSC = self.encoder(condition.images).flatten(2).mT
        if condition.dropped is None or self.nothing is None:
            return states_BSC
        states_BSC = states_BSC.repeat(rows // max(len(states_BSC), 1), 1, 1)
        return torch.where(condition.dropped[:, None, None], self.nothing, states_BSC)

    def branches(self, condition: Condition, guidance: float) -> Condition:
        return condition if self.nothing is None else condition.branches(guidance)
