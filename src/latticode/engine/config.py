"""Configuration of a run: the recipe's schema, its overrides, and its completion from data and tokenizer."""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
)

from latticode.core import registry, renamed
from latticode.core.mappings import differences
from latticode.core.plugins import Table
from latticode.core.registry import SpecError, nearest
from latticode.data import AudioPreprocess, DensePreprocess, Preparation, Preprocess, VideoPreprocess
from latticode.engine.schedules import RAMP_KEYS, Ramp, at_end, ramps_in


class ConfigError(ValueError):
    """A recipe or override that cannot be run, with what would be valid."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a string; people mean the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.(inf|nan)$"),
    list("-+0123456789."),
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class DataConfig(_Section, ABC):
    """Where the examples come from and how they are brought to one shape; `kind` says what they are.

    Examples:
        >>> data = load_config("fsq-tokenizer").data  # of one kind of data
        >>> isinstance(data, DataConfig), data.kind, data.split
        (True, 'image', 'train')
    """

    source: str
    split: Literal["train", "test", "all"] = "train"
    holdout: float = Field(
        default=0.1, gt=0, lt=1, description="share kept for testing where the source has no test split"
    )
    workers: NonNegativeInt = 2

    @abstractmethod
    def _preparation(self) -> Preparation: ...

    def preprocess(self) -> Preparation:
        """The preparation of examples that this section describes. Raises ConfigError."""
        try:
            return self._preparation()
        except ValueError as error:
            raise ConfigError(f"data: {error}") from None


class ImageData(DataConfig):
    """`data` of a recipe for images.

    Examples:
        >>> ImageData(source="photos/", size=64, flip=True).preprocess().shape
        (3, 64, 64)
    """

    kind: Literal["image"] = "image"
    size: PositiveInt | None = None
    channels: Literal[1, 3] = 3
    resize: str = "bicubic"
    crop: str = "center"
    flip: bool = False

    def _preparation(self) -> Preparation:
        return Preprocess(self.size, self.channels, self.resize, self.crop, self.flip)


class AudioData(DataConfig):
    """`data` of a recipe for recordings.

    Examples:
        >>> AudioData(kind="audio", source="speech/", rate=16000, length=8000).preprocess().shape
        (1, 8000)
    """

    kind: Literal["audio"]
    rate: PositiveInt = Field(description="samples per second; others are resampled")
    length: PositiveInt | None = Field(default=None, description="training window in samples")
    channels: Literal[1, 2] = 1

    def _preparation(self) -> Preparation:
        return AudioPreprocess(self.rate, self.length, self.channels)


class VideoData(DataConfig):
    """`data` of a recipe for clips.

    Examples:
        >>> VideoData(kind="video", source="clips/", size=32, frames=5).preprocess().shape
        (3, 5, 32, 32)
    """

    kind: Literal["video"]
    size: PositiveInt | None = None
    frames: PositiveInt | None = Field(default=None, description="training window in frames")
    channels: Literal[1, 3] = 3
    resize: str = "bicubic"
    crop: str = "center"
    flip: bool = False
    fps: PositiveFloat = 25.0

    def _preparation(self) -> Preparation:
        return VideoPreprocess(self.size, self.frames, self.channels, self.resize, self.crop, self.flip, self.fps)


class DenseData(DataConfig):
    """`data` of a recipe for photographs with label maps.

    Examples:
        >>> data = DenseData(kind="dense", source="rooms/", size=64, maps=("depth.png",))
        >>> data.channels, data.preprocess().shape  # RGB and the depth
        (4, (4, 64, 64))
    """

    kind: Literal["dense"]
    size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = Field(default=None, description="or height, width")
    maps: tuple[str, ...] = Field(default=(), description="endings of the label maps' files, e.g. depth.png")
    resize: str = "bicubic"
    crop: str = "squash"
    area: tuple[float, float] = Field(default=(0.05, 1.0), description="share of the picture that crop inception takes")
    aspect: tuple[float, float] = Field(default=(0.75, 1.333), description="and its width / height")
    flip: bool = False
    largest: tuple[int, ...] = Field(default=(), description="number that each map may hold")

    @property
    def channels(self) -> int:
        """Channels of an example: RGB and one for each label map."""
        return 3 + len(self.maps)

    def _preparation(self) -> Preparation:
        return DensePreprocess(
            self.size, self.maps, self.resize, self.crop, self.area, self.aspect, self.flip, self.largest
        )


def _kind_of(data: Any) -> Any:
    return data.get("kind", "image") if isinstance(data, Mapping) else getattr(data, "kind", None)


DATA: dict[str, type[DataConfig]] = {"image": ImageData, "audio": AudioData, "video": VideoData, "dense": DenseData}
Data = Annotated[
    Annotated[ImageData, Tag("image")]
    | Annotated[AudioData, Tag("audio")]
    | Annotated[VideoData, Tag("video")]
    | Annotated[DenseData, Tag("dense")],
    Discriminator(
        _kind_of, custom_error_type="kind", custom_error_message=f"data.kind must be one of {', '.join(DATA)}"
    ),
]


class OptimizerConfig(_Section):
    """AdamW with linear warm-up, then a cosine to `final` times the rate (or constant).

    Examples:
        >>> from latticode.engine.loop import learning_rate
        >>> optimizer = OptimizerConfig(lr=1e-3, warmup=10, final=0.1)
        >>> [learning_rate(optimizer, step, steps=100) for step in (0, 9, 100)]
        [0.0001, 0.001, 0.0001]
    """

    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: NonNegativeFloat = 0.0
    warmup: NonNegativeInt = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    final: float = Field(default=0.0, ge=0, le=1)
    clip: NonNegativeFloat = 1.0


Weight = Annotated[
    Annotated[float, Tag("number")] | Annotated[dict[str, Any], Tag("ramp")],
    Discriminator(lambda value: "ramp" if isinstance(value, Mapping) else "number"),
]


class RunConfig(_Section):
    """A whole run. What is trained is the prior if there is one, else the classifier, else the tokenizer.

    Examples:
        >>> config = load_config("fsq-tokenizer", ["data.source=photos/", "tokenizer.quantizer.levels=[8,5,5,5]"])
        >>> config.kind, config.steps, config.spec["quantizer"]["levels"]
        ('tokenizer', 4000, [8, 5, 5, 5])
        >>> load_config("fsq-tokenizer", ["stps=200"])
        Traceback (most recent call last):
        latticode.engine.config.ConfigError: unknown key 'stps'...
    """

    about: str = ""
    data: Data
    tokenizer: dict[str, Any] | str | None = None
    prior: dict[str, Any] | None = None
    classifier: dict[str, Any] | None = None
    objective: dict[str, Any]
    weights: dict[str, Weight] = Field(description="of the loss terms; a ramp (engine/schedules.py) for one that moves")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    optimizers: dict[str, OptimizerConfig] = Field(
        default_factory=dict, description="by player, e.g. discriminator, where it differs from `optimizer`"
    )
    init_from: str | None = Field(
        default=None, description="run whose weights, and discriminator, training starts from"
    )
    init_parts: dict[str, str] = Field(
        default_factory=dict, description="part of the model: RUN, or RUN:PART, whose weights it starts from"
    )
    train_only: list[str] = Field(default_factory=list, description="parts of the model, e.g. decoder; others freeze")
    steps: PositiveInt = 1000
    batch_size: PositiveInt = 64
    accumulate: PositiveInt = 1
    ema: float = Field(default=0.999, ge=0, lt=1)
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: NonNegativeInt = 0
    log_every: PositiveInt = 50
    picture_every: PositiveInt = 1000
    save_every: PositiveInt = 500

    def on(self, source: str | None) -> RunConfig:
        """The same run on the data of another source; None: on its own."""
        if source is None:
            return self
        return self.model_copy(update={"data": self.data.model_copy(update={"source": source})})

    @property
    def kind(self) -> str:
        """What is trained: prior, classifier or tokenizer."""
        return next(k for k in ("prior", "classifier", "tokenizer") if getattr(self, k) is not None)

    @property
    def spec(self) -> registry.Spec:
        """Of the trained model, as the recipe has it."""
        spec = getattr(self, self.kind)
        if not isinstance(spec, dict):
            raise ConfigError(f"tokenizer={spec!r} names a trained run, so there is nothing left to train")
        return spec

    @property
    def model(self) -> registry.Spec:
        """The spec to build: every ramp is where it starts."""
        return at_end(self.spec, "from")

    @property
    def ramps(self) -> dict[str, Ramp]:
        """By dotted key as in an override, e.g. `weights.kl`. Raises ConfigError for one that is wrong or misplaced."""
        try:
            found = dict(ramps_in(getattr(self, self.kind), self.kind))
            if elsewhere := [key for key, _ in ramps_in(self.objective, "objective")]:
                raise ConfigError(f"{elsewhere[0]} cannot be a ramp: only weights and numbers of the {self.kind} can")
        except SpecError as error:
            raise ConfigError(str(error)) from None
        found |= {f"weights.{name}": value for name, value in self.weights.items() if isinstance(value, dict)}
        ramps, errors = {}, []
        for key, value in found.items():
            try:
                ramps[key] = Ramp.model_validate(value)
            except ValidationError as error:
                errors += [_say(e, [key, *e["loc"]], RAMP_KEYS) for e in error.errors()]
        if errors:
            raise ConfigError("\n".join(errors))
        return ramps


RECIPES: Table[Any] = Table(  # name -> what has `read_text`
    "recipe",
    {
        entry.name.removesuffix(".yaml"): entry
        for entry in sorted((resources.files("latticode") / "recipes").iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".yaml")
    },
)


def recipe_names() -> list[str]:
    """The shipped recipes and those of plug-ins."""
    return sorted(RECIPES)


def read_recipe(recipe: str) -> dict[str, Any]:
    """The content of a recipe by name, shipped or of a plug-in, or of a YAML file by path."""
    path = Path(recipe)
    recipe = renamed.RECIPES.get(recipe, recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"no recipe file {recipe}; shipped recipes: {', '.join(recipe_names())}")
        return parse_yaml(path.read_text(), recipe)
    if recipe not in RECIPES:
        raise ConfigError(f"no recipe {recipe!r}{nearest(recipe, recipe_names())}; or give the path of a .yaml file")
    return parse_yaml(RECIPES[recipe].read_text(), recipe)


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """The mapping in a YAML text. Raises ConfigError, which calls it `name`, for anything else."""
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{name} must be a mapping of keys to values, got {type(content).__name__}")
    return content


def override(content: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`content` with every `dotted.key=value` set; values are YAML. Raises ConfigError for one without '='."""
    result = copy.deepcopy(dict(content))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"an override is key=value, got {text!r}")
        *parents, last = key.split(".")
        target: Any = result
        for depth, parent in enumerate(parents):
            inner = target.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{key}: {'.'.join(parents[: depth + 1])} is {inner!r}, which has no keys")
            target = inner
        try:
            target[last] = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: {value!r} is not valid YAML: {error}") from None
    return result


