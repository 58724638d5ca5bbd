from collections import Counter

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater import random
from headwater.datamodules.collate import collate
from headwater.fusion import CrossAttend, Project
from headwater.modalities import Text
from headwater.model import Model
from headwater.objectives.causal import Causal
from headwater.objectives.denoising import Denoising
from headwater.objectives.likelihood import Anchor, HashDrop, Likelihood, Power
from headwater.objectives.masks.policies import Words
from headwater.objectives.masks.salient import Salient
from headwater.objectives.noise import Delete, GapSentences, Infill, Permute, Prefix, Reconstruction, SpanCorruption
from headwater.objectives.noise.denoisers import marked
from headwater.objectives.noise.gap_sentences import overlap
from headwater.objectives.noise.operators import Ids, sentences
from headwater.tokens import Tokens
from headwater.trunk import Trunk

END, MARKS = 256, 257  # of bytes: the end mark, and the first of the extra ids
WORDS = [
    "the",
    "dog",
    "sees",
    "a",
    "red",
    "boat",
    "and",
    "sings.",
    "is",
    "it",
    "far?",
    "nobody",
    "knows!",
    "so",
    "they",
    "go",
    "home",
]


def writer(extra=40, length=120, width=16, depth=1, **options):
    torch.manual_seed(0)
    return Model({"text": Text(Trunk(width, depth, 2), length=length, extra=extra, **options)}).double()


def texts(count, low=1, high=20, seed=0):
    """Sentences of `low` to `high` words."""
    draw = random.uniform(random.fold(torch.arange(count), seed), (high + 1,), "texts")
    lengths = low + (draw[:, 0] * (high - low + 1)).long()
    return [" ".join(WORDS[int(i * len(WORDS))] for i in row[1 : 1 + n]) for row, n in zip(draw, lengths.tolist(), strict=True)]


def batched(model, signals, rows=None, seed=0):
    reader = model.encoder("text").reader
    made = collate([{"text": reader.tokens(signal)} for signal in signals], ["text"], rows)
    return {**made, "seed": random.fold(torch.arange(len(signals)), seed)}


def told(task, count):
    """Of every sample the input, and the answers that are asked for, as ids."""
    t, found = task["text"], [([], []) for _ in range(count)]
    source = task.get("source", t)
    seen = source.real() & (source.order == 0)
    for side, (ids, sample) in enumerate(
        [(source.x[seen], source.sample()[seen]), (task["answer"][task["asked"]], t.sample()[task["asked"]])]
    ):
        for i, s in zip(ids.tolist(), sample.tolist(), strict=True):
            found[s][side].append(i)
    return found


def filled(source, target):
    """The spans of the target put at the marks of the source."""
    spans, mark = {}, None
    for i in target:
        if i >= MARKS:
            mark = i
            spans[mark] = []
        else:
            spans[mark].append(i)
    assert list(spans) == list(range(MARKS, MARKS + len(spans)))  # one mark after the other
    assert [i for i in source if i >= MARKS] == list(spans)
    return [i for token in source for i in (spans[token] if token >= MARKS else [token])]


