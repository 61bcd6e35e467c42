"""Images, recordings and clips from anywhere, as batches; and tokens, the same way."""

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
