import math

import pytest
import torch
from torch.testing import assert_close

from headwater.hub.card import model_of
from headwater.modalities import Action, Text
from headwater.model import Model
from headwater.process import Process
from headwater.spec import build
from headwater.trunk import Trunk

PATHS = ("rectified", "cosine", "linear")
KINDS = ("velocity", "noise", "signal", "v")
every = pytest.mark.parametrize("path", PATHS)
both = pytest.mark.parametrize(("path", "kind"), [(p, k) for p in PATHS for k in KINDS])
T = torch.linspace(0.01, 0.99, 25, dtype=torch.float64, requires_grad=True)


def papers(path, t):
    """a and s of one time, as the papers write them."""
    if path == "rectified":
        return 1 - t, t
    if path == "cosine":
        return math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
    a = math.exp(-0.25 * t**2 * (20 - 0.1) - 0.5 * t * 0.1)
    return a, math.sqrt(1 - a * a)


def drawn(n=25):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, n, generator=generator, dtype=torch.float64)


@every
def test_paths_are_those_of_the_papers(path):
    expected = torch.tensor([papers(path, t) for t in T.tolist()], dtype=torch.float64)
    assert_close(torch.stack(Process(path).shown(T), 1).detach(), expected)


def test_ends_of_the_paths():
    for path in PATHS:
        a, s = Process(path).shown(torch.tensor([0.0, 1.0], dtype=torch.float64))
        assert_close(a, torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=0, atol=0.007)  # 0.0066 of the signal is left by DDPM
        assert_close(s, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-4)


@every
def test_the_velocity_is_the_derivative_of_the_path(path):
    """By autograd through x_t, for fixed signal and noise."""
    x, e = drawn()
    process = Process(path)
    (slope,) = torch.autograd.grad(process.noisy(x, e, T).sum(), T)
    assert_close(process.target(x, e, T), slope)


def test_targets_of_the_other_kinds():
    x, e = drawn()
    a, s = Process("cosine").shown(T)
    assert_close(Process("cosine", "noise").target(x, e, T), e)
    assert_close(Process("cosine", "signal").target(x, e, T), x)
    assert_close(Process("cosine", "v").target(x, e, T), a * e - s * x)
    assert_close(Process("cosine", "velocity").target(x, e, T), math.pi / 2 * (a * e - s * x))


@both
def test_what_is_said_gives_both_ends_back(path, kind):
    x, e = drawn()
    process = Process(path, kind)
    signal, noise = process.ends(process.noisy(x, e, T), process.target(x, e, T), T)
    assert_close(signal, x)
    assert_close(noise, e)


@both
def test_all_kinds_mean_the_same_velocity(path, kind):
    x, e = drawn()
    process = Process(path, kind)
    assert_close(process.velocity(process.noisy(x, e, T), process.target(x, e, T), T), Process(path).target(x, e, T))


@both
def test_errors_scale_as_the_equations_say(path, kind):
    """One more in the answer is -s / scale more signal and a / scale more noise."""
    x, e = drawn()
    process = Process(path, kind)
    noisy, said = process.noisy(x, e, T), process.target(x, e, T)
    signal, noise = process.ends(noisy, said + 1, T)
    a, s = process.shown(T)
    assert_close(signal - x, -s / process.scale(T))
    assert_close(noise - e, a / process.scale(T))


@both
def test_min_snr_weighs_the_error_of_the_signal(path, kind):
    """The loss in any kind of answer is min(snr, most) times the squared error of the signal that it means."""
    x, e = drawn()
    process = Process(path, kind)
    noisy, truth = process.noisy(x, e, T), process.target(x, e, T)
    wrong = truth + 0.3
    a, s = process.shown(T)
    expected = (a / s).square().clamp(max=5) * (process.ends(noisy, wrong, T).signal - x).square()
    assert_close(process.min_snr(T) * (wrong - truth).square(), expected)


def test_min_snr_is_the_papers_for_noise_signal_and_v():
    snr = [papers("cosine", t)[0] ** 2 / papers("cosine", t)[1] ** 2 for t in T.tolist()]
    for kind, forms in {
        "signal": lambda r: min(r, 5),
        "noise": lambda r: min(r, 5) / r,
        "v": lambda r: min(r, 5) / (r + 1),
    }.items():
        expected = torch.tensor([forms(r) for r in snr], dtype=torch.float64)
        assert_close(Process("cosine", kind).min_snr(T).detach(), expected)


@both
def test_at_the_ends_of_its_times_everything_is_finite(path, kind):
    process = Process(path, kind)
    t = process.within(torch.tensor([0.0, 1.0]))
    x, e = torch.ones(2), -torch.ones(2)
    noisy, said = process.noisy(x, e, t), process.target(x, e, t)
    for value in (*process.ends(noisy, said, t), process.velocity(noisy, said, t), process.min_snr(t)):
        assert value.isfinite().all()


def test_it_is_made_again_from_its_spec():
    made = build(Process("cosine", "v", ["label"]).spec)
    assert (made.path, made.predicts, made.told) == ("cosine", "v", ("label",))


def test_it_travels_with_the_model(tmp_path):
    encoders = {"action": Action(Trunk(16, 1, 2), slots=2), "text": Text(Trunk(16, 1, 2))}
    model = Model(encoders, processes={"action": Process("cosine", "noise", ["text"])})
    again = model_of(model.spec, tmp_path).process("action")
    assert (again.path, again.predicts, again.told) == ("cosine", "noise", ("text",))
    assert model.only(["action", "text"]).processes == model.processes
    assert model.only(["text"]).processes == {}  # without what it is told it is no more
    assert (model.process("text").path, model.process("text").predicts) == ("rectified", "velocity")
    assert model.process("action@view") is model.processes["action"]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="path 'straight'"):
        Process("straight")
    with pytest.raises(ValueError, match="predicts 'score'"):
        Process(predicts="score")