@pytest.mark.parametrize(
    "denoiser",
    [SpanCorruption(), SpanCorruption(0.5, 3.0), SpanCorruption(0.15, 32.0), SpanCorruption(0.3, policy=Words([32]))],
    ids=["short", "half", "long", "words"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_source_and_target_tell_the_document(denoiser, packed):
    model, signals = writer(), texts(1000)
    rows = [list(range(i, min(i + 3, 1000))) for i in range(0, 1000, 3)] if packed else None
    task = Denoising(model, denoisers={"it": denoiser}).task(batched(model, signals, rows))
    for signal, (source, target) in zip(signals, told(task, 1000), strict=True):
        assert source[-1] == target[-1] == END
        assert bytes(filled(source[:-1], target[:-1])).decode() == signal


def test_the_format_is_that_of_t5():
    """Raffel et al., figure 2, with words as ids. The mark that closes their target is the end mark here."""
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week", "."]
    t = Tokens(torch.arange(11)[None], torch.arange(11)[None, :, None])
    pair = marked(t, torch.tensor([[w in ("for", "inviting", "last") for w in words]]), range(100, 105))
    source, target = ([words[i] if i < 100 else f"<{i - 100}>" for i in p.x[p.real()].tolist()] for p in pair)
    assert " ".join(source) == "Thank you <0> me to your party <1> week ."
    assert " ".join(target) == "<0> for inviting <1> last"


def test_marks_that_run_out_leave_the_rest_as_it_is():
    model, signals = writer(extra=3), texts(200, 15, 20)
    task = Denoising(model, denoisers={"it": SpanCorruption(0.5, policy=Words([32]))}).task(batched(model, signals))
    for signal, (source, target) in zip(signals, told(task, 200), strict=True):
        assert max(source) <= MARKS + 2
        assert bytes(filled(source[:-1], target[:-1])).decode() == signal


@pytest.mark.parametrize(("rate", "mean"), [(0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.5, 8.0), (0.15, 64.0), (0.5, 64.0)])
def test_density_and_mean_length_of_spans(rate, mean):
    """The settings of UL2, over documents of 400 to 600 tokens: both within 2 %, and each document by its own budget."""
    lengths = 400 + (random.uniform(torch.arange(400), (), "length") * 201).long()
    place = torch.arange(600).expand(400, 600)
    t = Tokens(torch.zeros_like(place), place[..., None], place < lengths[:, None])
    source, target = SpanCorruption(rate, mean)(t, torch.arange(400), ids(200))
    hidden = (target.real() & (target.x == 0)).sum(1)
    number = (target.real() & (target.x > 0)).sum(1)
    assert torch.equal(hidden, (rate * lengths.float()).round().long())
    assert torch.equal(number, (rate * lengths.float() / mean).round().long().clamp(min=1))
    assert abs(hidden.sum() / lengths.sum() / rate - 1) < 0.02
    if number.float().mean() > 5:  # where rounding to whole spans plays no part
        assert abs(hidden.sum() / number.sum() / mean - 1) < 0.02
    assert torch.equal(source.real().sum(1), lengths - hidden + number)


def ids(marks):
    return Ids(257, range(257, 257 + marks))


def test_all_choices_of_spans_are_equally_likely():
    """Of 7 tokens 3 in 2 spans: 2 ways to cut, times 10 ways to put two spans into 5 gaps."""
    count = 20_000
    place = torch.arange(7).expand(count, 7)
    t = Tokens(place, place[..., None])
    _, target = SpanCorruption(3 / 7, 1.5)(t, torch.arange(count), ids(5))
    hidden = torch.zeros(count, 7, dtype=torch.bool)
    for place in range(7):
        hidden[:, place] = ((target.x == place) & target.real()).any(1)
    found = Counter(map(tuple, hidden.int().tolist()))
    assert len(found) == 20
    assert all(sum(mask) == 3 for mask in found)
    assert all(abs(n / count - 1 / 20) < 0.01 for n in found.values())


@pytest.mark.parametrize("denoiser", [SpanCorruption(), SpanCorruption(0.5, 64.0), GapSentences(), Reconstruction(), Prefix()])
def test_documents_of_a_token_or_two(denoiser):
    """One token is hidden whole; of two at least one is asked for."""
    model = writer()
    task = Denoising(model, denoisers={"it": denoiser}).task(batched(model, ["a", "ab", "x"], [[0, 1], [2]]))
    for signal, (_, target) in zip(["a", "ab", "x"], told(task, 3), strict=True):
        left = bytes(i for i in target if i < END).decode()
        assert left
        assert left in signal
        assert target[-1] == END


def test_a_prefix_is_split_anywhere():
    model, signals = writer(extra=0), texts(2000, 8, 12)
    task = Denoising(model, denoisers={"it": Prefix()}).task(batched(model, signals))
    shares = []
    for signal, (source, target) in zip(signals, told(task, 2000), strict=True):
        assert bytes(source + target[:-1]).decode() == signal
        assert target[-1] == END
        shares.append(len(source) / len(signal))
    shares = torch.tensor(shares).sort().values
    assert (shares - torch.linspace(0, 1, 2000)).abs().max() < 0.05  # uniform
    task = Denoising(model, denoisers={"it": Prefix((0.25, 0.25))}).task(batched(model, signals))
    for signal, (source, target) in zip(signals, told(task, 2000), strict=True):
        assert len(target) - 1 == int(torch.tensor(0.25 * len(signal)).round())
        assert bytes(source + target[:-1]).decode() == signal


def test_all_of_it_asked_for_is_causal_prediction():
    model = writer()
    batch = batched(model, texts(7), [[0, 1, 2], [3, 4], [5, 6]])
    causal, ours = Causal(model), Denoising(model, denoisers={"it": Prefix((1.0, 1.0))})
    a, b = causal(model, causal.task(batch))["causal"], ours(model, ours.task(batch))["denoising"]
    assert_close(a.total, b.total)
    assert a.number == b.number


def test_reconstruction_asks_for_the_whole_of_what_noise_has_changed():
    model, signals = writer(), texts(300)
    noise = [Permute(), Infill(0.3)]
    task = Denoising(model, denoisers={"it": Reconstruction(noise)}).task(batched(model, signals))
    seed = random.fold(batched(model, signals)["seed"], "denoising")
    for k, (signal, (source, target)) in enumerate(zip(signals, told(task, 300), strict=True)):
        assert bytes(target[:-1]).decode() == signal
        x = torch.tensor([list(signal.encode())])
        t = Tokens(x, torch.arange(x.shape[1])[None, :, None])
        for turn, step in enumerate(noise):
            t = step(t, random.fold(seed[k : k + 1], turn), ids(40))
        assert source == [*t.x[t.real()].tolist(), END]
    assert Reconstruction().marks(10) == 1
    assert Reconstruction([Delete(0.1)]).marks(10) == 0


def rouge(sentence, rest, size, unique):
    """F1 of the n-grams that a sentence shares with others."""
    a, b = Counter(grams(sentence, size)), Counter(gram for other in rest for gram in grams(other, size))
    if unique:
        a, b = Counter(set(a)), Counter(set(b))
    both = sum((a & b).values())
    return 2 * both / max(sum(a.values()) + sum(b.values()), 1)


def grams(x, size):
    return [tuple(x[i : i + size]) for i in range(len(x) - size + 1)]


def cut(x):
    made = [[]]
    for i, c in enumerate(x):
        if i and x[i - 1] in b"!.?\n" and c not in b"!.?\n":
            made.append([])
        made[-1].append(c)
    return made


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gap_sentences_are_those_of_a_brute_force_ranking(size, unique, packed):
    model, signals = writer(length=200), texts(120, 1, 30)
    rows = [list(range(i, min(i + 5, 120))) for i in range(0, 120, 5)] if packed else None
    batch = batched(model, signals, rows)
    t = batch["text"]._replace(valid=batch["text"].real() & (batch["text"].x != END))
    score = overlap(t, sentences(t, [33, 46, 63, 10]), size, unique)
    task = Denoising(model, denoisers={"it": GapSentences(0.3, size, unique)}).task(batch)
    several = 0
    for k, (signal, (source, target)) in enumerate(zip(signals, told(task, 120), strict=True)):
        parts = cut(signal.encode())
        expected = [rouge(part, parts[:n] + parts[n + 1 :], size, unique) for n, part in enumerate(parts)]
        found = score[t.real() & (t.sample() == k)]
        assert_close(found, torch.tensor([e for e, part in zip(expected, parts, strict=True) for _ in part]).double())
        number = min(max(round(0.3 * len(parts)), 1), max(len(parts) - 1, 1))
        best = sorted(sorted(range(len(parts)), key=lambda n, e=expected: (-e[n], n))[:number])
        assert target == [*(c for n in best for c in parts[n]), END]
        assert source == [*(c for n, part in enumerate(parts) for c in ([MARKS] if n in best else part)), END]
        several += len(parts) > 3
    assert several > 20


def test_gaps_may_be_the_first_or_random_ones():
    model, signals = writer(length=200), texts(400, 28, 30)
    lead, anywhere = (
        told(Denoising(model, denoisers={"it": GapSentences(0.3, pick=pick)}).task(batched(model, signals)), 400)
        for pick in ("first", "random")
    )
    for signal, (_, target) in zip(signals, lead, strict=True):
        assert signal.startswith(bytes(target[:-1]).decode())
    begins = sum(
        signal.startswith(bytes(i for i in target[:9] if i < END).decode())
        for signal, (_, target) in zip(signals, anywhere, strict=True)
    )
    assert 0 < begins < 250


def ul2(**options):
    return {
        "r": SpanCorruption(0.15, 3.0, mode=0),
        "x": SpanCorruption(0.5, 8.0, mode=1),
        "s": Prefix((0.25, 0.25), mode=2),
    }


def test_denoisers_are_drawn_by_their_shares_and_marked_by_their_mode():
    model = writer(length=40)
    objective = Denoising(model, denoisers=ul2(), shares={"r": 2.0, "s": lambda progress: 1 + 4 * progress})
    batch = batched(model, texts(10_000, 4, 5))
    for progress, expected in ((0.0, [0.5, 0.25, 0.25]), (1.0, [0.25, 0.125, 0.625])):
        task = objective.task({**batch, "progress": progress})
        share = task["denoiser"].bincount(minlength=3) / 10_000
        assert_close(share, torch.tensor(expected), atol=0.01, rtol=0)
        t = task["text"]
        first = t.x[:, 0] - MARKS
        assert torch.equal(first, task["denoiser"])  # modes 0, 1, 2 of the extra ids
        assert (
            int(((t.x - MARKS >= 0) & (t.x - MARKS < 3) & (t.x < 297) & t.real())[:, 1:].sum()) == 0
        )  # and no mark is one of them


@pytest.mark.parametrize("packed", [False, True])
def test_what_may_see_what(packed):
    """The source sees the source, in both directions; a place of the target the source and no later place; nobody other texts."""
    model = writer(depth=2)
    objective = Denoising(model, denoisers=ul2())
    task = objective.task(batched(model, texts(4, 3, 6, seed=2), [[0, 1], [2, 3]] if packed else None))
    t = task["text"]
    embedded = model.embed({"text": t})["text"]
    x = embedded.x.detach().requires_grad_()
    y = model({"text": embedded._replace(x=x)}, True)["text"].x
    for row in range(len(t.x)):
        for n in t.real()[row].nonzero()[:, 0].tolist():
            (grad,) = torch.autograd.grad(y[row, n, 0], x, retain_graph=True)
            sees = grad.abs().amax(-1) > 0
            same = (t.sample() == t.sample()[row, n]) & t.real()
            asked = task["asked"]
            earlier = torch.zeros_like(same)
            earlier[row, : n + 1] = True
            expected = same & (~asked | (asked & earlier)) if asked[row, n] else same & ~asked
            assert torch.equal(sees, expected)


def test_answers_do_not_see_what_they_are_asked_for():
    model = writer(depth=2)
    objective = Denoising(model, denoisers={"it": Prefix((0.5, 0.5))})
    batch = batched(model, ["the dog sees a boat", "the dog sees a bird"])
    batch["seed"] = torch.zeros(2, dtype=torch.int64)
    y = objective.states(model, objective.task(batch))
    same = 16  # letters that both share
    assert torch.equal(y[0, : same + 1], y[1, : same + 1])
    assert not torch.equal(y[0, same + 1], y[1, same + 1])


def test_the_loss_is_that_of_the_target_given_the_source():
    """-sum_t log p(y_t | y_1 .. y_t-1, source), each document alone and each prefix run anew; value and gradient."""
    model, signals = writer(), texts(5, 2, 4)
    objective = Denoising(model, denoisers=ul2(), likelihood=Likelihood(Power(2.0)))
    batch = batched(model, signals, [[0, 1], [2], [3, 4]])
    task = objective.task(batch)
    loss = 0.0
    for source, target in told(task, 5):
        for n, answer in enumerate(target):
            seen = torch.tensor([*source, model.encoder("text").start, *target[:n]])[None]
            length = seen.shape[1]
            order = torch.tensor([[0] * len(source) + [1 + i for i in range(n + 1)]])
            t = Tokens(seen, torch.arange(length)[None, :, None], order=order)
            logits = model.encoder("text").unembed(model(model.embed({"text": t}), True)["text"].x[0, -1])
            loss = loss - logits.softmax(-1)[answer] ** 2
    term = objective(model, task)["denoising"]
    assert_close(term.total, loss)
    assert int(term.number) == sum(len(target) for _, target in told(task, 5))
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert_close(torch.autograd.grad(term.total, parameters), torch.autograd.grad(loss, parameters))


def test_some_answers_are_never_asked_for():
    model, batch = writer(), batched(writer(), texts(50))
    whole = Denoising(model, denoisers=ul2()).task(batch)
    part = Denoising(model, denoisers=ul2(), likelihood=Likelihood(drop=HashDrop(k=3, h=2))).task(batch)
    assert torch.equal(part["text"].x, whole["text"].x)
    assert bool((part["asked"] <= whole["asked"]).all())
    assert 0.5 < part["asked"].sum() / whole["asked"].sum() < 0.8


def test_each_denoisers_own_loss_is_told():
    model = writer()
    objective = Denoising(model, denoisers=ul2())
    term = objective(model, objective.task(batched(model, texts(40))))["denoising"]
    task = objective.task(batched(model, texts(40)))
    total = 0.0
    for k, name in enumerate(ul2()):
        chosen = task["denoiser"] == k
        own = {**task, "asked": task["asked"] & chosen[task["text"].sample()]}
        part = objective(model, own)["denoising"]
        assert_close(term.metrics[name].double(), (part.total / part.number).detach())
        total = total + part.total
    assert_close(total, term.total)


@pytest.mark.parametrize("packed", [False, True])
def test_spans_may_stand_at_their_marks(packed):
    model, signals = writer(), texts(60, 3, 12)
    rows = [[0, 1, 2], [3], [*range(4, 60)]] if packed else None
    for denoisers in ({"it": SpanCorruption(0.4, 3.0, mode=0)}, {"it": Prefix()}, {"it": SpanCorruption(0.3, policy=Words([32]))}):
        task = Denoising(model, denoisers=denoisers, places="blanks").task(batched(model, signals, rows))
        plain = Denoising(model, denoisers=denoisers).task(batched(model, signals, rows))
        t, mode = task["text"], int(denoisers["it"].mode is not None)
        assert torch.equal(t.x, plain["text"].x)
        assert torch.equal(task["asked"], plain["asked"])
        for sample in range(60):
            chosen = (t.sample() == sample) & t.real()
            x, order, position = (field[chosen].tolist() for field in (t.x, t.order, t.position))
            seen, stands, expected = {}, None, []
            for place, (token, step) in enumerate(zip(x, order, strict=True)):
                if MARKS + mode <= token < MARKS + 40:
                    if step == 0:
                        seen[token] = place
                    else:
                        stands, number = seen[token], 0
                if step == 0 or stands is None:
                    expected.append([place, 0])
                else:
                    number += 1
                    expected.append([stands, number])
            assert position == expected


@pytest.mark.parametrize("join", [Project, CrossAttend])
def test_an_encoder_and_a_decoder(join):
    """The source goes through an encoder of another depth; what is written sees it and what was written before."""
    torch.manual_seed(0)
    encoders = {
        "source": Text(Trunk(16, 3, 2), length=60, extra=20),
        "text": Text(Trunk(16, 1, 2), length=60, extra=20),
    }
    options = {"modalities": ["source"]} if join is Project else {"asks": {"text": ["source"]}}
    model = Model(encoders, lambda widths: join(widths, **options)).double()
    objective = Denoising(model, into="source", denoisers=ul2())
    signals = texts(5, 2, 5)
    batch = batched(model, signals, [[0, 1], [2], [3, 4]])
    task = objective.task(batch)
    alone = Denoising(model, denoisers=ul2()).task(batch)
    assert told(task, 5) == told(alone, 5)
    assert bool((task["source"].order == 0).all())
    embedded = {
        k: t._replace(x=t.x.detach().requires_grad_()) for k, t in model.embed({k: task[k] for k in objective.seen}).items()
    }
    y = model(embedded, True)["text"].x
    row, n = 1, 3
    grads = torch.autograd.grad(y[row, n].square().sum(), [embedded["source"].x, embedded["text"].x])
    source, text = (g.abs().amax(-1) > 0 for g in grads)
    assert torch.equal(source[row], task["source"].real()[row])
    assert text[row].nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    assert not source[[0, 2]].any()
    (grad,) = torch.autograd.grad(model.encode(embedded, True)["source"].x[row, 0].square().sum(), embedded["source"].x)
    assert torch.equal(grad[row].abs().amax(-1) > 0, task["source"].real()[row])  # the source sees itself in both directions


def test_texts_without_an_end_mark_have_none_in_the_target():
    model = writer(end="")
    signals = texts(50)
    for signal, (source, target) in zip(
        signals, told(Denoising(model, denoisers={"it": Prefix()}).task(batched(model, signals)), 50), strict=True
    ):
        assert bytes(source + target).decode() == signal


def test_one_model_learns_three_denoisers_and_follows_the_mode():
    """All three losses fall. The same source is answered by the span alone, or by all of the text, as the mode says."""
    model, signals = writer(width=48, depth=2, extra=8, length=40).float(), texts(24, 4, 6)
    denoisers = {
        "span": SpanCorruption(0.3, 64.0, mode=0),
        "whole": Reconstruction([Infill(0.3, 30.0)], mode=1),
        "suffix": Prefix((0.5, 0.5), mode=2),
    }
    objective = Denoising(model, denoisers=denoisers)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    for step in range(120):
        term = objective(model, objective.task(batched(model, signals, seed=step)))["denoising"]
        losses.append([float(term.metrics[name]) for name in denoisers])
        optimizer.zero_grad()
        (term.total / term.number).backward()
        optimizer.step()
    assert (torch.tensor(losses[-10:]).mean(0) < 0.5 * torch.tensor(losses[0])).all()
    begun = {}  # mode -> how often a mark is written first
    for mode in range(3):
        x = torch.tensor([[MARKS + mode, *b"the dog", MARKS + 3, *b" boat", END, model.encoder("text").start]])
        length = x.shape[1]
        order = torch.tensor([[0] * (length - 1) + [length]])
        t = Tokens(x, torch.arange(length)[None, :, None], order=order)
        y = model(model.embed({"text": t}), True)["text"].x[0, -1]
        begun[mode] = model.encoder("text").unembed(y).softmax(-1)[MARKS + 3].item()
    assert begun[0] > 0.8
    assert begun[1] < 0.2
    assert begun[2] < 0.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Denoising(writer(extra=0)), "found 0 extra ids of text; expected 0 for modes and at least 1 for marks"),
        (lambda: Denoising(writer(extra=7), denoisers=ul2()), "expected 3 for modes and at least 8 for marks"),
        (lambda: Denoising(cases.model(), "image"), "made of vectors"),
        (lambda: Denoising(writer(), shares={"spans": 1.0, "other": 1.0}), "shares name other"),
        (lambda: Denoising(writer(), into="text"), "read from the data"),
        (lambda: Denoising(writer(), into="text", places="blanks"), "one stack only"),
        (lambda: Denoising(writer(), context=["image"]), "no fusion"),
        (lambda: Denoising(writer(), likelihood=Likelihood(anchor=Anchor())), "anchor"),
        (lambda: Denoising(cases.model(fuse="Bottleneck"), "choice", denoisers={"it": Prefix()}), "no order"),
        (lambda: SpanCorruption(1.5), "share from 0 to 1"),
        (lambda: SpanCorruption(mean=0.5), "mean"),
        (lambda: SpanCorruption(policy=Salient()), "asks the model"),
        (lambda: Prefix((0.5, 0.2)), "rate"),
        (lambda: GapSentences(size=0), "size"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_encoder_of_other_ids_is_refused():
    encoders = {"text": Text(Trunk(16, 1, 2), extra=40), "source": Text(Trunk(16, 1, 2))}
    model = Model(encoders, lambda widths: Project(widths, ["source"]))
    with pytest.raises(ValueError, match="expected the same ids"):
        Denoising(model, into="source")
