"""One function per hot operation, with one dispatch: `reference` is the specification, `fast` what runs.

`portable` is `fast` without what was compiled at installation (`native`): what runs where there was no compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, library

from latticode.core import modes
from latticode.kernels import entropies, lattice, native, nearest, reference, stages, tiles, traced, vocabulary
from latticode.kernels.grid import Lattice
from latticode.kernels.lattice import alike, empty_like

_COMPILED = native.available()
_NEAREST = {
    "fast": (native if _COMPILED else nearest).nearest_code,
    "portable": nearest.nearest_code,
    "reference": reference.nearest_code,
}
_ENTROPIES = {"fast": entropies, "portable": entropies, "reference": reference}
_LATTICE = {"fast": native if _COMPILED else lattice, "portable": lattice, "reference": reference}
_STAGES = {"fast": native if _COMPILED else stages, "portable": stages, "reference": reference}
_active = "fast"


@contextmanager
def use(name: str) -> Generator[None, None, None]:
    """Run the kernels of `name`, "fast", "portable" or "reference", inside the block; the whole process is switched."""
    global _active
    if name not in _NEAREST:
        raise ValueError(f"kernels must be one of {', '.join(_NEAREST)}, got {name!r}")
    previous, _active = _active, name
    try:
        yield
    finally:
        _active = previous


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """For each row of `x` (N, d) the row of `codebook` (K, d) at the least Euclidean distance: (N,) int64.

    The answer is that of float64, and one of the codes that tie in float64. Half precision is widened, autocast has no
    effect, and no gradient flows. A row that is not finite gets some code in 0 .. K-1. One opaque operator to
    torch.compile; torch.export and ONNX get plain operators instead, which decide in float32.

    Raises:
        ValueError: for other ranks, different widths, an empty codebook or integers.
    """
    fits = x.ndim == codebook.ndim == 2 and x.shape[1] == codebook.shape[1] > 0 and len(codebook) > 0
    if not fits or not x.is_floating_point() or not codebook.is_floating_point():
        raise ValueError(
            "nearest_code expects float x (N, d) and codebook (K, d) with K, d >= 1, "
            f"got {tuple(x.shape)} {x.dtype} and {tuple(codebook.shape)} {codebook.dtype}"
        )
    if _exporting():
        return tiles.traced(x.detach(), codebook.detach())
    return _nearest_code(x.detach(), codebook.detach())


@library.custom_op("latticode::nearest_code", mutates_args=(), schema="(Tensor x, Tensor codebook) -> Tensor")
def _nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return _NEAREST[_active](x, codebook)


@library.register_vmap("latticode::nearest_code")  # pyright: ignore[reportOptionalCall]
def _(info: Any, in_dims: tuple[int | None, int | None], x: Tensor, codebook: Tensor) -> tuple[Tensor, int]:
    if in_dims[1] is None:
        x = x.movedim(in_dims[0] or 0, 0)
        return _nearest_code(x.flatten(0, 1), codebook).view(x.shape[:2]), 0
    books = codebook.movedim(in_dims[1], 0)
    rows = [x] * len(books) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    return torch.stack([_nearest_code(one, book) for one, book in zip(rows, books, strict=True)]), 0


@library.register_fake("latticode::nearest_code")
def _(x: Tensor, codebook: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


def to_lattice(z: Tensor, lattice: Lattice) -> tuple[Tensor, Tensor]:
    """Finite scalar quantization of `z` (..., d): latents (..., d) and codes (..., factors) int64.

    `grid` has the formulas. Arithmetic is float32 with a correctly rounded tanh, whatever the type of `z` or the
    autocast; on CUDA a digit may be the neighbouring one within about 1e-6 of an edge. Latents have the type and the
    memory layout of `z`: channels first in memory cost nothing. The gradient passes through the bound as if nothing had
    been rounded. A NaN makes all codes of its token -1, stays NaN in its own channel of the latents and gets no
    gradient; infinities saturate. One opaque operator to torch.compile; torch.export and ONNX get plain operators
    instead, with the float32 tanh of their runtime.

    Raises:
        ValueError: if `z` is not (..., d) floats.
    """
    if z.ndim < 1 or z.shape[-1] != len(lattice.levels) or not z.is_floating_point():
        raise ValueError(f"to_lattice expects floats (..., {len(lattice.levels)}), got {tuple(z.shape)} {z.dtype}")
    if _exporting():
        return reference.to_lattice(z, lattice, torch.float32)
    if torch.compiler.is_compiling():
        return _to_lattice(z, list(lattice.levels), lattice.bound, lattice.slope, lattice.factors)
    return _ToLattice.apply(z, lattice)


class _ToLattice(torch.autograd.Function):
    """The operator for eager mode: one with a gradient costs 0.1 ms a call, as much as 10,000 tokens do.

    Where the backward pass is differentiated itself, as in `torch.func`, it is the specification.
    """

    @staticmethod
    def forward(z: Tensor, lattice: Lattice) -> tuple[Tensor, Tensor]:
        with torch.autocast(z.device.type, enabled=False):
            latents, codes = _lattice_kernel("to_lattice", z)(z, lattice)
        return latents if latents.stride() == z.stride() else alike(latents, z), codes.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        z, ctx.lattice = inputs
        ctx.save_for_backward(z)
        ctx.set_materialize_grads(False)  # of the codes
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        (z,) = ctx.saved_tensors
        if gradient is None:
            return None, None
        with torch.autocast(z.device.type, enabled=False):
            if torch.is_grad_enabled():
                return reference.to_lattice_backward(gradient, z, ctx.lattice, _precise(z)), None
            return _lattice_kernel("to_lattice_backward", z)(gradient, z, ctx.lattice), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], *inputs: Any) -> tuple[Any, tuple[int, int]]:
        z, lattice = inputs
        return _ToLattice.apply(z.movedim(in_dims[0], 0), lattice), (0, 0)


_described = functools.lru_cache(maxsize=256)(Lattice)  # checks its arguments, which costs as much as 1000 tokens
_FORMAT = "int[] levels, str bound, float slope, int factors"


@library.custom_op("latticode::to_lattice", mutates_args=(), schema=f"(Tensor z, {_FORMAT}) -> (Tensor, Tensor)")
def _to_lattice(z: Tensor, levels: list[int], bound: str, slope: float, factors: int) -> tuple[Tensor, Tensor]:
    with torch.autocast(z.device.type, enabled=False):
        latents, codes = _lattice_kernel("to_lattice", z)(z, _described(tuple(levels), bound, slope, factors))
    return alike(latents, z), codes.contiguous()


@library.register_fake("latticode::to_lattice")
def _(z: Tensor, levels: list[int], bound: str, slope: float, factors: int) -> tuple[Tensor, Tensor]:
    return empty_like(z), z.new_empty(*z.shape[:-1], factors, dtype=torch.int64)


@library.custom_op(
    "latticode::to_lattice_backward", mutates_args=(), schema=f"(Tensor gradient, Tensor z, {_FORMAT}) -> Tensor"
)
def _to_lattice_backward(
    gradient: Tensor, z: Tensor, levels: list[int], bound: str, slope: float, factors: int
) -> Tensor:
    with torch.autocast(z.device.type, enabled=False):
        kernel = _lattice_kernel("to_lattice_backward", z)
        return alike(kernel(gradient, z, _described(tuple(levels), bound, slope, factors)), z)


@library.register_fake("latticode::to_lattice_backward")
def _(gradient: Tensor, z: Tensor, levels: list[int], bound: str, slope: float, factors: int) -> Tensor:
    return empty_like(z)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, *ctx.description = inputs
    ctx.save_for_backward(z)
    ctx.mark_non_differentiable(output[1])


def _to_lattice_gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _to_lattice_backward(gradient, *ctx.saved_tensors, *ctx.description), None, None, None, None


library.register_autograd("latticode::to_lattice", _to_lattice_gradients, setup_context=_save_for_backward)


def _lattice_kernel(name: str, z: Tensor) -> Callable[..., Any]:
    """The function `name` for the device of `z`: the specification where there is no fast one."""
    if _active == "fast" and z.is_cuda and nearest.has_triton():
        from latticode.kernels import lattice_triton

        return getattr(lattice_triton, name)
    if z.device.type == "cpu":
        return getattr(_LATTICE[_active], name)
    return functools.partial(getattr(reference, name), precise=_precise(z))


def _precise(z: Tensor) -> torch.dtype:
    return torch.float32 if z.device.type == "mps" else torch.float64  # Apple GPUs have no float64


def to_lattices(z: Tensor, lattice: Lattice, depth: int) -> tuple[Tensor, Tensor]:
    """`z` (..., d) in `depth` residual stages of one clamped lattice: latents (..., d), codes (..., depth * factors).

    Stage i has the scale L^-i, so together they are one even grid of L^depth levels; `reference.to_lattices` has the
    formulas. Arithmetic is float32. The gradient passes where one of the stages does not clamp, or where it leads back.
    A token that is not finite gets codes -1, NaN latents and no gradient. One opaque operator to torch.compile;
    torch.export and ONNX get plain operators instead.

    Raises:
        ValueError: if `z` is not (..., d) floats, or the lattice not one that `stages.fits`.
    """
    if z.ndim < 1 or z.shape[-1] != len(lattice.levels) or not z.is_floating_point():
        raise ValueError(f"to_lattices expects floats (..., {len(lattice.levels)}), got {tuple(z.shape)} {z.dtype}")
    if depth < 1 or not stages.fits(lattice):
        raise ValueError(f"to_lattices needs a clamped lattice of up to {stages.EXACT} codes, got {depth} of {lattice}")
    if _exporting():
        return reference.to_lattices(z, lattice, depth)
    if torch.compiler.is_compiling():
        return _to_lattices(z, list(lattice.levels), lattice.factors, depth)
    return _ToLattices.apply(z, lattice, depth)


class _ToLattices(torch.autograd.Function):
    """The operator for eager mode, as `_ToLattice` is."""

    @staticmethod
    def forward(z: Tensor, lattice: Lattice, depth: int) -> tuple[Tensor, Tensor]:
        with torch.autocast(z.device.type, enabled=False):
            return _stages_kernel("to_lattices", z)(z, lattice, depth)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        z, *ctx.description = inputs
        ctx.save_for_backward(z)
        ctx.set_materialize_grads(False)  # zeros for the codes cost as much as the rest of backward
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        (z,) = ctx.saved_tensors
        if gradient is None:
            return None, None, None
        with torch.autocast(z.device.type, enabled=False):
            kernel = _stages_kernel("to_lattices_backward", z)
            kernel = reference.to_lattices_backward if torch.is_grad_enabled() else kernel
            return kernel(gradient, z, *ctx.description), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None, None], *inputs: Any) -> tuple[Any, tuple[int, int]]:
        z, lattice, depth = inputs
        return _ToLattices.apply(z.movedim(in_dims[0], 0), lattice, depth), (0, 0)


@library.custom_op(
    "latticode::to_lattices",
    mutates_args=(),
    schema="(Tensor z, int[] levels, int factors, int depth) -> (Tensor, Tensor)",
)
def _to_lattices(z: Tensor, levels: list[int], factors: int, depth: int) -> tuple[Tensor, Tensor]:
    with torch.autocast(z.device.type, enabled=False):
        latents, codes = _stages_kernel("to_lattices", z)(z, _described(tuple(levels), "clamp", 2.0, factors), depth)
    return latents.contiguous(), codes.contiguous()


@library.register_fake("latticode::to_lattices")
def _(z: Tensor, levels: list[int], factors: int, depth: int) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(*z.shape[:-1], depth * factors, dtype=torch.int64)


@library.custom_op(
    "latticode::to_lattices_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor z, int[] levels, int factors, int depth) -> Tensor",
)
def _to_lattices_backward(gradient: Tensor, z: Tensor, levels: list[int], factors: int, depth: int) -> Tensor:
    kernel = _stages_kernel("to_lattices_backward", z)
    return kernel(gradient, z, _described(tuple(levels), "clamp", 2.0, factors), depth).contiguous()


@library.register_fake("latticode::to_lattices_backward")
def _(gradient: Tensor, z: Tensor, levels: list[int], factors: int, depth: int) -> Tensor:
    return z.new_empty(z.shape)


def _to_lattices_gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _to_lattices_backward(gradient, *ctx.saved_tensors, *ctx.description), None, None, None


library.register_autograd("latticode::to_lattices", _to_lattices_gradients, setup_context=_save_for_backward)


def _stages_kernel(name: str, z: Tensor) -> Callable[..., Any]:
    """The function `name` for the device of `z`: the specification where there is no fast one."""
    return getattr(_STAGES[_active] if z.device.type == "cpu" else reference, name)


def _exporting() -> bool:
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()  # torch before 2.7 has none


def _entropies(x: Tensor) -> Any:
    """Where the entropies of `x` are from: plain operators for an exported graph and inside `torch.func`."""
    if _exporting():
        return traced
    inside = not torch.compiler.is_compiling() and modes.transformed(x)
    return reference if inside else _ENTROPIES[_active]


def bernoulli_entropy(logits: Tensor) -> Tensor:
    """Of each row of `logits` (N, D), the entropy of D independent bits with P(bit) = sigmoid(logit), in nats: (N,)."""
    logits, _ = _widened("bernoulli_entropy", logits, logits[..., 0])
    return _entropies(logits).bernoulli_entropy(logits).to(logits.dtype)


def bernoulli_mixture(logits: Tensor, weights: Tensor) -> Tensor:
    """The sum over tokens of w_n P_n, P_n the distribution of D independent bits over the 2^D codes: (2^D,).

    P_n(bit_i = 1) = sigmoid(logits[n, i]), and a code is sum_i 2^i [bit_i = 1]. With `weights` (N,) of 1 / N it is the
    mean distribution, and its `entropy` that of the batch. Differentiable in `logits`, in O(N D + 2^D) memory. Tokens
    of weight 0 count nothing, whatever they hold.

    Raises:
        ValueError: for other shapes, or integers.
    """
    logits, weights = _widened("bernoulli_mixture", logits, weights)
    return _entropies(logits).bernoulli_mixture(logits, weights).to(logits.dtype)


def soft_assignment(x: Tensor, codebook: Tensor, temperature: float, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over tokens of w_n H(p_n), in nats, and of w_n p_n (K,), p_n = softmax(-|x_n - c|^2 / temperature).

    For `x` (N, d), `codebook` (K, d) and `weights` (N,). Differentiable in the first two, in O(K d + N d) memory.
    Tokens of weight 0 count nothing, whatever they hold.

    Raises:
        ValueError: for other shapes, integers, an empty codebook, or a temperature that is not > 0.
    """
    x, weights = _widened("soft_assignment", x, weights)
    if codebook.ndim != 2 or codebook.shape[1] != x.shape[1] or len(codebook) == 0 or not temperature > 0:
        raise ValueError(
            f"soft_assignment of tokens {tuple(x.shape)} expects a codebook (K, {x.shape[1]}) with K >= 1 and a "
            f"temperature > 0, got {tuple(codebook.shape)} and {temperature}"
        )
    dtype = torch.promote_types(x.dtype, codebook.dtype)
    kernel = _entropies(x).soft_assignment
    how = {"compiled": True} if kernel is entropies.soft_assignment and _compiled() else {}
    total, mixture = kernel(x.to(dtype), codebook.to(dtype), weights.to(dtype), temperature, **how)
    return total.to(dtype), mixture.to(dtype)


