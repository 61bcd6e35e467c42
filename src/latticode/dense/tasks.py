"""Dense tasks: depth estimation, panoptic segmentation, colorization; each with its losses, metrics and pictures.

A dense example is one integer tensor: RGB 0..255, then the label maps of its task (`data.dense`). Everything that a
model knows of a task is in these objects, which have no parameters. Sources: UViM (arXiv 2205.10337) and FSQ (arXiv
2309.15505), table 2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode.core.derived import constant
from latticode.core.values import to_float, to_uint8
from latticode.metrics.dense import ClassMetrics, ColorizationMetrics, DepthMetrics, PanopticMetrics
from latticode.viz.pictures import ramp_colours, segment_colours

IGNORED = -1  # the target of a pixel without a label
LABELS = 5  # steps that are named beside the colours of depth
Colour = tuple[int, ...]  # RGB 0..255


class Task(nn.Module, ABC):
    """A dense task. `inputs` are examples (B, 3 + maps, H, W), integers; `output` is what a model gives for them.

    Examples:
        >>> task: Task = Colorization()  # one of them; `PixelClasses` shows how to make another
        >>> photo = torch.full((1, 3, 2, 2), 255, dtype=torch.int32)
        >>> task.maps, task.losses(task.label(photo), photo)
        (0, {'mse': tensor(0.)})
        >>> task.label_maps(photo[:, :2])
        Traceback (most recent call last):
        ValueError: Colorization takes integers (B, 3, H, W), RGB and 0 label maps, got torch.int32 (1, 2, 2, 2); ...
    """

    maps: int  # label maps behind the RGB of an example
    classes: tuple[int, ...]  # sizes of the one-hot codes that `label` stacks; () = the label is no classification
    channels: int  # that `output` has

    def image(self, inputs: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1]: all that a prediction may be made of. Label maps may be missing from `inputs`."""
        return to_float(inputs[:, :3])

    @abstractmethod
    def label(self, inputs: Tensor) -> Tensor:
        """(B, C, H, W) float: what may be hidden in the code, C = sum(classes) or the channels of a picture."""

    @abstractmethod
    def losses(self, output: Tensor, inputs: Tensor) -> dict[str, Tensor]:
        """Unweighted scalars by name. A pixel without a label has no part in them."""

    @abstractmethod
    def predict(self, output: Tensor, image: Tensor) -> Tensor:
        """(B, P, H, W), the prediction in the task's own unit."""

    @abstractmethod
    def metrics(self) -> Any:
        """A fresh scorer as those of `latticode.metrics.dense`: update(prediction, inputs), compute() to a dict with
        `count`, `shown` (the names that training logs), `protocol`."""

    @abstractmethod
    def picture(self, prediction: Tensor) -> Tensor:
        """(B, 3, H, W) uint8: a prediction to look at."""

    def legend(self, prediction: Tensor) -> list[tuple[str, Colour]]:
        """What the colours of the picture of predictions (B, P, H, W) mean; a text may be empty."""
        return []

    def enlarge(self, prediction: Tensor, image: Tensor) -> Tensor:
        """A prediction (1, P, h, w) at the size of the photograph (1, 3, H, W) RGB in [-1, 1] that it is of."""
        return F.interpolate(prediction.double(), image.shape[2:], mode="nearest-exact").to(prediction.dtype)

    def label_maps(self, inputs: Tensor) -> Tensor:
        """(B, maps, H, W) int64. Raises ValueError if `inputs` are not examples of this task."""
        if inputs.ndim != 4 or inputs.shape[1] != 3 + self.maps or inputs.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} takes integers (B, {3 + self.maps}, H, W), RGB and {self.maps} label maps, "
                f"got {inputs.dtype} {tuple(inputs.shape)}; data.maps names the label maps"
            )
        return inputs[:, 3:].long()


