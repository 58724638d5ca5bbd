"""Gradients that agree: rules against the papers' algorithms, and steps that are the plain ones where nothing conflicts."""

from functools import partial

import pytest
import torch
from contracts import cases
from runs import COUPLED, UNCOUPLED, make, pairs, trainer, whole, write_pairs
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close

from headwater import distributed
from headwater.objectives import Causal, Contrastive, Masked, Weighted
from headwater.objectives.agreeing import Agreeing, agreement
from headwater.objectives.divided import Groups
from headwater.objectives.harmonised import Guarded, Harmonised, Projected, Rule, guarded, products, projected, units
from headwater.objectives.objective import count, weighted_sum
from headwater.objectives.probe import Probe
from headwater.pretrainer import Pretrainer
from headwater.training.schedules import constant
from headwater.training.sharding import shard

HIDE, NEXT = partial(Masked, modality="text", mode="substitute"), partial(Causal, modality="text")
PARTS = partial(Weighted, parts={"mask": HIDE, "next": NEXT})
THREE = partial(Contrastive, pairs=[("image", "text", 1.0), ("image", "audio", 0.5)])
ALL = partial(Weighted, parts=COUPLED)
INNER = {"parts": PARTS, "terms": THREE, "one term": NEXT}


class Plain(Rule):
    """The sum as it is."""

    def __call__(self, gram, parts, step):
        return torch.ones_like(gram[..., 0])


