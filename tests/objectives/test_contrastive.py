import math
from functools import partial

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater import distributed
from headwater.objectives import Contrastive
from headwater.objectives.contrast.candidates import Candidates, Rows, contrast
from headwater.objectives.contrast.losses import Bound, Margin, Sigmoid, Softmax
from headwater.objectives.contrast.positives import Identity, Target
from headwater.objectives.contrast.queue import Queue
from headwater.objectives.contrast.scores import Cosine, Score
from headwater.objectives.contrastive import Found, gather, join
from headwater.objectives.objective import weighted_sum
from headwater.pretrainer import count
from headwater.view import View


def scores(rows=4, columns=6):
    torch.manual_seed(0)
    s = torch.randn(rows, columns, dtype=torch.float64, requires_grad=True)
    return s, Target(torch.eye(rows, columns, dtype=torch.float64))


def oracle(name, s, options):
    """Every loss of a row typed anew, as a list over rows; s: scores with the temperature in, row i belongs to column i."""
    rows, columns = s.shape
    others = [[j for j in range(columns) if j != i] for i in range(rows)]
    if name == "softmax":
        return [-(s[i, i].exp() / sum(s[i, j].exp() for j in range(columns))).log() for i in range(rows)]
    if name == "sigmoid":
        z = [[1 if i == j else -1 for j in range(columns)] for i in range(rows)]
        bias = options["bias"]
        return [-sum((1 / (1 + (-z[i][j] * (s[i, j] + bias)).exp())).log() for j in range(columns)) for i in range(rows)]
    margin = 0.3
    cost = [[(margin + s[i, j] - s[i, i]).clamp(min=0) for j in others[i]] for i in range(rows)]
    if name == "all":
        return [sum(c) / len(c) for c in cost]
    if name == "hardest":
        return [max(c) for c in cost]
    behind = [[c for c, j in zip(cost[i], others[i], strict=True) if s[i, j] < s[i, i]] for i in range(rows)]
    return [max(c) if c else s.sum() * 0 for c in behind]


CASES = {
    "softmax": lambda: Softmax(1.0),
    "sigmoid": lambda: Sigmoid(1.0, bias=-1.5),
    "all": lambda: Margin(0.3, "all"),
    "hardest": lambda: Margin(0.3, "hardest"),
    "semi-hard": lambda: Margin(0.3, "semi-hard"),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_equal_their_formulas(name):
    s, target = scores()
    loss = CASES[name]().double()
    ours, theirs = loss.rows(loss.logits(s), target), torch.stack(oracle(name, s, {"bias": -1.5}))
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours.sum(), s), torch.autograd.grad(theirs.sum(), s))


@pytest.mark.parametrize("kind", ["nwj", "jsd", "smile"])
def test_bounds_and_gradients_equal_their_formulas(kind):
    s, target = scores(4, 4)
    loss = Bound(kind, temperature=1.0, clip=0.5).double()
    ours = loss.total(loss.rows(loss.logits(s), target)) / 4
    pairs = [s[i, i] for i in range(4)]
    rest = [s[i, j] for i in range(4) for j in range(4) if i != j]

    def mean(values):
        return sum(values) / len(values)

    theirs = {
        "nwj": lambda: mean(pairs) - mean([f.exp() for f in rest]) / math.e,
        "jsd": lambda: -mean([(1 + (-f).exp()).log() for f in pairs]) - mean([(1 + f.exp()).log() for f in rest]),
        "smile": lambda: mean(pairs) - mean([f.exp().clamp(math.exp(-0.5), math.exp(0.5)) for f in rest]).log(),
    }[kind]()
    assert_close(-ours, theirs)
    assert_close(torch.autograd.grad(-ours, s), torch.autograd.grad(theirs, s))


@pytest.mark.parametrize("loss", [Softmax(1.0), Sigmoid(1.0), Margin(others="all"), Margin(), Bound("jsd"), Bound("nwj")])
def test_what_is_left_out_does_not_count(loss):
    s, target = scores(4, 6)
    loss = loss.double()
    log_w = torch.zeros(4, 6, dtype=torch.float64)
    log_w[:, 4:] = -math.inf
    less = loss.rows(loss.logits(s), Target(target.t, log_w))
    assert_close(less, loss.rows(loss.logits(s[:, :4]), Target(target.t[:, :4])))
    assert not torch.autograd.grad(less.sum(), s)[0][:, 4:].any()


