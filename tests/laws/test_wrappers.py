"""Every quantizer is right under every wrapper: a row for each of the zoo, a column for each way to use a module."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.scatter_gather import gather
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from latticode.core import registry
from latticode.core.types import Quantized
from latticode.quantizers import Quantizer
from latticode.quantizers.codebook import Codebook
from zoo import latents, same


class Behind(nn.Module):
    """A quantizer behind what learns, as in a model of somebody else."""

    def __init__(self, quantizer: Quantizer):
        super().__init__()
        self.quantizer = quantizer
        self.first = nn.Linear(quantizer.dim, quantizer.dim)

    def forward(self, z: Tensor) -> Quantized:
        return self.quantizer(2 * torch.tanh(self.first(z)))

    def tensors(self, z: Tensor) -> tuple[Tensor, ...]:
        out = self(z)
        return (out.latents, out.codes, *out.losses.values())


def total(out: Quantized | tuple[Tensor, ...]) -> Tensor:
    latents_, _, *losses = (out.latents, out.codes, *out.losses.values()) if isinstance(out, Quantized) else out
    return latents_.square().mean() + sum(losses)


def alike(a: Quantizer, b: Quantizer) -> None:
    """Both give the same in eval mode."""
    z = latents(40, a.dim, seed=3)
    one, other = a.eval()(z), b.eval()(z)
    assert torch.equal(one.codes, other.codes)
    assert same(one.latents, other.latents)
    assert torch.equal(a.encode(z), b.encode(z))
    assert same(a.decode(one.codes), b.decode(one.codes))


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(same(value, theirs[key]) for key, value in ours.items())


def on_meta(quantizer: Quantizer) -> Quantizer:
    with torch.device("meta"):
        return registry.build(registry.spec_of(quantizer))


def codebooks(module: nn.Module) -> list[Codebook]:
    return [part for part in module.modules() if isinstance(part, Codebook)]


# --- the columns


def meta(quantizer: Quantizer, folder: Path) -> None:
    twin = on_meta(quantizer).to_empty(device="cpu")
    twin.load_state_dict(quantizer.state_dict())
    alike(quantizer, twin)


def meta_assigned(quantizer: Quantizer, folder: Path) -> None:
    twin = on_meta(quantizer)
    twin.load_state_dict(quantizer.state_dict(), assign=True)
    assert not any(t.is_meta for t in (*twin.parameters(), *twin.buffers()))
    alike(quantizer, twin.to("cpu"))


def hub(quantizer: Quantizer, folder: Path) -> None:
    """A part of a model of transformers, which builds on the meta device and sets every tensor by its name."""
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "law"

        def __init__(self, spec: Any = None, **others: Any):
            super().__init__(**others)
            self.spec = spec

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config: Config):
            super().__init__(config)
            self.body = Behind(registry.build(config.spec))
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            pass

    model = Model(Config(registry.spec_of(quantizer)))
    model.body.quantizer.load_state_dict(quantizer.state_dict())
    model.save_pretrained(folder)
    twin = Model.from_pretrained(folder)
    assert equal_states(model, twin)
    alike(quantizer, twin.body.quantizer)


def trained(quantizer: Quantizer, reentrant: bool | None, passes: int) -> tuple[list[Tensor], nn.Module]:
    """Codes and gradients of a few steps, with and without a checkpoint."""
    torch.manual_seed(5)
    model, found = Behind(copy.deepcopy(quantizer)), []
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(3):
        torch.manual_seed(step)
        inputs = [latents(60, quantizer.dim, seed=10 * step + i).requires_grad_() for i in range(passes)]
        outs = [
            model.tensors(z) if reentrant is None else checkpoint(model.tensors, z, use_reentrant=reentrant)
            for z in inputs
        ]
        optimizer.zero_grad()
        torch.stack([*map(total, outs)]).sum().backward()
        optimizer.step()
        found += [*(out[1] for out in outs), *(z.grad for z in inputs)]
    return found, model


def checkpointed(quantizer: Quantizer, folder: Path) -> None:
    """A pass that is replayed codes as it did, and moves nothing again; with two passes in a step as well."""
    fresh = registry.build(registry.spec_of(quantizer))  # its first step, with k-means, is replayed too
    for start, passes in ((fresh, 1), (quantizer, 2)):
        expected, plain = trained(start, None, passes)
        for reentrant in (False, True):
            found, model = trained(start, reentrant, passes)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs)  # the order in which gradients are added is another
            for key, value in plain.state_dict().items():
                torch.testing.assert_close(model.state_dict()[key], value)


def checkpointed_directly(quantizer: Quantizer, folder: Path) -> None:
    """What PyTorch makes of the struct: itself, or, with reentry, a tuple in which it sees the tensors only."""
    z = latents(30, quantizer.dim).requires_grad_()
    out = checkpoint(quantizer, z, use_reentrant=False)
    assert type(out) is Quantized
    assert total(out).requires_grad
    out = checkpoint(quantizer, z, use_reentrant=True)
    assert type(out) is tuple
    out[0].square().sum().backward()
    assert z.grad is not None
    assert (z.grad != 0).any()
    with pytest.raises(AttributeError, match="no attribute 'losses'"):
        out.losses  # type: ignore[attr-defined]  # noqa: B018


def frozen(quantizer: Quantizer, folder: Path) -> None:
    """Stays as it is in training mode, from the start as later on; what is around it must pass it on."""
    fresh = registry.build(registry.spec_of(quantizer)).requires_grad_(False)
    around = nn.Sequential(copy.deepcopy(quantizer))
    around.apply(lambda part: part.requires_grad_(False))  # type: ignore[arg-type]
    for model in (fresh, around):
        before = copy.deepcopy(model)
        for step in range(3):
            z = latents(60, quantizer.dim, seed=step) * 3 + 5
            total(model(z.requires_grad_())).backward()
        assert equal_states(model, before)
        assert all(parameter.grad is None for parameter in model.parameters())
    books = codebooks(fresh.requires_grad_(True))
    before = copy.deepcopy(fresh)
    fresh(latents(60, quantizer.dim) * 3 + 5)
    assert equal_states(fresh, before) == (not books)


def frozen_codes(quantizer: Quantizer, folder: Path) -> None:
    """Single codes of an averaged book stay; the others are found and move around them."""
    fresh = registry.build(registry.spec_of(quantizer))
    books = codebooks(fresh)
    for book in books:
        if book.learned:
            with pytest.raises(ValueError, match="update='ema'"):
                book.freeze([0])
        else:
            with pytest.raises(ValueError, match=rf"codes must lie in 0 .. {len(book.count) - 1}, got \[-1\]"):
                book.freeze(torch.tensor([-1]))
            book.freeze(range(0, len(book.count), 3))
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    for step in range(6):
        out = fresh(latents(80, quantizer.dim, seed=step))
        assert all(loss.isfinite() for loss in out.losses.values())
    fresh.load_state_dict(copy.deepcopy(fresh.state_dict()))
    fresh(latents(80, quantizer.dim))
    for name, book in fresh.named_modules():
        if isinstance(book, Codebook) and not book.learned:
            then = before[f"{name}.weight"]
            assert torch.equal(book.weight[::3], then[::3])
            if len(then) > 1:
                assert (book.weight != then).any()
            assert book.weight.isfinite().all()
            book.unfreeze()
            assert book.count.isfinite().all()
            torch.testing.assert_close(book.total[::3], then[::3] * book.count[::3, None])


def two_passes(quantizer: Quantizer, folder: Path) -> None:
    """Two forward passes before one backward pass: the gradients of one after the other."""
    twin = copy.deepcopy(quantizer)
    inputs, others = ([latents(60, quantizer.dim, seed=i).requires_grad_() for i in (1, 2)] for _ in range(2))
    torch.manual_seed(7)
    torch.stack([total(quantizer(z)) for z in inputs]).sum().backward()
    torch.manual_seed(7)
    for z in others:
        total(twin(z)).backward()
    for ours, theirs in zip([*inputs, *quantizer.parameters()], [*others, *twin.parameters()], strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def exported(quantizer: Quantizer, folder: Path) -> None:
    """As it stands, with its struct, for any number of tokens; saved and read again."""
    batch = torch.export.Dim("batch")
    program = torch.export.export(quantizer.eval(), (latents(6, quantizer.dim),), dynamic_shapes={"z": {0: batch}})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    z = latents(41, quantizer.dim, seed=3)
    expected = quantizer(z)
    for one in (program, torch.export.load(file)):
        out = one.module()(z)
        assert type(out) is Quantized
        assert torch.equal(out.codes, expected.codes)
        torch.testing.assert_close(out.latents, expected.latents)
        torch.testing.assert_close(dict(out.losses), dict(expected.losses))


def flattened(quantizer: Quantizer, folder: Path) -> None:
    """The struct is a node of PyTorch's trees, and what DataParallel gathers."""
    out = quantizer.eval()(latents(6, quantizer.dim))
    leaves, spec = pytree.tree_flatten(out)
    assert len(leaves) == 2 + len(out.losses)
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    again = pytree.tree_unflatten(leaves, pytree.treespec_loads(pytree.treespec_dumps(spec)))
    assert type(again) is Quantized
    assert again.latents is out.latents
    assert again.losses == out.losses
    assert type(pytree.tree_map(lambda t: t.detach(), out)) is Quantized
    both = gathered(out, out)
    assert type(both) is Quantized
    assert torch.equal(both.codes, torch.cat([out.codes, out.codes]))
    assert both.losses.keys() == out.losses.keys()