class PixelClasses(Task):
    """A task that puts every pixel in a class, once for each of `classes`; the loss is the mean cross entropy.

    Examples:
        >>> class Water(PixelClasses):  # where a map of 0 (land), 1 (water) and 255 (unknown) says that there is some
        ...     maps, classes, channels, terms = 1, (2,), 2, ("water",)
        ...     def targets(self, inputs):
        ...         numbers = self.label_maps(inputs)
        ...         return numbers.where(numbers < 2, IGNORED)
        ...     def predict(self, output, image):
        ...         return output.argmax(1, keepdim=True)
        >>> task = Water()
        >>> scene = torch.tensor([0, 0, 0, 1], dtype=torch.int32).view(1, 4, 1, 1)
        >>> task.predict(task.label(scene), task.image(scene)), task.losses(torch.zeros(1, 2, 1, 1), scene)
        (tensor([[[[1]]]]), {'water': tensor(0.6931)})
    """

    terms: tuple[str, ...]  # names of the losses

    @abstractmethod
    def targets(self, inputs: Tensor) -> Tensor:
        """(B, len(classes), H, W) int64: the class, or IGNORED."""

    def label(self, inputs: Tensor) -> Tensor:
        """(B, sum(classes), H, W): the one-hot codes, all zero where a pixel has no label."""
        return torch.cat(
            [_one_hot(*pair) for pair in zip(self.targets(inputs).unbind(1), self.classes, strict=True)], 1
        )

    def losses(self, output: Tensor, inputs: Tensor) -> dict[str, Tensor]:
        parts = zip(self.terms, output.split(self.classes, 1), self.targets(inputs).unbind(1), strict=True)
        return {term: _cross_entropy(logits, target) for term, logits, target in parts}

    def metrics(self) -> Any:
        """The share of pixels that are predicted as from the label itself."""
        return ClassMetrics(
            lambda inputs: self.predict(self.label(inputs), self.image(inputs)),
            lambda inputs: (self.targets(inputs) != IGNORED).all(1, keepdim=True),
        )

    def picture(self, prediction: Tensor) -> Tensor:
        """A colour for each number of the first map."""
        return segment_colours(prediction[:, 0].long(), torch.zeros_like(prediction[:, 0]).long())


class Depth(PixelClasses):
    """Distance in metres, as one of `bins` equal parts of low .. high metres.

    The label map holds integers, `scale` of them to the metre (millimetres: 1000), 0 = not measured. What falls into
    the first bin is ignored, as missing depth lies there; what is farther than `high` is in the last.

    Args:
        scale: numbers of the label map to the metre.
        bins: >= 2.
        low, high: metres, 0 <= low < high.

    Raises:
        ValueError: for arguments outside the above.

    Examples:
        >>> task = Depth(scale=1000.0, bins=4, high=8.0)
        >>> scene = torch.zeros(1, 4, 1, 3, dtype=torch.int32)  # RGB and millimetres
        >>> scene[0, 3] = torch.tensor([[0, 3000, 9000]])
        >>> task.targets(scene).flatten()  # nothing measured, 2 .. 4 m, the last bin
        tensor([-1,  1,  3])
        >>> task.predict(task.label(scene), task.image(scene)).flatten()[1:]
        tensor([3.0006, 7.0001])
    """

    maps, terms = 1, ("depth",)

    def __init__(self, scale: float | None = None, bins: int = 256, low: float = 1e-3, high: float = 10.0):
        super().__init__()
        if scale is None or not scale > 0:
            raise ValueError(f"16-bit depth needs task.scale, units per metre (1000 for millimetres), got {scale}")
        if bins < 2 or not 0 <= low < high:
            raise ValueError(f"depth needs bins >= 2 and 0 <= low < high, got bins {bins}, low {low}, high {high}")
        self.scale, self.bins, self.low, self.high = scale, bins, low, high
        self.classes, self.channels = (bins,), bins

    def metres(self, inputs: Tensor) -> Tensor:
        """(B, 1, H, W) float: the true distance, 0 where it was not measured."""
        return self.label_maps(inputs).float() / self.scale

    def targets(self, inputs: Tensor) -> Tensor:
        share = (self.metres(inputs) - self.low) / (self.high - self.low)
        found = (share * self.bins).floor().clamp(0, self.bins - 1).long()
        return found.where(found > 0, IGNORED)

    def predict(self, output: Tensor, image: Tensor) -> Tensor:
        """(B, 1, H, W) metres: the middle of the likeliest bin."""
        share = (output.argmax(1, keepdim=True) + 0.5) / self.bins
        return self.low + share * (self.high - self.low)

    def metrics(self) -> DepthMetrics:
        return DepthMetrics(self.metres, self.low, self.high)

    def picture(self, prediction: Tensor) -> Tensor:
        """What is near is light, from the nearest to the farthest of the batch."""
        near, far = _extremes(prediction)
        return ramp_colours((far - prediction[:, 0]) / (far - near))

    def legend(self, prediction: Tensor) -> list[tuple[str, Colour]]:
        near, far = _extremes(prediction)
        share = torch.linspace(1, 0, 4 * LABELS + 1)
        colours = ramp_colours(share[None, None])[0, :, 0].T.tolist()
        texts = [f"{far - (far - near) * float(x):.2f} m" if i % 4 == 0 else "" for i, x in enumerate(share)]
        return list(zip(texts, map(tuple, colours), strict=True))


