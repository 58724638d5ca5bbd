"""Gradients of single samples, told without being made: equal to those that autograd finds for each sample alone."""

import copy
import warnings
import weakref

import pytest
import torch
import towers
from contracts import cases
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headwater import distributed, random
from headwater.layers import DynamicTanh, LayerScale
from headwater.modalities import Text
from headwater.model import Model, tower
from headwater.objectives import Causal, Contrastive, Masked
from headwater.objectives.curvature import hessian_product
from headwater.objectives.objective import weighted_sum
from headwater.objectives.probe import Probe
from headwater.training.calls import Calls
from headwater.training.ghost import (
    Ghost,
    asking,
    dot,
    gradient_of,
    hidden,
    linear_products,
    linear_squares,
    table_products,
    table_squares,
    vector_gradients,
)
from headwater.trunk import Trunk

pytestmark = pytest.mark.filterwarnings("ignore:gradients of samples leave out")
QUICK = ["Causal", "Masked", "Masked ids", "Registers", "Reconstructed words"]


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("length", [3, 40])  # of either way to a norm
def test_formulas_equal_sums_over_tokens(length):
    a, b, reference = draws(4, length, 5), draws(4, length, 6, seed=1), draws(6, 5, seed=2)
    whole = torch.stack([sum(torch.outer(b[s, t], a[s, t]) for t in range(length)) for s in range(4)])
    assert_close(linear_products(a, b, reference), (whole * reference).sum((1, 2)))
    assert_close(linear_squares(a, b), whole.square().sum((1, 2)))


def test_formulas_of_tables_equal_sums_over_tokens():
    ids, b, reference = torch.tensor([[0, 3, 3], [1, 1, 1], [2, 0, 4]]), draws(3, 3, 2), draws(5, 2, seed=1)
    whole = torch.zeros(3, 5, 2, dtype=torch.float64)
    for s in range(3):
        for t in range(3):
            whole[s, ids[s, t]] += b[s, t]
    assert_close(table_products(ids, b, reference), (whole * reference).sum((1, 2)))
    assert_close(table_squares(ids, b), whole.square().sum((1, 2)))


@pytest.mark.parametrize(
    "module", [nn.LayerNorm(5), nn.RMSNorm(5), LayerScale(5, 0.3), DynamicTanh(5)], ids=lambda m: type(m).__name__
)
def test_vectors_equal_autograd(module):
    module, a, b = module.double(), draws(3, 4, 5), draws(3, 4, 5, seed=1)
    for name, p in module.named_parameters():
        alone = [torch.autograd.grad((module(a[s]) * b[s]).sum(), p)[0] for s in range(3)]
        assert_close(vector_gradients(module, a, b)[name], torch.stack(alone))


def alone(ghost, batch, rows, reference):
    """<g_i, reference> and |g_i|^2 by one backward pass per sample. rows: each sample as a batch of its own."""
    model, objective = ghost.model, ghost.objective
    found = []
    with asking(model, objective):
        numbers = objective.numbers(hidden(model, objective, batch))
        for row in rows:
            task = hidden(model, objective, row)
            own = {name: numbers[name] for name in objective.numbers(task)}
            try:
                g = gradient_of(model, objective, task, own, ghost.names, len(batch["seed"]))
            except RuntimeError:  # a sample without targets reaches no parameter
                g = {name: torch.zeros_like(reference[name]) for name in ghost.names}
            found.append(torch.stack([dot(g, reference, ghost.names), dot(g, g, ghost.names)]))
    return torch.stack(found).T


