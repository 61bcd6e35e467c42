"""Embedded data sets (`embedded:NAME`): images inside scikit-learn and scikit-image, and synthetic ones; offline."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from latticode.data.folders import FileSource
from latticode.data.media import AUDIO, DENSE, IMAGE, VIDEO
from latticode.data.records import ArraySource, Source, select
from latticode.data.synthetic import MovingDigits, Shapes, Tones

# Every colour photograph of everyday things in the two wheels. Left out: drawings and charts, grey pictures, medical
# and astronomical ones (ihc, retina, hubble_deep_field), and color.png. motorcycle_left and _right are one stereo pair.
TRAIN_PHOTOS = (
    "skimage/data/chelsea.png",
    "skimage/data/coffee.png",
    "skimage/data/motorcycle_left.png",
    "skimage/data/motorcycle_right.png",
    "skimage/data/rocket.jpg",
    "sklearn/datasets/images/flower.jpg",
)
TEST_PHOTOS = ("skimage/data/astronaut.png", "sklearn/datasets/images/china.jpg")


def open_digits(name: str, split: str, holdout: float) -> Source:
    """1,797 handwritten digits, 8x8 grey, 10 classes (UCI optical recognition, in scikit-learn); 0..16 -> 0..255."""
    from sklearn.datasets import load_digits

    data, labels = load_digits(return_X_y=True)
    images = np.rint(np.asarray(data).reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    names = [f"digits/{i:04d}" for i in range(len(images))]
    source = ArraySource(name, images, np.asarray(labels, np.int64), tuple("0123456789"), names)
    return select(source, None, split, holdout)


def open_faces(name: str, split: str, holdout: float) -> Source:
    """100 faces and 100 other patches of Labeled Faces in the Wild, 25x25 grey, 2 classes (in scikit-image)."""
    patches = np.load(_locate("skimage/data/lfw_subset.npy"), allow_pickle=False)  # (200, 25, 25) float in [0, 1]
    images = np.rint(patches * 255).astype(np.uint8)
    names = [f"faces/{i:03d}" for i in range(len(images))]
    source = ArraySource(name, images, np.repeat([0, 1], 100), ("face", "other"), names)
    return select(source, None, split, holdout)


def open_photos(name: str, split: str, holdout: float) -> Source:
    """Eight colour photographs, 300 to 741 pixels a side, unlabelled. Test: astronaut and china; train: the rest."""
    paths = {"train": TRAIN_PHOTOS, "test": TEST_PHOTOS, "all": TRAIN_PHOTOS + TEST_PHOTOS}[split]
    files = [_locate(path) for path in paths]
    return _Photos(name, Path(), [str(file) for file in files], [-1] * len(files), ())


class _Photos(FileSource):
    def name_of(self, i: int) -> str:
        return Path(self.files[i]).name


def open_tones(name: str, split: str, holdout: float) -> Source:
    """240 synthetic vowels of 0.3 to 0.5 s at 8 kHz, 5 classes: for trying audio out."""
    return select(Tones(name), None, split, holdout)


def open_moving_digits(name: str, split: str, holdout: float) -> Source:
    """1,797 clips of 12 frames, 32x32 grey: the digits, each flying through the picture. 10 classes."""
    digits = open_digits(name, "all", holdout)
    assert isinstance(digits, ArraySource)
    return select(MovingDigits(name, digits), None, split, holdout)


def open_shapes(name: str, split: str, holdout: float) -> Source:
    """300 made-up photographs, 64x64, of balls and boxes in a room, with depth, classes and instances."""
    return select(Shapes(name), None, split, holdout)


SETS = {
    "digits": (IMAGE, open_digits),
    "faces": (IMAGE, open_faces),
    "photos": (IMAGE, open_photos),
    "tones": (AUDIO, open_tones),
    "moving-digits": (VIDEO, open_moving_digits),
    "shapes": (DENSE, open_shapes),
}


def _locate(path: str) -> Path:
    """A data file of an installed package, found without importing it. Raises ValueError if it is not there."""
    package, _, rest = path.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    for folder in spec.submodule_search_locations or []:
        if (file := Path(folder) / rest).is_file():
            return file
    raise ValueError(f"the embedded file {path} is missing: is {package} installed from its wheel?")
