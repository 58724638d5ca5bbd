"""Looking further ahead than a step: hypergradients by a Neumann series, against solved problems."""

from functools import partial

import pytest
import torch
from test_common_minima import Bowl, Point, bowl
from test_vpretraining import DESIGNED, SHARES, made, probe_of, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close

from headwater import distributed
from headwater.objectives import VPretraining, Weighted
from headwater.objectives.designers import PartWeights
from headwater.objectives.directions import Neumann
from headwater.objectives.estimators import Difference, Double
from headwater.objectives.probe import Probe
from headwater.tokens import Tokens
from headwater.training.sharding import shard


class Whole(nn.Module):
    """What a Pretrainer is to a Probe."""

    def __init__(self, model, objective):
        super().__init__()
        self.backbone, self.objective = model, objective(model)


class Labelled(Bowl):
    """Feedback on a point."""

    feedback_needs = ("answer",)


def bilevel(shapes, target, **options):
    """A point that learns several quadratics, whose weights feedback at `target` sets."""
    d = len(target)
    inner = partial(Weighted, parts={name: partial(Bowl, a=a, c=c) for name, (a, c) in shapes.items()})
    feedback = partial(Labelled, a=torch.eye(d, dtype=torch.float64), c=target)
    objective = partial(VPretraining, inner=inner, feedback=feedback, designer=PartWeights, after=0, **options)
    return Whole(Point(d), objective).double()


def weights(logits):
    return torch.softmax(logits, -1) * len(logits)


def solved(logits, shapes):
    """theta*(phi), in closed form."""
    w = weights(logits)
    curvature = sum(w[k] * a for k, (a, _) in enumerate(shapes.values()))
    return torch.linalg.solve(curvature, sum(w[k] * a @ c for k, (a, c) in enumerate(shapes.values())))


def step_of(whole_, step):
    """What is handed over for the designer in a step."""
    probe = Probe(whole_, whole_.backbone, lambda ask: ask(), step)
    nothing = Tokens(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    batch = {"seed": torch.zeros(1, dtype=torch.int64), "step": step, "progress": 0.0, "nothing": nothing}
    left = whole_.objective.before_step(probe, {**batch, "feedback": dict(batch)})
    ((_, gradients, _),) = probe.handed
    return gradients, left, probe


@pytest.mark.parametrize("estimator", [Double(), Difference()], ids=["double", "difference"])
def test_the_hypergradient_is_that_of_the_solved_problem(estimator):
    """Within 1 %, by central differences of L_down(theta*(phi)); one step ahead is another direction."""
    shapes = {f"part{k}": bowl(k) for k in range(4)}
    target = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    phi = torch.tensor([0.3, -0.2, 0.5, -0.1], dtype=torch.float64)
    slopes = {}
    for name, direction in {"ahead": None, "solved": Neumann(300, 0.1)}.items():
        run = bilevel(shapes, target, estimator=estimator, direction=direction)
        with torch.no_grad():
            run.objective.designer.logits.copy_(phi)
            run.backbone.theta.copy_(solved(phi, shapes))
        slopes[name] = step_of(run, 0)[0][0]

    def down(logits):
        return (solved(logits, shapes) - target).square().sum() / 2

    expected = torch.stack([(down(phi + 1e-5 * e) - down(phi - 1e-5 * e)) / 2e-5 for e in torch.eye(4, dtype=torch.float64)])
    assert (slopes["solved"] - expected).norm() < 0.01 * expected.norm()  # what is handed over is descended
    assert (slopes["ahead"] - expected).norm() > 0.1 * expected.norm()


def test_the_series_is_the_inverse():
    """rate * sum (I - rate H)^k g, typed out; with damping of (H + damping)^-1."""
    a, c = bowl(1)
    model = Point(5)
    inner = Bowl(model, a, c)
    probe = Probe(model, model, lambda ask: ask())
    g = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for terms, damping in ((0, 0.0), (3, 0.0), (3, 0.5), (400, 0.5)):
        (found,) = Neumann(terms, 0.1, damping)(probe, lambda: inner(model, {}), [g])
        h = a + damping * torch.eye(5, dtype=torch.float64)
        powers = [torch.linalg.matrix_power(torch.eye(5, dtype=torch.float64) - 0.1 * h, k) @ g for k in range(terms + 1)]
        assert_close(found, 0.1 * torch.stack(powers).sum(0), rtol=1e-6, atol=1e-8)
        assert probe.told["neumann"] == terms if terms < 400 else 50 < probe.told["neumann"] < 400
    assert_close(found, torch.linalg.solve(h, g), rtol=1e-6, atol=1e-7)


def test_a_series_that_grows_ends():
    a, c = bowl(1)
    model = Point(5)
    inner = Bowl(model, -a, c)  # it curves downwards
    probe = Probe(model, model, lambda ask: ask())
    with pytest.warns(UserWarning, match="grows behind 0 of 5 terms"):
        (found,) = Neumann(5, 0.1)(probe, lambda: inner(model, {}), [torch.ones(5, dtype=torch.float64)])
    assert_close(found, torch.full((5,), 0.1, dtype=torch.float64))


@pytest.mark.parametrize("direction", [None, Neumann(3, 0.1)], ids=["ahead", "neumann"])
def test_harmful_tasks_lose_their_weight(direction):
    """Two tasks each know half of what feedback wants, two pull elsewhere: the latter fall below 5 % of all weight."""
    target = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    first, second = (
        torch.diag(torch.tensor([1.0, 1, 1, 0.1, 0.1, 0.1]).double()),
        torch.diag(torch.tensor([0.1] * 3 + [1.0] * 3).double()),
    )
    shapes = {"a": (first, target), "b": (second, target), "c": (first, target + 3), "d": (second, -2 * target)}
    run = bilevel(shapes, target, direction=direction)
    optimizer = torch.optim.Adam(run.objective.designer.parameters(), lr=0.2)
    for step in range(120):
        (gradient,), left, _ = step_of(run, step)
        run.objective.designer.logits.grad = gradient
        optimizer.step()
        terms = run.objective(run.backbone, run.objective.task(left))
        (slope,) = torch.autograd.grad(sum(t.total for t in terms.values()), run.backbone.theta)
        with torch.no_grad():
            run.backbone.theta -= 0.1 * slope
    share = weights(run.objective.designer.logits.detach()) / 4
    assert share[2:].max() < 0.05
    assert share[:2].min() > 0.2
    assert (run.backbone.theta - target).norm() < 0.1 * target.norm()


def ahead(shares, split):
    """What is handed over along a Neumann direction, whole."""
    pretrainer, batch = made(*DESIGNED["parts"], rows=shares[distributed.rank()], fuse="JointTokens", direction=Neumann(2, 0.01))
    if split and distributed.world() > 1:
        shard(pretrainer, init_device_mesh("cpu", (distributed.world(),)))
    probe = probe_of(pretrainer)
    pretrainer.objective.before_step(probe, batch)
    return [[whole(g) for g in gradients] for _, gradients, _ in probe.handed]


@pytest.mark.parametrize("split", [False, True], ids=["ddp", "fsdp2"])
def test_two_ranks_look_further_ahead_as_one_process_does(ranks, split):
    alone = ahead([sorted(SHARES[0] + SHARES[1])], split)
    for found in ranks(ahead, SHARES, split):
        assert_close(found, alone, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("options", [{"terms": -1}, {"rate": 0.0}, {"damping": -0.1}])
def test_what_cannot_work_is_refused(options):
    with pytest.raises(ValueError, match="expected a rate above 0"):
        Neumann(**options)
