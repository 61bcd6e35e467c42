"""Perceptual losses: the distance of two images in the features of a frozen network.

Images are (B, C, H, W) in [-1, 1], the loss is a scalar mean. `LPIPS` has weights that were fitted to human judgements,
`FeatureDistance` a classifier trained here.

The networks are constants of the loss: they are no parameters, always in eval mode, and no part of a saved state. They
are read from their files on a CPU, also inside a model that is built on the meta device, and survive `to_empty`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor, nn

from latticode.core.pretrained import WEIGHTS, load_model

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
LINEAR_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth"


def constant(network: nn.Module) -> nn.Module:
    """`network` in eval mode with its parameters and buffers turned into buffers that no state dict holds."""
    for module in network.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            delattr(module, name)
            module.register_buffer(name, tensor.detach(), persistent=False)
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False  # or it would ask every state that is loaded for its count of batches
    return network.eval()


class Perceptual(nn.Module, ABC):
    """A perceptual loss: `forward(output, target)` is the distance.

    `name` is the network's, for reports; `kind` is short: lpips or classifier.

    Examples:
        A network gives feature maps, the distance follows:

        >>> class Pixels(Perceptual):
        ...     name = kind = "pixels"
        ...     def stages(self, images):
        ...         return [images]
        >>> images = torch.ones(1, 3, 8, 8)
        >>> float(Pixels()(images, images)), round(float(Pixels()(-images, images)), 3)
        (0.0, 4.0)
    """

    name: str
    kind: str

    @abstractmethod
    def stages(self, images: Tensor) -> Sequence[Tensor]:
        """The feature maps (B, F, h, w) of `images` that are compared."""

    def weigh(self, stage: int, squares: Tensor) -> Tensor:
        """(B, F, h, w) squared differences of unit vectors to (B, h, w)."""
        return squares.sum(1)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean over images of the sum over stages of the mean over positions; the gradient goes to `output` only."""
        with torch.no_grad():
            wanted = [_unit(h) for h in self.stages(target)]
        total = torch.zeros((), device=output.device)
        for stage, (h, goal) in enumerate(zip(self.stages(output), wanted, strict=True)):
            total = total + self.weigh(stage, (_unit(h) - goal).square()).mean()
        return total

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        held = [buffer.detach() for buffer in self.buffers()]
        super()._apply(fn, recurse)
        for now, before in zip(self.buffers(), held, strict=True):
            if not now.is_meta:
                now.copy_(before)  # `to_empty` leaves whatever was in memory
        return self

    def train(self, mode: bool = True) -> Self:
        """Always eval mode: the network is a constant of the loss."""
        return super().train(False)


class FeatureDistance(Perceptual):
    """The features of a classifier that was trained here, layer by layer, every channel counting the same.

    Its number is comparable only under the same classifier, and it is no LPIPS: nothing was fitted to what people see.

    Args:
        run: the folder of the classifier's run.

    Raises ValueError for a run of another model; calling it, for images of other channels.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from latticode.metrics import Classifier
        >>> images = torch.rand(2, 3, 32, 32) * 2 - 1
        >>> with TemporaryDirectory() as folder:
        ...     run = Classifier(classes=10, channels=3, width=4).save_pretrained(folder)
        ...     perceptual = FeatureDistance(str(run))
        >>> float(perceptual(images, images)), bool(perceptual(0 * images, images) > 0)
        (0.0, True)
    """

    kind = "classifier"

    def __init__(self, run: str):
        super().__init__()
        self.run = run
        with torch.device("cpu"):
            network = load_model(Path(run))
        if not isinstance(getattr(network, "body", None), nn.Sequential):
            raise ValueError(f"{run} holds a {type(network).__name__}; a classifier is needed")
        self.channels = int(network.channels)
        self.body = constant(network.body)
        digest = hashlib.sha256((Path(run) / WEIGHTS).read_bytes()).hexdigest()
        self.name = f"features of {run}, SHA-256 {digest[:16]}"

    def stages(self, images: Tensor) -> list[Tensor]:
        """What every rectifier lets through."""
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(f"{self.run} sees images (B, {self.channels}, H, W), got {tuple(images.shape)}")
        found, h = [], images
        for layer in self.body:  # type: ignore[union-attr]
            h = layer(h)
            if isinstance(layer, nn.ReLU):
                found.append(h)
        return found


