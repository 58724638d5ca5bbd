import math

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater import random
from headwater.model import Model
from headwater.objectives.dropout import Dropped
from headwater.objectives.flow import Flow, Times
from headwater.process import Process
from headwater.tokens import Tokens

PROCESSES = [Process(path, kind) for path in ("rectified", "cosine", "linear") for kind in ("velocity", "noise", "signal", "v")]


def task(n=4000, tokens=2, times=None):
    objective = Flow(cases.model(), times=times)
    x = torch.randn(n, tokens, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    raw = Tokens(x, torch.zeros(n, tokens, 1))
    return x, objective.task({"image": raw, "seed": torch.arange(n)})


def awake(model):
    """Modulation starts at zero: nothing would depend on time."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


def test_the_path_is_straight_and_the_velocity_its_derivative():
    x, batch = task(n=50)
    t = batch["time"][..., None]
    noise = batch["target"] + x
    assert_close(batch["image"].x, (1 - t) * x + t * noise)
    assert_close(batch["image"].x - t * batch["target"], x)  # one step back along the velocity is the signal


@pytest.mark.parametrize("spread", [0.7, 1.5])
def test_time_is_logit_normal_and_shared_by_a_sample(spread):
    _, batch = task(times=Times(spread, mean=0.4))
    assert torch.equal(batch["time"][:, 0], batch["time"][:, 1])
    logit = batch["time"][:, 0].double().logit()
    assert abs(logit.mean() - 0.4) < 4 * spread / 4000**0.5
    assert abs(logit.std() - spread) < 4 * spread / 8000**0.5


def test_times_may_be_even_and_shifted_towards_the_noise():
    seed = torch.arange(20000)
    even, moved = Times(None)(seed, "t"), Times(None, shift=3.0)(seed, "t")
    assert_close(moved, 1 - (1 - even) / (1 + 2 * even))
    assert_close((moved / (1 - moved))[even < 0.9], (3 * even / (1 - even))[even < 0.9], rtol=1e-4, atol=0)
    for q in (0.1, 0.5, 0.9):
        assert abs(float((even < q).double().mean()) - q) < 4 * (q * (1 - q) / 20000) ** 0.5


def test_steps_may_have_times_of_their_own():
    model = cases.model()
    objective = Flow(model, "video", each="step")
    batch = objective.task(cases.batch(model.readers, cases.examples(model.readers)))
    time, order = batch["time"], batch["video"].order
    for row, step in {(r, int(o)) for r in range(len(time)) for o in order[r]}:
        assert len(time[row][order[row] == step].unique()) == 1
    assert len(time.unique()) > len(time) * 0.9 * int(order.max())


def test_noise_is_standard_normal_and_independent_of_time_and_signal():
    x, batch = task()
    noise = (batch["target"] + x).flatten(1)
    every = torch.cat([noise, x.flatten(1), batch["time"][:, :1].logit()], 1)
    expected = torch.eye(13)
    assert (every.T.corrcoef() - expected).abs().max() < 4.5 / 4000**0.5
    assert (noise.mean(0).abs() < 4.5 / 4000**0.5).all()
    assert ((noise.std(0) - 1).abs() < 4.5 / 8000**0.5).all()


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: f"{p.path} {p.predicts}")
@pytest.mark.parametrize("most", [None, 5.0])
def test_the_loss_is_the_papers_formula_in_value_and_gradient(process, most):
    """The task and the mean squared error again, number by number, for actions with absent slots."""
    model = awake(cases.model())
    model.processes["action"] = process
    objective = Flow(model, "action", most=most)
    given = cases.batch(model.readers, cases.examples(model.readers))
    answers = []
    handle = model.encoder("action").head.register_forward_hook(lambda *call: answers.append(call[-1]))
    term = objective(model, objective.task(given))["flow"]
    handle.remove()
    raw, answer, total = given["action"], answers[0], 0.0
    seeds = random.token_seed(given["seed"], raw)
    for b, n in raw.real().nonzero().tolist():
        logit = float(random.normal(given["seed"][raw.sample()[b, n]], (), "flow/time"))
        t = min(max(1 / (1 + math.exp(-logit)), 1e-3), 0.995)
        (a, s), (da, ds) = oracle(process.path, t)
        errors = []
        for slot in range(3):
            x, e = float(raw.x[b, n, slot]), float(random.normal(seeds[b, n], (3,), "flow/action")[slot])
            if not math.isnan(x):
                truth = {"velocity": da * x + ds * e, "noise": e, "signal": x, "v": a * e - s * x}[process.predicts]
                errors.append((answer[b, n, slot] - truth) ** 2)
        snr = (a / s) ** 2
        size = {"velocity": (da - ds * a / s) ** 2, "noise": snr, "signal": 1, "v": (a * a / s + s) ** 2}[process.predicts]
        total = total + (1 if most is None else min(snr, most) / size) * sum(errors) / len(errors)
    assert_close(term.total.double(), total, rtol=1e-4, atol=1e-5)
    assert term.number == int(raw.real().sum())
    head = model.encoder("action").head.weight
    got, expected = (torch.autograd.grad(value, head, retain_graph=True)[0] for value in (term.total, total))
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


def oracle(path, t):
    """a, s and their derivatives."""
    if path == "rectified":
        return (1 - t, t), (-1, 1)
    if path == "cosine":
        c, s = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
        return (c, s), (-math.pi / 2 * s, math.pi / 2 * c)
    a = math.exp(-0.25 * t**2 * 19.9 - 0.05 * t)
    s, da = math.sqrt(1 - a * a), -(0.05 + 9.95 * t) * math.exp(-0.25 * t**2 * 19.9 - 0.05 * t)
    return (a, s), (da, -a * da / s)


@pytest.mark.parametrize("modality", ["image", "audio"])  # by its norms, and with its tokens
def test_time_matters(modality):
    model = awake(cases.model())
    objective = Flow(model, modality)
    batch = objective.task(cases.batch(model.readers, cases.examples(model.readers)))
    late = {**batch, "time": batch["time"] * 0.5}
    a, b = (objective(model, given)["flow"].total for given in (batch, late))
    assert not torch.isclose(a, b)


def test_time_is_told_from_position_where_it_comes_with_the_tokens():
    """Both are sines; swapping them gives other tokens."""
    model = cases.model()
    position = torch.tensor([[[10.0]], [[20.0]]], dtype=torch.float64)
    t = Tokens(torch.zeros(2, 1, 16, dtype=torch.float64), position)
    parts, condition = model.at_time({"audio": t}, "audio", torch.tensor([[0.02], [0.01]]))
    assert not condition
    placed = model.encoder("audio").trunk.placed(parts["audio"]).x
    assert (placed[0] - placed[1]).abs().max() > 0.1


def test_what_the_process_is_told_changes_only_its_samples():
    model = awake(cases.model())
    model.processes["image"] = Process(told=["choice"])
    objective = Flow(model)
    assert objective.needs == ("image", "choice")
    batch = objective.task(cases.batch(model.readers, cases.examples(model.readers)))
    states = objective.states(model, batch)
    other = batch["choice"]._replace(x=(batch["choice"].x + 1) % 5)
    changed = objective.states(model, {**batch, "choice": other})
    apart = (changed - states).abs().amax((1, 2))
    has = torch.isin(torch.arange(len(apart)), batch["choice"].samples())
    assert (apart[has] > 1e-4).all()
    assert (apart[~has] < 1e-12).all()
    gone = batch["choice"]._replace(valid=torch.zeros_like(batch["choice"].real()))
    alone = objective.states(model, {**batch, "choice": gone})
    assert_close(alone[~has], states[~has])
    assert not torch.allclose(alone[has], states[has])


def test_steps_see_the_past_and_what_is_known_alone():
    """No answer changes with frames or actions of later steps; the words are seen from every step."""
    model = awake(cases.model())
    objective = Flow(model, "action", context=["text"], past=["video"], each="step")
    batch = objective.task(cases.batch(model.readers, cases.examples(model.readers)))
    states, order = objective.states(model, batch), batch["action"].order

    def moved(name, where):
        x = batch[name].x
        other = torch.where(where, x + 1 if x.ndim == 3 else (x + 1) % 256, x)
        apart = (objective.states(model, {**batch, name: batch[name]._replace(x=other)}) - states).abs().amax(-1)
        return apart > 1e-9

    for name in ("video", "action"):
        late = (batch[name].order == 1) & batch[name].real()
        changed = moved(name, late[..., None])
        assert not changed[batch["action"].real() & (order < 1)].any()
        assert changed[batch["action"].real() & (order >= 1)].any()
    real, told = batch["action"].real(), torch.isin(batch["action"].sample(), batch["text"].samples())
    assert moved("text", batch["text"].real())[real & told & (order == 0)].all()


@pytest.mark.parametrize("fuse", ["JointTokens", "CrossAttend", "Bottleneck"])
def test_contexts_help_through_any_fusion(fuse):
    model = awake(cases.model(fuse=fuse))
    objective = Flow(model, "audio", context=["text"])
    batch = objective.task(cases.batch(model.readers, cases.examples(model.readers)))
    step, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(25):
        term = objective(model, batch)["flow"]
        losses.append(float(term.total.detach()))
        step.zero_grad()
        term.total.backward()
        step.step()
    assert losses[-1] < 0.8 * losses[0]
    assert model.encoder("text").stem.weight.grad.any()


def test_contexts_are_dropped_for_guidance():
    model = cases.model()
    wrapped = Dropped(model, lambda m: Flow(m, context=["text"]), {"text": 0.5})
    given = cases.batch(model.readers, cases.examples(model.readers, 40))
    batch = wrapped.task(given)
    assert 5 < len(batch["text"].samples()) < len(given["text"].samples()) - 5
    assert wrapped.numbers(batch)["flow"] == given["image"].real().sum()


def test_ids_strangers_and_wrong_numbers_are_refused():
    model = cases.model()
    with pytest.raises(ValueError, match="ids"):
        Flow(model, "text")
    with pytest.raises(ValueError, match="no fusion"):
        Flow(cases.model(fuse=None), "image", ["text"])
    with pytest.raises(ValueError, match="most 0"):
        Flow(model, most=0)
    with pytest.raises(ValueError, match="spread 0"):
        Times(0)
    model.processes["image"] = Process(told=["text"])
    with pytest.raises(ValueError, match="has 24 numbers; expected 16"):
        Flow(model)
    with pytest.raises(ValueError, match="no encoder for 'label'"):
        Model(dict(model.encoders), processes={"image": Process(told=["label"])})