def compared(name, packed=False):
    model = cases.model()
    objective = cases.objective(name, model)
    if objective.coupled:
        pytest.skip("its loss mixes samples by design")
    readers = cases.readers(model, objective)
    samples = cases.examples(readers)
    reference = {n: draws(*p.shape, seed=k) for k, (n, p) in enumerate(model.named_parameters())}
    batch = cases.batch(readers, samples, packed=packed)
    ghost = Ghost(model, objective)
    found = ghost.align(batch, reference)
    ghost.check(batch)
    return found, alone(ghost, batch, [cases.batch(readers, samples, [i]) for i in range(len(samples))], reference), ghost


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", [n for n in QUICK if n in cases.OBJECTIVES])
def test_equal_autograd_of_every_sample(name, packed):
    found, (products, squares), _ = compared(name, packed)
    assert products.abs().max() > 1e-3
    assert_close(found.product, products, rtol=1e-6, atol=1e-9)
    assert_close(found.square, squares, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", [n for n in cases.OBJECTIVES if n not in QUICK])
def test_equal_autograd_whatever_the_objective(name, packed):
    found, (products, squares), _ = compared(name, packed)
    assert_close(found.product, products, rtol=1e-6, atol=1e-9)
    assert_close(found.square, squares, rtol=1e-6, atol=1e-9)


def test_cosine_and_the_mean():
    """Cosines are those of the parameters that are seen, and the mean of all g_i is the gradient of the batch."""
    model = cases.model()
    objective = cases.objective("Causal", model)
    readers = cases.readers(model, objective)
    batch, ghost = cases.batch(readers, cases.examples(readers)), Ghost(model, objective)
    task = hidden(model, objective, batch)
    whole = gradient_of(model, objective, task, objective.numbers(task), ghost.names)
    found = ghost.align(batch, whole)
    assert_close(found.product.mean(), dot(whole, whole, ghost.names))
    assert_close(found.reference, dot(whole, whole, ghost.names))
    present = found.square > 0
    assert_close(found.cosine[present], (found.product / (found.square * found.reference).sqrt())[present])
    assert not found.cosine[~present].any()
    assert (~present).any()  # cases have a sample without text


def test_losses_that_compare_samples_and_nothing_to_see_are_refused():
    model = cases.model()
    with pytest.raises(ValueError, match=r"Contrastive.*compares the samples"):
        Ghost(model, Contrastive(model, "image", "text"))
    with pytest.raises(ValueError, match=r"layers=\['fusion\.no'\], in which no linear"):
        Ghost(model, Causal(model), ["fusion.no"])


def language(**options):
    torch.manual_seed(0)
    model = Model({"text": Text(Trunk(16, depth=2, heads=2), length=12, **options)}).double()
    objective = Causal(model)
    batch = cases.batch(model.readers, [{"text": t} for t in model.encoder("text").reader.example(6, 0)])
    return model, objective, batch


def test_what_is_left_out_is_named_once():
    model, objective, batch = language(tied=True)
    share = model.encoder("text").stem.weight.numel() / sum(p.numel() for p in model.parameters())
    with pytest.warns(UserWarning, match=rf"leave out {share:.1%} of the trained numbers.*encoders\.text\.stem\.weight$"):
        ghost = Ghost(model, objective)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ghost.align(batch, {name: torch.ones_like(model.get_parameter(name)) for name in ghost.names})
        Ghost(model, objective, ["encoders.text.trunk.blocks"])  # nothing of what was asked for is left out


def test_a_weight_that_is_used_where_no_layer_shows_is_found():
    model, objective, batch = language()
    encoder = model.encoder("text")
    plain, w = encoder.unembed, encoder.trunk.blocks[1].mlp.fc2.weight
    Ghost(model, objective).check(batch)
    encoder.unembed = lambda x: plain(x + nn.functional.linear(nn.functional.pad(x, (0, w.shape[1] - x.shape[-1])), w))
    with pytest.raises(ValueError, match=r"do not add up.*blocks\.1\.mlp\.fc2"):
        Ghost(model, objective).check(batch)


def test_places_are_no_samples():
    """A table of places has as many rows as there are samples here, and is left out all the same."""

    class Placed(Text):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            self.table = nn.Embedding(12, 16)

        def embed(self, raw):
            t = super().embed(raw)
            return t._replace(x=t.x + self.table(torch.arange(t.x.shape[1])))

    torch.manual_seed(0)
    model = Model({"text": Placed(Trunk(16, depth=1, heads=2), length=12)}).double()
    objective, reader = Causal(model), model.encoder("text").reader
    batch = cases.batch(model.readers, [{"text": t} for t in reader.example(12, 0)])
    rows = batch["text"].position.shape[1]
    batch = cases.batch(model.readers, [{"text": t} for t in reader.example(rows, 0)])
    assert batch["text"].position.shape[0] == batch["text"].position.shape[1]
    ghost = Ghost(model, objective)
    with pytest.warns(UserWarning, match=r"whose rows are no samples: encoders\.text\.table\.weight"):
        ghost.check(batch)
    assert "encoders.text.table" not in ghost.layers


@pytest.mark.parametrize("name", [pytest.param("timm/vit_tiny_patch16_224", marks=pytest.mark.slow), "gpt2", "llama"])
def test_towers_of_other_libraries(name, tmp_path):
    """Linear layers of timm, the turned ones of GPT-2, and the head of a language model behind its own reshaping."""
    image = name.startswith("timm")
    torch.manual_seed(0)
    encoder = tower(name) if image else tower(f"transformers/{towers.folder(name, tmp_path / name)}")
    modality = "image" if image else "text"
    model = Model({modality: encoder}).double()
    objective = (Masked(model, "image", mode="substitute") if image else Causal(model)).double()
    readers = cases.readers(model, objective)
    samples = [{modality: t} for t in readers[modality].example(3, 0)]
    ghost = Ghost(model, objective, ["encoders.image.tower.blocks.0"] if image else None)
    reference = {n: draws(*model.get_parameter(n).shape, seed=k) for k, n in enumerate(ghost.names)}
    batch = cases.batch(readers, samples)
    found = ghost.align(batch, reference)
    products, squares = alone(ghost, batch, [cases.batch(readers, samples, [i]) for i in range(3)], reference)
    assert_close(found.product, products)
    assert_close(found.square, squares)
    assert sum(model.get_parameter(n).numel() for n in ghost.names) > (0.02 if image else 0.95) * sum(
        p.numel() for p in model.parameters()
    )


def test_projections_are_those_of_the_gradients():
    model, objective, batch = language()
    ghost, layer = Ghost(model, objective), "encoders.text.trunk.blocks.0.attn.qkv"
    found = ghost.project(batch, layer, size=4, seed=3)
    whole = []

    def visit(path, a, b):
        whole.append(b.mT @ a)

    ghost.visit(batch, visit, [layer])
    start = torch.tensor(3)
    p, q = (random.normal(start, (n, 4), f"{layer}/{side}").double() for n, side in ((48, "out"), (16, "in")))
    assert_close(found.double(), (p.T @ whole[0] @ q).flatten(1) / 4, rtol=1e-5, atol=1e-8)
    assert torch.equal(found, ghost.project(batch, layer, size=4, seed=3))
    fine = torch.stack([ghost.project(batch, layer, size=24, seed=s) for s in range(40)]).double()
    wanted = whole[0].flatten(1) @ whole[0].flatten(1).T
    assert_close((fine @ fine.mT).mean(0), wanted, rtol=0.2, atol=0.2 * float(wanted.diag().mean()))
    with pytest.raises(ValueError, match=r"found layer 'head'.*expected 1 or more, and one of encoders\.text\.trunk"):
        ghost.project(batch, "head")


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in self.known:
                size = x.untyped_storage().nbytes()
                self.known.add(key)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(x.untyped_storage(), self.gone, key, size)
        return out

    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size


def test_memory_is_under_half_of_that_of_stored_gradients():
    torch.manual_seed(0)
    model = Model({"text": Text(Trunk(96, depth=3, heads=2), length=24)})
    objective, ghost = Causal(model), Ghost(model, Causal(model))
    samples = [{"text": t} for t in model.encoder("text").reader.example(24, 0)]
    batch = cases.batch(model.readers, samples)
    reference = {name: torch.ones_like(model.get_parameter(name)) for name in ghost.names}
    with Live() as ours:
        ghost.align(batch, reference)
    numbers, stored = objective.numbers(hidden(model, objective, batch)), []
    with Live() as theirs:
        for i in range(len(samples)):
            task = hidden(model, objective, cases.batch(model.readers, samples, [i]))
            stored.append(gradient_of(model, objective, task, numbers, ghost.names))
    assert ours.most < theirs.most / 2


def products_of(shares):
    """Products and squares of this rank's samples, with a target's gradient that is summed over the ranks."""
    from headwater.training.influence import Target

    model, objective, _ = language()
    samples = [{"text": t} for t in model.encoder("text").reader.example(6, 0)]
    batch = cases.batch(model.readers, samples, shares[distributed.rank()])
    ghost = Ghost(model, objective)
    found = ghost.align(batch, Target(model, objective, [batch]).gradient(ghost.names))
    return found.product / len(batch["seed"]) * int(objective.numbers(hidden(model, objective, batch))["causal"])


def test_ranks_see_what_one_process_sees(ranks):
    (whole,) = [products_of([range(6)])]
    first, second = ranks(products_of, [[0, 1, 2, 3], [4, 5]])
    assert_close(torch.cat([first, second]), whole)


def test_split_weights_are_refused(ranks):
    for said in ranks(refused):
        assert "fsdp2" in said


def refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, objective, _ = language()
    fully_shard(model, mesh=init_device_mesh("cpu", (distributed.world(),)))
    with pytest.raises(ValueError, match="fsdp2 has split") as error:
        Ghost(model, objective)
    return str(error.value)


def probe_of(model, objective, batch):
    both = nn.ModuleList([model, objective])
    task = hidden(model, objective, batch)
    return Probe(both, model, lambda ask: ask()), lambda: objective(model, task)


def curved(shares):
    model, objective, _ = language()
    samples = [{"text": t} for t in model.encoder("text").reader.example(6, 0)]
    probe, ask = probe_of(model, objective, cases.batch(model.readers, samples, shares[distributed.rank()]))
    direction = [draws(*p.shape, seed=k) for k, p in enumerate(probe.theta)]
    before = copy.deepcopy(model.state_dict())
    found = hessian_product(probe, ask, direction)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    return found


def test_hessian_products_equal_the_exact_ones():
    model, objective, batch = language()
    probe, ask = probe_of(model, objective, batch)
    direction = [draws(*p.shape, seed=k) for k, p in enumerate(probe.theta)]
    with asking(model, objective):
        terms = ask()
        loss = weighted_sum(terms, {name: term.number for name, term in terms.items()}, 1)
        slopes = torch.autograd.grad(loss, probe.theta, create_graph=True)
        exact = torch.autograd.grad(sum((g * d).sum() for g, d in zip(slopes, direction, strict=True)), probe.theta)
    found = curved([range(6)])
    error = torch.stack([(a - b).norm() for a, b in zip(found, exact, strict=True)]).norm()
    assert error < 1e-6 * torch.stack([x.norm() for x in exact]).norm()
    with pytest.raises(ValueError, match=r"relative=-1\.0; expected a step above 0"):
        hessian_product(probe, ask, direction, -1.0)


def test_hessian_products_on_ranks(ranks):
    first, second = ranks(curved, [[0, 1, 2, 3], [4, 5]])
    for a, b, whole in zip(first, second, curved([range(6)]), strict=True):
        assert torch.equal(a, b)
        assert_close(a, whole, rtol=1e-5, atol=1e-8)


def test_rows_are_followed_through_slices_and_masks():
    """Whose rows they are, of tensors that were cut out of (B, N, D) in the ways that autograd notes."""
    model, objective, batch = language()
    x = draws(6, 8, 16).requires_grad_() * 1
    mask = draws(6, 8) > 0
    own = torch.arange(6)[:, None].expand(6, 8)
    calls = Calls(model, hidden(model, objective, batch), 6)
    ways = [lambda t: t[:, -3:], lambda t: t[:, ::2][mask[:, ::2]], lambda t: t[2:4], lambda t: t[:, 1], lambda t: t[mask]]
    ways += [lambda t: t.narrow(-2 if t.ndim == 3 else -1, 1, 2), lambda t: t[mask][3:9], lambda t: t[:, :]]
    for way in ways:
        made = way(x)
        assert torch.equal(calls._whose("encoders.text.head", tuple(made.shape), made.grad_fn), way(own))
    flat = x[mask].reshape(1, -1, 16)
    assert torch.equal(calls._whose("encoders.text.head", tuple(flat.shape), flat.grad_fn), own[mask][None])
    lost = x.transpose(0, 1)[mask.T]
    assert calls._whose("encoders.text.head", tuple(lost.shape), lost.grad_fn) is None