def gathered(*outs: Quantized) -> Any:
    with pytest.MonkeyPatch.context() as patch:  # which asserts that there are GPUs
        patch.setattr("torch.nn.parallel._functions.Gather.apply", lambda device, dim, *parts: joined(parts))
        return gather(outs, torch.device("cpu"))


def joined(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(parts) if parts[0].ndim == 0 else torch.cat(parts)


def copied(quantizer: Quantizer, folder: Path) -> None:
    """In the middle of training, behind a checkpoint."""
    z = latents(40, quantizer.dim).requires_grad_()
    total(checkpoint(quantizer, z, use_reentrant=False)).backward()
    twins = [copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))]
    for one in (quantizer, *twins):
        torch.manual_seed(2)
        one(latents(40, quantizer.dim, seed=2))
        assert equal_states(one, quantizer)
    for twin in twins:
        alike(quantizer.eval(), twin)


def data_parallel(quantizer: Quantizer, folder: Path) -> None:
    """Every parameter gets a gradient, so that nothing has to be searched for; buffers may be broadcast."""
    twin = copy.deepcopy(quantizer)
    torch.manual_seed(0)
    model = Behind(quantizer)
    torch.manual_seed(0)
    plain = Behind(twin)
    wrapped = DistributedDataParallel(model)
    for step in range(2):
        for one in (wrapped, plain):
            torch.manual_seed(step)
            out = one(latents(40, twin.dim, seed=step))
            assert type(out) is Quantized
            total(out).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert equal_states(model, plain)


