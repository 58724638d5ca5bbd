"""Codes as targets: clusters, random projection and quantiser, against their formulas typed anew with loops."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from contracts import cases
from safetensors.torch import save_file
from torch.testing import assert_close

from headwater import distributed, modalities, random
from headwater.model import Model
from headwater.objectives.targets.codes import (
    Clusters,
    Quantiser,
    RandomProjection,
    diversity,
    kmeans,
    nearest,
    select_code,
)
from headwater.objectives.targets.features import layers
from headwater.objectives.targets.target import Asked
from headwater.training.schedules import Linear
from headwater.trunk import Trunk


def sounds(depth=1, seed=0):
    torch.manual_seed(seed)
    return Model({"audio": modalities.Audio(Trunk(16, depth, heads=2), bands=4, frames=4)}).double()


def batch_of(model, numbers=None, packed=False):
    return cases.batch(model.readers, cases.examples(model.readers, 7), numbers, packed)


def blobs(count=6, each=30, width=5):
    torch.manual_seed(1)
    centres = torch.randn(count, width).double() * 20
    return centres, (centres[:, None] + 0.1 * torch.randn(count, each, width)).flatten(0, 1)[torch.randperm(count * each)]


def by_sample(found, batch):
    t = batch["audio"]
    return {s: found[t.real() & (t.sample() == s)] for s in t.samples().tolist()}


def test_nearest_against_loops():
    torch.manual_seed(0)
    x, centres = torch.randn(2, 7, 3).double(), torch.randn(5, 3).double()
    for b in range(2):
        for n in range(7):
            distance = [sum((float(x[b, n, f]) - float(centres[k, f])) ** 2 for f in range(3)) for k in range(5)]
            assert int(nearest(x, centres)[b, n]) == distance.index(min(distance))


def test_kmeans_finds_blobs_and_is_a_fixed_point():
    centres, x = blobs()
    found = kmeans(x, 6, seed=3)
    assert_close(found[nearest(centres, found)], centres, rtol=0, atol=0.1)
    own = nearest(x, found)
    for k in range(6):  # Lloyd's condition: every centre is the mean of what is nearest to it
        assert_close(found[k], sum(x[own == k]) / int((own == k).sum()), rtol=1e-9, atol=1e-9)
    assert torch.equal(found, kmeans(x, 6, seed=3))
    assert kmeans(x[:3], 6).isfinite().all()  # more clusters than vectors


def test_kmeans_steps_never_raise_the_error():
    torch.manual_seed(0)
    x = torch.randn(300, 4).double()
    errors = []
    for steps in range(6):
        centres = kmeans(x, 8, steps=steps)
        errors.append(float((x - centres[nearest(x, centres)]).square().sum()))
    assert all(later <= earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_clusters_of_a_file(tmp_path):
    model = sounds()
    torch.manual_seed(0)
    centres = torch.randn(9, 16)
    file = str(tmp_path / "centres.safetensors")
    save_file({"centres": centres}, file)
    target, batch = Clusters(model, "audio", file=file).double(), batch_of(sounds())
    assert target.size == 9
    assert torch.equal(target.look(model, batch), nearest(batch["audio"].x, centres.double()))
    assert_close(target.centres, centres.double())
    with pytest.raises(FileNotFoundError, match="headwater clusters"):
        Clusters(model, "audio", file=str(tmp_path / "none"))
    save_file({"x": centres}, file)
    with pytest.raises(ValueError, match="expected a tensor `centres`"):
        Clusters(model, "audio", file=file)
    save_file({"centres": centres[:, :3].contiguous()}, file)
    with pytest.raises(ValueError, match=r"found centres \(9, 3\) for audio"):
        Clusters(model, "audio", file=file)


def test_clusters_are_fitted_to_the_first_batch_and_then_stay():
    model = sounds()
    target = Clusters(model, "audio", size=4).double()
    first, other = batch_of(model), batch_of(model, [0, 1])
    real = first["audio"].real()
    codes = target.look(model, first)
    order = random.token_seed(first["seed"], first["audio"])[real].argsort()
    assert_close(target.centres, kmeans(first["audio"].x[real][order], 4))
    assert set(codes[real].tolist()) == {0, 1, 2, 3}
    kept = target.centres.clone()
    target.look(model, other)
    assert torch.equal(target.centres, kept)
    again = Clusters(model, "audio", size=4).double()
    again.load_state_dict(target.state_dict())
    assert torch.equal(again.look(model, other), target.look(model, other))
    assert torch.equal(again.centres, kept)


def test_clusters_wait_for_tokens_and_want_enough_of_them():
    model = sounds()
    target, batch = Clusters(model, "audio", size=4).double(), batch_of(model)
    none = batch["audio"]._replace(valid=torch.zeros_like(batch["audio"].real()))
    target.look(model, batch | {"audio": none})
    assert not target.fitted
    with pytest.warns(UserWarning, match="400 clusters of audio are fitted to the"):
        Clusters(model, "audio", size=400).double().look(model, batch)
    target.look(model, batch)
    assert target.fitted


def test_clusters_do_not_depend_on_rows():
    model = sounds()
    found = [Clusters(model, "audio", size=4).double() for _ in range(2)]
    codes = [target.look(model, batch_of(model, packed=p)) for target, p in zip(found, (False, True), strict=True)]
    assert torch.equal(found[0].centres, found[1].centres)
    apart, packed = (by_sample(c, batch_of(model, packed=p)) for c, p in zip(codes, (False, True), strict=True))
    assert all(torch.equal(apart[s], packed[s]) for s in range(7))


def fitted(shares):
    model = sounds()
    target = Clusters(model, "audio", size=4).double()
    target.look(model, batch_of(model, shares[distributed.rank()]))
    return target.centres


def test_all_ranks_fit_the_same_clusters(ranks):
    expected = fitted([list(range(7))])
    for got in ranks(fitted, [[0, 3, 4, 6, 1], [2, 5]]):
        assert torch.equal(got, expected)


def test_clusters_of_a_tower():
    model, tower = sounds(), sounds(2, seed=1).encoder("audio")
    batch = batch_of(model)
    outer = Clusters(model, "audio", tower=tower, size=5).double()
    assert_close(outer.vectors(batch["audio"]), tower(tower.embed(batch["audio"])).x)
    inner = Clusters(model, "audio", tower=tower, layer=1, size=5).double()
    assert_close(inner.vectors(batch["audio"]), layers(tower, batch["audio"], [0], "block")[0])
    assert inner.look(model, batch).max() < 5
    assert not any(p.requires_grad for p in inner.parameters())
    with pytest.raises(ValueError, match="found layer 3"):
        Clusters(model, "audio", tower=tower, layer=3)
    with pytest.raises(ValueError, match="found layer 1"):
        Clusters(model, "audio", layer=1)


def test_ids_are_codes_already():
    model = Model({"text": modalities.Text(Trunk(16, 1, heads=2), length=8)})
    for make in (Clusters, RandomProjection):
        with pytest.raises(ValueError, match="made of ids"):
            make(model, "text")


def test_random_projection_against_loops():
    """BEST-RQ: argmin_i || norm(c_i) - norm(A x) ||, of a signal with mean 0 and deviation 1."""
    model = sounds()
    target, batch = RandomProjection(model, "audio", size=11, width=3).double(), batch_of(model)
    found, t = target.look(model, batch), batch["audio"]
    for row in range(len(t.x)):
        x = t.x[row][t.real()[row]]
        x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
        for n in range(len(x)):
            y = [sum(float(target.projection[d, f] * x[n, f]) for f in range(16)) for d in range(3)]
            length = math.sqrt(sum(v * v for v in y))
            distance = [math.dist([v / length for v in y], c.tolist()) for c in target.codes]
            assert int(found[row, n]) == distance.index(min(distance))
    packed = batch_of(model, packed=True)
    apart, joined = by_sample(found, batch), by_sample(target.look(model, packed), packed)
    assert all(torch.equal(apart[s], joined[s]) for s in range(7))


def test_random_projection_is_a_function_of_its_seed():
    made = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model = sounds()
        torch.manual_seed(noise)
        made.append(RandomProjection(model, "audio", size=50, width=4, seed=seed))
    assert torch.equal(made[0].codes, made[1].codes)
    assert torch.equal(made[0].projection, made[1].projection)
    assert not torch.equal(made[0].codes, made[2].codes)
    assert_close(made[0].codes.norm(dim=-1), torch.ones(50))
    bound = (6 / (16 + 4)) ** 0.5  # Xavier
    assert 0.9 * bound < made[0].projection.abs().max() < bound
    assert list(made[0].parameters()) == []


def test_choosing_a_code_is_hard_forward_and_soft_backward():
    torch.manual_seed(0)
    logits, noise = torch.randn(3, 2, 5).double().requires_grad_(), torch.randn(3, 2, 5).double()
    found, weight = select_code(logits, noise, 0.7), torch.randn(3, 2, 5).double()
    for k in range(3):
        for g in range(2):
            best = max(range(5), key=lambda v, k=k, g=g: (logits[k, g, v] + noise[k, g, v]).item())
            assert_close(found[k, g], torch.eye(5).double()[best])
    raised = ((logits + noise) / 0.7).exp()
    naive = torch.autograd.grad((raised / raised.sum(-1, keepdim=True) * weight).sum(), logits, retain_graph=True)[0]
    assert_close(torch.autograd.grad((found * weight).sum(), logits)[0], naive)


def test_diversity_against_loops():
    """Baevski et al. 2020, footnote to equation 4: (G V - sum_g exp(-sum_v p_gv log p_gv)) / (G V)."""
    torch.manual_seed(0)
    scores = torch.randn(2, 6).double().requires_grad_()
    mean = scores.softmax(-1)
    naive = (2 * 6 - sum(math.e ** -sum(mean[g, v] * mean[g, v].log() for v in range(6)) for g in range(2))) / (2 * 6)
    assert_close(diversity(mean), naive)
    gradients = [torch.autograd.grad(loss, scores, retain_graph=True)[0] for loss in (diversity(mean), naive)]
    assert_close(*gradients)
    assert_close(diversity(torch.full((3, 4), 0.25)), torch.tensor(0.0))
    one = torch.eye(4)[:2].requires_grad_()
    assert diversity(one) == 0.75  # 0 log 0 = 0
    assert torch.autograd.grad(diversity(one), one)[0].isfinite().all()


def quantised(temperature=1.0, packed=False, numbers=None, **options):
    model = sounds()
    torch.manual_seed(3)
    target = Quantiser(model, "audio", books=2, codes=5, size=6, temperature=temperature, **options).double()
    batch = batch_of(model, numbers, packed)
    t, seed = batch["audio"], random.token_seed(batch["seed"], batch["audio"])
    asked = Asked(t, seed, model.encoder("audio").embed(t).x, None, 0.25)
    return target, asked, batch


def test_quantised_vectors_against_loops():
    target, asked, _ = quantised(temperature=Linear(2.0, 0.5))
    found, terms = target.answer(asked)
    noise = random.gumbel(asked.seed, (2, 5), "quantiser").double()
    every = []
    for row in range(len(found)):
        for k in range(found.shape[1]):
            z = asked.embedded[row, k]
            z = (z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt()
            logits = (target.choose.weight @ z + target.choose.bias).view(2, 5)
            chosen = [int((logits[g] + noise[row, k, g]).argmax()) for g in range(2)]
            vector = torch.cat([target.codes[g, chosen[g]] for g in range(2)])
            assert_close(found[row, k], target.out.weight @ vector + target.out.bias)
            if asked.raw.real()[row, k]:
                every.append(logits.softmax(-1))
    mean = sum(every) / len(every)
    expected = 1 - (-(mean * mean.log()).sum(-1)).exp().sum() / 10
    term = terms["diversity"]
    assert int(term.number) == len(every)
    assert_close(term.total / term.number, expected, rtol=1e-9, atol=1e-9)
    assert_close(term.metrics["perplexity"], (-(mean * mean.log()).sum(-1)).exp().mean().detach())
    assert term.weight == 0.1


def test_the_temperature_only_changes_the_gradient():
    answers, gradients = [], []
    for temperature in (0.5, 2.0):
        target, asked, _ = quantised(temperature)
        y = target.answer(asked)[0]
        answers.append(y.detach())
        gradients.append(torch.autograd.grad(y.square().sum(), target.choose.weight)[0])
    assert_close(*answers)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


def test_a_book_that_is_pushed_to_diversity_uses_all_codes():
    target, asked, _ = quantised()
    asked = asked._replace(embedded=asked.embedded.detach())
    with torch.no_grad():
        target.choose.bias[:] = torch.tensor([4.0, 0, 0, 0, 0] * 2)
    optimizer = torch.optim.Adam(target.parameters(), 0.05)
    found = []
    for _ in range(60):
        term = target.answer(asked)[1]["diversity"]
        optimizer.zero_grad()
        (term.total / term.number).backward()
        optimizer.step()
        found.append(float(term.metrics["perplexity"]))
    assert found[-1] > 4.5 > found[0] + 1


def test_quantiser_refuses_what_it_cannot_build():
    for options, said in (
        ({"size": 7}, "size that books divide"),
        ({"codes": 1}, "1 codes"),
        ({"temperature": 0.0}, "temperature 0"),
    ):
        with pytest.raises(ValueError, match=said):
            Quantiser(sounds(), "audio", **options)
    target, asked, _ = quantised()
    with pytest.raises(ValueError, match="embedded"):
        target.answer(asked._replace(embedded=None))


def test_copies_do_not_share_what_is_fitted():
    model = sounds()
    target = Clusters(model, "audio", size=4).double()
    other = copy.deepcopy(target)
    target.look(model, batch_of(model))
    assert bool(target.fitted)
    assert not bool(other.fitted)
