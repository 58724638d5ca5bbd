import math

import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from torch.testing import assert_close

from headwater.modalities.label import Categories, Category
from headwater.objectives.contrast.candidates import Candidates, Rows, contrast
from headwater.objectives.contrast.hard_negatives import HardNegatives, WithoutFalse
from headwater.objectives.contrast.losses import Softmax
from headwater.objectives.contrast.positives import Alike, Identity, SameLabel, features
from headwater.objectives.contrast.scores import Cosine
from headwater.objectives.contrast.soft_positives import Momentum, Nearest, NoiseAware, noisy
from headwater.tokens import Tokens

SCALE = 4.0


class Plain(Cosine):
    """Dot products of vectors as they are."""

    def __init__(self, dim=3):
        torch.nn.Module.__init__(self)
        self.like = (torch.empty(0, dim),)


SCORE = Plain()


def vectors(n=5, seed=0):
    torch.manual_seed(seed)
    return [torch.nn.functional.normalize(torch.randn(n, 3, dtype=torch.float64), dim=-1).requires_grad_() for _ in "ab"]


def loss(positives, a, b, facts_a=(), facts_b=(), tile=1 << 20, own=None):
    """What the rows of `a` add beside the candidates `b`, one number."""
    own = torch.arange(len(a)) if own is None else own
    rows, candidates = Rows((a,), facts_a, own), Candidates((b,), facts_b)
    return contrast(SCORE, Softmax(1 / SCALE, learned=False).double(), positives, rows, candidates, tile).sum()


def naive(a, b, answers, weight=None):
    """- sum_j T_ij log( e^S_ij / sum_k w_ik e^S_ik ) with loops; answers, weight: functions of i and the row's scores."""
    total = 0
    for i in range(len(a)):
        s = [SCALE * sum(a[i] * b[j]) for j in range(len(b))]
        fixed = [x.item() for x in s]
        t, w = answers(i, fixed), [1.0] * len(b) if weight is None else weight(i, fixed)
        below = sum(w[k] * s[k].exp() for k in range(len(b)))
        total = total - sum(t[j] * (s[j] - below.log()) for j in range(len(b)))
    return total


def alone(i, scores):
    return [float(j == i) for j in range(len(scores))]


def softmax(values):
    return [math.exp(v) / sum(math.exp(w) for w in values) for v in values]


def same(ours, theirs, given):
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours, given), torch.autograd.grad(theirs, given))


def labels(*ids):
    """One row per sample, None = no label."""
    x = torch.tensor([[0 if i is None else i] for i in ids])
    return Tokens(x, torch.zeros(*x.shape, 1), torch.tensor([[i is not None] for i in ids]))


def facts(positives, label, n=5):
    return positives.facts({"label": label, "seed": torch.zeros(n, dtype=torch.int64)}, "image", torch.arange(n), ())


CLASSES = ["x", "y", "z"]
TAGS = Tokens(
    torch.tensor([[1.0, 1, 0], [0, 1, 1], [0, 0, 0], [1, 1, 0], [1, 0, 0]]).double()[:, None],
    torch.zeros(5, 1, 1),
    torch.tensor([1, 1, 0, 1, 1]).bool()[:, None],
)


@pytest.mark.parametrize(
    "positives",
    [
        Identity(SCORE),
        HardNegatives(SCORE, beta=0.0),
        WithoutFalse(SCORE, above=1.01),
        Momentum(SCORE, share=0.0),
        Nearest(SCORE, share=0.0),
        NoiseAware(SCORE),
        Alike(SCORE, Categories(CLASSES), share=0.0),
        SameLabel(SCORE, Category(CLASSES)),
    ],
    ids=lambda p: type(p).__name__,
)
def test_with_nothing_extra_it_is_infonce(positives):
    a, b = vectors()
    known = {"Alike": (TAGS.x[:, 0],), "SameLabel": (torch.full((5,), -1),)}
    given = known.get(type(positives).__name__)
    sides = [given or tuple(x.detach() for x in side) for side in ([a], [b])]
    ours = loss(positives, a, b, *(side if positives.like else () for side in sides))
    target = torch.nn.functional.cross_entropy(SCALE * a @ b.T, torch.arange(5), reduction="sum")
    assert_close(ours, target, rtol=1e-6, atol=1e-6)
    same(ours, naive(a, b, alone), (a, b))


def test_all_of_a_label_are_answers_and_those_without_have_their_partner():
    a, b = vectors()
    ids = [1, 0, 1, None, 1]
    positives = SameLabel(SCORE, Category(CLASSES))
    known = facts(positives, labels(*ids))
    assert known[0].tolist() == [1, 0, 1, -1, 1]

    def answers(i, scores):
        right = [j == i or (ids[i] is not None and ids[i] == ids[j]) for j in range(5)]
        return [r / sum(right) for r in right]

    same(loss(positives, a, b, known, known), naive(a, b, answers), (a, b))


