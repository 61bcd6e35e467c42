"""A residual stage whose codebook depends on what earlier stages have made of the token (QINCo, arXiv 2401.14732)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from latticode.core.modes import exporting
from latticode.kernels import nearest_code
from latticode.quantizers.base import Quantizer, Step, Tokens, Update, token_mean
from latticode.quantizers.codebook import Codebook
from latticode.quantizers.gradients import straight_through

DECAY = 0.99  # of the running counts that tell dead codes
TILE = 2**22  # numbers in one layer's activations during the search: 16 MiB


class Contextual(Quantizer):
    """A quantizer whose codes mean something else for each `context` (..., D), the sum of what earlier stages gave.

    `Residual` passes it; `Tokens.context` holds it in `_quantize`. Without one it is a quantizer like the others.

    Examples:
        >>> from latticode.quantizers import VQ, Residual
        >>> stages = Residual([VQ(8, 2), QINCo(8, 2, width=4)]).eval()
        >>> isinstance(stages.stages[1], Contextual), stages(torch.randn(5, 2)).codes.shape
        (True, torch.Size([5, 2]))
    """

    @abstractmethod
    def _encode(self, x: Tensor, context: Tensor | None = None) -> Tensor: ...

    @abstractmethod
    def _decode(self, codes: Tensor, context: Tensor | None = None) -> Tensor: ...


class QINCo(Contextual):
    """A codebook of `size` vectors c_k of width `dim` that a network adapts to each token's context x.

    c'_k = y_B with y_0 = c_k + P [c_k, x] and y_{b+1} = y_b + V_b relu(U_b y_b): P maps 2 D channels to D, U_b D to
    `width` and V_b back. All starts as the plain codebook: P and V_b are 0. Alone, or as the first stage of
    a `Residual`, there is no context and the codebook is plain, as in the paper; the network then gets gradients of 0,
    so a first stage is better a `VQ` with update "gradient".

    Losses, unweighted: `commitment`, mean (z - sg(c'))^2, and `codebook`, mean (c' - sg(z))^2, weighed 1, the loss of
    the paper. The gradient passes straight through to the latents; the context counts as constant.

    Every token has its own codebook, so a search takes O(N K (D + B width) D) time; it goes tile by tile in O(N + K)
    memory, and only the chosen code is computed with gradients.

    Args:
        size: K, the number of codes.
        dim: D, the width of latents and codes.
        width: of the hidden layers.
        blocks: B, the number of residual blocks.
        kmeans: start from k-means over the first training batch; else from N(0, 1).
        restart: as for `VQ`.

    Raises:
        ValueError: for arguments outside the above.

    Examples:
        >>> from latticode import VQ, Residual
        >>> quantizer = Residual([VQ(16, 4, update="gradient"), QINCo(16, 4, width=8), QINCo(16, 4, width=8)])
        >>> out = quantizer(torch.randn(100, 4))
        >>> loss = out.losses["codebook"] + 0.25 * out.losses["commitment"]
        >>> out.codes.shape
        torch.Size([100, 3])
    """

    def __init__(
        self, size: int, dim: int, *, width: int = 256, blocks: int = 2, kmeans: bool = True, restart: float = 0.1
    ):
        super().__init__()
        if size < 1 or dim < 1 or width < 1 or blocks < 0:
            raise ValueError(f"size, dim, width must be >= 1 and blocks >= 0, got {size}, {dim}, {width}, {blocks}")
        if not 0 <= restart < 1:
            raise ValueError(f"restart is a fraction of the mean count and must be in [0, 1), got {restart}")
        self.size, self.dim, self.vocab = size, dim, (size,)
        self.width, self.blocks, self.kmeans, self.restart = width, blocks, kmeans, restart
        self.embedding = Codebook(
            size, dim, learned=True, unit=False, decay=DECAY, kmeans=kmeans, upkeep="restart", restart=restart
        )
        self.concat = nn.Linear(2 * dim, dim)
        self.expand = nn.ModuleList(nn.Linear(dim, width, bias=False) for _ in range(blocks))
        self.contract = nn.ModuleList(nn.Linear(width, dim, bias=False) for _ in range(blocks))
        for last in (self.concat, *self.contract):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def _quantize(self, tokens: Tokens) -> Step:
        x, target, keep = tokens.values, tokens.target, tokens.keep
        context = None if tokens.context is None else tokens.context.detach()
        if tokens.upkeep:
            self.embedding.upkeep(x, keep)
        codes = self._encode(x, context)
        q = self._decode(codes, context)
        codebook = q + self._unused() if context is None and self.training else q
        losses = {
            "commitment": token_mean((target - q.detach()).square(), keep),
            "codebook": token_mean((codebook - target.detach()).square(), keep),
        }
        return Step(straight_through(x, q), codes, losses, [Update(self.embedding, x, codes, keep)])

    @torch.no_grad()
    def _encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        flat, vectors = x.reshape(-1, self.dim), self.embedding.vectors()
        if context is None:
            codes = nearest_code(flat, vectors)
        else:
            search = _nearest if exporting() else _search  # no other runtime knows our operator
            codes = search(flat, context.reshape(-1, self.dim), vectors, self._network())
        return codes.view(*x.shape[:-1], 1)

    def _decode(self, codes: Tensor, context: Tensor | None = None) -> Tensor:
        vectors = F.embedding(codes[..., 0], self.embedding.vectors())
        if context is None:
            return vectors
        # One layout, however the tokens came: a matrix product rounds by it.
        rows = context.reshape(-1, self.dim).contiguous()
        return adapted(vectors.reshape(-1, self.dim), rows, self._network()).view(vectors.shape)

    def _unused(self) -> Tensor:
        """0, with a gradient of 0 for the network: DDP waits for one of every parameter."""
        return 0 * torch.stack([weight.sum() for weight in self._network()]).sum()

    def _network(self) -> list[Tensor]:
        """The weights in the order of `adapted`, in float32 at least."""
        blocks = [layer for pair in zip(self.expand, self.contract, strict=True) for layer in pair]
        weights = [parameter for layer in (self.concat, *blocks) for parameter in layer.parameters()]
        return [weight.to(self._arithmetic) for weight in weights]

    def extra_repr(self) -> str:
        names = ("size", "dim", "width", "blocks", "kmeans", "restart")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def adapted(vectors: Tensor, context: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The codes c' of `vectors` (..., D) in `context` (..., D), which broadcast.

    `weights` are P, its bias, U_0, V_0, U_1, ..
    """
    project, bias, *blocks = weights
    of_code, of_context = project.chunk(2, dim=1)  # P [c, x] = P_c c + P_x x: no pair is laid out
    y = vectors + F.linear(vectors, of_code) + F.linear(context, of_context, bias)
    for expand, contract in zip(blocks[::2], blocks[1::2], strict=True):
        y = y + F.linear(F.relu(F.linear(y, expand)), contract)
    return y


def _nearest(x: Tensor, context: Tensor, vectors: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """`_search` in one piece, in O(N K width) memory."""
    codes = adapted(vectors, context[:, None], weights)  # (N, K, D)
    return (codes - x[:, None]).square().sum(dim=-1).argmin(dim=-1)


@library.custom_op("latticode::adapted_nearest_code", mutates_args=())
def _search(x: Tensor, context: Tensor, vectors: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """For each row of `x` (N, D) the nearest of `vectors` (K, D), adapted to its row of `context` (N, D): (N,) int64.

    One opaque operator to torch.compile, which would unroll the tiles.
    """
    widest = max(len(weight) for weight in weights)
    rows = max(TILE // (len(vectors) * widest), 1)
    nearest = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for start in range(0, len(x), rows):
        tile = slice(start, start + rows)
        nearest[tile] = _nearest(x[tile], context[tile], vectors, weights)
    return nearest


@library.register_vmap("latticode::adapted_nearest_code")  # pyright: ignore[reportOptionalCall]
def _(info: Any, in_dims: Any, x: Tensor, context: Tensor, vectors: Tensor, weights: Sequence[Tensor]) -> Any:
    if any(dim is not None for dim in (in_dims[2], *in_dims[3])):
        raise NotImplementedError("vmap of QINCo takes many batches of tokens, not many networks")
    rows = [
        one.expand(info.batch_size, *one.shape) if dim is None else one.movedim(dim, 0)
        for one, dim in zip((x, context), in_dims, strict=False)
    ]
    codes = _search(*(one.flatten(0, 1) for one in rows), vectors, weights)
    return codes.view(rows[0].shape[:2]), 0


@library.register_fake("latticode::adapted_nearest_code")
def _(x: Tensor, context: Tensor, vectors: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)