def sharded(quantizer: Quantizer, folder: Path) -> None:
    """FSDP2, on a mesh of one process."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    twin = copy.deepcopy(quantizer)
    model, plain = Behind(quantizer), Behind(twin)
    plain.first.load_state_dict(model.first.state_dict())
    fsdp.fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    for one in (model, plain):
        torch.manual_seed(0)
        total(one(latents(40, twin.dim))).backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None, name
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)  # type: ignore[attr-defined]


def compiled(quantizer: Quantizer, folder: Path) -> None:
    torch._dynamo.reset()
    twin = copy.deepcopy(quantizer)
    one = torch.compile(quantizer, backend="eager", fullgraph=True)
    outs = []
    for module in (one, twin):
        torch.manual_seed(1)
        outs.append(module(latents(30, twin.dim)))
    assert type(outs[0]) is Quantized
    assert torch.equal(outs[0].codes, outs[1].codes)
    torch.testing.assert_close(outs[0].latents, outs[1].latents)
    assert equal_states(quantizer, twin)


def functional(quantizer: Quantizer, folder: Path) -> None:
    """`torch.func` and second derivatives, in eval mode; training is no pure function if it moves codes."""
    z = latents(20, quantizer.dim, seed=1)
    if codebooks(quantizer):
        for transformed in (torch.func.grad(lambda z: total(quantizer(z))), torch.vmap(quantizer)):
            with pytest.raises(RuntimeError, match="a quantizer in training moves its codebooks: call eval"):
                transformed(z)
    quantizer.eval()
    x = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(quantizer(x)), x, create_graph=True)
    torch.testing.assert_close(
        torch.func.grad(lambda z: total(quantizer(z)))(z), gradient.detach(), rtol=1e-4, atol=1e-5
    )
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert second.isfinite().all()
    out, expected = torch.vmap(quantizer)(z.view(4, 5, -1)), quantizer(z.view(4, 5, -1))
    assert torch.equal(out.codes, expected.codes)
    assert same(out.latents, expected.latents)


WRAPPERS: dict[str, Callable[[Quantizer, Path], None]] = {
    one.__name__: one
    for one in (
        meta,
        meta_assigned,
        hub,
        checkpointed,
        checkpointed_directly,
        frozen,
        frozen_codes,
        two_passes,
        exported,
        flattened,
        copied,
        data_parallel,
        sharded,
        compiled,
        functional,
    )
}


@pytest.fixture(scope="module", autouse=True)
def _process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file = tmp_path_factory.mktemp("group") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


SLOW = {"hub", "checkpointed", "exported", "compiled"}
COLUMNS = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in WRAPPERS]


@pytest.mark.parametrize("wrapper", COLUMNS)
def test_a_quantizer_is_right_under(wrapper: str, quantizer: Quantizer, tmp_path: Path):
    WRAPPERS[wrapper](quantizer, tmp_path)
