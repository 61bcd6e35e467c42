"""Quantizers against vector-quantize-pytorch: speed in alternating rounds of one process, memory in fresh processes.

    python benchmarks/quantizers.py > docs/results/quantizers.txt
    python benchmarks/quantizers.py --only vq-16384-8 --rounds 9

Prints a Markdown table and then the same as JSON. A step is forward and backward in training mode. A ratio is the other
side's time over ours in the same round, so above 1 is faster; compare ratios, since absolute times drift with the
machine. Memory is the highest resident size during one step in a fresh process, less its size just before that step; a
tiny step of the same kind has loaded the libraries by then.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

Step = Callable[[], Any]

LEVELS = [8, 5, 5, 5]
FSQ_BYTES = 2 * 4 * 4 + 8, 3 * 4 * 4  # per token and pass: read z, write latents and an int64 code; read g, z, write dz
GEMM_TILE = 1024, 512  # of the sgemm floor: the fastest found for 2 MiB of cache


@dataclass(frozen=True)
class Row:
    """One line of the table: `make(side, **arguments)` gives the step of one side."""

    name: str
    target: str
    make: Callable[..., Step]
    arguments: Mapping[str, int]
    tiny: Mapping[str, int]  # instead of `arguments` to load the libraries
    seconds: float  # it takes about this long on one core, with 5 rounds
    others: tuple[str, ...] = ()  # sides besides ours and the peer's
    peer_rounds: int | None = None  # for a peer that takes seconds a step
    peer_bytes: int = 0  # that the peer needs, from its tensors of the size tokens x codes


def training(forward: Callable[[Tensor], tuple[Tensor, list[Tensor]]], *shape: int) -> Step:
    """A step of `forward`: latents and losses of an input of `shape`; all sides get the same numbers and gradients."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator).requires_grad_()
    g = torch.randn(shape, generator=generator)

    def step() -> None:
        latents, losses = forward(z)
        terms = [loss.sum() for loss in losses if loss.requires_grad]
        torch.autograd.grad([latents, *terms], z, [g, *(torch.ones(()) for _ in terms)])

    return step


def ours(quantizer: Callable[[Tensor], Any]) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
    def forward(z: Tensor) -> tuple[Tensor, list[Tensor]]:
        out = quantizer(z)
        return out.latents, list(out.losses.values())

    return forward


def theirs(quantizer: Callable[[Tensor], Any]) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
    def forward(z: Tensor) -> tuple[Tensor, list[Tensor]]:
        latents, _, *losses = quantizer(z[None])
        return latents[0], [loss for loss in losses if isinstance(loss, Tensor)]

    return forward


def fsq_tokens(side: str, tokens: int) -> Step:
    from latticode.quantizers import FSQ

    if side == "copy":
        return copying(tokens * sum(FSQ_BYTES))
    if side == "peer":
        import vector_quantize_pytorch as peers

        return training(theirs(peers.FSQ(LEVELS)), tokens, len(LEVELS))
    quantizer = FSQ(LEVELS)
    return training(
        ours(torch.compile(quantizer, dynamic=False) if side == "compiled" else quantizer), tokens, len(LEVELS)
    )


def fsq_image(side: str, images: int, size: int) -> Step:
    from latticode.quantizers import FSQ

    shape = images, len(LEVELS), size, size
    if side == "copy":
        return copying(images * size * size * sum(FSQ_BYTES))
    if side == "peer":
        import vector_quantize_pytorch as peers

        peer = peers.FSQ(LEVELS, channel_first=True)
        return training(lambda z: (peer(z)[0], []), *shape)
    quantizer = FSQ(LEVELS)
    run = torch.compile(quantizer, dynamic=False) if side == "compiled" else quantizer
    return training(lambda z: (run(z.movedim(1, -1)).latents.movedim(-1, 1), []), *shape)