def random_gradients(k, d=20, seed=0):
    return torch.randn(k, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def combined(coefficients, gradients):
    return coefficients @ gradients


def pcgrad(gradients, order):
    """Algorithm 1 of Yu et al. 2020, with vectors."""
    total = torch.zeros_like(gradients[0])
    for i, others in enumerate(order):
        g = gradients[i].clone()
        for j in others:
            if j != i and g @ gradients[j] < 0:
                g -= g @ gradients[j] / (gradients[j] @ gradients[j]) * gradients[j]
        total += g
    return total


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_projection_is_the_papers_algorithm(k):
    for seed in range(20):
        g = random_gradients(k, seed=seed)
        order = torch.rand(k, k, generator=torch.Generator().manual_seed(seed)).argsort(-1)
        assert_close(combined(projected(g @ g.T, order), g), pcgrad(g, order.tolist()))


def test_after_projection_no_pair_has_a_negative_inner_product():
    conflicts = 0
    for seed in range(50):
        g = random_gradients(2, 4, seed)
        conflicts += bool(g[0] @ g[1] < 0)
        gram, order = g @ g.T, torch.tensor([[0, 1], [1, 0]])
        total = combined(projected(gram, order), g)
        one = [g[i] - min(0.0, float(g[i] @ g[1 - i])) / (g[1 - i] @ g[1 - i]) * g[1 - i] for i in range(2)]
        assert_close(total, one[0] + one[1])
        assert all(one[i] @ g[1 - i] > -1e-12 for i in range(2))
        assert all(total @ g[i] > -1e-12 for i in range(2))
    assert conflicts > 10


@pytest.mark.parametrize("counts", [True, False])
def test_a_guarded_sum_does_not_go_against_its_reference(counts):
    bent = 0
    for seed in range(50):
        g = random_gradients(3, 4, seed)
        plain = g.sum(0) if counts else g[0] + g[2]
        found = combined(guarded(g @ g.T, 1, counts), g)
        assert found @ g[1] > -1e-12
        if plain @ g[1] >= 0:
            assert_close(found, plain)
        else:
            bent += 1
            assert_close(found, plain - (plain @ g[1]) / (g[1] @ g[1]) * g[1])
    assert bent > 3


def test_absent_parts_change_nothing():
    g = random_gradients(3)
    g[1] = 0
    order = torch.arange(3).expand(3, 3)
    assert_close(combined(projected(g @ g.T, order), g), pcgrad(g[[0, 2]], [[0, 1], [0, 1]]))
    assert_close(guarded(g @ g.T, 1), torch.ones(3, dtype=torch.float64))
    assert_close(Guarded("old")(torch.ones(2, 3, 3), ["a", "b", "c"], 0), torch.ones(2, 3))


def test_units():
    names = ["a.stem.weight", "a.stem.bias", "a.blocks.0.w", "a.blocks.0.mlp.b", "a.blocks.10.w", "fusion.blocks.0.w"]
    assert units(names, "model") == [0] * 6
    assert units(names, "block") == [0, 0, 1, 1, 2, 3]
    assert units(names, "parameter") == list(range(6))
    g = [[torch.randn(3), torch.randn(2, 2), torch.randn(4)] for _ in range(2)]
    gram = products(g, [0, 1, 0], False)
    assert_close(gram[1, 0, 1], (g[0][1] * g[1][1]).double().sum(), rtol=1e-5, atol=1e-6)
    assert_close(gram[0, 0, 1], (g[0][0] @ g[1][0] + g[0][2] @ g[1][2]).double(), rtol=1e-5, atol=1e-6)


def made(inner, rows=None, fuse=None, **options):
    torch.manual_seed(0)
    model = cases.model(fuse=fuse)
    pretrainer = Pretrainer(model, partial(Harmonised, inner=inner, **options)).double()
    pretrainer.objective.start(model)
    readers = cases.readers(model, pretrainer.objective)
    rows = list(range(7)) if rows is None else rows
    batch = cases.batch(readers, cases.examples(readers, 7), rows)
    return pretrainer, {**batch, "origin": torch.tensor(rows) % 2, "progress": 0.5, "step": 4}


def stepped(pretrainer, batch, micro=1, prepare=True):
    """What a Pretrainer does until the optimizer steps: gradients by name, what was told, and the values of the terms."""
    probe = Probe(pretrainer, pretrainer.backbone, pretrainer.call, 3, 4, micro)
    if prepare:
        batch = pretrainer.objective.before_step(probe, batch)
    pieces = [pretrainer.hide(piece) for piece in pretrainer.objective.pieces(batch, micro)]
    numbers = count([pretrainer.objective.numbers(piece) for piece in pieces])
    values = {}
    for piece in pieces:
        terms = pretrainer.ask(piece)
        weighted_sum(terms, numbers, 1).backward()
        for name, term in terms.items():
            values[name] = values.get(name, 0) + distributed.total(term.total.detach())
    if not prepare:
        for p in pretrainer.parameters():
            p.grad = None if p.grad is None else distributed.total(p.grad)
    probe.give(apart=False)
    return {n: whole(p.grad) for n, p in pretrainer.named_parameters() if p.grad is not None}, probe.told, values


def reached(gradients):
    """Without those that are zero throughout, such as that of registers that nothing asked can see."""
    return {n: g for n, g in gradients.items() if g.any()}


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("name", INNER)
def test_with_the_plain_sum_the_step_is_the_plain_one(name, micro):
    """Gradients, which parameters get one, values: nothing is counted twice or lost. And the run's state is left alone."""
    pretrainer, batch = made(INNER[name], rule=Plain())
    plain, _, values = stepped(*made(INNER[name]), prepare=False)
    before = {n: x.clone() for n, x in pretrainer.state_dict().items()}
    state = torch.get_rng_state()
    found, told, same = stepped(pretrainer, batch, micro)
    assert_close(found, reached(plain), rtol=1e-7, atol=1e-10)
    assert_close(same, values)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], x) for n, x in pretrainer.state_dict().items())
    assert len([n for n in told if n.startswith("cosine")]) == (name != "one term")