class LPIPS(Perceptual):
    """The perceptual loss LPIPS 0.1 on VGG16 (Zhang et al. 2018, arXiv 1801.03924, eq. 1).

    Its weights were fitted to what people see as different.

    Grey images are shown in three equal channels.

    Args:
        vgg: file of VGG16's weights (`features.0.weight`, ...); by default where torchvision keeps it.
        linear: file of the weights of the five stages (`lin0.model.1.weight`, ...); by default where torch-fidelity
            keeps it. Files are .safetensors or .pth; nothing is downloaded.

    Raises ValueError, saying what to get and where to put it, for a file that is not there or does not fit.

    Examples:
        >>> try:
        ...     distance = LPIPS()(torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64))
        ... except ValueError as error:  # where the weights are not on this machine
        ...     assert "get https://" in str(error)
    """

    shift: Tensor
    scale: Tensor

    name, kind = "LPIPS 0.1, VGG16", "lpips"
    widths = (64, 128, 256, 512, 512)
    convolutions = (2, 2, 3, 3, 3)

    def __init__(self, vgg: str | None = None, linear: str | None = None):
        super().__init__()
        self.vgg, self.linear = vgg, linear
        kept = Path(torch.hub.get_dir()) / "checkpoints"
        files = {
            url: Path(given or kept / url.rpartition("/")[2]) for url, given in ((VGG_URL, vgg), (LINEAR_URL, linear))
        }
        if missing := [f"{url} as {path}" for url, path in files.items() if not path.is_file()]:
            raise ValueError(
                f"LPIPS lacks its weights: get {' and '.join(missing)}. With latticode[perceptual] installed, "
                "torch_fidelity's and torchvision's own LPIPS put them there; or use the perceptual type 'features', "
                "which needs a classifier trained here"
            )
        with torch.device("cpu"):
            body, at = [], 3
            for stage, (width, count) in enumerate(zip(self.widths, self.convolutions, strict=True)):
                body += [nn.MaxPool2d(2)] if stage else []
                for _ in range(count):
                    body += [nn.Conv2d(at, width, 3, padding=1), nn.ReLU()]
                    at = width
            features = nn.Sequential(*body)
            heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in self.widths)
            _fill(features, files[VGG_URL], "features.")
            _fill(heads, files[LINEAR_URL], "lin", ".model.1")
            self.features, self.heads = constant(features), constant(heads)
            for key, values in (("shift", (-0.030, -0.088, -0.188)), ("scale", (0.458, 0.448, 0.450))):
                self.register_buffer(key, torch.tensor(values)[:, None, None], persistent=False)

    def stages(self, images: Tensor) -> list[Tensor]:
        """The last rectifier before each halving, and the last of all."""
        if images.ndim != 4 or images.shape[1] not in (1, 3) or min(images.shape[2:]) < 16:
            raise ValueError(f"LPIPS sees images (B, 1 or 3, H, W) of at least 16 px, got {tuple(images.shape)}")
        found, h = [], (images - self.shift) / self.scale
        for layer in self.features:  # type: ignore[union-attr]
            if isinstance(layer, nn.MaxPool2d):
                found.append(h)
            h = layer(h)
        return [*found, h]

    def weigh(self, stage: int, squares: Tensor) -> Tensor:
        return self.heads[stage](squares)[:, 0]  # type: ignore[index,operator]


def _unit(h: Tensor) -> Tensor:
    """(B, F, h, w) with features of length 1 at every position; where none is active they stay 0, with a gradient."""
    return h / (h.float().square().sum(1, keepdim=True) + 1e-10).sqrt()


def _fill(module: nn.Module, path: Path, prefix: str, infix: str = "") -> None:
    """Load `module`'s tensor n.rest from that called <prefix>n<infix>.rest in the file, strictly."""
    found: Mapping[str, Any]
    if path.suffix == ".safetensors":
        found = safetensors.torch.load_file(path)
    else:
        found = torch.load(path, map_location="cpu", weights_only=True)
    state = {}
    for key, tensor in module.state_dict().items():
        number, _, rest = key.partition(".")
        name = f"{prefix}{number}{infix}.{rest}"
        if name not in found or found[name].shape != tensor.shape:
            have = tuple(found[name].shape) if name in found else "none"
            raise ValueError(f"{path} does not fit: {name} must be {tuple(tensor.shape)}, the file has {have}")
        state[key] = found[name]
    module.load_state_dict(state)