def test_answers_by_score_have_the_gradient_of_their_summed_probability():
    a, b = vectors()
    ids = torch.tensor([1, 0, 1, 0, 1])
    ours = loss(SameLabel(SCORE, Category(CLASSES), share="by score"), a, b, (ids,), (ids,))
    p = (SCALE * a @ b.T).softmax(1)
    mass = -(p * (ids[:, None] == ids)).sum(1).log().sum()
    assert_close(torch.autograd.grad(ours, (a, b)), torch.autograd.grad(mass, (a, b)))


def test_shares_follow_what_tags_have_in_common():
    a, b = vectors()
    positives = Alike(SCORE, Categories(CLASSES), share=0.4)
    known = facts(positives, TAGS)
    tags = [{k for k in range(3) if row[k]} for row in TAGS.x[:, 0]]

    def answers(i, scores):
        common = [len(tags[i] & tags[j]) / max(1, len(tags[i] | tags[j])) for j in range(5)]
        soft = [c / sum(common) for c in common] if any(common) else alone(i, scores)
        return [0.6 * x + 0.4 * y for x, y in zip(alone(i, scores), soft, strict=True)]

    same(loss(positives, a, b, known, known), naive(a, b, answers), (a, b))


def test_cosine_of_neighbourhoods_and_a_schedule():
    a, b = vectors()
    positives = Alike(SCORE, Categories(CLASSES), share=lambda progress: progress, measure="cosine", floor=0.6)
    batch = {"label": TAGS, "seed": torch.zeros(5, dtype=torch.int64), "progress": 0.25}
    known = positives.facts(batch, "image", torch.arange(5), ())

    def answers(i, scores):
        norm = [math.sqrt(sum(row)) or 1.0 for row in TAGS.x[:, 0].tolist()]
        alike = [float(sum(TAGS.x[i, 0] * TAGS.x[j, 0])) / norm[i] / norm[j] for j in range(5)]
        kept = [x if x > 0.6 else 0.0 for x in alike]
        soft = [x / sum(kept) for x in kept] if any(kept) else alone(i, scores)
        return [0.75 * x + 0.25 * y for x, y in zip(alone(i, scores), soft, strict=True)]

    same(loss(positives, a, b, known, known), naive(a, b, answers), (a, b))


def test_features_join_ids_by_sample_in_packed_rows():
    packed = Tokens(torch.tensor([[2, 0, 1, 1]]), torch.zeros(1, 4, 1), None, torch.tensor([[0, 0, 2, 2]]))
    assert features(packed, 3, 3).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_hard_negatives_equal_the_printed_formula(alpha, beta):
    """- log( e^S_ii / (alpha e^S_ii + sum_j w_ij e^S_ij) ), w_ij = (n - 1) e^(beta S_ij) / sum_k e^(beta S_ik)."""
    a, b = vectors()

    def weight(i, scores):
        below = sum(math.exp(beta * scores[k]) for k in range(5) if k != i)
        return [alpha if j == i else 4 * math.exp(beta * scores[j]) / below for j in range(5)]

    same(loss(HardNegatives(SCORE, beta, alpha), a, b), naive(a, b, alone, weight), (a, b))


def test_hard_negatives_around_labels_leave_answers_alone():
    a, b = vectors()
    ids = [1, 0, 1, 0, 2]
    positives = HardNegatives(SCORE, 0.5, inner=lambda score: SameLabel(score, Category(CLASSES)))
    assert positives.needs == ("label",)
    known = (torch.tensor(ids),)

    def answers(i, scores):
        return [float(ids[i] == ids[j]) / ids.count(ids[i]) for j in range(5)]

    def weight(i, scores):
        wrong = [math.exp(0.5 * s) * (ids[i] != ids[j]) for j, s in enumerate(scores)]
        return [1.0 if ids[i] == ids[j] else (5 - ids.count(ids[i])) * wrong[j] / sum(wrong) for j in range(5)]

    same(loss(positives, a, b, known, known), naive(a, b, answers, weight), (a, b))


def test_harder_negatives_get_more_of_the_gradient():
    scores = torch.tensor([[1.0, 0.9, -0.5, -1.0]])
    weight = HardNegatives(SCORE, 1.0)((), (), torch.tensor([0]), scores).log_w
    assert weight[0, 1] > 0 > weight[0, 2] > weight[0, 3]
    assert_close(weight[0, 1:].exp().mean(), torch.tensor(1.0))


def test_columns_that_are_out_have_no_part():
    scores = torch.tensor([[1.0, 0.9, -torch.inf, -1.0]])
    inside, own = [0, 1, 3], torch.tensor([0])
    few = scores[:, inside]
    ids = torch.tensor([1, 1, 1, 2])
    unit = torch.eye(4)
    for positives, known in (
        (HardNegatives(SCORE, 1.0), ()),
        (Momentum(Plain(4)), (unit,)),
        (Nearest(Plain(4), k=2), (unit,)),
        (SameLabel(SCORE, Category(CLASSES)), (ids,)),
    ):
        row = tuple(k[:1] for k in known)
        whole, part = positives(row, known, own, scores), positives(row, tuple(k[inside] for k in known), own, few)
        assert_close(whole.t[:, inside], part.t)
        assert whole.t[0, 2] == 0
        if part.log_w is not None:
            assert_close(whole.log_w[:, inside], part.log_w)


