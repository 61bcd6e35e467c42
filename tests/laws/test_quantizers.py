"""The laws of every quantizer, one body over every registered class."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from latticode.core import registry
from latticode.quantizers import Quantizer, accumulating
from latticode.quantizers.codebook import Codebook
from zoo import DRAWN, SOFT, SPECS, latents, same, types


def test_every_registered_quantizer_is_held_to_the_laws():
    registered = {name for name, entry in registry.TABLE.items() if str(entry).startswith("latticode.quantizers.")}
    assert registered == types(list(SPECS.values()))


def test_decode_of_encode_is_the_latents_of_forward(trained: Quantizer):
    z = latents(500, trained.dim, seed=1) * 3
    out = trained(z)
    assert torch.equal(trained.encode(z), out.codes)
    assert same(trained.decode(out.codes), out.latents)


def test_the_error_is_what_decode_of_encode_adds(quantizer: Quantizer):
    z, state = latents(100, quantizer.dim, seed=1), copy.deepcopy(quantizer.state_dict())
    assert same(quantizer.error(z), quantizer.decode(quantizer.encode(z)) - z)
    assert all(same(value, state[key]) for key, value in quantizer.state_dict().items())
    z[7, 0] = torch.nan
    assert (quantizer.error(z)[7] == 0).all()
    assert quantizer.error(z.bfloat16()).dtype == torch.bfloat16


def test_codes_decode_to_the_latents_in_training(quantizer: Quantizer, name: str):
    """A training step may change the codebook, but not between the codes and the latents that it returns."""
    z = latents(300, quantizer.dim)  # the batch of the first step, so that no code is dead before this one
    before = copy.deepcopy(quantizer)
    out = quantizer(z)
    if name not in DRAWN:
        assert torch.equal(before.encode(z), out.codes)
    if name not in SOFT:
        assert same(before.decode(out.codes), out.latents)


def test_codes_are_integers_in_vocab(trained: Quantizer):
    z = latents(2, 50, trained.dim) * 10
    codes = trained(z).codes
    assert codes.dtype == torch.int64
    assert codes.shape == (2, 50, len(trained.vocab))
    assert (codes >= 0).all()
    assert (codes < torch.tensor(trained.vocab)).all()


def test_bits_is_log2_of_the_codebook(trained: Quantizer):
    assert trained.bits == pytest.approx(sum(torch.tensor(trained.vocab).double().log2().tolist()))


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 3, 4), (2, 1, 3, 2)])
def test_any_rank(trained: Quantizer, shape: tuple[int, ...]):
    z = latents(*shape, trained.dim)
    out = trained(z)
    assert out.latents.shape == z.shape
    assert out.codes.shape == (*shape, len(trained.vocab))
    flat = trained(z.reshape(-1, trained.dim))
    assert same(out.latents.reshape(-1, trained.dim), flat.latents)
    assert same(trained.decode(out.codes), out.latents)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
@pytest.mark.parametrize("training", [False, True])
def test_empty_batch(quantizer: Quantizer, shape: tuple[int, ...], training: bool):
    state = copy.deepcopy(quantizer.state_dict())
    out = quantizer.train(training)(latents(*shape, quantizer.dim))
    assert out.latents.shape == (*shape, quantizer.dim)
    assert out.codes.shape == (*shape, len(quantizer.vocab))
    assert quantizer.decode(out.codes).shape == out.latents.shape
    assert all(loss == 0 for loss in out.losses.values())
    assert all(same(value, state[key]) for key, value in quantizer.state_dict().items())


def test_tokens_do_not_depend_on_each_other(trained: Quantizer):
    z = latents(150, trained.dim, seed=2)
    out = trained(z)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    assert same(trained(z[order]).latents, out.latents[order])
    assert torch.equal(trained.encode(z[order]), out.codes[order])
    assert torch.equal(torch.cat([trained.encode(z[i : i + 1]) for i in range(20)]), out.codes[:20])


def test_strided_input(trained: Quantizer):
    image = latents(2, trained.dim, 5, 6).movedim(1, -1)  # channels first in memory
    assert same(trained(image).latents, trained(image.contiguous()).latents)
    image = image.movedim(-1, 1).contiguous(memory_format=torch.channels_last).movedim(1, -1)
    assert same(trained(image).latents, trained(image.contiguous()).latents)
    assert torch.equal(trained.encode(image[:, ::2]), trained.encode(image)[:, ::2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_gives_the_codes_of_float32(trained: Quantizer, dtype: torch.dtype):
    z = latents(200, trained.dim)
    out = trained(z.to(dtype))
    assert torch.equal(out.codes, trained.encode(z))
    assert same(out.latents, trained(z).latents.to(dtype))


def test_autocast_changes_nothing(quantizer: Quantizer):
    z = latents(100, quantizer.dim)
    other = copy.deepcopy(quantizer)
    torch.manual_seed(1)
    out = quantizer(z)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = other(z)
        assert same(other.decode(cast.codes).float(), other.decode(cast.codes))
    assert same(cast.latents, out.latents)
    assert torch.equal(cast.codes, out.codes)
    assert all(same(cast.losses[name], loss) for name, loss in out.losses.items())
    assert all(same(value, quantizer.state_dict()[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_module_round_trips(trained: Quantizer, dtype: torch.dtype):
    cast = trained.to(dtype)
    z = latents(200, trained.dim).to(dtype)
    out = cast(z)
    assert out.latents.dtype == dtype
    assert torch.equal(cast.encode(z), out.codes)
    assert same(cast.decode(out.codes), out.latents)


def test_a_bfloat16_module_still_trains_without_error(quantizer: Quantizer):
    quantizer.bfloat16()
    out = quantizer(latents(50, quantizer.dim).bfloat16())
    assert all(loss.isfinite() for loss in out.losses.values())


def test_nan_is_code_minus_one_and_stays_with_its_token(quantizer: Quantizer, name: str):
    quantizer.train(name not in DRAWN)
    z = latents(60, quantizer.dim)
    broken = z.clone()
    broken[7, -1] = torch.nan
    kept = torch.arange(60) != 7
    clean, twin = copy.deepcopy(quantizer).eval(), copy.deepcopy(quantizer)
    torch.manual_seed(1)
    out = quantizer(broken)
    torch.manual_seed(1)
    expected = twin(z[kept])
    assert (out.codes[7] == -1).all()
    assert out.latents[7, -1].isnan()
    assert torch.equal(out.codes[kept], expected.codes)
    assert same(out.latents[kept], expected.latents)
    assert torch.equal(clean.encode(broken)[kept], clean.encode(z)[kept])
    for name, loss in out.losses.items():
        torch.testing.assert_close(loss, expected.losses[name])
    for key, value in quantizer.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[key])


@pytest.mark.parametrize("training", [False, True])
def test_padding_is_marked_and_touches_nothing(quantizer: Quantizer, name: str, training: bool):
    """As if it were not there, even where it holds a NaN."""
    quantizer.train(training and name not in DRAWN)
    z = latents(60, quantizer.dim)
    padded = torch.cat([z[:20], torch.full((5, quantizer.dim), torch.nan), latents(5, quantizer.dim) * 9, z[20:]])
    mask = torch.ones(70, dtype=torch.bool)
    mask[20:30] = False
    twin = copy.deepcopy(quantizer)
    padded.requires_grad_()
    outs = []
    for module, arguments in ((quantizer, (padded, mask)), (twin, (z,))):
        torch.manual_seed(1)
        outs.append(module(*arguments))
    out, expected = outs
    assert torch.equal(quantizer.encode(padded, mask)[~mask], out.codes[~mask])
    assert (out.codes[~mask] == -1).all()
    assert (out.latents[~mask] == 0).all()
    assert torch.equal(out.codes[mask], expected.codes)
    assert same(out.latents[mask], expected.latents)
    for name, loss in out.losses.items():
        torch.testing.assert_close(loss, expected.losses[name])
    for key, value in quantizer.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[key])
    (gradient,) = torch.autograd.grad(out.latents.square().sum() + sum(out.losses.values()), padded)
    assert (gradient[~mask] == 0).all()
    assert gradient.isfinite().all()


def test_refuses_a_mask_that_does_not_fit(trained: Quantizer):
    z = latents(2, 3, trained.dim)
    for mask in (torch.ones(2, 3), torch.ones(6, dtype=torch.bool), torch.ones(2, 3, trained.dim, dtype=torch.bool)):
        for method in (trained, trained.encode):
            with pytest.raises(ValueError, match=r"need a bool mask \(2, 3\)"):
                method(z, mask)


def test_accumulated_parts_are_one_batch(quantizer: Quantizer, name: str):
    """Between two optimizer steps: the codebook moves once, and the mean of the parts' losses is the batch's."""
    if name in DRAWN:
        pytest.skip("draws differ with the size of a batch")
    for book in quantizer.modules():
        if isinstance(book, Codebook):
            book.restart, book.upkeep_by = 0.0, "restart"  # these draw from the first part only
    z = latents(80, quantizer.dim)
    twin = copy.deepcopy(quantizer)
    whole, inputs = twin(z), [part.requires_grad_() for part in z.clone().split(40)]
    with accumulating(quantizer):
        parts = [quantizer(part) for part in inputs]
    assert torch.equal(torch.cat([part.codes for part in parts]), whole.codes)
    for name, loss in whole.losses.items():
        if name != "diversity":  # of a batch, not of a token
            torch.testing.assert_close(sum(part.losses[name] for part in parts) / 2, loss)
    for key, value in quantizer.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[key])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, 1e30])
def test_infinite_and_huge_values_touch_nothing_else(quantizer: Quantizer, value: float):
    z = latents(60, quantizer.dim)
    broken = z.clone()
    broken[7] = value
    quantizer.eval()
    out, expected = quantizer(broken), quantizer(z)
    kept = torch.arange(60) != 7
    assert torch.equal(out.codes[kept], expected.codes[kept])
    assert ((out.codes >= -1) & (out.codes < torch.tensor(quantizer.vocab))).all()
    quantizer.train()(torch.where(broken.isinf(), broken, z))
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())


def test_all_tokens_broken(quantizer: Quantizer):
    state = copy.deepcopy(quantizer.state_dict())
    out = quantizer(torch.full((5, quantizer.dim), torch.nan))
    assert (out.codes == -1).all()
    assert all(loss == 0 for loss in out.losses.values())
    assert all(same(value, state[key]) for key, value in quantizer.state_dict().items())


def test_the_gradient_reaches_z(quantizer: Quantizer):
    z = latents(40, quantizer.dim).requires_grad_()
    out = quantizer(z)
    assert not out.codes.requires_grad
    (gradient,) = torch.autograd.grad((out.latents * latents(*z.shape, seed=1)).sum(), z)
    assert gradient.isfinite().all()
    assert (gradient != 0).any(dim=-1).all()


def test_a_nan_token_gets_no_nan_from_the_losses(quantizer: Quantizer):
    z = latents(40, quantizer.dim)
    z[3] = torch.nan
    z.requires_grad_()
    out = quantizer(z)
    kept = torch.arange(40) != 3
    (gradient,) = torch.autograd.grad(out.latents[kept].sum() + sum(out.losses.values()), z)
    assert gradient[kept].isfinite().all()


def test_losses_are_scalars(quantizer: Quantizer):
    for loss in quantizer(latents(20, quantizer.dim)).losses.values():
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        assert loss >= 0


def test_encode_and_decode_are_pure(quantizer: Quantizer):
    state = copy.deepcopy(quantizer.state_dict())
    z = latents(60, quantizer.dim).requires_grad_()
    codes = quantizer.encode(z)
    quantizer.decode(codes)
    quantizer.eval()(z)
    assert not codes.requires_grad
    assert all(same(value, state[key]) for key, value in quantizer.state_dict().items())


def test_a_spec_and_a_state_rebuild_the_module(trained: Quantizer):
    spec = registry.spec_of(trained)
    twin = registry.build(spec)
    assert registry.spec_of(twin) == spec
    twin.load_state_dict(trained.state_dict())
    z = latents(100, trained.dim)
    assert same(twin.eval()(z).latents, trained(z).latents)


SAVED = json.loads((Path(__file__).parent / "states-0.1.json").read_text())


@pytest.mark.parametrize("name", SAVED)
def test_a_state_of_version_0_1_loads(name: str):
    """Names, shapes and types of the tensors that each class saved then."""
    spec, state = SPECS[name], {}
    for key, described in SAVED[name].items():
        shape, dtype = described.rsplit(" ", 1)
        state[key] = torch.ones(json.loads(shape), dtype=getattr(torch, dtype))
    quantizer = registry.build(spec)
    quantizer.load_state_dict(state)
    assert all((value == 1).all() for value in quantizer.state_dict().values())


def test_a_resumed_module_trains_on_bit_for_bit(quantizer: Quantizer):
    twin = registry.build(registry.spec_of(quantizer))
    twin.load_state_dict(quantizer.state_dict())
    for step in range(3):
        outs = []
        for module in (quantizer, twin):
            torch.manual_seed(step)
            outs.append(module(latents(40, quantizer.dim, seed=step)))
        assert same(outs[0].latents, outs[1].latents)
    assert all(same(value, twin.state_dict()[key]) for key, value in quantizer.state_dict().items())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_act_alike(trained: Quantizer, duplicate: Any):
    z = latents(50, trained.dim)
    assert same(duplicate(trained)(z).latents, trained(z).latents)


def test_refuses_latents_that_do_not_fit(trained: Quantizer):
    for z in (latents(3, trained.dim + 1), torch.tensor(1.0), torch.zeros(3, trained.dim, dtype=torch.int64)):
        for method in (trained, trained.encode):
            with pytest.raises(ValueError, match=rf"\(\.\.\., {trained.dim}\)"):
                method(z)


def test_refuses_codes_that_do_not_fit(trained: Quantizer):
    slots = len(trained.vocab)
    good = torch.zeros(3, slots, dtype=torch.int64)
    for codes in (good.float(), torch.zeros(3, slots + 1, dtype=torch.int64), torch.tensor(0)):
        with pytest.raises(ValueError, match=rf"\(\.\.\., {slots}\)"):
            trained.decode(codes)
    for wrong in (-1, trained.vocab[0]):
        codes = good.clone()
        codes[1, 0] = wrong
        with pytest.raises(ValueError, match=str(wrong)):
            trained.decode(codes)
