"""Images from anywhere, as batches; and tokens, the same way."""

from latticode.data.loading import Loader, TokenLoader
from latticode.data.sources import Record, Source, StreamSource, open_source
from latticode.data.tokens import TokenDataset, TokenWriter
from latticode.data.transforms import ImageError, Preprocess, decode_image

__all__ = [
    "ImageError",
    "Loader",
    "Preprocess",
    "Record",
    "Source",
    "StreamSource",
    "TokenDataset",
    "TokenLoader",
    "TokenWriter",
    "decode_image",
    "open_source",
]
