"""V-Pretraining: the value is the drop of the feedback's loss, estimators agree, and the learner's step is the plain one."""

from functools import partial

import pytest
import torch
from contracts import cases
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from headwater import distributed, modalities
from headwater.objectives import Causal, Contrastive, Flow, Masked, Supervised, VPretraining, Weighted
from headwater.objectives.designers import PartWeights, SoftTargets, SourceWeights, TokenWeights
from headwater.objectives.estimators import Checked, Difference, Double, Forward
from headwater.objectives.objective import count, weighted_sum
from headwater.objectives.probe import Probe
from headwater.pretrainer import Pretrainer
from headwater.training.sharding import shard

parts = partial(
    Weighted,
    parts={"hide": partial(Masked, modality="text", mode="substitute"), "next": partial(Causal, modality="text")},
)
named = partial(Supervised, label=modalities.Category(3), modality="text")
DESIGNED = {
    "soft targets": (partial(Causal, modality="text"), partial(SoftTargets, k=4, hidden=8)),
    "tokens": (partial(Causal, modality="text"), partial(TokenWeights, k=4, hidden=8)),
    "sources": (partial(Masked, modality="text", mode="substitute"), partial(SourceWeights, groups=2)),
    "sources of pairs": (partial(Contrastive, a="image", b="text"), partial(SourceWeights, groups=2)),
    "sources of noise": (
        partial(Flow, modality="action"),
        partial(SourceWeights, groups=2),
        partial(Supervised, label=modalities.Category(3), modality="action"),
    ),
    "parts": (parts, PartWeights),
    "drawn parts": (parts, partial(PartWeights, draw=True)),
}


def made(inner, designer, feedback=named, rows=None, fuse=None, **options):
    """A Pretrainer in float64 whose designer is somewhere, and a batch with feedback."""
    torch.manual_seed(0)
    model = cases.model(fuse=fuse)
    objective = partial(VPretraining, inner=inner, feedback=feedback, designer=designer, after=0, **options)
    pretrainer = Pretrainer(model, objective).double()
    with torch.no_grad():
        for p in pretrainer.objective.designer.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype)
    pretrainer.objective.start(model)
    readers = cases.readers(model, pretrainer.objective)
    samples = cases.examples(readers, 12)
    rows = list(range(7)) if rows is None else rows
    batch = cases.batch(readers, samples, rows)
    held = cases.batch(readers, samples, [7 + k for k in range(5) if k % distributed.world() == distributed.rank()])
    source = torch.tensor(rows) % 2
    return pretrainer, {**batch, "origin": source, "feedback": held, "progress": 0.5, "step": 4}


def probe_of(pretrainer):
    return Probe(pretrainer, pretrainer.backbone, pretrainer.call, 3)


def value(pretrainer, batch, estimator, where=None):
    """The value and its gradient by the designer's parameters."""
    objective, probe = pretrainer.objective, probe_of(pretrainer)
    probe.among(where)
    run = {"progress": batch["progress"], "step": batch["step"]}
    direction = objective._direction(probe, pretrainer.backbone, {**batch["feedback"], **run})
    part = {name: v for name, v in batch.items() if name != "feedback"}
    phi = list(objective.designer.parameters())
    return *estimator(probe, objective._ask(probe, pretrainer.backbone, part), direction, phi), direction


def cosine(a, b):
    a, b = (torch.cat([g.flatten() for g in x]) for x in (a, b))
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("name", DESIGNED)
def test_estimators_agree(name):
    pretrainer, batch = made(*DESIGNED[name])
    exact, slopes, _ = value(pretrainer, batch, Double())
    assert exact != 0
    assert any(g.any() for g in slopes)
    for estimator in (Forward(), Difference(), Difference(1e-6, sides=1)):
        found, gradients, _ = value(pretrainer, batch, estimator)
        assert_close(found, exact, rtol=1e-2, atol=1e-9)
        assert cosine(gradients, slopes) > 0.999
        assert_close(gradients, slopes, rtol=1e-2, atol=1e-6 * max(float(g.abs().max()) for g in slopes))


