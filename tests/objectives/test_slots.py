import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater.modalities import Text
from headwater.model import Model
from headwater.objectives import Causal, Slots
from headwater.tokens import Tokens
from headwater.trunk import Trunk


def made(slots=2, passes=2, texts=("sea", "a dog")):
    torch.manual_seed(3)
    model = Model({"text": Text(Trunk(16, 2, 2, registers=1))}).double()
    objective = Slots(model, slots=slots, passes=passes)
    reader = model.encoder("text").reader
    return model, objective, cases.batch(model.readers, [{"text": reader.tokens(text)} for text in texts])


def one_after_the_other(model, ids, slots):
    """States of the last slot of every place, (N, D): each slot gets the state that a run up to the one before it ended with."""
    encoder, x, position, answers = model.encoder("text"), [], [], []
    before = torch.cat([torch.tensor([encoder.start]), ids[:-1]])
    for place, token in enumerate(encoder.stem(before)):
        for k in range(slots + 1):
            x.append(token if k == 0 else state)  # noqa: F821
            position.append([place])
            t = Tokens(torch.stack(x)[None], torch.tensor(position)[None], order=torch.arange(len(x))[None])
            state = model({"text": t}, True)["text"].x[0, len(x) - 1]
        answers.append(state)
    return torch.stack(answers)


@pytest.mark.parametrize("slots", [1, 2])
@torch.no_grad()
def test_passes_in_parallel_end_at_the_sequential_run(slots):
    model, _, batch = made(slots)
    ids = batch["text"].x[1]
    wanted = one_after_the_other(model, ids, slots)
    away = []
    for passes in (1, 4, len(ids) * slots):
        objective = Slots(model, slots=slots, passes=passes)
        away.append(float((objective.states(model, objective.task(batch))[1] - wanted).abs().max()))
    assert away[2] < 1e-10
    assert away[2] <= away[1] <= away[0]


@pytest.mark.parametrize("passes", [0, 3])
def test_no_answer_sees_its_token_or_what_follows(passes):
    model, objective, batch = made(passes=passes)
    plain = objective.states(model, objective.task(batch))[1]
    for changed in range(len(plain)):
        x = batch["text"].x.clone()
        x[1, changed] = 65
        states = objective.states(model, objective.task({**batch, "text": batch["text"]._replace(x=x)}))[1]
        moved = (states - plain).abs().amax(-1) > 1e-12
        assert moved.tolist() == [place > changed for place in range(len(plain))]


def test_pauses_are_start_tokens_that_stand_between():
    model, objective, batch = made(slots=1, passes=0)
    encoder, ids = model.encoder("text"), batch["text"].x[1]
    before = torch.cat([torch.tensor([encoder.start]), ids[:-1]])
    x = torch.stack([before, torch.full_like(before, encoder.start)], 1).flatten()[None]
    t = Tokens(x, torch.arange(len(ids)).repeat_interleave(2)[None, :, None])
    y = model(model.embed({"text": t}), True)["text"].x[0, 1 : 2 * len(ids) : 2]
    assert_close(objective.states(model, objective.task(batch))[1], y, rtol=1e-9, atol=1e-9)


def test_the_same_is_asked_as_without_slots_and_nothing_is_thrown_away():
    model, objective, batch = made()
    assert not list(objective.parameters())
    assert objective.numbers(objective.task(batch)) == Causal(model).numbers(Causal(model).task(batch))


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="one slot or more"):
        made(slots=0)
    with pytest.raises(ValueError, match="no fewer than 0"):
        made(passes=-1)
