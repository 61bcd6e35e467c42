"""COCO's panoptic format (https://cocodataset.org/#format-data): a JSON file, its folder of PNGs, and the photographs.

The JSON file lists pictures, categories and, for each picture, segments; `annotations/panoptic_val2017.json` has its
PNGs in the folder of the same name. The colour of a pixel is the id of its segment, R + 256 G + 65536 B, 0 = none.
"""

from __future__ import annotations

import json
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latticode.data.media import DENSE, Medium
from latticode.data.records import Record, Source, part_of, select
from latticode.data.transforms import ImageError, decode_image

SEMANTIC, INSTANCE = "sem.png", "inst.png"  # the label maps that the format holds, named as in other sources


class Annotation(NamedTuple):
    """A picture, the PNG of its segments, and what they are.

    Examples:
        >>> one = Annotation("val/a", Path("val/a.jpg"), Path("panoptic_val/a.png"), {5: (0, 1)})
        >>> one.segments[5]  # class 0, instance 1
        (0, 1)
    """

    name: str
    photo: Path
    png: Path
    segments: dict[int, tuple[int, int]]  # id -> class, and instance (0 = none)


class Segments:
    """The PNG of a picture, decoded when one of its maps is asked for.

    Examples:
        >>> from io import BytesIO
        >>> from PIL import Image
        >>> file = BytesIO()
        >>> Image.new("RGB", (2, 1), (5, 0, 0)).save(file, "PNG")  # every pixel is of segment 5
        >>> segments = Segments(file.getvalue(), {5: (3, 1)}, void=9)
        >>> segments.labels(0).tolist(), segments.labels(1).tolist()
        ([[3, 3]], [[1, 1]])
    """

    def __init__(self, file: bytes, segments: dict[int, tuple[int, int]], void: int):
        self.file, self.known = file, dict(sorted({0: (void, 0), **segments}.items()))

    @cached_property
    def _place(self) -> np.ndarray:
        """(H, W): which of the known segments each pixel is of."""
        red, green, blue = (
            np.asarray(band, np.int32) for band in decode_image(self.file, "segments").convert("RGB").split()
        )
        pixels, known = red + 256 * green + 65536 * blue, np.asarray(list(self.known))
        place = np.searchsorted(known, pixels).clip(max=len(known) - 1)
        if (wrong := known[place] != pixels).any():
            unknown = ", ".join(map(str, np.unique(pixels[wrong])[:5]))
            raise ImageError(f"segments {unknown} are in the PNG but not in the JSON file")
        return place

    def labels(self, which: int) -> np.ndarray:
        """(H, W) int32: class (0) or instance (1) of every pixel."""
        return np.asarray(list(self.known.values()), np.int32)[self._place, which]


class PanopticSource(Source):
    """Classes are numbered by category id from 0; `void`, the number after the last, stands for pixels of no segment
    and for crowds. Instances of things are numbered from 1, stuff has none.

    Examples:
        >>> from io import BytesIO
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> content = {
        ...     "images": [{"id": 1, "file_name": "a.png"}],
        ...     "categories": [{"id": 7, "name": "cat", "isthing": 1}],
        ...     "annotations": [
        ...         {"image_id": 1, "file_name": "a.png", "segments_info": [{"id": 5, "category_id": 7}]}
        ...     ],
        ... }
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "panoptic_train.json"
        ...     _ = file.write_text(json.dumps(content))
        ...     for part in ("train", "panoptic_train"):  # photographs, and PNGs of segments
        ...         (Path(folder) / part).mkdir()
        ...         Image.new("RGB", (4, 4), (5, 0, 0)).save(Path(folder) / part / "a.png")
        ...     source = PanopticSource("pets", [file])
        ...     record = source[0]
        >>> source.categories, int(record.maps["sem.png"]().max()), int(record.maps["inst.png"]().max())
        (('cat',), 0, 1)
    """

    classes = ()

    def __init__(self, name: str, files: list[Path]):
        self.name = name
        self.annotations: list[Annotation] = []
        self.parts: list[str | None] = []
        self.categories: tuple[str, ...] = ()
        for path in files:
            try:
                content = json.loads(path.read_text())
                categories = sorted(content["categories"], key=lambda category: category["id"])
                names = tuple(category["name"] for category in categories)
                if self.categories and names != self.categories:
                    raise ValueError("its categories are not those of the other files")
                self.categories, self.void = names, len(names)
                found = _read(path, content, categories)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path} is not a panoptic annotation file of COCO: {type(error).__name__}: {error}"
                ) from error
            self.annotations += found
            self.parts += [part_of(path.stem.removeprefix("panoptic_"))] * len(found)

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, i: int) -> Record:
        annotation = self.annotations[i]
        segments = Segments(annotation.png.read_bytes(), annotation.segments, self.void)
        maps = {SEMANTIC: partial(segments.labels, 0), INSTANCE: partial(segments.labels, 1)}
        return Record(annotation.photo.read_bytes(), -1, annotation.name, maps=maps)

    def name_of(self, i: int) -> str:
        return self.annotations[i].name


def find(folder: Path) -> list[Path]:
    """The annotation files of a folder laid out as COCO is, or [] if it is not."""
    found = sorted(folder.glob("annotations/panoptic_*.json")) or sorted(folder.glob("panoptic_*.json"))
    return [path for path in found if path.with_suffix("").is_dir()]


def open_coco(name: str, files: list[Path], split: str, holdout: float, medium: Medium = DENSE) -> Source:
    """The pictures of one or several annotation files; panoptic_train2017.json is of the split train.

    Raises ValueError for label maps that the format does not have, and for files that are not of the format.
    """
    if not medium.maps or not set(medium.maps) <= {SEMANTIC, INSTANCE}:
        raise ValueError(
            f"{name!r} has the label maps {SEMANTIC} and {INSTANCE} for data.maps of data.kind=dense, "
            f"got {', '.join(medium.maps) or 'none'}"
        )
    source = PanopticSource(name, files)
    return select(source, source.parts if len(files) > 1 else None, split, holdout)


def _read(path: Path, content: dict[str, Any], categories: list[dict[str, Any]]) -> list[Annotation]:
    number = {category["id"]: i for i, category in enumerate(categories)}
    things = {category["id"] for category in categories if category.get("isthing")}
    photos = {picture["id"]: picture["file_name"] for picture in content["images"]}
    folder, found = None, []
    for annotation in content["annotations"]:
        segments = {}
        for place, segment in enumerate(annotation["segments_info"], 1):
            category = segment["category_id"]
            if category not in number:
                raise ValueError(f"segment {segment['id']} is of category {category}, which it does not list")
            is_thing = category in things
            crowd = bool(segment.get("iscrowd"))
            segments[segment["id"]] = (
                len(number) if crowd else number[category],
                place if is_thing and not crowd else 0,
            )
        photo = photos[annotation["image_id"]]
        folder = folder or _folder_of(path, photo)
        found.append(
            Annotation(f"{path.stem}/{photo}", folder / photo, path.with_suffix("") / annotation["file_name"], segments)
        )
    return found


def _folder_of(path: Path, photo: str) -> Path:
    """Where the photographs are: val2017 for panoptic_val2017.json, else any folder around that has the first one."""
    around = [path.parent, path.parent.parent]
    named = [base / path.stem.removeprefix("panoptic_") for base in around]
    others = [folder for base in around for folder in (base, *sorted(base.iterdir())) if (folder / photo).is_file()]
    found = [*filter(Path.is_dir, named), *others]
    if not found:
        raise ValueError(f"its first photograph {photo} is in no folder beside it, nor beside {path.parent}")
    return found[0]