@pytest.mark.parametrize("name", DESIGNED)
def test_the_value_is_the_drop_of_the_feedbacks_loss(name):
    """After one small SGD step on the designed task, and the other way round for the gradient by the designer."""
    pretrainer, batch = made(*DESIGNED[name])
    found, slopes, _ = value(pretrainer, batch, Double())
    objective, probe, rate = pretrainer.objective, probe_of(pretrainer), 1e-5
    run = {"progress": batch["progress"], "step": batch["step"]}
    part = {n: v for n, v in batch.items() if n != "feedback"}
    ask = objective._ask(probe, pretrainer.backbone, part)
    down = objective._feedback(pretrainer.backbone, {**batch["feedback"], **run})
    before, _ = probe.gradient(down, [])
    _, step = probe.gradient(ask, probe.theta)
    with probe.nudged(step, -rate):
        after, _ = probe.gradient(down, [])
    assert_close((before - after) / rate, found, rtol=0.05, atol=0)
    phi = list(objective.designer.parameters())
    with torch.no_grad():
        for p, g in zip(phi, slopes, strict=True):
            p += 1e-4 * g
    ascended, _, _ = value(pretrainer, batch, Double())
    gain = sum((g * g).sum() for g in slopes) * 1e-4
    assert_close(ascended - found, gain, rtol=0.05, atol=0)


def step(pretrainer, batch, clip=1e-2):
    """What a Pretrainer does in one step, with SGD; gradients are clipped."""
    probe = probe_of(pretrainer)
    batch = pretrainer.objective.before_step(probe, batch)
    task = pretrainer.hide(batch)
    numbers = count([pretrainer.objective.numbers(task)])
    weighted_sum(pretrainer.ask(task), numbers, distributed.world()).backward()
    probe.give(apart=False)
    learned = [p for p in pretrainer.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in learned])
    torch.nn.utils.clip_grads_with_norm_(learned, clip, norm)
    probe.give(apart=True, clip=clip)
    return probe, task


@pytest.mark.parametrize("name", DESIGNED)
def test_the_learner_takes_the_plain_step_on_the_detached_task(name):
    """Bit by bit, with clipping on; and no gradient of the feedback ever comes near its parameters."""
    pretrainer, batch = made(*DESIGNED[name])
    seen = []
    for p in pretrainer.backbone.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    before = {n: p.detach().clone() for n, p in pretrainer.state_dict().items()}
    state = torch.get_rng_state()
    _, task = step(pretrainer, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], x) for n, x in pretrainer.state_dict().items())
    got = {n: p.grad for n, p in pretrainer.named_parameters()}
    assert all(got[n] is not None and got[n].any() for n in got if n.startswith("objective.designer"))
    assert got["objective.feedback.head.weight"].any()
    backward_passes = len(seen)
    pretrainer.zero_grad()
    seen.clear()
    numbers = count([pretrainer.objective.numbers(task)])
    weighted_sum(pretrainer.ask(task), numbers, 1).backward()
    assert len(seen) == backward_passes  # of the task alone
    learned = [p for p in pretrainer.parameters() if p.grad is not None]
    torch.nn.utils.clip_grad_norm_(learned, 1e-2)
    assert learned
    for n, p in pretrainer.named_parameters():
        if p.grad is not None:
            assert torch.equal(p.grad, got[n]), n
        else:
            assert got[n] is None or n.startswith(("objective.designer", "objective.feedback"))


SHARES = [[0, 2, 3, 5, 6], [1, 4]]


def ahead(shares, name, split, control=None):
    """What is handed over: the designer's gradient and the head's; and the direction, all whole."""
    pretrainer, batch = made(*DESIGNED[name], rows=shares[distributed.rank()], fuse="JointTokens", control=control)
    if split and distributed.world() > 1:
        shard(pretrainer, init_device_mesh("cpu", (distributed.world(),)))
    probe = probe_of(pretrainer)
    pretrainer.objective.before_step(probe, batch)
    given = [[whole(g) for g in gradients] for _, gradients, _ in probe.handed]
    return given, [whole(g) for g in probe.direction], probe.told["feedback"]