def apart(inner, batch_rows=None, groups=None):
    """The plain gradient of each part alone, by name of parameters of the model."""
    pretrainer, batch = made(inner, batch_rows)
    model, objective = pretrainer.backbone, pretrainer.objective.inner
    task = objective.task(batch, objective.look(model, batch))
    terms, found = objective(model, task), []
    for name in terms:
        loss = weighted_sum({name: terms[name]}, {name: terms[name].number}, 1)
        slopes = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
        found.append([torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), slopes, strict=True)])
    return found, [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("unit", ["model", "block", "parameter"])
@pytest.mark.parametrize("name", ["parts", "terms"])
def test_conflicting_gradients_are_projected(name, unit):
    (a, b), names = apart(INNER[name])
    found, told, _ = stepped(*made(INNER[name], unit=unit))
    index, total, conflicts = units(names, unit), {}, []
    for number in range(max(index) + 1):
        mine = [i for i, k in enumerate(index) if k == number]
        x, y = (torch.cat([g[i].flatten() for i in mine]) for g in (a, b))
        conflicts.append(bool(x @ y < 0))
        both = pcgrad([x, y], [[0, 1], [1, 0]]).split([a[i].numel() for i in mine])
        total |= {f"backbone.{names[i]}": part.view_as(a[i]) for i, part in zip(mine, both, strict=True)}
    assert unit != "parameter" or any(conflicts)
    for n, g in found.items():
        if n in total:
            assert_close(g, total[n], rtol=1e-6, atol=1e-10)
    x, y = (torch.cat([g.flatten() for g in part]) for part in (a, b))
    (cosine,) = (v for n, v in told.items() if n.startswith("cosine"))
    assert_close(cosine, x @ y / (x.norm() * y.norm()), rtol=1e-6, atol=1e-9)
    assert_close(told["conflicts"].double(), torch.tensor(conflicts).double().mean())


def test_groups_of_samples_are_parts():
    found, told, _ = stepped(*made(partial(Causal, modality="text"), groups=Groups(2), rule=Plain()))
    plain, *_ = stepped(*made(partial(Causal, modality="text")), prepare=False)
    assert_close(found, reached(plain), rtol=1e-7, atol=1e-10)
    halves = []
    for rows in ([0, 2, 4, 6], [1, 3, 5]):
        pretrainer, batch = made(NEXT, rows)
        terms = pretrainer.ask(pretrainer.hide(batch))
        weighted_sum(terms, count([{n: t.number for n, t in terms.items()}]), 1).backward()
        halves.append(torch.cat([p.grad.flatten() for p in pretrainer.backbone.encoder("text").parameters()]))
    assert_close(told["cosine/origin0:origin1"], torch.cosine_similarity(*halves, 0))


SHARES = [[0, 2, 3, 5, 6], [1, 4]]


def on_ranks(shares, name, split, groups=None, micro=1):
    pretrainer, batch = made(INNER[name], shares[distributed.rank()], "JointTokens", unit="block", groups=groups)
    if split and distributed.world() > 1:
        shard(pretrainer, init_device_mesh("cpu", (distributed.world(),)))
    found, told, values = stepped(pretrainer, batch, micro)
    return found, {n: x.double() for n, x in told.items()}, values


@pytest.mark.parametrize("split", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("name", "groups", "micro"), [("parts", None, 1), ("parts", None, 2), ("terms", None, 1), ("one term", Groups(2), 1)]
)
def test_two_ranks_harmonise_as_one_process_does(ranks, name, groups, micro, split):
    alone = on_ranks([sorted(SHARES[0] + SHARES[1])], name, split, groups, micro)
    for found in ranks(on_ranks, SHARES, name, split, groups, micro):
        assert_close(found, alone, rtol=1e-5, atol=1e-9)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def fit(shards, steps=5, sharded=False, resume=None, save=None, micro=1, precision="32-true", inner=ALL, **options):
    """Parameters after some steps, and what was logged in the last one."""
    objective = partial(Harmonised, inner=inner, **options)
    make_optimizer = partial(torch.optim.AdamW, lr=1e-3)
    pretrainer = Pretrainer(make().backbone, objective, make_optimizer, constant, micro=micro, clip=0.1)
    run = trainer(steps, sharded, precision=precision)
    run.fit(pretrainer, pairs(shards, batch_size=6), ckpt_path=resume, weights_only=resume and True)
    if save:
        run.save_checkpoint(save)
    return {n: whole(p) for n, p in pretrainer.named_parameters()}, {n: x.clone() for n, x in run.callback_metrics.items()}


def test_a_run_with_the_plain_sum_is_the_plain_run(shards):
    found, told = fit(shards, rule=Plain())
    plain = Pretrainer(
        make().backbone,
        ALL,
        partial(torch.optim.AdamW, lr=1e-3),
        constant,
        clip=0.1,
    )
    run = trainer(5)
    run.fit(plain, pairs(shards, batch_size=6))
    for n, p in plain.named_parameters():
        n = n.replace("objective.", "objective.inner.")
        assert_close(found[n], p.detach(), rtol=1e-3, atol=1e-4)
    for n, x in run.callback_metrics.items():
        assert_close(told[n], x, rtol=1e-3, atol=1e-4)
    assert {"train/cosine/mask:next", "train/cosine/mask:pair", "train/conflicts"} <= told.keys()


def test_a_run_that_was_cut_ends_like_the_uninterrupted_one(shards, tmp_path):
    once, _ = fit(shards, unit="block")
    fit(shards, 3, save=tmp_path / "three.ckpt", unit="block")
    again, _ = fit(shards, resume=tmp_path / "three.ckpt", unit="block")
    assert all(torch.equal(once[n], again[n]) for n in once)


def test_pieces_and_half_precision(shards):
    a, b = fit(shards)[0], fit(shards, micro=2)[0]
    assert_close(a, b, rtol=1e-3, atol=2e-4)
    _, told = fit(shards, precision="bf16-mixed")
    assert told["train/conflicts"].isfinite()


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("micro", [1, 2])
def test_two_ranks_learn_what_one_process_learns(ranks, shards, sharded, micro):
    alone, told = fit(shards, 4)
    (a, told_a), (b, _) = ranks(fit, shards, 4, sharded, None, None, micro)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert_close(a, alone, rtol=1e-3, atol=2e-4)
    assert_close(told_a["train/cosine/mask:pair"], told["train/cosine/mask:pair"], rtol=1e-3, atol=1e-4)


def test_agreement_is_the_lowest_cosine():
    a, b, c = random_gradients(3, 8 * 5).view(3, 8, 5)
    b[3], a[4], c[4] = 0, 0, 0
    cosine = torch.nn.functional.cosine_similarity
    expected = torch.minimum(torch.minimum(cosine(a, b, -1), cosine(a, c, -1)), cosine(b, c, -1))
    expected[3], expected[4] = cosine(a[3], c[3], 0), 1
    assert_close(agreement([a, b, c]), expected)
    assert_close(agreement([a]), torch.ones(8, dtype=torch.float64))


def pulls(shares, packed=False, split=False):
    torch.manual_seed(0)
    model = cases.model(fuse=None)
    pretrainer = Pretrainer(
        model, partial(Agreeing, inner=THREE, modality="image", threshold=lambda progress: progress - 0.5)
    ).double()
    readers = cases.readers(model, pretrainer.objective)
    batch = cases.batch(readers, cases.examples(readers, 7), shares[distributed.rank()], packed)
    if split:
        shard(pretrainer, init_device_mesh("cpu", (distributed.world(),)))
    probe = Probe(pretrainer, model, pretrainer.call, 3)
    batch |= {"progress": 0.5, "step": 0}
    left = pretrainer.objective.before_step(probe, batch)
    found = agreement(pretrainer.objective.pulls(probe, model, batch))
    assert all(p.grad is None or not whole(p.grad).any() for p in pretrainer.parameters())
    return found, [left[name].samples() for name in ("image", "text", "audio")], batch, probe.told, pretrainer


def test_the_cosine_of_a_sample_is_that_of_its_gradients_by_what_the_encoder_returns():
    found, left, batch, told, pretrainer = pulls([list(range(7))])
    model, inner = pretrainer.backbone, pretrainer.objective.inner
    encoded = {n: model.encode(model.embed({n: batch[n]}))[n] for n in ("image", "text", "audio")}
    pooled = {n: model.pool(n, t) for n, t in encoded.items()}
    slopes = []
    for pair, other in zip(inner.pairs, ("text", "audio"), strict=True):
        both = torch.isin(pooled["image"].sample, pooled[other].sample)
        a = torch.nn.functional.normalize(pooled["image"].x[both], dim=-1)
        b = torch.nn.functional.normalize(pooled[other].x, dim=-1)
        logits = pair.loss.logits(a @ b.T)
        target = torch.arange(len(a))
        loss = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
        slopes.append(torch.autograd.grad(loss, encoded["image"].x, retain_graph=True)[0].sum(1))
    assert_close(found, agreement(slopes), rtol=1e-6, atol=1e-8)
    assert found[3] == 1  # it has no text
    kept = (found >= 0).nonzero()[:, 0]
    assert 1 < len(kept) < 7
    assert all(set(samples.tolist()) <= set(kept.tolist()) for samples in left)
    assert torch.equal(left[0], kept)
    assert_close(told["kept"], (found >= 0).double().mean())
    packed, left_packed, *_ = pulls([list(range(7))], packed=True)
    assert_close(packed, found)
    assert all(torch.equal(a, b) for a, b in zip(left, left_packed, strict=True))


def on_ranks_pulls(shares, split):
    return pulls(shares, split=split)[0]


@pytest.mark.parametrize("split", [False, True], ids=["ddp", "fsdp2"])
def test_two_ranks_agree_as_one_process_does(ranks, split):
    alone, *_ = pulls([list(range(7))])
    for found, own in zip(ranks(on_ranks_pulls, SHARES, split), SHARES, strict=True):
        assert_close(found, alone[own], rtol=1e-6, atol=1e-8)


def test_harmonised_around_agreeing_runs(shards, tmp_path):
    pairs_of = partial(Agreeing, inner=ALL, modality="image", threshold=0.1)
    once, told = fit(shards, inner=pairs_of)
    assert told["train/kept"] < 1
    fit(shards, 3, save=tmp_path / "three.ckpt", inner=pairs_of)
    again, _ = fit(shards, resume=tmp_path / "three.ckpt", inner=pairs_of)
    assert all(torch.equal(once[n], again[n]) for n in once)


def test_what_cannot_work_is_refused(shards):
    with pytest.raises(ValueError, match="put it outside"):
        fit(shards, 1, inner=partial(Harmonised, inner=partial(Weighted, parts=UNCOUPLED)))
    with pytest.raises(ValueError, match="the rule names old; the parts of this loss are mask, next, pair"):
        fit(shards, 1, rule=Guarded("old"))
    with pytest.raises(ValueError, match="two or more"):
        Groups(1)
    with pytest.raises(ValueError, match="has no 'class'"):
        stepped(*made(INNER["one term"], groups=Groups(2, "class")))
    with pytest.raises(ValueError, match="no encoder for 'taste'"):
        Agreeing(cases.model(), THREE, "taste")
    with pytest.raises(ValueError, match="does not ask the encoder of text"):
        fit(shards, 1, inner=partial(Agreeing, inner=partial(Masked, modality="image", width=16), modality="text"))
    with pytest.raises(ValueError, match="as a part; it makes the gradient of a whole step"):
        Weighted(cases.model(), {"agree": partial(Harmonised, inner=PARTS)})
    assert Projected(1)(torch.eye(3)[None], ["a", "b", "c"], 0).tolist() == [[1, 1, 1]]
