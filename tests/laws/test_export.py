"""Every kind of tokenizer as ONNX with a dynamic batch and dynamic sizes: at sizes that were never exported it gives
the codes and the outputs of the module."""

from __future__ import annotations

import pytest
import torch
from test_causal import CASES as SOUND_AND_CLIPS
from test_tokenizers import CASES, prepared
from torch import Tensor, nn

from latticode import Tokenizer
from latticode.core.registry import build

KINDS = {name: CASES[name] for name in CASES if name not in ("fsq-colour", "feedback")}  # others have these parts
MORE = ("audio", "video", "video-patch")
EXTRA = {1: [(0,), (13,)], 2: [(0, 0), (3, 1)], 3: [(0, 0, 0), (2, 3, 1)]}  # samples beyond whole strides


class Both(nn.Module):
    """What a deployed tokenizer is asked for."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, inputs: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        return self.tokenizer.encode(inputs), self.tokenizer.decode(codes)


def inputs_of(tokenizer: Tokenizer, count: int, strides: int, extra: tuple[int, ...]) -> Tensor:
    """A batch of `strides` strides along every axis, and `extra` samples."""
    shape = [strides * s + lead + e for s, lead, e in zip(tokenizer.strides, tokenizer.leads, extra, strict=True)]
    return torch.rand(count, tokenizer.channels, *shape) * 2 - 1


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", [*KINDS, *MORE])
@pytest.mark.slow
def test_onnx_of_any_size(name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if name in KINDS:
        tokenizer = prepared(KINDS[name])
    else:
        torch.manual_seed(0)
        tokenizer = build(SOUND_AND_CLIPS[name][0]).eval()
        tokenizer.quant_conv.weight.mul_(10)  # so that latents spread over many codes although nothing is trained
    whole, odd = EXTRA[tokenizer.axes]
    x = inputs_of(tokenizer, 2, 3, odd)
    axes = range(tokenizer.axes)
    batch = torch.export.Dim("batch")
    shapes = {
        "inputs": {0: batch, **{2 + axis: torch.export.Dim.DYNAMIC for axis in axes}},
        "codes": {0: batch, **{1 + axis: torch.export.Dim.DYNAMIC for axis in axes}},
    }
    program = torch.export.export(Both(tokenizer), (x, tokenizer.encode(x)), dynamic_shapes=shapes)
    onnx = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False)
    assert onnx is not None
    session = onnxruntime.InferenceSession(onnx.model_proto.SerializeToString())
    names = [one.name for one in session.get_inputs()]
    for strides, extra in ((2, whole), (4, odd), (5, whole)):
        x = inputs_of(tokenizer, 3, strides, extra)
        codes = tokenizer.encode(x)
        ours, outputs = session.run(None, dict(zip(names, (x.numpy(), codes.numpy()), strict=True)))
        assert torch.equal(torch.from_numpy(ours), codes)
        torch.testing.assert_close(torch.from_numpy(outputs), tokenizer.decode(codes), atol=1e-4, rtol=0)
