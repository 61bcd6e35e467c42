"""Residual quantization: each stage quantizes what the ones before it have left (RQ-VAE, arXiv 2203.01941)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode.core.derived import constant
from latticode.core.types import Quantized, Softened
from latticode.kernels import Lattice, to_lattices
from latticode.kernels.stages import fits, joint_latents
from latticode.quantizers.base import Quantizer, Step, Tokens, contractions, pooled
from latticode.quantizers.fsq import FSQ
from latticode.quantizers.gradients import straight_through
from latticode.quantizers.implicit import Contextual
from latticode.quantizers.vq import Softening


class Residual(Softening):
    """The sum of what several stages give: stage i sees r_i, with r_0 = z and r_{i+1} = r_i - q_i.

    A stage with a fixed grid sees r_i / s_i and gives s_i times its latents; s_i fits what is left to the stage's
    `reach`. With L levels on [-1, 1] in every stage s_i = L^-i, and n stages are one even grid of L^n levels that
    serves +- L / (L-1) with errors up to L^(1-n) / (L-1); signs have s_i = 2^-i. (The scale (L-1)^-i that is asked for
    in issue 96 of vector-quantize-pytorch wastes half of both end cells, leaves (L-1)^-n, and refines nothing for
    L = 2.) Codebooks find their own scale, so for them alone s = 1. For FSQ stages take bound "clamp": a tanh would
    change the residual, not bound it.

    Codes stand stage after stage. `decode` takes the first slots of whole stages as well, and codes of -1 in later
    stages: from the first stage without codes on, a token is not refined.

    Gradient. r_{i+1} = r_i - q_i is differentiated as it stands, so with J_i the derivative that stage i passes the
    latents have 1 - prod (1 - J_i): exactly one identity for straight-through stages, not one of each stage as where
    the residual is detached. (Of the stages' own parameters in the latents, those of an earlier stage get only what
    later ones do not undo: with straight-through stages behind it, nothing. Codebooks learn from averages or losses.)
    Losses would see a z without gradient behind a straight-through stage; to them, each stage's input has the
    derivative 1 in z: |z - sg(q_0 + .. + q_i)|^2, as in RQ-VAE. They are the means over tokens and stages, in the
    units of the stage: each counts alike, however fine it is.

    One FSQ with bound "clamp" for all stages is one even grid: all digits of a token are found together, but for
    training with dropout. Stage by stage they are the same within rounding at the edges of cells.

    Args:
        stages: one quantizer for each stage, all of one `dim`; or a single one, used `depth` times: it is initialized
            at its first use only, and learns from the tokens of all stages in one update (RQ-VAE's shared codebook).
        depth: the number of stages, for a single quantizer only.
        dropout: in training, each sample along the first axis (for z (N, D) each token) keeps with this probability
            only its first n stages, n uniform in 1 .. depth-1. Of the others its codes are -1, and they add nothing to
            latents, losses and statistics.
        soft_clamp: first bound z to c tanh(z / c), with c the `reach` of the first stage, which needs a fixed grid.
            Decoded latents are then near the bounded z.

    Raises:
        ValueError: for arguments outside the above.

    Examples:
        >>> from latticode import VQ
        >>> quantizer = Residual([VQ(64, 8), VQ(64, 8), VQ(64, 8)])
        >>> out = quantizer(torch.randn(100, 8))
        >>> out.codes.shape
        torch.Size([100, 3])
        >>> quantizer.decode(out.codes[:, :2]).shape  # from the first two stages
        torch.Size([100, 8])
    """

    def __init__(
        self,
        stages: Sequence[Quantizer] | Quantizer,
        depth: int | None = None,
        *,
        dropout: float = 0.0,
        soft_clamp: bool = False,
    ):
        super().__init__()
        self.stages = held(stages, depth, "stages", "depth")
        self.depth, self.dropout, self.soft_clamp = depth, dropout, soft_clamp
        first, *others = sequence = self._sequence
        if any(stage.dim != first.dim for stage in others):
            raise ValueError(f"all stages need one dim, got {[stage.dim for stage in sequence]}")
        if not 0 <= dropout <= 1 or (dropout > 0 and not others):
            raise ValueError(f"dropout must be in [0, 1], and 0 for a single stage, got {dropout}")
        self.dim, self.vocab = first.dim, tuple(size for stage in sequence for size in stage.vocab)
        scales, left = units(sequence)
        if soft_clamp and math.inf in first.reach:
            raise ValueError("soft_clamp needs a first stage with a fixed grid, one whose contraction is below 1")
        self._table = scales
        # Clamped values are not near z, so what is left of z has no bound.
        share = [width / reach if reach < math.inf else 1.0 for width, reach in zip(left, first.reach, strict=True)]
        self.contraction = 1.0 if soft_clamp else share

    @property
    def reach(self) -> list[float]:
        return [math.inf] * self.dim if self.soft_clamp else self._sequence[0].reach

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantize `z` (..., D) with gradients; `mask` (...) bool is False at padding."""
        lattice = self._joint
        if lattice is None or self.soft_clamp or self._drops:  # bounded, an infinity would look like a number
            return super().forward(z, mask)
        self._check_latents(z, mask)
        latents, codes = to_lattices(z, lattice, len(self._prefixes))
        if mask is not None:
            gone = ~mask[..., None]
            latents, codes = latents.masked_fill(gone, 0.0), codes.masked_fill(gone, -1)
        return Quantized(latents, codes)

    def _quantize(self, tokens: Tokens) -> Step:
        if (lattice := self._joint) is not None and not self._drops:
            return Step(*to_lattices(self._bound(tokens.values), lattice, len(self._prefixes)))
        tokens = tokens.through(self._bound)
        kept = self._draw(tokens.keep) if self._drops else None
        residual, total, steps, codes = tokens.values, None, [], []
        for i, stage in enumerate(self._sequence):
            values, context = self._down(residual, i), self._context(stage, total, i)
            alive = None if kept is None or i == 0 else kept > i
            keep = tokens.keep if alive is None else tokens.keep & alive
            upkeep = tokens.upkeep and (i == 0 or self.depth is None)
            target = straight_through(tokens.target, values)  # what the losses see: with the gradient of z
            step = stage._quantize(Tokens(values, keep, target, upkeep, *context))
            latents, chosen = self._up(step.latents, i), step.codes
            if alive is not None:
                latents = torch.where(alive[..., None], latents, 0.0)
                chosen = torch.where(alive[..., None], chosen, -1)
            residual = residual - latents
            total = latents if total is None else total + latents
            steps.append(step)
            codes.append(chosen)
        assert total is not None
        updates = [update for step in steps for update in step.updates]
        return Step(total, torch.cat(codes, dim=-1), pooled([step.losses for step in steps]), updates)

    def _encode(self, x: Tensor) -> Tensor:
        if (lattice := self._joint) is not None:
            return to_lattices(self._bound(x), lattice, len(self._prefixes))[1]
        sequence = self._sequence
        residual, total, codes = self._bound(x), None, []
        for i, stage in enumerate(sequence):
            values, context = self._down(residual, i), self._context(stage, total, i)
            codes.append(stage._encode(values, *context))
            if i + 1 < len(sequence):
                latents = self._up(stage._decode(codes[-1], *context), i)
                residual = residual - latents
                total = latents if total is None else total + latents
        return torch.cat(codes, dim=-1)

    def inner(self, z: Tensor, codes: Tensor) -> Iterator[tuple[str, Quantizer, Tensor, Tensor]]:
        bounded, slot = self._bound(z), 0
        for i, stage in enumerate(self._sequence):
            left = bounded if slot == 0 else bounded - self.decode(codes[..., :slot])
            chosen = codes[..., slot : slot + len(stage.vocab)]
            yield item("stages", i, self.depth), stage, self._down(left, i), chosen
            slot += len(stage.vocab)

    def _soften(self, x: Tensor, temperature: float) -> Softened:
        residual, drawn = x, []
        for i, stage in enumerate(self._sequence):
            if not isinstance(stage, Softening):
                name = type(stage).__name__
                raise ValueError(f"codes are drawn by their distance, so stages need a codebook; stage {i} is {name}")
            drawn.append(stage._soften(residual, temperature))
            residual = residual - stage._decode(drawn[-1].codes)
        most = max(p.shape[-1] for _, p in drawn)
        padded = [F.pad(p, (0, most - p.shape[-1])) for _, p in drawn]
        return Softened(torch.cat([codes for codes, _ in drawn], dim=-1), torch.cat(padded, dim=-2))

    def _decode(self, codes: Tensor) -> Tensor:
        if (lattice := self._joint) is not None:
            return self._decode_joint(codes, lattice)
        first, *others = self._sequence
        start = len(first.vocab)
        total = self._up(first._decode(codes[..., :start]), 0)
        alive = torch.ones_like(codes[..., 0], dtype=torch.bool)
        for i, stage in enumerate(others, 1):
            chunk = codes[..., start : start + len(stage.vocab)]
            start += len(stage.vocab)
            if chunk.shape[-1] == 0:
                break
            alive = alive & stage._present(chunk)
            chunk = torch.where(alive[..., None], chunk, 0)
            latents = self._up(stage._decode(chunk, *self._context(stage, total, i)), i)
            total = total + torch.where(alive[..., None], latents, 0.0)
        return total

    def _decode_joint(self, codes: Tensor, lattice: Lattice) -> Tensor:
        assert isinstance(self.stages, FSQ)
        by_stage = codes.unflatten(-1, (-1, lattice.factors))  # (..., stages, factors)
        absent = (by_stage < 0).any(dim=-1).cumsum(dim=-1) > 0
        digits = self.stages._digits(by_stage.clamp(min=0))  # pyright: ignore[reportPrivateUsage]
        middle = constant([level - 1 for level in lattice.levels], torch.int64, codes.device)
        places = (2 * digits - middle).masked_fill(absent[..., None], 0)
        missing = len(self._prefixes) - places.shape[-2]
        return joint_latents(F.pad(places, (0, 0, 0, missing)), lattice)

    @property
    def _joint(self) -> Lattice | None:
        """The lattice that all stages share, where they can be done at once."""
        stage = self.stages
        if not isinstance(stage, FSQ) or stage.noise or stage.feedback or self._arithmetic != torch.float32:
            return None
        lattice = stage._lattice  # pyright: ignore[reportPrivateUsage]
        return lattice if fits(lattice) else None

    @property
    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    @property
    def _sequence(self) -> list[Quantizer]:
        return listed(self.stages, self.depth)

    @property
    def _prefixes(self) -> list[int]:
        found, start = [], 0
        for stage in self._sequence:
            found += [start + slots for slots in stage._prefixes]
            start += len(stage.vocab)
        return found

    @property
    def _lowest(self) -> list[int]:
        first = self._sequence[0]._lowest
        return first + [-1] * (len(self.vocab) - len(first))

    def _context(self, stage: Quantizer, total: Tensor | None, i: int) -> tuple[Tensor, ...]:
        """What `stage` needs beside its tokens or codes."""
        return (self._down(total, i),) if total is not None and isinstance(stage, Contextual) else ()

    def _draw(self, keep: Tensor) -> Tensor:
        """The number of stages that each sample keeps, to be compared with tensors of the shape of `keep` (...)."""
        rows, depth = keep.shape[:1], len(self._sequence)
        short = torch.rand(rows, device=keep.device) < self.dropout
        kept = torch.where(short, torch.randint(1, depth, rows, device=keep.device), depth)
        return kept.view(rows + (1,) * (keep.ndim - 1))

    def _bound(self, z: Tensor) -> Tensor:
        if not self.soft_clamp:
            return z
        limit = constant(self._sequence[0].reach, self._arithmetic, z.device)
        return limit * torch.tanh(z / limit)

    def _down(self, x: Tensor, i: int) -> Tensor:
        """`x` (..., D) in the units of stage i."""
        return x / self._scale(i, x.device) if self._is_scaled(i) else x

    def _up(self, x: Tensor, i: int) -> Tensor:
        return x * self._scale(i, x.device) if self._is_scaled(i) else x

    def _scale(self, i: int, device: torch.device) -> Tensor:
        """(D,), never in half precision, which would move the grids."""
        return constant(self._table[i], self._arithmetic, device)

    def _is_scaled(self, i: int) -> bool:
        return any(scale != 1 for scale in self._table[i])

    def extra_repr(self) -> str:
        return f"depth={self.depth}, dropout={self.dropout}, soft_clamp={self.soft_clamp}"


def units(stages: Sequence[Quantizer]) -> tuple[list[list[float]], list[float]]:
    """The scale of each stage, channel by channel, and half the width of what all of them leave; inf: not known.

    The first stage with a fixed grid stands at scale 1 and says how wide the latents are.
    """
    width, found = [math.inf] * stages[0].dim, []
    for stage in stages:
        width = [reach if w == math.inf else w for w, reach in zip(width, stage.reach, strict=True)]
        found.append([_unit(w, reach) for w, reach in zip(width, stage.reach, strict=True)])
        width = [w * share for w, share in zip(width, contractions(stage), strict=True)]
    return found, width


def _unit(width: float, reach: float) -> float:
    """The scale at which latents of that half width fill the reach of a stage, or [-1, 1] if it adapts."""
    if width == math.inf:
        return 1.0
    return width if reach == math.inf else width / reach


def held(parts: Sequence[Quantizer] | Quantizer, times: int | None, name: str, count: str) -> nn.ModuleList | Quantizer:
    """`parts`, argument `name` of a module, as it can hold it: a list, or a single one that is used `times` times.

    Raises ValueError for an empty list, one quantizer twice in it, or a `times`, argument `count`, that does not fit.
    """
    if isinstance(parts, Quantizer):
        if times is None or times < 1:
            raise ValueError(f"a single quantizer needs {count} >= 1, got {times}")
        return parts
    if times is not None:
        raise ValueError(f"{count} is for a single quantizer; {name} has {len(parts)}, got {count}={times}")
    if not parts:
        raise ValueError(f"{name} must hold at least one quantizer, got none")
    if len({id(part) for part in parts}) < len(parts):
        raise ValueError(f"{name} holds one quantizer twice; to share it, give it alone with {count}")
    return nn.ModuleList(parts)


def item(name: str, i: int, times: int | None) -> str:
    """The place of the i-th of the quantizers `name`, of one that is used `times` that of a slot."""
    return f"{name}[{i}]" if times is None else f"{name} slot {i}"


def listed(parts: nn.ModuleList | Quantizer, times: int | None) -> list[Quantizer]:
    """One quantizer for each use, of what `held` gave."""
    return [parts] * (times or 0) if isinstance(parts, Quantizer) else list(parts)  # type: ignore[return-value]