def copying(moved: int) -> Step:
    """A copy that reads and writes `moved` bytes in all."""
    source, target = torch.ones(moved // 8), torch.empty(moved // 8)
    return lambda: target.copy_(source)


def vq(side: str, size: int, dim: int, tokens: int = 16384) -> Step:
    from latticode.quantizers import VQ

    if side == "floor":
        return products(tokens, size, dim)
    if side == "peer":
        import vector_quantize_pytorch as peers

        return training(theirs(peers.VectorQuantize(dim=dim, codebook_size=size).train()), tokens, dim)
    return training(ours(VQ(size, dim, kmeans=False).train()), tokens, dim)


def products(tokens: int, size: int, dim: int) -> Step:
    """The matrix products of a search and nothing else, in tiles that stay in the cache."""
    x, codebook = torch.randn(tokens, dim), torch.randn(size, dim)
    rows, width = min(GEMM_TILE[0], tokens), min(GEMM_TILE[1], size)
    tile = torch.empty(rows, width)

    def step() -> None:
        for i in range(0, tokens, rows):
            for j in range(0, size, width):
                torch.mm(x[i : i + rows], codebook[j : j + width].t(), out=tile)

    return step


def lfq(side: str, bits: int, tokens: int = 4096) -> Step:
    if side == "peer":
        import vector_quantize_pytorch as peers

        return training(theirs(peers.LFQ(dim=bits, codebook_size=2**bits).train()), tokens, bits)
    from latticode.quantizers import LFQ

    return training(ours(LFQ(bits).train()), tokens, bits)


def rvq(side: str, size: int, dim: int, tokens: int = 16384) -> Step:
    if side == "peer":
        import vector_quantize_pytorch as peers

        return training(theirs(peers.ResidualVQ(dim=dim, codebook_size=size, num_quantizers=8).train()), tokens, dim)
    from latticode.quantizers import VQ, Residual

    return training(ours(Residual([VQ(size, dim, kmeans=False, restart=0.0) for _ in range(8)]).train()), tokens, dim)


def residual_fsq(side: str, tokens: int) -> Step:
    if side == "peer":
        import vector_quantize_pytorch as peers

        peer = peers.ResidualFSQ(levels=LEVELS, num_quantizers=8, dim=len(LEVELS))
        return training(theirs(peer.train()), tokens, len(LEVELS))
    from latticode.quantizers import FSQ, Residual

    return training(ours(Residual(FSQ(LEVELS, bound="clamp"), depth=8).train()), tokens, len(LEVELS))


def importing(side: str) -> Step:
    """Importing a package when torch is there already, in a process of its own."""
    package = {"ours": "latticode", "peer": "vector_quantize_pytorch"}[side]
    code = f"import torch, time; t = time.perf_counter(); import {package}; print(time.perf_counter() - t)"
    return lambda: float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


def vq_row(target: str, size: int, dim: int, seconds: float, peer_rounds: int) -> Row:
    # an int64 and a float one-hot, three copies of the distances
    peer_bytes = (8 + 4 + 3 * 4) * 2**14 * size
    tiny = {"size": 64, "dim": dim, "tokens": 64}
    name = f"vq-{size}-{dim}"
    return Row(name, target, vq, {"size": size, "dim": dim}, tiny, seconds, ("floor",), peer_rounds, peer_bytes)


def lfq_row(target: str, bits: int, seconds: float, peer_rounds: int) -> Row:
    # seven copies of distances, logits and probabilities
    peer_bytes = 7 * 4 * 2**12 * 2**bits
    tiny = {"bits": 4, "tokens": 64}
    return Row(f"lfq-{bits}", target, lfq, {"bits": bits}, tiny, seconds, (), peer_rounds, peer_bytes)


FSQ_SIDES = "compiled", "copy"
ROWS = [
    Row("fsq-1m", "5x; <= 3 copies; compiled <= eager", fsq_tokens, {"tokens": 2**20}, {"tokens": 64}, 40, FSQ_SIDES),
    Row("fsq-65k", "5x", fsq_tokens, {"tokens": 2**16}, {"tokens": 64}, 25, FSQ_SIDES),
    Row("fsq-image", "5x", fsq_image, {"images": 16, "size": 256}, {"images": 2, "size": 8}, 40, FSQ_SIDES),
    vq_row("20x; 100x less memory", 2**14, 8, 50, peer_rounds=2),
    vq_row("runs; < 150 MB", 2**16, 8, 15, peer_rounds=1),
    vq_row("runs; < 150 MB", 2**18, 8, 35, peer_rounds=1),
    vq_row("5x; floor >= 0.6", 2**14, 256, 75, peer_rounds=2),
    lfq_row("200x; 20x less memory", 14, 35, peer_rounds=2),
    lfq_row("400x; 70x less memory", 16, 110, peer_rounds=1),
    lfq_row("< 200 MB", 18, 15, peer_rounds=1),
    Row("rvq", "10x", rvq, {"size": 1024, "dim": 64}, {"size": 64, "dim": 64, "tokens": 64}, 30, peer_rounds=2),
    Row("residual-fsq-65k", "10x", residual_fsq, {"tokens": 2**16}, {"tokens": 64}, 15),
    Row("residual-fsq-1m", "10x", residual_fsq, {"tokens": 2**20}, {"tokens": 64}, 40),
]


@dataclass
class Result:
    """Times in seconds by side, the sides that could not run, and megabytes by side."""

    name: str
    target: str
    times: dict[str, list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    megabytes: dict[str, float] = field(default_factory=dict)

    def ratio(self, side: str) -> dict[str, float] | None:
        """Of `side` over ours, round by round."""
        pairs = zip(self.times.get(side, []), self.times.get("ours", []), strict=False)
        ratios = [other / own for other, own in pairs]
        return spread(ratios) if ratios else None

    def record(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "seconds": {side: spread(values) for side, values in self.times.items()},
            "over_ours": {side: self.ratio(side) for side in self.times if side != "ours"},
            "megabytes": self.megabytes,
            "missing": self.missing,
        }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def seconds(step: Step) -> float:
    """Of the second of two steps: the first finds the heap and the caches as another side has left them. If it took
    more than a second, that does not show, and it stands for itself."""
    for _ in range(2):
        began = time.perf_counter()
        step()
        taken = time.perf_counter() - began
        if taken > 1:
            break
    return taken


def measure(row: Row, rounds: int, threads: int) -> Result:
    """Memory of ours and the peer, then times of all sides by turns."""
    result = Result(row.name, row.target)
    sides = ["ours", "peer", *row.others]
    if row.peer_bytes > 0.9 * free_memory():
        sides.remove("peer")
        result.missing["peer"] = f"out of memory (needs {row.peer_bytes / 1e9:.0f} GB)"
    for side in [side for side in sides if side in ("ours", "peer")]:
        result.megabytes[side] = memory_of(row, side, threads)
    steps = {side: row.make(side, **row.arguments) for side in sides}
    few = {"peer": row.peer_rounds} if row.peer_rounds else {}
    for side in sides:
        if side not in few:
            steps[side]()  # compiles, and fills caches
            steps[side]()
    for turn in range(rounds):
        for side in sides if turn % 2 else sides[::-1]:
            if turn < few.get(side, rounds):
                result.times.setdefault(side, []).append(seconds(steps[side]))
    return result


def free_memory() -> float:
    """Bytes that can still be had; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next(1024 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def memory_of(row: Row, side: str, threads: int) -> float:
    command = [sys.executable, __file__, "--memory", row.name, side, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"{side} ended with status {done.returncode}"]
        raise RuntimeError(last[0])
    return float(done.stdout)


def report_memory(name: str, side: str) -> None:
    """What the process started by `memory_of` does.

    Linux only. Not by getrusage: that peak survives exec, so it would be the one of the process that measures times.
    """
    row = next(row for row in ROWS if row.name == name)
    row.make(side, **row.tiny)()
    step = row.make(side, **row.arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmHWM")
    step()
    print((resident("VmHWM") - before) / 1e6)


def resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * float(line.split()[1]) for line in lines if line.startswith(key))


def measure_import(rounds: int) -> Result:
    result = Result("import", "< 0.3 s beyond torch")
    steps = {side: importing(side) for side in ("ours", "peer")}
    for turn in range(rounds):
        for side in ("ours", "peer") if turn % 2 else ("peer", "ours"):
            result.times.setdefault(side, []).append(steps[side]())
    return result


def on_cuda(rounds: int) -> dict[str, Any]:
    """Shares of what the card can do, both measured here: its copy bandwidth and its GEMM rates."""
    from latticode.kernels import nearest_code
    from latticode.quantizers import FSQ

    def median(step: Step) -> float:
        def timed() -> None:
            step()
            torch.cuda.synchronize()

        timed(), timed()
        return statistics.median(seconds(timed) for _ in range(4 * rounds))

    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / median(lambda: target.copy_(source))
    tokens = 2**24
    z = torch.randn(tokens, len(LEVELS), device="cuda", requires_grad=True)
    quantizer, g = FSQ(LEVELS).cuda(), torch.randn(tokens, len(LEVELS), device="cuda")
    latents = quantizer(z).latents
    forward = median(lambda: quantizer(z))
    backward = median(lambda: torch.autograd.grad(latents, z, g, retain_graph=True))
    found: dict[str, Any] = {
        "card": torch.cuda.get_device_name(),
        "copy_gb_per_second": bandwidth / 1e9,
        "fsq_forward_share_of_copy": FSQ_BYTES[0] * tokens / forward / bandwidth,
        "fsq_backward_share_of_copy": FSQ_BYTES[1] * tokens / backward / bandwidth,
    }
    n, size = 2**16, 2**14
    for dim in (8, 64, 256):
        x, codebook = torch.randn(n, dim, device="cuda"), torch.randn(size, dim, device="cuda")
        work = 2 * n * size * dim
        searching = work / median(lambda a=x, b=codebook: nearest_code(a, b))
        kinds = {"bf16": (torch.bfloat16, False), "tf32": (torch.float32, True), "fp32": (torch.float32, False)}
        rates: dict[str, float] = {}
        for name, (dtype, allowed) in kinds.items():
            a, b = x.to(dtype), codebook.to(dtype)
            out = torch.empty(n, size, device="cuda", dtype=dtype)
            previous = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high" if allowed else "highest")
            rates[name] = work / median(lambda a=a, b=b, out=out: torch.mm(a, b.t(), out=out))
            torch.set_float32_matmul_precision(previous)
        found[f"nearest_code_d{dim}"] = {
            "tflop_per_second": searching / 1e12,
            "share_of_gemm": {name: searching / rate for name, rate in rates.items()},
            "gemm_tflop_per_second": {name: rate / 1e12 for name, rate in rates.items()},
        }
    return found


def table(results: list[Result]) -> str:
    """Markdown; a ratio is median (min to max) over rounds."""

    def times(value: dict[str, float] | None) -> str:
        return f"{value['median']:.3g} ({value['min']:.3g} to {value['max']:.3g})" if value else "-"

    def megabytes(result: Result) -> str:
        both = result.megabytes
        less = f", {both['peer'] / max(both['ours'], 1):.0f}x less" if "peer" in both else ""
        peer = f"{both['peer']:.0f}" if "peer" in both else "-"
        return f"{both['ours']:.0f} / {peer}{less}" if both else "-"

    lines = [
        "| work | ours, ms | peer / ours | compiled, copy or floor / ours | MB, ours / peer | at least |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        own = {key: 1000 * value for key, value in spread(result.times["ours"]).items()} if result.times else None
        peer = result.missing.get("peer") or times(result.ratio("peer"))
        rest = [f"{s} {times(result.ratio(s))}" for s in result.times if s not in ("ours", "peer")]
        row = [result.name, result.missing.get("row") or times(own), peer, "; ".join(rest) or "-", megabytes(result)]
        lines.append("| " + " | ".join([*row, result.target]) + " |")
    return "\n".join(lines)


def main() -> None:
    names = [*(row.name for row in ROWS), "import", "cuda"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=f"one of {', '.join(names)}")
    parser.add_argument("--rounds", type=int, default=5, help="of every side but slow peers, default 5")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, default 1")
    parser.add_argument("--memory", nargs=2, metavar=("NAME", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.memory:
        return report_memory(*options.memory)

    console = Console(stderr=True)
    chosen = options.only or names
    rows = [row for row in ROWS if row.name in chosen]
    results: list[Result] = []
    began, done, total = time.perf_counter(), 0.0, sum(row.seconds for row in rows)
    for number, row in enumerate(rows, 1):
        pace = (time.perf_counter() - began) / done if done else 1.0
        left = pace * (total - done) / 60
        console.print(f"{number}/{len(rows)} {row.name}: {row.target}; about {left:.1f} minutes left for all")
        try:
            results.append(measure(row, options.rounds, options.threads))
        except Exception as error:  # one row must not cost the others
            results.append(Result(row.name, row.target, missing={"row": str(error)}))
        done += row.seconds
    if "import" in chosen:
        results.append(measure_import(options.rounds))
    cuda = on_cuda(options.rounds) if "cuda" in chosen and torch.cuda.is_available() else None
    print(table(results))
    print(
        "\nA ratio is the time of the other side over ours, median (min to max) over rounds. MB: the highest resident "
        "size during a step of a fresh process, less its size just before.\n"
    )
    about = {
        "torch": torch.__version__,
        "threads": options.threads,
        "cpus": os.cpu_count(),
        "rounds": options.rounds,
        "load": os.getloadavg()[0],
        "minutes": (time.perf_counter() - began) / 60,
    }
    print(json.dumps(about | {"rows": {result.name: result.record() for result in results}, "cuda": cuda}, indent=2))


if __name__ == "__main__":
    main()
