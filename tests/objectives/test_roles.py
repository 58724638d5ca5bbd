import pytest
import torch
from contracts import cases

from headwater.datamodules.collate import collate
from headwater.modalities import Records
from headwater.modalities.record_turns import Dialogue
from headwater.model import Model
from headwater.objectives import Causal, Contrastive, Roles
from headwater.objectives.roles import speaker
from headwater.tokens import Tokens
from headwater.trunk import Trunk

TURNS = [
    {"turns": [{"role": "user", "text": "hi"}, {"role": "assistant", "text": "hello"}, {"role": "user", "text": "bye"}]},
    {"turns": [{"role": "system", "text": "be kind"}, {"role": "user", "text": "x"}, {"role": "assistant", "text": ""}]},
]


def made(learned):
    torch.manual_seed(0)
    model = Model({"text": Records(Trunk(16, 1, 2), Dialogue(), length=64)}).double()
    reader = model.encoder("text").reader
    batch = collate([{"text": reader.tokens(record)} for record in TURNS], ["text"])
    return model, Roles(model, learned=learned), {**batch, "seed": torch.arange(2)}, reader


def test_who_speaks_is_told_by_the_last_mark_of_the_document():
    marks, document = torch.tensor([7, 9]), torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])
    t = Tokens(torch.tensor([[1, 7, 2, 9, 3, 4, 7, 5]]), torch.zeros(1, 8, 1), document=document)
    who, opens = speaker(t, marks)
    assert who.tolist() == [[-1, 0, 0, 1, 1, -1, 0, 0]]
    assert opens.tolist() == [[False, True, False, True, False, False, True, False]]


@pytest.mark.parametrize(("learned", "said"), [(["assistant"], ["hello", ""]), (["user", "system"], ["hi", "bye", "be kind", "x"])])
def test_only_learned_roles_are_asked_for_and_nothing_else_has_a_gradient(learned, said):
    model, objective, batch, reader = made(learned)
    task = objective.task(batch)
    asked, ids = task["asked"], task["answer"]
    assert ids[asked].tolist() == [i for text in said for i in [*text.encode(), reader.end]]
    states = objective.inner.states(model, task).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(objective.inner.score(model, states, task)["causal"].total, states)
    assert not gradient[~asked].any()
    assert gradient[asked].any(-1).all()


def test_all_roles_together_are_all_but_the_marks():
    _, objective, batch, reader = made(["system", "user", "assistant"])
    asked, plain = objective.task(batch)["asked"], Causal(made(["user"])[0]).task(batch)["asked"]
    marks = torch.isin(batch["text"].x, torch.tensor([*reader.roles.values()]))
    assert torch.equal(asked, plain & ~marks)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="knows system, user, assistant"):
        made(["answer"])
    with pytest.raises(ValueError, match="knows none"):
        Roles(cases.model())
    with pytest.raises(ValueError, match="expected Causal"):
        Roles(cases.model(), inner=lambda m: Contrastive(m, "text", "image"))
