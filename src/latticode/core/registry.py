"""One explicit table of every class that a configuration can name, and `build`, which turns a spec into a module.

A spec is data: `{"type": "fsq", "levels": [8, 5, 5, 5]}`. Only names of this table are understood, so a configuration
or an untrusted checkpoint can name no code. The table holds addresses, not classes: it imports nothing until something
is built, so it can sit below every layer and serve all of them (a model saves itself without reaching up). Classes of
other packages join it by `latticode.register` (`latticode.core.plugins`).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from latticode.core import renamed
from latticode.core.mappings import is_list, is_mapping
from latticode.core.plugins import Table, address, load_plugins, register

Spec = dict[str, Any]

OWN: dict[str, str | type[nn.Module]] = {
    # quantizers
    "fsq": "latticode.quantizers.fsq:FSQ",
    "vq": "latticode.quantizers.vq:VQ",
    "simvq": "latticode.quantizers.vq:SimVQ",
    "lfq": "latticode.quantizers.binary:LFQ",
    "bsq": "latticode.quantizers.binary:BSQ",
    "gumbel": "latticode.quantizers.stochastic:Gumbel",
    "ibq": "latticode.quantizers.ibq:IBQ",
    "stochastic_vq": "latticode.quantizers.stochastic:StochasticVQ",
    "qinco": "latticode.quantizers.implicit:QINCo",
    "projected": "latticode.quantizers.compose:Projected",
    "grouped": "latticode.quantizers.compose:Grouped",
    "hierarchical": "latticode.quantizers.compose:Hierarchical",
    "residual": "latticode.quantizers.residual:Residual",
    # encoders and decoders
    "conv_encoder": "latticode.autoencoders.conv:ConvEncoder",
    "conv_decoder": "latticode.autoencoders.conv:ConvDecoder",
    "maskgit_encoder": "latticode.autoencoders.maskgit:MaskGITEncoder",
    "maskgit_decoder": "latticode.autoencoders.maskgit:MaskGITDecoder",
    "residual_encoder": "latticode.autoencoders.residual:ResidualEncoder",
    "residual_decoder": "latticode.autoencoders.residual:ResidualDecoder",
    "vit_encoder": "latticode.autoencoders.vit:ViTEncoder",
    "vit_decoder": "latticode.autoencoders.vit:ViTDecoder",
    "audio_encoder": "latticode.autoencoders.audio:AudioEncoder",
    "audio_decoder": "latticode.autoencoders.audio:AudioDecoder",
    "video_encoder": "latticode.autoencoders.video:VideoEncoder",
    "video_decoder": "latticode.autoencoders.video:VideoDecoder",
    "unshuffled": "latticode.autoencoders.shuffle:Unshuffled",
    "shuffled": "latticode.autoencoders.shuffle:Shuffled",
    "logit_laplace": "latticode.autoencoders.pixels:LogitLaplace",
    # models
    "tokenizer": "latticode.tokenizers.tokenizer:Tokenizer",
    "hierarchical_tokenizer": "latticode.tokenizers.hierarchical:HierarchicalTokenizer",
    "palette": "latticode.tokenizers.palette:Palette",
    "gpt": "latticode.priors.gpt:GPT",
    "maskgit": "latticode.priors.maskgit:MaskGIT",
    "muse": "latticode.priors.muse:Muse",
    "mage": "latticode.priors.mage:MAGE",
    "pixelcnn": "latticode.priors.pixelcnn:PixelCNN",
    "two_level": "latticode.priors.pixelcnn:TwoLevel",
    "contextual_rq": "latticode.priors.contextual:ContextualRQ",
    "dalle": "latticode.priors.dalle:DALLE",
    "guide": "latticode.priors.guide:Guide",
    "classifier": "latticode.metrics.classifier:Classifier",
    # dense tasks
    "uvim": "latticode.dense.uvim:UViM",
    "depth": "latticode.dense.tasks:Depth",
    "panoptic": "latticode.dense.tasks:Panoptic",
    "colorization": "latticode.dense.tasks:Colorization",
    # readers of captions
    "bpe": "latticode.priors.text:BPE",
    "text_encoder": "latticode.priors.text:TextEncoder",
    "t5": "latticode.priors.text:T5Text",
    # discriminators and perceptual losses
    "patch_discriminator": "latticode.nn.discriminator:PatchDiscriminator",
    "stylegan_discriminator": "latticode.nn.discriminator:StyleGANDiscriminator",
    "multi_discriminator": "latticode.nn.discriminator_audio:MultiDiscriminator",
    "period_discriminator": "latticode.nn.discriminator_audio:PeriodDiscriminator",
    "stft_discriminator": "latticode.nn.discriminator_audio:STFTDiscriminator",
    "lpips": "latticode.losses.perceptual:LPIPS",
    "features": "latticode.losses.perceptual:FeatureDistance",
    # objectives
    "reconstruction": "latticode.engine.objectives:ReconstructionObjective",
    "adversarial": "latticode.engine.objectives:Adversarial",
    "prior": "latticode.engine.objectives:PriorObjective",
    "guided": "latticode.engine.objectives:GuidedObjective",
    "prior_classification": "latticode.engine.objectives:PriorClassificationObjective",
    "classification": "latticode.engine.objectives:ClassificationObjective",
}
TABLE = Table("module", OWN)


class SpecError(ValueError):
    """A spec that names an unknown type or key, or lacks one."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """', did you mean X?' if something in `valid` is close, then the list of what is valid."""
    valid = sorted(valid)
    close = difflib.get_close_matches(word, valid, n=2, cutoff=0.5)
    hint = f"; nearest: {', '.join(close)}" if close else ""
    return f"{hint}; valid: {', '.join(valid) or 'none'}"


def resolve(name: Any) -> type[nn.Module]:
    """The class behind a type name, old ones included. Raises SpecError for a name that is not in the table."""
    name = renamed.TYPES.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in TABLE:
        raise SpecError(
            f"unknown type {name!r}{nearest(str(name), TABLE)}. If it is a class of your own, call "
            f"latticode.register({str(name)!r}, TheClass) first; if it is another package's, install that"
        )
    entry = TABLE[name]
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        return getattr(importlib.import_module(module), attribute)
    return entry


def parameters_of(cls: type) -> dict[str, inspect.Parameter]:
    """The constructor's parameters by name, without self."""
    named = list(inspect.signature(cls.__init__).parameters.items())[1:]
    return {name: p for name, p in named if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def check(spec: Mapping[str, Any], path: str = "") -> None:
    """Raise SpecError if `spec`, or a spec inside it, names an unknown type or key or lacks a required one."""
    spec, here = renamed.spec(spec), path or "spec"
    if "type" not in spec:
        raise SpecError(f"{here} needs a 'type'; valid: {', '.join(sorted(TABLE))}")
    try:
        parameters = parameters_of(resolve(spec["type"]))
    except SpecError as error:
        raise SpecError(f"{here}: {error}") from None
    for key in spec:
        if key != "type" and key not in parameters:
            raise SpecError(f"{here}: unknown key {key!r} for type {spec['type']!r}{nearest(key, parameters)}")
    missing = [k for k, p in parameters.items() if p.default is inspect.Parameter.empty and k not in spec]
    if missing:
        raise SpecError(f"{here}: type {spec['type']!r} lacks {', '.join(missing)}; valid: {', '.join(parameters)}")
    for key, value in spec.items():
        for index, inner in enumerate(value if is_list(value) else [value]):
            if is_mapping(inner) and "type" in inner:
                suffix = f".{index}" if is_list(value) else ""
                check(inner, f"{path}.{key}{suffix}" if path else f"{key}{suffix}")


def build(spec: Mapping[str, Any]) -> Any:
    """Build the module that `spec` describes, inner specs first.

    Raises SpecError for unknown types, unknown keys and missing keys (with the valid ones), and whatever the
    constructor raises for bad values.

    Examples:
        >>> import latticode
        >>> latticode.build({"type": "residual", "stages": {"type": "fsq", "levels": [5, 3]}, "depth": 2}).vocab
        (15, 15)
        >>> latticode.build({"type": "fsq", "level": [5, 3]})
        Traceback (most recent call last):
        ...
        latticode.core.registry.SpecError: spec: unknown key 'level' for type 'fsq'; nearest: levels; valid: ...
    """
    check(spec)
    return _build(renamed.spec(spec))


def _build(value: Any) -> Any:
    if is_mapping(value) and "type" in value:
        arguments = {key: _build(inner) for key, inner in value.items() if key != "type"}
        return resolve(value["type"])(**arguments)
    if is_list(value):
        return [_build(inner) for inner in value]
    return value


def spec_of(module: nn.Module) -> Spec:
    """The spec that rebuilds `module`: each constructor parameter is read from the attribute of the same name.

    That attribute exists by the house rule that a registered class keeps its arguments; a law test holds it.
    """
    cls = type(module)
    name = _name_of(cls)
    if name is None:
        raise SpecError(
            f"{cls.__name__} is not in the table, so no file can name it. Call latticode.register({snake(cls)!r}, "
            f"{cls.__name__}) before it is saved and again wherever it is loaded, or have a package installed there "
            "that does (its entry point latticode.plugins)"
        )
    spec: Spec = {"type": name}
    for key in parameters_of(cls):
        if not hasattr(module, key):
            raise SpecError(
                f"{cls.__name__} takes {key!r} and keeps no attribute of this name; a registered class keeps every "
                "argument of its constructor as it was given"
            )
        spec[key] = _plain(getattr(module, key), f"{cls.__name__}.{key}")
    return spec


def snake(cls: type) -> str:
    """The usual type name of a class: MyEncoder -> my_encoder, MySTFTLoss -> my_stft_loss."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()


def _name_of(cls: type) -> str | None:
    """The type name of a class; plug-ins are imported only if it has none without them."""
    for _ in range(2):
        found = next((name for name, entry in TABLE.loaded.items() if address(entry) == address(cls)), None)
        if found is not None:
            return found
        load_plugins()
    return None


def essence(spec: Any) -> Any:
    """`spec` without what is a constructor's default: it stays the same when a class gets a further option."""
    if is_list(spec):
        return [essence(inner) for inner in spec]
    if not is_mapping(spec) or "type" not in spec:
        return spec
    parameters = parameters_of(resolve(spec["type"])).items()
    defaults = {key: _plain(p.default, key) for key, p in parameters if p.default is not p.empty}
    return {key: essence(value) for key, value in spec.items() if key not in defaults or value != defaults[key]}


def _plain(value: Any, place: str) -> Any:
    """A constructor's argument as data. Raises SpecError for what a spec cannot hold."""
    if is_list(value) or isinstance(value, nn.ModuleList):
        return [_plain(inner, place) for inner in value]
    if isinstance(value, nn.Module):
        return spec_of(value)
    if is_mapping(value):
        return {str(key): _plain(inner, f"{place}.{key}") for key, inner in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise SpecError(
        f"{place} is a {type(value).__name__}; a spec holds numbers, strings, booleans, None, lists, mappings, modules"
    )


__all__ = [
    "TABLE",
    "Spec",
    "SpecError",
    "build",
    "check",
    "essence",
    "nearest",
    "parameters_of",
    "register",
    "resolve",
    "spec_of",
]
