"""Encoders and decoders: tensors in, tensors out.

An encoder has `in_channels`, a decoder `out_channels` and `last_layer`, the weight that its output comes from; both
have `latent`, `stride` and, if it is not 2, `axes` (see `latticode.tokenizers.tokenizer`).
"""

from latticode.autoencoders.audio import AudioDecoder, AudioEncoder
from latticode.autoencoders.conv import ConvDecoder, ConvEncoder
from latticode.autoencoders.maskgit import MaskGITDecoder, MaskGITEncoder
from latticode.autoencoders.pixels import LogitLaplace
from latticode.autoencoders.residual import ResidualDecoder, ResidualEncoder
from latticode.autoencoders.shuffle import Shuffled, Unshuffled
from latticode.autoencoders.video import VideoDecoder, VideoEncoder
from latticode.autoencoders.vit import ViTDecoder, ViTEncoder

__all__ = [
    "AudioDecoder",
    "AudioEncoder",
    "ConvDecoder",
    "ConvEncoder",
    "LogitLaplace",
    "MaskGITDecoder",
    "MaskGITEncoder",
    "ResidualDecoder",
    "ResidualEncoder",
    "Shuffled",
    "Unshuffled",
    "ViTDecoder",
    "ViTEncoder",
    "VideoDecoder",
    "VideoEncoder",
]
