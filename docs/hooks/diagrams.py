"""Diagrams of the architecture page, drawn as SVG in the colours of the theme, with no script and no download."""

from __future__ import annotations

from html import escape

import package

CAPTIONS = {
    "core": "types, registry, files, ranks",
    "kernels": "hot operations, C and Triton",
    "nn": "blocks of networks",
    "losses": "pixels, perceptual, adversarial",
    "quantizers": "latents to codes and back",
    "autoencoders": "encoders and decoders",
    "data": "sources, batches, token files",
    "tokenizers": "encoder, quantizer, decoder",
    "priors": "generators over codes",
    "metrics": "PSNR, usage, FID",
    "viz": "pictures, figures, reports",
    "dense": "UViM: depth, segments, colours",
    "sampling": "samples of a seed, edits",
    "engine": "recipes and the training loop",
    "evaluate": "scores with their protocol",
    "runs": "run folders, one file a verb",
    "study": "quantizers against each other",
    "diagnose": "what is wrong with codes",
    "cli": "the command line",
}
WIDTH, LEFT, HIGH, GAP = 920, 34, 52, 12

ARROW = (
    '<defs><marker id="{id}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0 8 4 0 8z" class="head"/></marker></defs>'
)


def rooms() -> str:
    """The rooms of the package, floor by floor; each box leads to the room's page of the reference."""
    floors = package.layers()
    height = len(floors) * (HIGH + GAP) - GAP + 8
    parts = [ARROW.format(id="down")]
    parts.append(f'<path d="M14 8V{height - 12}" class="line" marker-end="url(#down)"/>')
    parts.append(f'<text x="24" y="{height / 2}" class="side" transform="rotate(-90 24 {height / 2})">imports</text>')
    for number, floor in enumerate(floors):
        y = 4 + (len(floors) - 1 - number) * (HIGH + GAP)
        wide = (WIDTH - LEFT - GAP * (len(floor) - 1)) / len(floor)
        for i, room in enumerate(floor):
            x = LEFT + i * (wide + GAP)
            about = escape(package.of_room(room)[0].summary)
            parts.append(
                f'<a href="../api/{room}/"><title>{about}</title>'
                f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{HIGH}" rx="6" class="box"/>'
                f'<text x="{x + wide / 2:.1f}" y="{y + 22}" class="name">{room}</text>'
                f'<text x="{x + wide / 2:.1f}" y="{y + 40}" class="note">{CAPTIONS.get(room, "")}</text></a>'
            )
    return _svg(height, "The rooms of latticode, floor by floor", parts)


STAGES = (  # the way of a tensor: encoding, generating, decoding; (name, what comes out of it)
    (
        ("image", "(B, 3, H, W) float"),
        ("encoder", "(B, E, h, w)"),
        ("quant_conv", "(B, h, w, D)"),
        ("quantizer", "(B, h, w, D)"),
        ("codes", "(B, h, w, K) int64"),
    ),
    (
        ("labels, text", "Conditioning"),
        ("prior", "logits of codes"),
        ("sample", "temperature, guidance"),
        ("codes", "(B, h, w, K) int64"),
    ),
    (
        ("codes", "(B, h, w, K) int64"),
        ("quantizer.decode", "(B, h, w, D)"),
        ("post_quant_conv", "(B, E, h, w)"),
        ("decoder", "(B, 3, H, W)"),
        ("image", "(B, 3, H, W) float"),
    ),
)
TITLES = ("encode", "generate", "decode")


def tensor() -> str:
    """An image's way through encoder, quantizer and codes, a prior over them, and back."""
    parts = [ARROW.format(id="on")]
    rise, wide = 108, 154
    for row, (title, stages) in enumerate(zip(TITLES, STAGES)):
        y = 24 + row * rise
        step = (WIDTH - wide - 2) / (len(stages) - 1)
        parts.append(f'<text x="1" y="{y - 8}" class="title">{title}</text>')
        for i, (name, shape) in enumerate(stages):
            x = 1 + i * step
            kind, round_ = ("data", 26) if name in ("image", "codes", "labels, text") else ("box", 6)
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{wide}" height="{HIGH}" rx="{round_}" class="{kind}"/>'
                f'<text x="{x + wide / 2:.1f}" y="{y + 22}" class="name">{name}</text>'
                f'<text x="{x + wide / 2:.1f}" y="{y + 40}" class="note">{shape}</text>'
            )
            if i:
                parts.append(
                    f'<path d="M{x - step + wide:.1f} {y + HIGH / 2}H{x - 2:.1f}" class="line" marker-end="url(#on)"/>'
                )
    return _svg(24 + 2 * rise + HIGH + 6, "The way of a tensor through tokenizer and prior", parts)


def _svg(height: float, title: str, parts: list[str]) -> str:
    body = "".join(parts)
    return (
        f'<div class="diagram"><svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{title}">{body}</svg></div>'
    )