def validate(content: Mapping[str, Any]) -> RunConfig:
    """The run that `content` describes. Raises ConfigError naming every wrong key with the nearest valid ones."""
    content = renamed.recipe(content)
    if content.get("prior") is not None and not isinstance(content.get("tokenizer"), str):
        raise ConfigError("a prior needs a trained tokenizer: give tokenizer=FOLDER of its run")
    if content.get("train_only") and not content.get("init_from"):
        raise ConfigError("train_only freezes what is already trained: give init_from=RUN too")
    shared, players = content.get("optimizer", {}), content.get("optimizers")
    if isinstance(shared, Mapping) and isinstance(players, Mapping):
        own = {name: {**shared, **value} if isinstance(value, Mapping) else value for name, value in players.items()}
        content = {**content, "optimizers": own}
    try:
        config = RunConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from None
    if config.tokenizer is None and config.prior is None and config.classifier is None:
        raise ConfigError("a run needs something to train: a tokenizer, a prior or a classifier")
    _ = config.ramps  # raises for a wrong one
    return config


def _explain(error: Any) -> str:
    section: type[BaseModel] = RunConfig
    parts = list(error["loc"])
    if parts[0] == "data" and len(parts) > 1:  # pydantic puts the kind between
        section = DATA[parts.pop(1)]
    elif parts[0] == "optimizers":
        section = OptimizerConfig
    elif parts[0] == "weights":
        parts = parts[:2]  # behind is what the weight was taken for
    elif len(parts) > 1:
        section = RunConfig.model_fields[parts[0]].annotation  # type: ignore[assignment]
    return _say(error, parts, section.model_fields)


