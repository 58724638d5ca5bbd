import pytest
import torch
from contracts import cases
from torch.nn import functional as F
from torch.testing import assert_close

from headwater.objectives import JointEmbedding
from headwater.tokens import Pooled, in_all, of


def made(packed=False, modalities=("image",), **options):
    model = cases.model(fuse=None)
    objective = JointEmbedding(model, modalities, **{"projector": [16, 8]} | options).double()
    readers = cases.readers(model, objective)
    return model, objective, cases.batch(readers, cases.examples(readers, 7), packed=packed)


def official_vicreg(x, y):
    """The loss of github.com/facebookresearch/vicreg, main_vicreg.py, with its default weights."""
    n, d = x.shape
    repr_loss = F.mse_loss(x, y)
    x, y = x - x.mean(0), y - y.mean(0)
    std_x, std_y = torch.sqrt(x.var(dim=0) + 0.0001), torch.sqrt(y.var(dim=0) + 0.0001)
    std_loss = torch.mean(F.relu(1 - std_x)) / 2 + torch.mean(F.relu(1 - std_y)) / 2
    covs = [(z.T @ z) / (n - 1) for z in (x, y)]
    cov_loss = sum(c.masked_fill(torch.eye(d, dtype=torch.bool), 0).pow(2).sum() / d for c in covs)
    return 25 * repr_loss + 25 * std_loss + cov_loss


def test_the_default_is_the_official_vicreg():
    model, objective, batch = made()
    found, _ = cases.terms(objective, model, batch)
    x = [v.x for v in model.represent({k: batch[k] for k in objective.needs}).values()]
    z = objective.heads["image"](torch.stack(x))  # the norms of a head see all views
    assert {k: int(t.number) for k, t in found.items()} == {"invariance": 7, "variance": 7, "covariance": 7}
    assert_close(cases.loss(found), official_vicreg(*z))


def test_several_views_are_compared_pair_by_pair():
    model, objective, batch = made(views=3, terms={"invariance": 1.0, "alignment": 1.0}, projector=[])
    found, _ = cases.terms(objective, model, batch)
    z = [v.x for v in model.represent({k: batch[k] for k in objective.needs}).values()]
    pairs = [(z[0], z[1]), (z[0], z[2]), (z[1], z[2])]
    assert_close(found["invariance"].total / 7, sum(F.mse_loss(a, b) for a, b in pairs) / 3)
    assert_close(found["alignment"].total / 7, sum((2 - 2 * F.cosine_similarity(a, b)).mean() for a, b in pairs) / 3)


def test_only_samples_that_have_all_modalities_count():
    model, objective, batch = made(modalities=("image", "text"), views=0, terms={"invariance": 1.0}, projector=[])
    term = cases.terms(objective, model, batch)[0]["invariance"]
    pooled = model.represent({k: batch[k] for k in ("image", "text")})
    have = [0, 1, 2, 4, 5, 6]  # every fifth lacks text
    assert pooled["text"].sample.tolist() == have
    assert term.number == 6
    assert_close(term.total, (pooled["image"].x[have] - pooled["text"].x).square().mean(-1).sum())


EVERY = dict.fromkeys(["invariance", "barlow", "variance", "covariance", "orthogonality", "spread", "gaussian", "unit"], 0.1)


@pytest.mark.parametrize("packed", [False, True])
def test_two_pieces_equal_one(packed):
    results = []
    for chunks in (1, 2):
        model, objective, batch = made(packed, terms=EVERY, slices=8)
        assert objective.pieces(batch, chunks) == [batch]
        model.chunks = chunks
        loss = cases.loss(cases.terms(objective, model, batch)[0])
        loss.backward()
        grads = {n: p.grad for n, p in torch.nn.ModuleList([model, objective]).named_parameters() if p.grad is not None}
        results.append((loss, grads))
    assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def rank_after(terms, steps=100):
    """exp(entropy of the singular values) of image vectors, of at most 7, after training on pairs of pictures and words."""
    model, objective, batch = made(modalities=("image", "text"), views=0, terms=terms, projector=[])
    step = torch.optim.Adam([*model.parameters(), *objective.parameters()], 1e-2)
    for _ in range(steps):
        loss = cases.loss(cases.terms(objective, model, batch)[0])
        step.zero_grad()
        loss.backward()
        step.step()
    p = torch.linalg.svdvals(model.represent({"image": batch["image"]})["image"].x.detach())
    return float(torch.special.entr(p / p.sum()).sum().exp())


def test_pairs_without_negatives_collapse_and_with_a_term_they_do_not():
    assert rank_after({"alignment": 1.0}) < 2
    assert rank_after({"alignment": 1.0, "spread": 1.0}) > 4
    assert rank_after({"invariance": 1.0, "variance": 1.0, "covariance": 0.5}) > 4


def test_samples_in_all():
    a, b, c = (torch.tensor(x) for x in ([0, 2, 3, 5], [0, 3, 5], [1, 3, 5]))
    assert in_all([a, b, c]).tolist() == [3, 5]
    assert of(Pooled(torch.tensor([[0.0], [2.0], [3.0], [5.0]]), a), torch.tensor([3, 5])).flatten().tolist() == [3.0, 5.0]


@pytest.mark.parametrize(
    "options",
    [
        {"modalities": []},
        {"modalities": ["image", "image"]},
        {"terms": {}},
        {"terms": {"invarience": 1.0}},
        {"views": 1},
        {"views": 0, "terms": {"barlow": 1.0}},
    ],
)
def test_bad_settings_are_named(options):
    with pytest.raises(ValueError, match=r"expected|set"):
        JointEmbedding(cases.model(fuse=None), **options)


def test_vectors_of_unlike_size_need_a_projector():
    model = cases.model(fuse=None)
    model.space, model.projections = None, torch.nn.ModuleDict()
    with pytest.raises(ValueError, match="projector"):
        JointEmbedding(model, ["image", "text"], views=0, projector=[])