def entropy(p: Tensor) -> Tensor:
    """-sum p ln p of a distribution `p` (K,) in nats, a scalar; 0 ln 0 = 0, and probabilities of 0 get no gradient."""
    return _ENTROPIES[_active].entropy(p).to(p.dtype)


def head_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, codes: Tensor, smoothing: float = 0.0) -> Tensor:
    """The mean cross entropy of `codes` (M,) under logits x W' + b, in nats, with label smoothing.

    For states `x` (M, D), `weight` (C, D) and `bias` (C,). Differentiable; a CPU needs no memory of M C numbers for it.
    """
    if _blocked(x, weight):
        return vocabulary.CrossEntropy.apply(x, weight, bias, codes, smoothing, _compiled())
    return reference.head_cross_entropy(x, weight, bias, codes, smoothing)


@torch.no_grad()
def head_nats(x: Tensor, weight: Tensor, bias: Tensor, codes: Tensor) -> Tensor:
    """-ln p (M,) of `codes` (M,) under logits x W' + b as of `head_cross_entropy`; no gradient flows."""
    if _blocked(x, weight):
        return vocabulary.nats(x, vocabulary.Head(weight, bias, _compiled()), codes)
    parts = _portions(len(weight), x, codes)
    return torch.cat([reference.head_nats(y, weight, bias, some) for y, some in parts])