def test_a_weighted_candidate_counts_as_often_in_the_softmax():
    s, target = scores()
    weights = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    loss = Softmax(1.0).double()
    ours = loss.rows(s, Target(target.t, weights.log().expand(4, 6)))
    often = [[j for j in range(6) for _ in range(int(weights[j]))] for _ in range(4)]
    assert_close(ours, torch.stack([sum(s[i, j].exp() for j in often[i]).log() - s[i, i] for i in range(4)]))


class Exact(Score):
    """log p(x, y) / p(x) p(y) of standard normal numbers with this correlation, the best critic there is, plus a constant."""

    def __init__(self, correlation, constant):
        super().__init__()
        self.r, self.constant = correlation, constant

    def forward(self, a, b):
        x, y, r = a[0][:, None], b[0][None], self.r
        ratio = -0.5 * math.log(1 - r * r) - (r * r * (x * x + y * y) - 2 * r * x * y) / (2 * (1 - r * r))
        return ratio + self.constant


def estimates(loss, correlation, n, batches, constant=0.0):
    """Mean and standard error over batches of n pairs of minus the loss."""
    score, found = Exact(correlation, constant), []
    for noise in torch.randn(batches, 2, n, dtype=torch.float64):
        x, y = noise[0], correlation * noise[0] + math.sqrt(1 - correlation**2) * noise[1]
        rows = Rows((x,), (), torch.arange(n))
        found.append(-loss.total(contrast(score, loss, Identity(score), rows, Candidates((y,), ()), 1 << 23)).item() / n)
    values = torch.tensor(found)
    return values.mean().item(), values.std().item() / math.sqrt(batches)


@pytest.mark.parametrize("correlation", [0.5, 0.9])
def test_infonce_stays_below_the_information_of_gaussians_and_approaches_it(correlation):
    information = -0.5 * math.log(1 - correlation**2)
    torch.manual_seed(0)
    found = []
    for n, batches in ((2, 500), (16, 200), (512, 10)):
        mean, error = estimates(Softmax(1.0, learned=False), correlation, n, batches)
        assert mean + math.log(n) < information + 3 * error
        assert mean + math.log(n) < math.log(n)
        found.append(mean + math.log(n))
    assert found == sorted(found)
    assert found[-1] > information - 0.05


@pytest.mark.parametrize(("kind", "constant"), [("nwj", 1.0), ("smile", 0.0)])
def test_other_bounds_reach_the_information_with_the_best_critic(kind, constant):
    information = -0.5 * math.log(1 - 0.5**2)
    torch.manual_seed(0)
    mean, error = estimates(Bound(kind, 1.0, learned=False, clip=20.0), 0.5, 512, 20, constant)
    assert abs(mean - information) < 3 * error + 0.01
    assert estimates(Bound(kind, 1.0, learned=False, clip=20.0), 0.5, 512, 20, constant - 0.7)[0] < mean + 3 * error


@pytest.mark.parametrize("n", [2, 7])
def test_untrained_loss_is_the_log_of_the_number_of_candidates(n):
    s = torch.zeros(n, n)
    assert_close(Softmax().rows(s, Target(torch.eye(n))), torch.full((n,), math.log(n)))


def test_only_samples_with_both_are_paired():
    a = Found((torch.tensor([[1.0], [2.0], [4.0]]),), torch.tensor([1, 2, 4]))
    b = Found((torch.tensor([[20.0], [30.0], [40.0]]),), torch.tensor([2, 3, 4]))
    assert [found.items[0].flatten().tolist() for found in join(a, b)] == [[2.0, 4.0], [20.0, 40.0]]


def vectors(model, objective, batch):
    """Unit vectors of every name as the objective compares them."""
    with torch.no_grad():
        encoded = model.encode(model.embed({name: batch[name] for name in objective.names}))
        return {name: objective.score.items(name, model.pool(name, t))[0] for name, t in encoded.items()}


def made(**options):
    """(model, objective, batch) of the contract cases."""
    model = cases.model()
    torch.manual_seed(0)
    objective = Contrastive(model, **options).double()
    readers = cases.readers(model, objective)
    return model, objective, cases.batch(readers, cases.examples(readers))


def cross_entropy(s, answer):
    return sum(row.exp().sum().log() - row[j] for row, j in zip(s, answer, strict=True))


def test_several_pairs_are_clip_of_each_with_the_samples_that_have_both():
    model, objective, batch = made(pairs=[("image", "text", 1), ("text", "action", 0.5)])
    terms = objective(model, batch)
    pooled = {name: model.represent({name: batch[name]})[name] for name in ("image", "text", "action")}
    for a, b, weight in (("image", "text", 1), ("text", "action", 0.5)):
        both = sorted(set(pooled[a].sample.tolist()) & set(pooled[b].sample.tolist()))
        x, y = (torch.stack([p.x[p.sample.tolist().index(k)] for k in both]) for p in (pooled[a], pooled[b]))
        s = torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(y, dim=-1).T / 0.07
        order = range(len(both))
        assert_close(terms[f"{a}-{b}"].total, (cross_entropy(s, order) + cross_entropy(s.T, order)) / 2, rtol=1e-6, atol=1e-6)
        assert (terms[f"{a}-{b}"].number, terms[f"{a}-{b}"].weight) == (len(both), weight)
    assert len({id(pair.loss.log_scale) for pair in objective.pairs}) == 2


