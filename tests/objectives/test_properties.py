from functools import partial

import pytest
import torch
from contracts import cases

from headwater.modalities import Text
from headwater.model import Model
from headwater.objectives import Masked
from headwater.objectives.targets.properties import Properties, first_letter, letter_sum


def test_words_have_the_properties_that_they_say():
    assert [first_letter(w) for w in ("apple", " Zoo", "7up", "?", " ", "")] == [0, 25, 26, 27, 28, 28]
    assert letter_sum("ab", 5) == (97 + 98) % 5


@pytest.mark.parametrize(("kind", "size"), [("first", 29), ("sum", 7), ("random", 7)])
def test_each_hidden_id_is_asked_for_its_property(kind, size):
    model = Model({"text": Text(cases.trunk(), length=24)}).double()
    target = partial(Properties, kind=kind, classes=7)
    o = Masked(model, "text", ratio=0.5, mode="substitute", target=target).double()
    batch = cases.batch(model.readers, cases.examples(model.readers))
    (term,) = cases.terms(o, model, batch)[0].values()
    term.total.backward()
    made = target(model, "text")
    assert made.size == size
    assert int(made.table.max()) < size
    for letter in "aZ4":
        expected = {"first": first_letter(letter), "sum": letter_sum(letter, 7)}.get(kind, int(made.table[ord(letter)]))
        assert made.table[ord(letter)] == expected
    if kind == "random":
        assert len(made.table.unique()) == 7
        assert torch.equal(made.table, target(model, "text").table)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match="expected ids"):
        Properties(cases.model(), "image")
