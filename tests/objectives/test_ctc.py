import math
from itertools import product

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater.modalities import Audio, Numbers, Transcript
from headwater.model import Model
from headwater.objectives import CTC
from headwater.objectives.ctc import needed
from headwater.tokens import Tokens


def spelled(path, blank):
    """What a path of one symbol per moment says: repeats are one, blanks are none."""
    return [k for i, k in enumerate(path) if k != blank and (i == 0 or path[i - 1] != k)]


def made(height=None):
    torch.manual_seed(0)
    m = Model({"audio": Audio(cases.trunk(), bands=4, frames=4, height=height)}).double()
    return m, CTC(m, Transcript("ab")).double()


@pytest.mark.parametrize("height", [None, 2])
def test_the_loss_is_the_sum_over_all_alignments(height):
    """Moments of one token each, or of two that answer together; value and gradient against every path, one by one."""
    m, o = made(height)
    rows = 1 if height is None else 2
    sounds = [m.readers["audio"].example(3, 0)[2].map(lambda f, n=n: f[: n * rows]) for n in (3, 4, 2)]
    words = ["ab", "aa", "b"]
    samples = [{"audio": s, "transcript": o.readers["transcript"].tokens(w)} for s, w in zip(sounds, words, strict=True)]
    batch = cases.batch(cases.readers(m, o), samples)
    (term,) = cases.terms(o, m, batch)[0].values()
    x = m.encode(m.embed({"audio": batch["audio"]}))["audio"].x
    expected = 0
    for k, (sound, word) in enumerate(zip(sounds, words, strict=True)):
        moments = x[k, : len(sound.x)].unflatten(0, (-1, rows)).mean(1)
        p = o.head(moments).softmax(-1)
        letters = ["ab".index(letter) for letter in word]
        paths = [path for path in product(range(3), repeat=len(p)) if spelled(path, 2) == letters]
        expected = expected - torch.stack([math.prod(p[t, c] for t, c in enumerate(path)) for path in paths]).sum().log()
    assert term.number == 5
    assert_close(term.total, expected)
    for got, wanted in zip(
        *(torch.autograd.grad(v, o.head.parameters(), retain_graph=True) for v in (term.total, expected)), strict=True
    ):
        assert_close(got, wanted)


def test_a_signal_too_short_for_its_transcript_is_left_out():
    label = Tokens(torch.tensor([[0, 0, 1], [0, 1, 0]]), torch.zeros(2, 3, 1), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool())
    assert needed(label).tolist() == [4, 2]
    m, o = made()
    sound = m.readers["audio"].example(3, 0)[2].map(lambda f: f[:2])
    for word, number in (("ab", 2), ("aa", 0), ("aba", 0), ("", 0)):
        batch = cases.batch(cases.readers(m, o), [{"audio": sound, "transcript": o.readers["transcript"].tokens(word)}])
        (term,) = cases.terms(o, m, batch)[0].values()
        term.total.backward()
        assert term.number == number
        assert term.total.isfinite()
        assert bool(term.total) == bool(number)


def test_it_learns_to_spell():
    m, o = made()
    samples = [
        {"audio": a, "transcript": o.readers["transcript"].tokens(w)}
        for a, w in zip(m.readers["audio"].example(3, 0)[1:], ("ab", "b"), strict=True)
    ]
    batch = cases.batch(cases.readers(m, o), samples)
    step = torch.optim.Adam([*m.parameters(), *o.parameters()], 1e-2)
    for _ in range(40):
        (term,) = cases.terms(o, m, batch)[0].values()
        step.zero_grad()
        term.total.backward()
        step.step()
    answer = o.head(m.encode(m.embed({"audio": batch["audio"]}))["audio"].x).argmax(-1)
    paths = [row[real].tolist() for row, real in zip(answer, batch["audio"].real(), strict=True)]
    assert [spelled(path, 2) for path in paths] == [[0, 1], [1]]


def test_labels_of_vectors_are_refused():
    with pytest.raises(ValueError, match="Numbers gives vectors; expected ids of letters"):
        CTC(made()[0], Numbers(["a"]))