def _say(error: Any, parts: Iterable[Any], valid: Iterable[str]) -> str:
    *_, last = parts = [str(part) for part in parts]
    place = ".".join(parts)
    if error["type"] == "extra_forbidden":
        return f"unknown key {place!r}{nearest(last, valid)}"
    if error["type"] == "missing":
        return f"missing key {place!r}"
    return f"{place}: {error['msg']}, got {error['input']!r}"


def complete(config: RunConfig, *, classes: int, vocab: Iterable[int] = (), grid: Iterable[int] = ()) -> RunConfig:
    """Fill in what data and tokenizer determine (channels, classes, vocab, grid) where the recipe leaves it open."""
    content = config.model_dump(mode="json")
    known: dict[str, Any] = {
        "in_channels": 3 if isinstance(config.data, DenseData) else config.data.channels,  # label maps are not seen
        "out_channels": config.data.channels,
        "channels": config.data.channels,
        "classes": classes,
        "vocab": list(vocab),
        "grid": list(grid),
    }
    try:
        for key in (config.kind, "objective"):
            content[key] = _fill(content[key], known)
            registry.check(content[key], key)
    except SpecError as error:
        raise ConfigError(str(error)) from None
    return RunConfig.model_validate(content)


def with_digits(spec: registry.Spec, radix: Sequence[int] | None) -> registry.Spec:
    """The spec of a prior with the `radix` of its tokenizer's codes where it says `digits: own`.

    Only to build it: the run keeps the word, so that priors over different tokenizers have one configuration.
    """
    return {**spec, "digits": radix and list(radix)} if spec.get("digits") == "own" else spec


