"""A small image classifier: the feature network of classifier-FID, and of the label accuracy of samples."""

from __future__ import annotations

from torch import Tensor, nn

from latticode.core.pretrained import Pretrained


class Classifier(Pretrained):
    """Convolutions at halved resolutions, global average pooling, one linear layer; for images of 16 to 64 px.

    The stem halves the resolution at once and every later block works on at most a sixteenth of the pixels, so the cost
    is about 7 million multiply-adds per 32x32 image at the default width. Any size from 8 px on is accepted.

    Examples:
        >>> import torch
        >>> classifier = Classifier(classes=10, channels=3, width=4)
        >>> images = torch.zeros(2, 3, 32, 32)
        >>> classifier(images).shape, classifier.features(images).shape
        (torch.Size([2, 10]), torch.Size([2, 16]))
    """

    def __init__(self, classes: int, channels: int = 1, width: int = 32):
        """`classes` >= 2 labels, images of `channels`, `width` channels in the first block and 4 `width` features."""
        super().__init__()
        for name, value, least in (("classes", classes, 2), ("channels", channels, 1), ("width", width, 1)):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        self.classes, self.channels, self.width = classes, channels, width
        self.body = nn.Sequential(
            *_block(channels, width, stride=2),
            *_block(width, 2 * width, stride=2),
            *_block(2 * width, 2 * width, stride=1),
            *_block(2 * width, 4 * width, stride=2),
            *_block(4 * width, 4 * width, stride=1),
        )
        self.head = nn.Linear(4 * width, classes)

    @property
    def dim(self) -> int:
        """The number of features."""
        return self.head.in_features

    def features(self, x: Tensor) -> Tensor:
        """Pooled penultimate features (B, 4 width) of images `x` (B, C, H, W) in [-1, 1]."""
        if x.ndim != 4 or x.shape[1] != self.channels or min(x.shape[2:]) < 8:
            raise ValueError(f"expected images (B, {self.channels}, H, W) of at least 8 px, got {tuple(x.shape)}")
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images `x` (B, C, H, W) in [-1, 1]."""
        return self.head(self.features(x))


def _block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]