def whole(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


@pytest.mark.parametrize("split", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("name", DESIGNED)
def test_two_ranks_look_ahead_as_one_process_does(ranks, name, split):
    alone = ahead([sorted(SHARES[0] + SHARES[1])], name, split)
    for found in ranks(ahead, SHARES, name, split):
        assert_close(found, alone, rtol=1e-5, atol=1e-9)


def test_controls():
    """Noise has the length of the gradient, and a designer that is still gets none."""
    inner, designer = DESIGNED["tokens"]
    (head, phi), direction, _ = ahead([list(range(7))], "tokens", False)
    (_, noise), same, _ = ahead([list(range(7))], "tokens", False, "random")
    length = [torch.cat([g.flatten() for g in x]).norm() for x in (phi, noise)]
    assert_close(length[0], length[1])
    assert abs(cosine(phi, noise)) < 0.6
    assert all(torch.equal(a, b) for a, b in zip(direction, same, strict=True))
    (only,), _, _ = ahead([list(range(7))], "tokens", False, "still")
    assert_close(only, head)
    pretrainer, batch = made(inner, designer, against=True)
    probe = probe_of(pretrainer)
    pretrainer.objective.before_step(probe, batch)
    assert_close(
        probe.direction,
        [a - b for a, b in zip(direction_of(pretrainer, batch), direction_of(pretrainer, batch, True), strict=True)],
    )


def direction_of(pretrainer, batch, wrong=False):
    objective, probe = pretrainer.objective, probe_of(pretrainer)
    held = {**batch["feedback"], "progress": 0.5, "step": 4}
    if wrong:
        held["label"] = held["label"].map(lambda field: field.roll(len(field) // 2, 0))
    return probe.gradient(objective._feedback(pretrainer.backbone, held), probe.theta)[1]


def test_last_blocks_alone_have_a_part():
    pretrainer, batch = made(*DESIGNED["soft targets"])
    blocks = "encoders.text.trunk.blocks.1|encoders.text.trunk.norm"
    exact, slopes, _ = value(pretrainer, batch, Double(), blocks)
    found, gradients, direction = value(pretrainer, batch, Difference(), blocks)
    assert len(direction) < len(list(pretrainer.backbone.parameters())) / 4
    assert_close(found, exact, rtol=1e-3, atol=1e-9)
    assert cosine(gradients, slopes) > 0.999


def test_a_budget_is_kept_where_it_can_be():
    pretrainer, batch = made(*DESIGNED["tokens"], budget=1000.0)
    pretrainer.objective.before_step(probe_of(pretrainer), batch)
    assert pretrainer.objective.chosen == 0  # the exact one
    pretrainer, batch = made(*DESIGNED["tokens"], budget=1e-6)
    with pytest.warns(UserWarning, match="no estimator keeps the budget"):
        pretrainer.objective.before_step(probe_of(pretrainer), batch)
    assert pretrainer.objective.chosen == 4
    other, _ = made(*DESIGNED["tokens"], budget=1e-6)
    other.load_state_dict(pretrainer.state_dict())
    assert other.objective.chosen == 4


def test_before_the_designer_begins_only_the_head_learns():
    pretrainer, batch = made(*DESIGNED["tokens"])
    pretrainer.objective.after = 5
    probe = probe_of(pretrainer)
    left = pretrainer.objective.before_step(probe, batch)
    assert len(probe.handed) == 1
    assert "feedback" not in left
    del batch["feedback"]
    probe = probe_of(pretrainer)
    assert pretrainer.objective.before_step(probe, {**batch, "step": 6}).keys() == batch.keys()
    assert not probe.handed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 0}, "expected every and pieces of 1 or more"),
        ({"budget": 0.0}, "budget above 0"),
        ({"where": "nothing"}, "no trainable parameter of the model matches"),
        ({"designer": partial(PartWeights)}, "expected a Weighted objective of several"),
        ({"designer": partial(SoftTargets, k=0)}, "answers"),
        ({"inner": partial(Contrastive, a="image", b="text"), "designer": SoftTargets}, "answers every place with ids"),
        ({"feedback": partial(Causal, modality="text"), "against": True}, "name keys in `labels`"),
    ],
)
def test_what_cannot_work_is_refused(options, said):
    inner, designer = DESIGNED["tokens"]

    def begun():
        pretrainer, batch = made(**{"inner": inner, "designer": designer, **options})
        pretrainer.objective.before_step(probe_of(pretrainer), batch)

    with pytest.raises(ValueError, match=said):
        begun()


def test_a_wrong_step_of_the_difference_is_found_and_mended():
    pretrainer, batch = made(*DESIGNED["soft targets"])
    far = Checked(Difference(0.3), every=4, least=0.99999)
    probe = Probe(pretrainer, pretrainer.backbone, pretrainer.call, 3, step=4)
    direction = pretrainer.objective._direction(probe, pretrainer.backbone, {**batch["feedback"], "progress": 0.5, "step": 4})
    part = {name: v for name, v in batch.items() if name != "feedback"}
    ask, phi = pretrainer.objective._ask(probe, pretrainer.backbone, part), list(pretrainer.objective.designer.parameters())
    with pytest.warns(UserWarning, match="disagree about the designer's gradient"):
        _, slopes = far(probe, ask, direction, phi)
    assert_close(slopes, Double()(probe, ask, direction, phi)[1])
    assert far.estimator.factor == 0.25
    assert probe.told["estimator"] < 0.99999
    near = Checked(Difference(), every=4)
    near(probe, ask, direction, phi)
    assert near.estimator.factor == 1
    assert probe.told["estimator"] > 0.999
    assert "factor" in {name.rpartition(".")[2] for name in near.state_dict()}
