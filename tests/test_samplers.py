import math

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater import random, samplers
from headwater.modalities import Action
from headwater.model import Model
from headwater.objectives.flow import Flow, Times
from headwater.process import Process
from headwater.samplers import ddim, draw, draw_ids, euler, guided, heun, left, refresh, times, unmask
from headwater.tokens import Tokens
from headwater.trunk import Trunk

PROCESSES = [Process(path, kind) for path in ("rectified", "cosine", "linear") for kind in ("velocity", "noise", "signal", "v")]
every = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: f"{p.path} {p.predicts}")


def gaussian(process, mean, std):
    """What the best head says of signals from a normal distribution."""

    def said(x, t):
        a, s = process.shown(t)
        p, q = process.asked(t)
        apart = (x - a * mean) / (a * a * std * std + s * s)
        return p * (mean + a * std * std * apart) + q * s * apart

    return said


def mixture(process, means, std):
    """The same of a mixture of equal weights; means: (K, D)."""

    def said(x, t):
        a, s = process.shown(t)
        p, q = process.asked(t)
        variance = a * a * std * std + s * s
        apart = (x[..., None, :] - a * means) / variance
        share = (-apart.square().sum(-1) * variance / 2).softmax(-1)[..., None]
        return (share * (p * (means + a * std * std * apart) + q * s * apart)).sum(-2)

    return said


def straight(process, x, grid, mean, std):
    """Where the equation dx_t / dt leads from x: the same quantile of the signals."""
    a, s = process.shown(grid[0])
    return mean + std * (x - a * mean) / (a * a * std * std + s * s).sqrt()


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def error(solver, process, steps):
    x, grid = noise(64), times(process, steps)
    found = solver(process, gaussian(process, 1.5, 0.5), x, grid)
    return float((found - straight(process, x, grid, 1.5, 0.5)).abs().max())


def test_times_fall_from_noise_to_signal_and_may_dwell_near_the_noise():
    assert_close(times(Process(), 4), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))
    assert_close(times(Process(), 4, shift=3.0), torch.tensor([1, 0.9, 0.75, 0.5, 0], dtype=torch.float64))
    assert times(Process(predicts="noise"), 4)[0] == 0.995
    with pytest.raises(ValueError, match="steps 0"):
        times(Process(), 0)


@every
def test_all_solvers_find_the_exact_end_for_a_gaussian(process):
    assert error(euler, process, 400) < 0.03
    assert error(ddim, process, 400) < 0.03
    assert error(heun, process, 60) < 0.01


@every
def test_one_step_is_enough_for_a_single_point(process):
    x = noise(8)
    assert_close(ddim(process, gaussian(process, 1.5, 0.0), x, times(process, 1)), torch.full((8,), 1.5, dtype=torch.float64))


@pytest.mark.parametrize("path", ["rectified", "cosine"])
def test_heun_is_of_second_order_and_the_others_of_first(path):
    for solver, order in ((euler, 1), (ddim, 1), (heun, 2)):
        coarse, fine = (error(solver, Process(path, "v"), steps) for steps in (64, 256))
        assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.25)


def test_euler_and_ddim_are_one_on_the_straight_path():
    process, x = Process(), noise(64)
    said, grid = gaussian(process, 1.5, 0.5), times(process, 7)
    assert_close(euler(process, said, x, grid), ddim(process, said, x, grid))


