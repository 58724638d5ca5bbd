import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater.objectives.flow import Flow
from headwater.tokens import Tokens


def task(n=4000, tokens=2, spread=1.0):
    objective = Flow(cases.model(), spread=spread)
    x = torch.randn(n, tokens, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    raw = Tokens(x, torch.zeros(n, tokens, 1))
    return x, objective.task({"image": raw, "seed": torch.arange(n)})


def test_the_path_is_straight_and_the_velocity_its_derivative():
    x, batch = task(n=50)
    t = batch["time"][..., None]
    noise = batch["velocity"] + x
    assert_close(batch["image"].x, (1 - t) * x + t * noise)
    assert_close(batch["image"].x - t * batch["velocity"], x)  # one step back along the velocity is the signal


def test_time_is_logit_normal_and_shared_by_a_sample():
    _, batch = task(spread=1.5)
    assert torch.equal(batch["time"][:, 0], batch["time"][:, 1])
    logit = batch["time"][:, 0].double().logit()
    assert abs(logit.mean()) < 4 * 1.5 / 4000**0.5
    assert abs(logit.std() - 1.5) < 4 * 1.5 / 8000**0.5


def test_noise_is_standard_normal_and_independent_of_time_and_signal():
    x, batch = task()
    noise = (batch["velocity"] + x).flatten(1)
    every = torch.cat([noise, x.flatten(1), batch["time"][:, :1].logit()], 1)
    expected = torch.eye(13)
    assert (every.T.corrcoef() - expected).abs().max() < 4.5 / 4000**0.5
    assert (noise.mean(0).abs() < 4.5 / 4000**0.5).all()
    assert ((noise.std(0) - 1).abs() < 4.5 / 8000**0.5).all()


def test_the_loss_is_the_mean_squared_error_of_the_velocity():
    model = cases.model()
    torch.manual_seed(1)
    torch.nn.init.normal_(model.encoder("action").trunk.blocks[0].modulation.weight)  # so that time matters
    objective = Flow(model, "action")
    batch = objective.task(cases.batch(model.readers, cases.examples(model.readers)))
    answers = []
    handle = model.encoder("action").head.register_forward_hook(lambda *call: answers.append(call[-1]))
    total = objective(model, batch)["flow"].total
    handle.remove()
    answer, error = answers[0], 0.0
    for b, n in batch["action"].real().nonzero().tolist():
        target = batch["velocity"][b, n]
        slots = [(answer[b, n, s] - target[s]) ** 2 for s in range(3) if not target[s].isnan()]
        error = error + sum(slots) / len(slots)
    assert_close(total.double(), error, rtol=1e-5, atol=1e-5)
    late = {**batch, "time": batch["time"] * 0.5}
    assert not torch.isclose(objective(model, late)["flow"].total, total)


def test_ids_and_trunks_without_time_are_refused():
    model = cases.model()
    with pytest.raises(ValueError, match="ids"):
        Flow(model, "text")
    with pytest.raises(ValueError, match="conditional"):
        Flow(model, "video")
