"""Encoders and decoders: tensors in, tensors out.

What one has to have, all of it, stands in `latticode.autoencoders.contract`: an encoder `in_channels`, a decoder
`out_channels`, both `latent` and `stride`, and what else they say of themselves where it is not the usual: `axes`,
`lead`, `reach`, and of a decoder `last_layer`. `try_out(encoder, decoder)` says what a pair breaks of it.
"""

from latticode.autoencoders.audio import AudioDecoder, AudioEncoder
from latticode.autoencoders.contract import Decoder, Encoder, try_out
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
    "Decoder",
    "Encoder",
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
    "try_out",
]
