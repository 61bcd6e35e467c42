"""Encoders and decoders: tensors in, tensors out."""

from latticode.autoencoders.conv import ConvDecoder, ConvEncoder

__all__ = ["ConvDecoder", "ConvEncoder"]