def test_what_looks_like_the_answer_is_no_negative():
    a, b = vectors()
    with torch.no_grad():
        b[3] = 0.99 * b[1] + 0.01 * b[3]
    known = (b.detach(),)

    def weight(i, scores):
        return [float(j == i or sum(b[i] * b[j]) < 0.9) for j in range(5)]

    assert sum(weight(1, [0] * 5)) < 5
    same(loss(WithoutFalse(SCORE, 0.9), a, b, known, known), naive(a, b, alone, weight), (a, b))
    both = WithoutFalse(SCORE, 0.9, inner=lambda score: HardNegatives(score, 0.5))
    assert loss(both, a, b, known, known).isfinite()


def test_momentum_targets_are_a_softmax_of_the_teachers_scores():
    a, b = vectors()
    slow_a, slow_b = (x.detach() for x in vectors(seed=1))

    def answers(i, scores):
        taught = softmax([float(sum(slow_a[i] * slow_b[j])) / 0.3 for j in range(5)])
        return [0.6 * x + 0.4 * y for x, y in zip(alone(i, scores), taught, strict=True)]

    ours = loss(Momentum(SCORE, 0.4, 0.3), a, b, (slow_a,), (slow_b,))
    same(ours, naive(a, b, answers), (a, b))


def test_nearest_are_those_most_like_the_partner():
    a, b = vectors()

    def answers(i, scores):
        alike = sorted((j for j in range(5) if j != i), key=lambda j: -sum(b[i] * b[j]).item())[:2]
        return [0.7 * float(j == i) + 0.15 * float(j in alike) for j in range(5)]

    ours = loss(Nearest(SCORE, k=2, share=0.3), a, b, (a.detach(),), (b.detach(),))
    same(ours, naive(a, b, answers), (a, b))


def test_tiles_give_the_same():
    a, b = vectors()
    for positives, known in (
        (HardNegatives(SCORE, 0.5), [(), ()]),
        (Momentum(SCORE), [(a.detach(),), (b.detach(),)]),
        (Nearest(SCORE), [(a.detach(),), (b.detach(),)]),
        (SameLabel(SCORE, Category(CLASSES)), [(torch.tensor([0, 1, 1, 0, 1]),)] * 2),
    ):
        same(loss(positives, a, b, *known, tile=10), loss(positives, a, b, *known), (a, b))


def fitted(steps=60):
    """A mixture that has seen losses of which 40 % are of mismatched pairs, and new losses with the truth."""
    positives = NoiseAware(SCORE, warmup=1)
    torch.manual_seed(0)

    def draw(n):
        wrong = torch.rand(n) < 0.4
        return torch.where(wrong, 3 + 0.6 * torch.randn(n), 0.8 + 0.4 * torch.randn(n)).double(), wrong

    for _ in range(steps):
        positives.facts({}, "image", torch.arange(0), ())
        positives.losses = [draw(64)[0]]
        positives.after_step(0.0)
    return positives, *draw(2000)


def test_the_mixture_finds_mismatched_pairs():
    positives, x, wrong = fitted()
    assert roc_auc_score(wrong, noisy(x, positives.moments)) > 0.98
    theirs = GaussianMixture(2, random_state=0).fit(x[:, None])
    mean = (positives.moments[:, 1] / positives.moments[:, 0]).sort().values
    assert_close(mean, torch.tensor(sorted(theirs.means_[:, 0])), rtol=0.1, atol=0.1)
    grid = torch.linspace(-2, 6, 50).double()
    assert (noisy(grid, positives.moments).diff() >= -1e-9).all()


@pytest.mark.parametrize("toward", ["scores", "uniform"])
def test_noisy_rows_have_softer_targets(toward):
    positives, *_ = fitted()
    positives.toward, positives.most = toward, 0.8
    a, b = vectors()

    def answers(i, scores):
        own_loss = math.log(sum(map(math.exp, scores))) - scores[i]
        p = 0.8 * noisy(torch.tensor([own_loss]).double(), positives.moments).item()
        other = softmax(scores) if toward == "scores" else [0.2] * 5
        return [(1 - p) * x + p * y for x, y in zip(alone(i, scores), other, strict=True)]

    ours = loss(positives, a, b)
    same(ours, naive(a, b, answers), (a, b))
    assert len(positives.losses) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: HardNegatives(SCORE, beta=-1),
        lambda: HardNegatives(SCORE, alpha=2),
        lambda: Momentum(SCORE, share=1.5),
        lambda: Momentum(SCORE, temperature=0),
        lambda: Nearest(SCORE, k=0),
        lambda: Nearest(SCORE, share=1.0),
        lambda: NoiseAware(SCORE, warmup=0),
    ],
)
def test_bad_arguments_are_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()


def test_scores_of_sets_cannot_be_kept():
    score = Plain()
    score.like = None
    with pytest.raises(ValueError, match="one vector per sample"):
        WithoutFalse(score)