@torch.no_grad()
def head_draw(x: Tensor, weight: Tensor, bias: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (M,) from the softmax of logits x W' + b, by inversion at `u` (M,) in [0, 1), and the ln p of each (M,).

    Which code a u stands for may differ between kernels where it lies within rounding of two.
    """
    if _blocked(x, weight):
        return vocabulary.draw(x, vocabulary.Head(weight, bias, _compiled()), u)
    found = [reference.head_draw(y, weight, bias, some) for y, some in _portions(len(weight), x, u)]
    codes, log_p = zip(*found, strict=True)
    return torch.cat(codes), torch.cat(log_p)


def _blocked(x: Tensor, weight: Tensor) -> bool:
    return _active != "reference" and vocabulary.serves(x, len(weight))


def _compiled() -> bool:
    return _active == "fast" and _COMPILED


def _portions(width: int, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`rows` (M, ..) of a few positions at a time, for temporaries of `width` numbers each: all at once would fill
    memory, which costs more than to compute them."""
    size = entropies.tile_rows(rows[0], width)
    return zip(*(t.split(size) for t in rows), strict=True)


def _widened(name: str, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both in their common type, float32 at least, after a check that `rows` (N, D >= 1) and `weights` (N,) fit."""
    fits = rows.ndim == 2 and rows.shape[1] > 0 and weights.shape == rows.shape[:1]
    if not fits or not rows.is_floating_point() or not weights.is_floating_point():
        raise ValueError(
            f"{name} expects float tokens (N, D) with D >= 1 and weights (N,), "
            f"got {tuple(rows.shape)} {rows.dtype} and {tuple(weights.shape)} {weights.dtype}"
        )
    dtype = torch.promote_types(torch.promote_types(rows.dtype, weights.dtype), torch.float32)
    return rows.to(dtype), weights.detach().to(dtype)
