"""Every quantizer as one graph: compiled, exported, as ONNX."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from latticode.core import registry
from latticode.quantizers import Quantizer
from zoo import SAME_AT_REST, SPECS, latents, same

distinct = pytest.mark.parametrize("spec", sorted(set(SAME_AT_REST.values()), key=list(SPECS).index), indirect=True)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_one_graph(quantizer: Quantizer, training: bool):
    """No graph break; values, gradients and what a training step does to the state are eager's."""
    torch._dynamo.reset()
    quantizer.train(training)
    twin = copy.deepcopy(quantizer)
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
    for step in range(2):
        results = []
        for module in (compiled, twin):
            torch.manual_seed(step)
            z = latents(60, twin.dim, seed=step).requires_grad_()
            out = module(z)
            (gradient,) = torch.autograd.grad(out.latents.square().sum() + sum(out.losses.values()), z)
            results.append((out, gradient))
        (ours, ours_gradient), (theirs, theirs_gradient) = results
        assert torch.equal(ours.codes, theirs.codes)
        torch.testing.assert_close(ours.latents, theirs.latents)
        torch.testing.assert_close(dict(ours.losses), dict(theirs.losses))
        torch.testing.assert_close(ours_gradient, theirs_gradient)
    for key, value in quantizer.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[key])


class Both(nn.Module):
    """What a deployed tokenizer needs of its quantizer."""

    def __init__(self, quantizer: Quantizer):
        super().__init__()
        self.quantizer = quantizer

    def forward(self, z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        return self.quantizer.encode(z), self.quantizer.decode(codes)


def exported(trained: Quantizer) -> torch.export.ExportedProgram:
    z = latents(6, trained.dim)
    batch = {0: torch.export.Dim("batch")}
    shapes = {"z": batch, "codes": batch}
    return torch.export.export(Both(trained), (z, trained.encode(z)), dynamic_shapes=shapes)


@pytest.mark.slow
@distinct
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_exported_with_a_dynamic_batch_it_gives_the_same_codes_and_so_does_onnx(trained: Quantizer):
    program = exported(trained)
    z = latents(41, trained.dim, seed=3)
    codes = trained.encode(z)
    ours, restored = program.module()(z, codes)
    assert torch.equal(ours, codes)
    torch.testing.assert_close(restored, trained.decode(codes))

    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    translated = torch.onnx.export(program, dynamo=True, verbose=False, optimize=True)
    assert translated is not None
    session = onnxruntime.InferenceSession(translated.model_proto.SerializeToString())
    names = [one.name for one in session.get_inputs()]
    ours, restored = (torch.from_numpy(a) for a in session.run(None, dict(zip(names, (z.numpy(), codes.numpy())))))
    assert torch.equal(ours, codes)
    torch.testing.assert_close(restored, trained.decode(codes))


@pytest.mark.slow
@pytest.mark.parametrize("spec", [name for name, first in SAME_AT_REST.items() if first != name], indirect=True)
def test_what_acts_in_training_alone_leaves_the_exported_graph_as_it_is(trained: Quantizer, name: str):
    """So these specs need no other test of encode and decode as a graph than those with the same graph."""
    first = registry.build(SPECS[SAME_AT_REST[name]])
    first(latents(300, first.dim))
    assert first.vocab == trained.vocab
    assert graph(first.eval()) == graph(trained)


def graph(quantizer: Quantizer) -> str:
    return exported(quantizer).graph_module.print_readable(print_output=False, include_stride=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["fsq-8555", "lfq", "vq-normalize", "grouped"])
def test_onnx_of_a_quantizer_as_it_stands(name: str):
    """Its struct becomes the outputs: latents, codes, losses."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    quantizer = registry.build(SPECS[name])
    quantizer(latents(200, quantizer.dim))
    shapes = {"z": {0: torch.export.Dim("batch")}}
    sample = (latents(6, quantizer.dim),)
    program = torch.onnx.export(quantizer.eval(), sample, dynamic_shapes=shapes, dynamo=True, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    z = latents(41, quantizer.dim, seed=3)
    found = session.run(None, {session.get_inputs()[0].name: z.numpy()})
    expected = quantizer(z)
    assert torch.equal(torch.from_numpy(found[1]), expected.codes)
    for ours, theirs in zip(found, (expected.latents, expected.codes, *expected.losses.values()), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@distinct
def test_one_graph_of_encode(trained: Quantizer):
    torch._dynamo.reset()
    z = latents(30, trained.dim)
    codes = trained.encode(z)
    assert torch.equal(torch.compile(trained.encode, backend="aot_eager", fullgraph=True)(z), codes)
    assert same(torch.compile(trained.decode, backend="aot_eager", fullgraph=True)(codes), trained.decode(codes))