def _fill(spec: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    def inside(value: Any) -> Any:
        if isinstance(value, list):
            return [inside(one) for one in value]
        return _fill(value, known) if isinstance(value, dict) and "type" in value else value

    filled = {key: inside(value) for key, value in spec.items()}
    parameters = registry.parameters_of(registry.resolve(spec.get("type")))
    return {k: known[k] for k in known if k in parameters} | filled


def load_config(recipe: str, overrides: Iterable[str] = (), tokenizer: RunConfig | None = None) -> RunConfig:
    """The run of a recipe (name or path) with overrides. A prior's `data` starts from that of its tokenizer's run:
    `tokenizer`, for one that is yet to be trained, or what its folder says."""
    content = override(read_recipe(recipe), overrides)
    folder = content.get("tokenizer")
    if tokenizer is None and isinstance(folder, str) and not (Path(folder) / "config.json").is_file():
        tokenizer = read_run(Path(folder))  # a folder of save_pretrained, which has config.json, says nothing of data
        if tokenizer.kind != "tokenizer":
            raise ConfigError(f"{folder} is the run of a {tokenizer.kind}; a tokenizer's is needed")
    if tokenizer is not None:
        content["data"] = tokenizer.data.model_dump(mode="json") | content.get("data", {})
    return validate(content)


def read_run(folder: Path) -> RunConfig:
    """The resolved configuration of a trained run."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is not the folder of a run: it has no config.yaml")
    return validate(parse_yaml(path.read_text(), str(path)))


FREE_ON_RESUME = {"about", "steps", "log_every", "picture_every", "save_every"}


def check_resumed(config: RunConfig, folder: Path) -> None:
    """Raise ConfigError if the run in `folder` was begun under another configuration, naming the keys that differ."""
    old, new = (c.model_dump(mode="json", exclude=FREE_ON_RESUME) for c in (read_run(folder), config))
    if changes := differences(old, new, free={"data.workers"}):
        raise ConfigError(
            f"{folder} was begun with another configuration, so it cannot be resumed with this one: {changes}"
        )


def to_yaml(config: RunConfig) -> str:
    """A configuration as the YAML that `load_config` reads."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)