class Panoptic(PixelClasses):
    """The class of every pixel and, for classes of things, which one of them it belongs to.

    The two label maps hold class numbers 0 .. C - 1, or `void`, and instance numbers in any order, 0 = none. An
    example's instances are numbered anew, by their centres of mass in reading order; beyond `instances` of them the
    smallest are ignored.

    Args:
        categories: the names of the C classes, or their number.
        things: which of them have instances, by name or number.
        instances: the most that a picture may have.
        void: the number that stands for no class, if there is one; such pixels are ignored.

    Raises:
        ValueError: for categories of one name, things that are none of them, instances < 1, and a void that is one.

    Examples:
        >>> task = Panoptic(["sky", "bird"], things=["bird"], instances=4, void=255)
        >>> scene = torch.zeros(1, 5, 1, 4, dtype=torch.int32)  # RGB, classes, instances
        >>> scene[0, 3] = torch.tensor([[0, 1, 1, 255]])
        >>> scene[0, 4] = torch.tensor([[0, 7, 3, 0]])
        >>> semantic, instance = task.targets(scene).unbind(1)
        >>> semantic.flatten(), instance.flatten()
        (tensor([ 0,  1,  1, -1]), tensor([-1,  0,  1, -1]))
        >>> task.predict(task.label(scene), task.image(scene))[0, 1, 0, :3]  # instances from 1, 0 = none
        tensor([0, 1, 2])
    """

    maps, terms = 2, ("semantic", "instance")

    def __init__(
        self,
        categories: Sequence[str] | int,
        things: Sequence[str | int],
        instances: int = 100,
        void: int | None = None,
    ):
        super().__init__()
        self.categories, self.things, self.instances, self.void = categories, list(things), instances, void
        self.names = tuple(map(str, range(categories) if isinstance(categories, int) else categories))
        known = {name: i for i, name in enumerate(self.names)} | {i: i for i in range(len(self.names))}
        if len(set(self.names)) != len(self.names) or not self.names:
            raise ValueError(f"categories need different names, and at least one, got {categories}")
        if not self.things or not set(self.things) <= set(known):
            raise ValueError(f"things must be some of the categories {', '.join(self.names)}; got {self.things}")
        if instances < 1:
            raise ValueError(f"instances must be >= 1, got {instances}")
        if void is not None and 0 <= void < len(self.names):
            raise ValueError(f"void must not be the number of a category, 0..{len(self.names) - 1}, got {void}")
        self.of_things = sorted({known[thing] for thing in self.things})  # class numbers
        self.classes, self.channels = (len(self.names), instances), len(self.names) + instances

    def targets(self, inputs: Tensor) -> Tensor:
        """Raises ValueError for a class number that is neither a category nor void."""
        semantic, instance = self.label_maps(inputs).unbind(1)
        valid = (semantic >= 0) & (semantic < len(self.names))
        if not (valid if self.void is None else valid | (semantic == self.void)).all():
            wrong = semantic[~valid].unique().tolist()
            raise ValueError(
                f"class numbers must lie in 0..{len(self.names) - 1} (void: {self.void}), got "
                f"{', '.join(map(str, [number for number in wrong if number != self.void][:5]))}"
            )
        thing = valid & self._is_thing(semantic.device)[semantic.where(valid, 0)] & (instance != 0)
        ids = (1 + instance * len(self.names) + semantic) * thing  # numbers may start again in every class
        return torch.stack([semantic.where(valid, IGNORED), number_instances(ids, self.instances)], 1)

    def predict(self, output: Tensor, image: Tensor) -> Tensor:
        """(B, 2, H, W) int64: class and instance, 1 .. instances, 0 for classes without.

        Where the likeliest class is one of things, the pixels of one instance have the class of things with the largest
        sum of its logits over them.
        """
        semantic, instance = output.float().split(self.classes, 1)
        found = semantic.argmax(1)  # (B, H, W)
        is_thing = self._is_thing(found.device)
        thing = is_thing[found]
        slot = instance.argmax(1)
        place = (slot + self.instances * torch.arange(len(slot), device=slot.device)[:, None, None])[thing]
        sums = semantic.new_zeros(len(slot) * self.instances, len(self.names))
        sums.index_add_(0, place, semantic.movedim(1, -1)[thing])
        classes = sums.masked_fill(~is_thing, -torch.inf).argmax(1)
        found[thing] = classes[place]
        return torch.stack([found, (slot + 1) * thing], 1)

    def metrics(self) -> PanopticMetrics:
        return PanopticMetrics(self.label_maps, self.names, self.of_things)

    def _is_thing(self, device: torch.device) -> Tensor:
        """Of each class (categories,) bool."""
        return constant([i in self.of_things for i in range(len(self.names))], torch.bool, device)

    def picture(self, prediction: Tensor) -> Tensor:
        """A hue for each class, with a shade for each instance; segments have dark outlines."""
        return segment_colours(*prediction.unbind(1))

    def legend(self, prediction: Tensor) -> list[tuple[str, Colour]]:
        """The classes that occur, the largest first."""
        numbers, sizes = prediction[:, 0].unique(return_counts=True)
        ordered = numbers[sizes.argsort(descending=True)].cpu()
        colours = segment_colours(ordered[:, None, None], torch.zeros_like(ordered)[:, None, None])[:, :, 0, 0]
        return [(self.names[i], tuple(colour)) for i, colour in zip(ordered.tolist(), colours.tolist(), strict=True)]


