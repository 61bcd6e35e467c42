"""Saving and loading of models: weights and spec in one safetensors file. Nothing is pickled; loading is strict."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from latticode.core import registry, renamed
from latticode.core.files import replacing, write_text
from latticode.core.freezing import Freezable

WEIGHTS, SCHEMA = "model.safetensors", 1


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Tensors and JSON-ready metadata into a safetensors file, atomically."""
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    text = {k: json.dumps(v) for k, v in metadata.items()}
    with replacing(path) as temporary:
        safetensors.torch.save_file(plain, temporary, text)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and metadata of `save_tensors`. Raises ValueError for a file that is not one."""
    metadata = read_metadata(path)
    with _opened(path) as file:
        return {k: file.get_tensor(k) for k in file.keys()}, metadata  # noqa: SIM118 (not a mapping)


def read_spec(folder: Path) -> registry.Spec:
    """The spec of the model saved in `folder`."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}; is it the folder of a run or a saved model?")
    metadata = read_metadata(path)
    if metadata.get("schema") != SCHEMA or "spec" not in metadata:
        raise ValueError(f"{path} has schema {metadata.get('schema')!r}, this version of latticode reads {SCHEMA}")
    return renamed.spec(metadata["spec"])


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of `save_tensors` without the tensors. Raises ValueError for a file that is not one."""
    try:
        with _opened(path) as file:
            return {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no latticode file: {error}") from None


def _opened(path: Path) -> Any:
    """A safetensors file; the library has no types."""
    return safetensors.safe_open(path, framework="pt")  # type: ignore[no-untyped-call]


class Pretrained(Freezable):
    """Gives a registered model `save_pretrained` and `from_pretrained`.

    Examples:
        >>> import tempfile, latticode
        >>> from latticode.tokenizers.palette import Palette
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = Palette(8)
        ...     loaded = latticode.load(saved.save_pretrained(folder))
        >>> type(loaded).__name__, loaded.training, loaded.fingerprint() == saved.fingerprint()
        ('Palette', False, True)
    """

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `config.json` (the spec, for people) and `model.safetensors` (weights, spec, schema) to `folder`."""
        folder = Path(folder)
        save_model(self, folder, self.state_dict())
        write_text(folder / "config.json", json.dumps(registry.spec_of(self), indent=2) + "\n")
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model saved in `folder`, in eval mode.

        Raises FileNotFoundError where there is none, ValueError for another schema, another class or unfitting weights.
        """
        model = load_model(folder)
        if not isinstance(model, cls):
            raise ValueError(f"{folder} holds a {type(model).__name__}, not a {cls.__name__}")
        return model

    def fingerprint(self) -> str:
        """SHA-256 over spec, defaults left out, and weights: what a token dataset remembers of its tokenizer."""
        return weights_digest(self, json.dumps(registry.essence(registry.spec_of(self)), sort_keys=True))


def weights_digest(module: nn.Module, about: str = "") -> str:
    """SHA-256 over `about` and the names, shapes, types and numbers of a module's state."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(module.state_dict().items()):
        shape = () if name.endswith("log_variance") else tuple(tensor.shape)  # as version 0.1 had it
        digest.update(f"{name} {shape} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_model(model: nn.Module, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """`weights` (the model's own or their average) with the model's spec as `folder`/model.safetensors."""
    save_tensors(folder / WEIGHTS, weights, {"schema": SCHEMA, "spec": registry.spec_of(model)})


def load_model(folder: str | Path) -> Any:
    """The model in `folder`, of a run or of `save_pretrained`, whatever its type, in eval mode; strict.

    Raises FileNotFoundError where there is none, ValueError for another schema and for weights that do not fit, and
    SpecError for a class that nobody has registered here (`latticode.register`): no file can name code to import.

    Examples:
        >>> import tempfile, latticode
        >>> from latticode.tokenizers.palette import Palette
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     loaded = latticode.load(Palette(8).save_pretrained(folder))
        >>> type(loaded).__name__, loaded.vocab
        ('Palette', (8,))
    """
    folder = Path(folder)
    spec = read_spec(folder)
    model = registry.build(spec)
    tensors, _ = load_tensors(folder / WEIGHTS)
    expected = model.state_dict()
    for name, tensor in tensors.items():
        if tensor.ndim == 0 and name in expected and expected[name].shape == (1,):  # a scalar of version 0.1
            tensors[name] = tensor.reshape(1)
    wrong = sorted(
        f"{k}: file {tuple(tensors[k].shape) if k in tensors else 'none'}, "
        f"model {tuple(expected[k].shape) if k in expected else 'none'}"
        for k in tensors.keys() | expected.keys()
        if k not in tensors or k not in expected or tensors[k].shape != expected[k].shape
    )
    if wrong:
        raise ValueError(f"{folder / WEIGHTS} does not fit its spec: {'; '.join(wrong[:5])} ({len(wrong)} in all)")
    model.load_state_dict(tensors)
    return model.eval()