def test_views_of_one_modality_are_told_apart_from_all_others_as_in_simclr():
    """NT-Xent with loops (arXiv:2002.05709, equation 1): 2 N views, a view's candidates are the other 2 N - 1."""
    head = partial(Cosine, head=[12, 6])
    model, objective, batch = made(a="image@0", b="image@1", within=True, score=head, loss=partial(Softmax, 0.5, learned=False))
    found = vectors(model, objective, batch)
    z, n, loss = torch.cat([found["image@0"], found["image@1"]]), len(found["image@0"]), 0
    for i in range(2 * n):
        s = [z[i] @ z[k] / 0.5 for k in range(2 * n)]
        j = (i + n) % (2 * n)
        loss = loss - (s[j].exp() / sum(s[k].exp() for k in range(2 * n) if k != i)).log()
    assert_close(objective(model, batch)["contrastive"].total, loss / 2)
    assert objective.needs == ("image@0", "image@1")
    assert set(objective.views) == {"image@0", "image@1"}


def test_keys_come_from_the_momentum_encoder_and_the_queue_as_in_moco():
    options = {"a": "image@0", "b": "image@1", "directions": "forth", "momentum": 0.5, "queue": 10}
    model, objective, batch = made(**options, loss=partial(Softmax, 0.2, learned=False))
    objective.start(model)
    queue = torch.empty(0, 8, dtype=torch.float64)
    teacher = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        q = vectors(model, objective, batch)["image@0"]
        now = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.load_state_dict(teacher, strict=False)
        k = vectors(model, objective, batch)["image@1"]
        model.load_state_dict(now, strict=False)
        keys = torch.cat([k, queue])
        expected = cross_entropy(q @ keys.T / 0.2, range(len(q)))
        term = objective(model, batch)["contrastive"]
        assert_close(term.total, expected, rtol=1e-6, atol=1e-6)
        optimizer.zero_grad()
        (term.total / term.number).backward()
        optimizer.step()
        objective.after_step(model, 0.0)
        queue = torch.cat([queue, k])[-10:]
        teacher = {name: 0.5 * t + 0.5 * model.get_parameter(name).detach() for name, t in teacher.items()}


def test_a_queue_keeps_the_last_keys_and_says_which_places_are_filled():
    queue = Queue(5, (torch.empty(0, 2), torch.empty(0, dtype=torch.int64)))
    assert queue.there().tolist() == [False] * 5
    for first, many in ((0, 3), (3, 3), (6, 0), (6, 7), (13, 1)):
        names = torch.arange(first, first + many)
        queue.push([torch.stack([names, -names], 1).float(), names])
        vectors, labels = queue.keys()
        kept = labels[queue.there()].tolist()
        assert sorted(kept) == list(range(max(0, first + many - 5), first + many))
        assert_close(vectors[queue.there()], torch.tensor([[x, -x] for x in kept], dtype=torch.float32).reshape(-1, 2))
    other = Queue(5, (torch.empty(0, 2), torch.empty(0, dtype=torch.int64)))
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.keys()[1], queue.keys()[1])


SHARED = {
    "past": {"score": partial(Cosine, head=[6], norm="layer"), "momentum": 0.9, "queue": 10},
    "views": {"a": "image@0", "b": "image@1", "score": partial(Cosine, head=[12, 6]), "within": True, "queue": 5},
}


def trained(name, shares, steps=3):
    """Parameters and buffers of the objective after some steps on this rank's share, and the sum of gradients of the model."""
    model, objective, _ = made(**SHARED[name])
    objective.start(model)
    readers = cases.readers(model, objective)
    samples = cases.examples(readers)
    optimizer = torch.optim.SGD([*model.parameters(), *objective.parameters()], lr=0.1)
    for step in range(steps):
        batch = cases.batch(readers, samples, shares[distributed.rank()], salt=step)
        numbers = count([objective.numbers(batch)])
        loss = weighted_sum(objective(model, batch), numbers, 1)  # gradients are summed, not averaged
        optimizer.zero_grad()
        loss.backward()
        for p in (*model.parameters(), *objective.parameters()):
            p.grad = torch.zeros_like(p) if p.grad is None else distributed.total(p.grad)
        optimizer.step()
        objective.after_step(model, 0.0)
    return {n: t.clone() for n, t in (model.state_dict() | objective.state_dict()).items()}