class Colorization(Task):
    """Colorization of a grey photograph. The label is the photograph itself, so examples have no label maps.

    Examples:
        >>> task = Colorization()
        >>> red = torch.tensor([255, 0, 0], dtype=torch.int32).view(1, 3, 1, 1)
        >>> ((task.image(red) + 1) * 127.5).flatten()  # the grey that a prediction sees
        tensor([76., 76., 76.])
        >>> task.label(red).flatten()
        tensor([ 1., -1., -1.])
    """

    maps, classes, channels = 0, (), 3

    def image(self, inputs: Tensor) -> Tensor:
        """The grey of ITU-R 601 in 8 bits, as Pillow's, three times."""
        return to_float(_grey(inputs)).expand(-1, 3, -1, -1)

    def label(self, inputs: Tensor) -> Tensor:
        """(B, 3, H, W) RGB in [-1, 1]."""
        self.label_maps(inputs)
        return to_float(inputs)

    def losses(self, output: Tensor, inputs: Tensor) -> dict[str, Tensor]:
        return {"mse": F.mse_loss(output, self.label(inputs))}

    def predict(self, output: Tensor, image: Tensor) -> Tensor:
        """(B, 3, H, W) RGB in [-1, 1]."""
        return output.clamp(-1, 1)

    def metrics(self) -> ColorizationMetrics:
        return ColorizationMetrics(self.label)

    def picture(self, prediction: Tensor) -> Tensor:
        return to_uint8(prediction)

    def enlarge(self, prediction: Tensor, image: Tensor) -> Tensor:
        """The predicted colours with the photograph's own luminance, which is all that is known of its details."""
        colours = F.interpolate(prediction.float(), image.shape[2:], mode="bilinear", antialias=True)
        change = _grey(to_uint8(image)) - _grey(to_uint8(colours))
        return (colours + change / 127.5).clamp(-1, 1)


def _grey(pixels: Tensor) -> Tensor:
    """(B, 1, H, W) int 0..255 of RGB (B, 3 or more, H, W) 0..255."""
    red, green, blue = pixels[:, :3].int().split(1, 1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _extremes(depth: Tensor) -> tuple[float, float]:
    near, far = float(depth.min()), float(depth.max())
    return near, max(far, near + 1e-3)


def number_instances(ids: Tensor, most: int) -> Tensor:
    """Instance numbers 0, 1, ... by the centres of mass in reading order, for ids (B, H, W) int64, 0 = none.

    The order is that of the mean row-major position of an instance's pixels, rounded down; of two with the same the
    larger comes first, then the one that begins first: so it does not depend on the ids. Of more than `most` instances
    of a picture the smallest are left out. IGNORED where there is none.
    """
    return torch.stack([_numbered(one, most) for one in ids])


def _numbered(ids: Tensor, most: int) -> Tensor:
    known, member, size = ids.flatten().unique(return_inverse=True, return_counts=True)
    position = torch.arange(ids.numel(), device=ids.device)
    first = torch.zeros_like(known).scatter_reduce(0, member, position, "amin", include_self=False)
    centre = torch.zeros_like(known).scatter_add(0, member, position) // size
    size = size.where(known != 0, 0)
    largest = (size * ids.numel() - first).argsort(descending=True)[: min(most, int((size > 0).sum()))]
    ordered = largest[centre[largest].argsort(stable=True)]
    number = torch.full_like(known, IGNORED)
    number[ordered] = torch.arange(len(ordered), device=ids.device)
    return number[member].view_as(ids)


def _one_hot(target: Tensor, size: int) -> Tensor:
    """(B, size, H, W) float of (B, H, W), all zero where IGNORED."""
    known = (target != IGNORED)[:, None]
    return known.new_zeros(len(target), size, *target.shape[1:], dtype=torch.float32).scatter_(
        1, target.clamp(min=0)[:, None], known.float()
    )


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The mean over the pixels that are not IGNORED; 0 if there are none."""
    total = F.cross_entropy(logits.float(), target, ignore_index=IGNORED, reduction="sum")
    return total / (target != IGNORED).sum().clamp(min=1)
