import math

import pytest
import torch
from torch.testing import assert_close

from headwater import distributed
from headwater.objectives.comparison import Prototypes, Regression, agreement, sinkhorn

G, V, S, K = 2, 4, 3, 6


def draws(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 0.3


def pairs():
    """Every large view of the teacher with every other view of the student."""
    return [(t, v) for t in range(G) for v in range(V) if v != t]


def dino(student, teacher, centre, hot, cold):
    """Algorithm 1 of arXiv:2104.14294 with loops: (V, S, K), (G, S, K) -> (S,)."""
    found = []
    for s in range(S):
        loss = 0
        for t, v in pairs():
            target = [math.e ** ((x - c) / cold) for x, c in zip(teacher[t, s], centre, strict=True)]
            answer = [math.e ** (x / hot) for x in student[v, s]]
            loss = loss - sum(p / sum(target) * (q / sum(answer)).log() for p, q in zip(target, answer, strict=True))
        found.append(loss / len(pairs()))
    return torch.stack(found)


def test_prototypes_equal_the_loops_of_dino_in_value_and_gradient():
    compare = Prototypes(4, K, [5]).double()
    compare.centre.copy_(draws(K, seed=1))
    student, teacher = draws(V, S, K).requires_grad_(), draws(G, S, K, seed=2)
    targets = compare.targets(teacher.flatten(0, 1), 0.0).view(G, S, K)
    ours = compare.error(agreement(compare.answers(student), targets, True))
    theirs = dino(student, teacher, compare.centre, 0.1, 0.04)
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours.sum(), student), torch.autograd.grad(theirs.sum(), student))


def test_without_own_pairs_every_student_view_meets_every_target():
    student, teacher = draws(V, S, K), draws(G, S, K, seed=1)
    every = torch.stack([sum(student[v, s] @ teacher[t, s] for v in range(V) for t in range(G)) / (V * G) for s in range(S)])
    assert_close(agreement(student, teacher, False), every)


def test_regression_equals_the_loops_of_byol():
    compare = Regression(5, [7, K], 8, norm="layer").double()
    student, teacher = draws(V, S, K).requires_grad_(), draws(G, S, K, seed=2)
    ours = compare.error(agreement(compare.answers(student), compare.targets(teacher.flatten(0, 1), 0.0).view(G, S, K), True))
    loss = 0
    for t, v in pairs():
        q = compare.predictor(student[v])
        gap = torch.stack([a / a.norm() - b / b.norm() for a, b in zip(q, teacher[t], strict=True)])
        loss = loss + (gap**2).sum(1) / len(pairs())
    assert_close(ours, loss)
    assert_close(torch.autograd.grad(ours.sum(), student), torch.autograd.grad(loss.sum(), student))


def sinkhorn_of_swav(scores, temperature, iterations):
    """`distributed_sinkhorn` of github.com/facebookresearch/swav with loops over a (K, B) matrix."""
    q = [[math.e ** (float(x) / temperature) for x in column] for column in scores.T]
    k, b = len(q), len(q[0])
    whole = sum(map(sum, q))
    q = [[x / whole for x in row] for row in q]
    for _ in range(iterations):
        q = [[x / sum(row) / k for x in row] for row in q]
        sums = [sum(row[j] for row in q) for j in range(b)]
        q = [[x / sums[j] / b for j, x in enumerate(row)] for row in q]
    return torch.tensor(q, dtype=torch.float64).T * b


def test_sinkhorn_equals_its_loops_and_meets_its_targets():
    scores = draws(12, K)
    assert_close(sinkhorn(scores, 0.1), sinkhorn_of_swav(scores, 0.1, 3))
    many = sinkhorn(scores, 0.1, 200)
    assert_close(many.sum(1), torch.ones(12, dtype=torch.float64))
    assert_close(many.sum(0), torch.full((K,), 12 / K, dtype=torch.float64))


@pytest.mark.parametrize("scores", [torch.zeros(4, 3), torch.tensor([[1e4, -1e4], [1e4, -1e4]]), torch.zeros(0, 3)])
def test_sinkhorn_survives_extremes(scores):
    assert sinkhorn(scores, 0.02).isfinite().all()


def balanced(balance, sizes):
    """Targets of this rank's rows, and the centre after a step."""
    compare = Prototypes(4, K, [5], balance=balance, centre_momentum=0.6).double()
    compare.centre.copy_(draws(K, seed=1))
    first = sum(sizes[: distributed.rank()])
    targets = compare.targets(draws(sum(sizes), K)[first : first + sizes[distributed.rank()]], 0.0)
    compare.after_step()
    return targets, compare.centre


@pytest.mark.parametrize("sizes", [[3, 2], [0, 4], [0, 0]])
@pytest.mark.parametrize("balance", ["centre", "sinkhorn"])
def test_ranks_balance_as_one_process(ranks, balance, sizes):
    targets, centre = balanced(balance, [sum(sizes)])
    results = ranks(balanced, balance, sizes)
    assert_close(torch.cat([got for got, _ in results]), targets)
    assert torch.equal(results[0][1], results[1][1])
    assert_close(results[0][1], centre)


def test_the_centre_moves_once_per_step_towards_the_mean_answer():
    compare = Prototypes(4, K, [5], centre_momentum=0.6).double()
    compare.after_step()
    assert not compare.centre.any()
    z = draws(4, K)
    before = compare.targets(z, 0.0)
    assert_close(compare.targets(z, 0.0), before)  # looking twice changes nothing
    compare.after_step()
    assert_close(compare.centre, 0.4 * sum(z) / 4)


def test_temperature_of_the_teacher_follows_its_schedule():
    compare = Prototypes(4, K, [5], balance="none", teacher_temperature=lambda progress: 0.04 + 0.03 * progress).double()
    z = draws(2, K)
    for progress in (0.0, 0.5, 1.0):
        assert_close(compare.targets(z, progress), (z / (0.04 + 0.03 * progress)).softmax(-1))


def test_metrics_tell_collapse():
    compare, k = Prototypes(4, K, [5]), float(K)
    one, flat, each = torch.eye(K)[[2] * 9], torch.full((9, K), 1 / k), torch.eye(K)
    found = [{n: round(float(v), 4) for n, v in compare.metrics(p).items()} for p in (one, flat, each)]
    assert [m["teacher_entropy"] for m in found] == [0.0, round(math.log(k), 4), 0.0]
    assert [m["prototypes_used"] for m in found] == [round(1 / k, 4), 1.0, 1.0]
    still = Regression(4, [8], 8).metrics(torch.nn.functional.normalize(torch.ones(9, 8), dim=-1))["teacher_std"]
    wide = Regression(4, [8], 8).metrics(torch.nn.functional.normalize(torch.randn(999, 8), dim=-1))["teacher_std"]
    assert still < 0.01 < 0.9 < wide < 1.1


def test_scores_of_prototypes_are_cosines():
    head = Prototypes(4, K, [5]).head
    z = head(torch.randn(3, 2, 4))
    x, w = head.mlp(torch.randn(7, 4)), head.prototypes.weight
    assert z.shape == (3, 2, K)
    assert z.abs().max() <= 1
    assert_close(
        head.prototypes(x) / x.norm(dim=1, keepdim=True) / w.norm(dim=1), torch.stack([torch.cosine_similarity(x, v) for v in w], 1)
    )


@pytest.mark.parametrize("wrong", [{"prototypes": 1}, {"sizes": []}, {"temperature": 0.0}, {"centre_momentum": 1.0}])
def test_bad_settings_are_named(wrong):
    with pytest.raises(ValueError, match="expected"):
        Prototypes(4, **wrong)