@pytest.mark.parametrize("shares", [[[4, 2, 6], [0, 5, 1, 3]], [[1, 2, 4, 5, 6, 0], [3]]], ids=["uneven", "one has no text"])
@pytest.mark.parametrize("name", SHARED)
def test_ranks_with_momentum_and_queue_equal_one_process_for_three_steps(ranks, name, shares):
    expected = trained(name, [sorted(shares[0] + shares[1])])
    for found in ranks(trained, name, shares):
        assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", [*SHARED, "pairs"])
def test_pieces_of_a_batch_have_the_loss_and_gradient_of_the_whole(name):
    options = SHARED.get(name, {"pairs": [("image", "text", 1.0), ("text", "audio", 2.0)]})
    found = []
    for chunks in (1, 2, 3):
        model, objective, batch = made(**options)
        model.chunks = chunks
        terms = objective(model, batch)
        cases.loss(terms).backward()
        gradients = {n: p.grad for n, p in torch.nn.ModuleList([model, objective]).named_parameters() if p.grad is not None}
        found.append((cases.loss(terms).detach(), gradients))
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])


def test_sigmoid_needs_one_direction_only_and_margin_both():
    model, both, batch = made(loss=partial(Sigmoid, bias=-2.0))
    forth = Contrastive(model, loss=partial(Sigmoid, bias=-2.0), directions="forth").double()
    back = Contrastive(model, loss=partial(Sigmoid, bias=-2.0), directions="back").double()
    totals = [objective(model, batch)["contrastive"].total for objective in (both, forth, back)]
    assert_close(totals[1], totals[0])
    assert_close(totals[2], totals[0])
    totals = [
        Contrastive(model, loss=Margin, directions=d).double()(model, batch)["contrastive"].total for d in ("both", "forth", "back")
    ]
    assert_close(totals[0], (totals[1] + totals[2]) / 2)
    assert totals[1] != totals[2]


def test_a_learned_temperature_stays_in_its_bounds():
    loss = Softmax(0.05, max_scale=30.0)
    with torch.no_grad():
        loss.log_scale.fill_(9.0)
    loss.after_step()
    assert_close(loss.metrics()["scale"], torch.tensor(30.0))
    assert_close(Softmax(0.05, learned=False).logits(torch.ones(1, 1)), torch.full((1, 1), 20.0))


def uneven_sizes():
    rank = distributed.rank()
    masks = torch.ones(rank + 1, 2 * rank + 1, dtype=torch.bool)
    values = torch.full((rank + 1, 2 * rank + 1, 2), float(rank + 1), requires_grad=True)
    every, mask = gather((values, masks), vary=True)
    (every.sum() * (rank + 1)).backward()
    return every.detach(), mask, values.grad


def test_items_of_varying_size_are_filled_up(ranks):
    for rank, (every, mask, gradient) in enumerate(ranks(uneven_sizes)):
        assert every.shape == (3, 3, 2)
        assert mask.tolist() == [[True, False, False], [True] * 3, [True] * 3]
        assert torch.equal(every[..., 0], torch.tensor([[1.0, 0, 0], [2.0] * 3, [2.0] * 3]))
        assert_close(gradient, torch.full_like(gradient, 3.0))
        assert gradient.shape == (rank + 1, 2 * rank + 1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": []}, "found no pairs"),
        ({"a": "image", "b": "image"}, "image@0"),
        ({"pairs": [("image", "text", 1), ("text", "image", 1)]}, "twice"),
        ({"views": {"image@0": View()}}, "found views"),
        ({"a": "image", "b": "smell"}, "no encoder"),
        ({"queue": 0}, "queue of 0"),
        ({"loss": partial(Softmax, 2.0)}, "temperature"),
        ({"loss": partial(Margin, 0.0)}, "margin"),
        ({"loss": partial(Bound, clip=0.0)}, "clip"),
        ({"score": Score, "queue": 4}, "vary in size"),
    ],
)
def test_bad_settings_are_named(options, message):
    if options.get("score") is Score:
        options = {**options, "score": lambda model, names: Score()}
    with pytest.raises(ValueError, match=message):
        Contrastive(cases.model(), **options)


def test_towers_of_different_sizes_need_a_shared_space():
    model = cases.model()
    model.space, model.projections = None, torch.nn.ModuleDict()
    with pytest.raises(ValueError, match="space"):
        Contrastive(model, a="image", b="text")