@pytest.mark.parametrize("path", ["rectified", "cosine", "linear"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_new_noise_keeps_the_distribution(path, eta):
    process, count = Process(path, "noise"), 20000
    generator = torch.Generator().manual_seed(1)
    fresh = lambda step: torch.randn(count, generator=generator, dtype=torch.float64)  # noqa: E731
    x = ddim(process, gaussian(process, 1.5, 0.5), noise(count), times(process, 200), eta, fresh)
    assert abs(float(x.mean()) - 1.5) < 0.02
    assert abs(float(x.std()) - 0.5) < 0.02


def test_new_noise_of_one_step_is_ddpms():
    """eta 1: the deviation of q(x_s | x_t, x_0), by Bayes' rule on the two normal distributions."""
    process, grid = Process("cosine", "signal"), torch.tensor([0.7, 0.4], dtype=torch.float64)
    (a, s), (b, r) = (tuple(map(float, process.shown(t))) for t in grid)
    step = s * s - (a / b * r) ** 2  # variance of x_t given x_s
    expected = math.sqrt(1 / (1 / r**2 + (a / b) ** 2 / step))
    x = torch.zeros(100000, dtype=torch.float64)
    found = ddim(process, lambda x, t: x, x, grid, 1.0, lambda _: noise(100000))
    assert float(found.std()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("solver", ["euler", "heun", "ddim"])
def test_a_mixture_is_sampled_right(solver):
    process, means = Process("cosine", "v"), torch.tensor([[-2.0, 0.0], [2.0, 1.0], [0.0, -2.0]])
    x = samplers.denoise(process, mixture(process, means, 0.3), torch.arange(6000), 2, steps=100, solver=solver)
    apart = (x[:, None] - means).square().sum(-1)
    nearest = apart.argmin(1)
    assert (nearest.bincount() / 6000 - 1 / 3).abs().max() < 0.03
    for k in range(3):
        assert (x[nearest == k].std(0) - 0.3).abs().max() < 0.03
        assert (x[nearest == k].mean(0) - means[k]).abs().max() < 0.03


def test_guidance_moves_by_the_difference():
    known, free = (lambda x, t: 3 * x + t), (lambda x, t: x)
    x, t = torch.tensor([1.0, 2.0]), torch.tensor(0.5)
    assert_close(guided(known, free, 2.0)(x, t), x + 2 * (2 * x + t))
    process = Process()
    said = guided(gaussian(process, 1.0, 0.5), gaussian(process, 0.0, 0.5), 3.0)
    found = heun(process, said, noise(2000), times(process, 40))
    assert abs(float(found.mean()) - 3.0) < 0.05  # of equal spread: the mean moves three times as far


def test_solvers_that_are_not_there_and_stray_noise_are_refused():
    with pytest.raises(ValueError, match="'midpoint'"):
        samplers.denoise(Process(), lambda x, t: x, torch.arange(2), 1, solver="midpoint")
    with pytest.raises(ValueError, match="eta 1"):
        samplers.denoise(Process(), lambda x, t: x, torch.arange(2), 1, eta=1.0)


@pytest.fixture(scope="module")
def learned():
    """A model of one token that learned the mixture of two normal distributions in two dimensions."""
    torch.manual_seed(0)
    model = Model({"action": Action(Trunk(64, 2, 1, conditional=True), slots=2)})
    objective, means = Flow(model, "action", times=Times(None)), torch.tensor([[-1.0, 0.5], [1.0, -0.5]])
    step = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    for number in range(600):
        step.param_groups[0]["lr"] = 3e-3 * (1 - number / 600)
        seed = torch.arange(512) + 512 * number
        x = means[(random.uniform(seed, (), "which") < 0.5).long()] + 0.4 * random.normal(seed, (2,), "x")
        batch = objective.task({"action": Tokens(x[:, None], torch.zeros(512, 1, 1)), "seed": seed})
        term = objective(model, batch)["flow"]
        step.zero_grad()
        (term.total / term.number).backward()
        step.step()
    return model.eval(), means


def test_the_learned_velocity_is_that_of_the_mixture(learned):
    model, means = learned
    seed, process = torch.arange(4000) + 10**6, Process()
    x = means[(seed % 2).long()] + 0.4 * random.normal(seed, (2,), "x")
    t = random.uniform(seed, (), "t")[:, None]
    noisy = process.noisy(x, random.normal(seed, (2,), "e"), t)
    truth = torch.stack([mixture(process, means, 0.4)(x, t) for x, t in zip(noisy, t[:, 0], strict=True)])
    with torch.no_grad():
        parts, condition = model.at_time(model.embed({"action": Tokens(noisy[:, None], torch.zeros(4000, 1, 1))}), "action", t)
        said = model.encoder("action").unembed(model(parts, condition=condition)["action"].x)[:, 0]
    relative = ((said - truth).square().sum() / truth.square().sum()).sqrt()
    assert relative < 0.1, f"{relative:.3f}"


def test_what_is_drawn_from_the_learned_model_is_the_mixture(learned):
    model, means = learned
    made = draw(model, "action", Tokens(torch.zeros(3000, 1, 2), torch.zeros(3000, 1, 1)), torch.arange(3000), steps=20)
    x = made.x[:, 0]
    side = (x @ (means[1] - means[0]) > 0).long()
    assert abs(float(side.float().mean()) - 0.5) < 0.06
    assert max(float((x[side == k].mean(0) - means[k]).abs().max()) for k in (0, 1)) < 0.15


@pytest.fixture(scope="module")
def model():
    """Untrained, but its norms listen to the time."""
    made = cases.model().eval()
    torch.manual_seed(1)
    for name, p in made.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(p, std=0.3)
    return made


def asked(model, n=4):
    given = cases.batch({n: model.readers[n] for n in ("image", "text", "choice")}, cases.examples(model.readers, n))
    return given["image"], {"text": given["text"]}, given["seed"]


def test_a_picture_depends_on_its_seed_and_context_alone(model):
    canvas, others, seed = asked(model)
    whole = draw(model, "image", canvas, seed, others, steps=3).x
    assert not torch.allclose(whole, draw(model, "image", canvas, seed + 1, others, steps=3).x)
    assert_close(whole, draw(model, "image", canvas._replace(x=canvas.x + 1), seed, others, steps=3).x)
    rows = slice(1, 3)
    some = draw(
        model, "image", canvas.map(lambda f: f[rows]), seed[rows], {k: t.map(lambda f: f[rows]) for k, t in others.items()}, steps=3
    )
    assert_close(some.x, whole[rows])


@pytest.mark.parametrize("solver", ["heun", "ddim"])
def test_guidance_of_nothing_and_of_all(model, solver):
    canvas, others, seed = asked(model)
    hidden = {k: t._replace(valid=torch.zeros_like(t.real())) for k, t in others.items()}
    options = {"steps": 3, "solver": solver, "eta": 0.5 if solver == "ddim" else 0.0}
    assert_close(
        draw(model, "image", canvas, seed, others, 0.0, **options).x, draw(model, "image", canvas, seed, hidden, **options).x
    )
    whole = draw(model, "image", canvas, seed, others, 1.0, **options).x
    assert_close(draw(model, "image", canvas, seed, others, 1.0 + 1e-9, **options).x, whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(draw(model, "image", canvas, seed, others, 3.0, **options).x, whole)
    with pytest.raises(ValueError, match=r"guidance 2.0 by \['audio'\]"):
        draw(model, "image", canvas, seed, others, 2.0, ["audio"])
    with pytest.raises(ValueError, match="guidance 2"):
        draw(model, "image", canvas, seed, guidance=2.0)


def test_steps_that_are_known_stay_and_are_seen(model):
    """A policy's move, given the moves before it and the frames so far."""
    given = cases.batch({n: model.readers[n] for n in ("action", "video", "text")}, cases.examples(model.readers, 5))
    canvas, seed = given["action"]._replace(x=given["action"].x.nan_to_num()), given["seed"]
    others, real = {n: given[n] for n in ("video", "text")}, canvas.real()
    free, options, last = canvas.order > 0, {"steps": 2, "past": ["video"]}, int(others["video"].order.max())
    made = draw(model, "action", canvas, seed, others, free=free, **options).x
    assert torch.equal(made[real & ~free], canvas.x[real & ~free])
    before = canvas._replace(x=torch.where(free[..., None], canvas.x, canvas.x + 1))
    assert (draw(model, "action", before, seed, others, free=free, **options).x - made)[real & free].abs().amax(-1).min() > 1e-9
    late = others["video"]._replace(x=torch.where((others["video"].order == last)[..., None], 9.0, others["video"].x))
    again = draw(model, "action", canvas, seed, {**others, "video": late}, free=free, **options).x
    changed = (again - made).abs().amax(-1) > 1e-9
    assert not changed[real & (canvas.order < last)].any()
    assert changed[real & (canvas.order >= last)].any()


def test_ever_fewer_are_hidden():
    total = torch.tensor([[8], [5]])
    assert [left(total, k / 4, "linear")[:, 0].tolist() for k in range(5)] == [[8, 5], [6, 3], [4, 2], [2, 1], [0, 0]]
    assert [left(total, k / 4, "cosine")[:, 0].tolist() for k in range(5)] == [[8, 5], [7, 4], [5, 3], [3, 1], [0, 0]]


def chain(n, kinds=4, mask=4):
    """The exact conditionals of sequences whose ids are all the same, and the calls that were made."""
    seen = []

    def logits(ids):
        seen.append(ids.clone())
        known = torch.where(ids == mask, -1, ids).amax(1)
        told = torch.nn.functional.one_hot(known.clamp(min=0), kinds).float().log()
        return torch.where((known < 0)[:, None], torch.zeros(len(ids), kinds), told)[:, None].expand(len(ids), n, kinds)

    return logits, seen


@pytest.mark.parametrize("hiding", ["linear", "cosine"])
def test_unmasking_follows_the_schedule_and_leaves_what_is_given(hiding):
    logits, seen = chain(8)
    ids, free = torch.full((600, 8), 1), torch.ones(600, 8, dtype=torch.bool)
    free[::2, :3] = False
    found = unmask(logits, ids, free, random.fold(torch.arange(600)[:, None], torch.arange(8)), 4, steps=4, hiding=hiding)
    for step, state in enumerate(seen):
        assert_close(
            (state == 4).sum(1, keepdim=True).float(), left(free.sum(1, keepdim=True), step / 4, hiding), check_dtype=False
        )
    assert (found[::2] == 1).all()
    assert (found < 4).all()


def test_one_token_at_a_time_draws_from_the_joint_distribution():
    free, seed = torch.ones(2000, 6, dtype=torch.bool), random.fold(torch.arange(2000)[:, None], torch.arange(6))
    ids = torch.zeros(2000, 6, dtype=torch.long)
    found = unmask(chain(6)[0], ids, free, seed, 4, steps=6, hiding="linear", spread=10.0)
    assert (found == found[:, :1]).all()
    assert (found[:, 0].bincount() / 2000 - 0.25).abs().max() < 0.05
    at_once = unmask(chain(6)[0], ids, free, seed, 4, steps=1)
    assert abs(float((at_once[:, 0] == at_once[:, 1]).float().mean()) - 0.25) < 0.05  # each alone


def test_the_likeliest_are_found_without_chance_and_the_surest_first():
    said = torch.tensor([[2.0, 0.0, 0.0], [5.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    states = []

    def logits(ids):
        states.append(ids.clone())
        return said.expand(len(ids), 3, 3)

    free = torch.ones(1, 3, dtype=torch.bool)
    found = unmask(
        logits, torch.zeros(1, 3, dtype=torch.long), free, torch.zeros(1, 3, dtype=torch.long), 3, 3, 0.0, hiding="linear"
    )
    assert [state[0].tolist() for state in states] == [[3, 3, 3], [3, 0, 3], [3, 0, 2]]
    assert found.tolist() == [[0, 0, 2]]


def test_refreshing_mends_what_does_not_fit():
    """A head that knows the sequence but for what it is shown wrong, place by place."""
    truth = torch.tensor([3, 1, 4, 1, 5, 2])

    def logits(ids):
        wrong = (ids != truth).sum(1)  # the more is wrong, the less sure
        return torch.nn.functional.one_hot(truth, 6).float() * (8 - wrong[:, None, None])

    ids, free = torch.zeros(500, 6, dtype=torch.long), torch.ones(500, 6, dtype=torch.bool)
    free[:, 0] = False
    ids[:, 0] = 0
    seed = random.fold(torch.arange(500)[:, None], torch.arange(6))
    once, often = (refresh(logits, ids, free, seed, 6, steps)[:, 1:] for steps in (1, 10))
    assert (often == truth[1:]).float().mean() > 0.98 > (once == truth[1:]).float().mean()
    assert (refresh(logits, ids, free, seed, 6, 10)[:, 0] == 0).all()


@pytest.mark.parametrize("masked", [True, False])
def test_ids_of_a_model_depend_on_their_seed_and_keep_the_prompt(model, masked):
    given = cases.batch({n: model.readers[n] for n in ("image", "choice")}, cases.examples(model.readers, 5))
    canvas, others, seed = given["choice"], {"image": given["image"]}, given["seed"]
    free = (canvas.place() > 0).expand_as(canvas.x)
    found = draw_ids(model, "choice", canvas, free, seed, others, steps=3, masked=masked)
    assert torch.equal(found.x[:, 0], canvas.x[:, 0])
    assert (found.x[canvas.real()] < 5).all()
    some, beside = (t.map(lambda f: f[2:4]) for t in (canvas, others["image"]))
    alone = draw_ids(model, "choice", some, free[2:4], seed[2:4], {"image": beside}, steps=3, masked=masked)
    assert torch.equal(found.x[2:4], alone.x)
    assert not torch.equal(found.x, draw_ids(model, "choice", canvas, free, seed + 1, others, steps=3, masked=masked).x)
    moved = draw_ids(model, "choice", canvas, free, seed, others, guidance=1e4, steps=3, masked=masked)
    assert not torch.equal(found.x, moved.x)
