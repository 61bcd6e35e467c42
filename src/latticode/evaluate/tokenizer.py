"""Scores of a tokenizer: PSNR, SSIM, rFID, perceptual distance; usage and perplexity of its codebook, dead codes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from latticode.core.modules import device_of, evaluating
from latticode.core.values import rounded
from latticode.data.loading import Loader
from latticode.data.media import IMAGE
from latticode.data.passes import Progress, Report, batches_of, count_of
from latticode.evaluate.common import feature_protocol, features_of, rates
from latticode.losses.perceptual import Perceptual
from latticode.metrics.codes import CodeStatistics
from latticode.metrics.features import FeatureNetwork, FeatureStatistics
from latticode.metrics.reconstruction import metrics_of
from latticode.tokenizers import tiling
from latticode.tokenizers.tokenizer import Tokenizer


def evaluate_tokenizer(
    tokenizer: Tokenizer,
    loader: Loader,
    *,
    features: FeatureNetwork | None = None,
    reference: Loader | None = None,
    perceptual: Perceptual | None = None,
    tile: int | None = None,
    limit: int | None = None,
    protocol: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Reconstruct what `loader` yields and measure it, the codes and, with a feature network, the reconstruction FID.

    Args:
        tokenizer: any; what it returns is compared after rounding to 8 bits (sound: 16).
        loader: images, recordings or clips; one ordered pass over them is made, without augmentation.
        features: names the key `rfid_<name>`, the rFID.
        reference: a loader of the images that the reconstructions' FID is taken against (the FSQ paper: the training
            set); without it, the originals of the same images.
        perceptual: its mean distance over the images, rounded to 8 bits, is the key `perceptual_<kind>`.
        tile: images longer than this are reconstructed in tiles, see `tiling.encode`.
        limit: stop after this many images.
        protocol: what the caller knows and the numbers depend on: resize filter, crop, EMA on or off, name of the set.
        progress: called with the images done and the images in all.

    Returns psnr, psnr_pooled (dB), ssim, exact for images; for clips also temporal_error and temporal_change; for sound
    si_sdr (dB), mel_distance, stft_distance. Then usage, perplexity, entropy_bits, dead, invalid, slots;
    bits_per_token, bits_per_pixel (not of sound), tokens_per_image or else tokens_per_second and bits_per_second;
    level_histograms (FSQ); rfid_<name>; perceptual_<kind>; count, skipped, protocol. Tokens of positions that lie
    partly or wholly in padding count, pixels of padding do not. Raises ValueError for a loader without records, a
    network that knows images for anything else, and reconstructions that are not finite.
    """
    medium = loader.preprocess.medium
    for network in (features, perceptual):
        if network is not None and medium is not IMAGE:
            raise ValueError(f"{network.name!r} knows images, not {medium.noun}s")
    metrics, codes = metrics_of(loader.preprocess), CodeStatistics(tokenizer.vocab)
    original, restored = FeatureStatistics(), FeatureStatistics()
    tokens, area, seconds, distance = 0, 0, 0.0, 0.0
    sizes: set[tuple[int, ...]] = set()
    more = count_of(reference) if features is not None and reference is not None else 0
    report = Report(progress, count_of(loader, limit) + more)
    with evaluating(tokenizer, features, perceptual):
        for batch in batches_of(loader, limit, report):
            images = batch.inputs.to(device_of(tokenizer))
            reconstruction = tiling.reconstruct(tokenizer, images, tile)
            metrics.update(images, reconstruction.output)
            codes.update(reconstruction.codes)
            tokens += reconstruction.codes[..., 0].numel()
            area += images[:, 0].numel()
            seconds += loader.preprocess.seconds(images)
            sizes.add(tuple(images.shape[1:]))
            if perceptual is not None:
                distance += len(images) * float(perceptual(rounded(reconstruction.output), rounded(images)))
            if features is not None:
                restored.update(features_of(features, reconstruction.output))
                if reference is None:
                    original.update(features_of(features, images))
        if features is not None and reference is not None:
            for batch in batches_of(reference, None, report):
                original.update(features_of(features, batch.inputs))
    cut = tile or (tiling.TILE if medium is IMAGE else math.inf)
    result = metrics.compute()
    count = result.pop("count")
    result |= codes.compute()
    del result["positions"]
    result["bits_per_token"] = tokenizer.bits
    result |= rates(tokenizer.bits * tokens, medium, area, seconds)
    result |= {"tokens_per_second": tokens / seconds} if seconds else {"tokens_per_image": tokens / count}
    levels: Any = getattr(tokenizer.quantizer, "levels", None)
    if levels is not None and tokenizer.vocab == tokenizer.quantizer.vocab:  # not of the upper grids, if any
        result["level_histograms"] = codes.level_histograms(levels)
    if features is not None:
        result[f"rfid_{features.name}"] = restored.distance(original)
    if perceptual is not None:
        result[f"perceptual_{perceptual.kind}"] = distance / count
    return result | {
        "count": count,
        "skipped": len(loader.skipped),
        "protocol": {
            **metrics.protocol,
            "usage": f"share of the codewords that appear at least once over all {count} {medium.noun}s",
            "bits_per_token": "log2 of the vocabulary, per grid position",
            f"{medium.noun}s": count,
            "sizes": [list(size) for size in sorted(sizes)],
            **feature_protocol(features, original, "the originals" if reference is None else "the reference set"),
            **({} if perceptual is None else {"perceptual": perceptual.name}),
            **({"tile": cut} if any(max(size[1:]) > cut for size in sizes) else {}),
            **(protocol or {}),
        },
    }
