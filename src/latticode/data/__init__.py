"""Data: images, audio and video from any source as batches, and token datasets the same way.

`open_source` opens what a user names, a `Preparation` turns its records into arrays, a `Loader` makes batches. A
`TokenWriter` writes a token dataset, a `TokenDataset` reads it, a `TokenLoader` makes batches of it.
"""

from latticode.data.clips import VideoPreprocess
from latticode.data.dense import DensePreprocess
from latticode.data.loading import Loader, TokenLoader
from latticode.data.media import AUDIO, DENSE, IMAGE, VIDEO, ContentError, Medium, Preparation
from latticode.data.sources import Record, Source, StreamSource, open_source
from latticode.data.tokens import TokenDataset, TokenWriter
from latticode.data.transforms import ImageError, Preprocess, decode_image
from latticode.data.waveforms import AudioPreprocess

__all__ = [
    "AUDIO",
    "DENSE",
    "IMAGE",
    "VIDEO",
    "AudioPreprocess",
    "ContentError",
    "DensePreprocess",
    "ImageError",
    "Loader",
    "Medium",
    "Preparation",
    "Preprocess",
    "Record",
    "Source",
    "StreamSource",
    "TokenDataset",
    "TokenLoader",
    "TokenWriter",
    "VideoPreprocess",
    "decode_image",
    "open_source",
]
