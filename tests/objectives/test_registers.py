import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater.objectives import Causal, Registers
from headwater.tokens import LAST, Tokens


def sides(packed=False, **options):
    model = cases.model()
    objective = Registers(model, prefix=["image"], **options).double()
    torch.nn.init.normal_(objective.register)
    samples = cases.examples(model.readers)
    return model, objective, objective.task(cases.batch(model.readers, samples, packed=packed)), samples


@pytest.mark.parametrize("packed", [False, True])
def test_ordinary_tokens_do_not_notice(packed):
    model, objective, task, _ = sides(packed)
    plain = Causal(model, prefix=["image"])
    with torch.no_grad():
        terms = objective(model, task)
        assert_close(
            terms["causal"].total, plain.score(model, plain.states(model, task), task)["causal"].total, rtol=1e-9, atol=1e-9
        )
        objective.register[::2] += 1.0
        again = objective(model, task)
    assert_close(again["causal"].total, terms["causal"].total, rtol=1e-9, atol=1e-9)
    assert abs(float(again["registers"].total - terms["registers"].total)) > 1e-3


def test_nothing_but_the_register_is_thrown_away():
    assert [name for name, _ in sides()[1].named_parameters()] == ["register"]


def test_a_register_answers_as_if_it_stood_alone_behind_what_it_sees():
    """-sum over registers of log p(x_t+d | x_1 .. x_t-1, a register at the position of t+d), each in a run of its own."""
    model, objective, task, samples = sides(packed=True, farthest=3, share=0.7)
    encoder, registers = model.encoder("text"), objective.registers(task)
    loss, distances = 0, []
    for row, column in registers.real().nonzero().tolist():
        number, place, later = (
            int(field[row, column]) for field in (registers.sample(), registers.order, registers.position[..., 0])
        )
        ids = torch.cat([torch.tensor([encoder.start]), samples[number]["text"].x])
        distances.append(later - place)
        assert registers.x[row, column] == ids[1 + later]
        seen = Tokens(ids[None, : place + 1], torch.arange(place + 1)[None, :, None])
        text = model.embed({"text": seen})["text"]
        x = torch.cat([text.x, objective.register[None, None]], 1)
        position = torch.cat([text.position, torch.tensor([[[later]]])], 1)
        hidden = torch.arange(place + 2)[None] <= place
        order = torch.arange(place + 2).clamp(max=place)[None]
        one = cases.batch(model.readers, samples, [number])["image"]
        image = model.embed({"image": one._replace(order=torch.zeros(one.x.shape[:2], dtype=torch.int64))})["image"]
        y = model({"text": Tokens(x, position, hidden, None, order), "image": image}, True)["text"]
        loss = loss - encoder.unembed(y.x[0, place + 1]).log_softmax(-1)[ids[1 + later]]
    found = objective(model, task)["registers"]
    assert_close(found.total.double(), loss, rtol=1e-6, atol=1e-6)
    assert set(distances) == {1, 2, 3}
    (a,), (b,) = (torch.autograd.grad(x, [objective.register]) for x in (found.total, loss))
    assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_shares_and_distances_are_as_told():
    _, objective, task, _ = sides(farthest=2, share=0.5)
    registers = objective.registers(task)
    assert 0.3 < int(registers.real().sum()) / int(task["asked"].sum()) < 0.6
    assert int(registers.order.max()) < LAST


def test_what_is_not_asked_for_is_not_asked_of_registers_either():
    model, objective, task, _ = sides()
    task["asked"][:, :4] = False
    registers = objective.registers(task)
    assert int(registers.position[registers.real()].min()) >= 4
    assert objective.numbers(task)["registers"] == registers.real().sum() == objective(model, task)["registers"].number


@pytest.mark.parametrize("options", [{"farthest": 0}, {"share": 0.0}, {"share": 1.5}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match="expected 1 or more"):
        Registers(cases.model(), **options)
