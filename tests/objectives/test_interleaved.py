"""Documents of several modalities, predicted one step after the other: places, formula, and what may be seen."""

import json
from io import BytesIO

import numpy as np
import pytest
import torch
from contracts import cases
from PIL import Image as Pictures
from torch.nn import functional as F
from torch.testing import assert_close

from headwater import random
from headwater.datamodules.collate import collate
from headwater.datamodules.streams import Interleaved as Stream
from headwater.datamodules.streams import join
from headwater.fusion import Bottleneck, JointTokens, Project
from headwater.generation import generate
from headwater.hub.backbone import Backbone
from headwater.modalities import Image, Text
from headwater.model import Model
from headwater.objectives import Interleaved
from headwater.tokens import Tokens
from headwater.trunk import Trunk
from headwater.turns import before, opened, turns


def small(fuse=None, depth=0, width=16):
    """Stems and heads only: everything is mixed in one deep causal trunk."""
    torch.manual_seed(0)
    encoders = {"image": Image(Trunk(width, depth, 2), 16, 8), "text": Text(Trunk(width, depth, 2), length=24)}
    return Model(encoders, fuse or (lambda widths: JointTokens(widths, Trunk(width, 2, 2, "sincos")))).double()


def picture(seed):
    return (255 * random.uniform(torch.tensor(seed), (16, 16, 3), "picture")).to(torch.uint8).numpy()


def png(seed):
    file = BytesIO()
    Pictures.fromarray(picture(seed)).save(file, "PNG")
    return file.getvalue()


def document(*kinds):
    """What the stream makes of texts and pictures in turns; a number names a picture, a string is a text."""
    segments = [{"text": kind} if isinstance(kind, str) else {"image": f"{kind}.png"} for kind in kinds]
    members = {"json": json.dumps({"segments": segments}).encode()} | {f"{k}.png": png(k) for k in kinds if isinstance(k, int)}
    sample, faults = Stream().tokens(small().readers, members, {})
    assert not faults
    return sample


DOCUMENTS = [document("ab", 0, "c", 1, 2, "de"), document(3, "fgh"), document("only words"), document(4)]


def batch(documents, rows=None):
    made = collate(documents, ["image", "text"], rows)
    model = small()
    ready = {name: cases.double(model.encoder(name).prepare(t)) for name, t in made.items()}
    return {**ready, "seed": random.fold(torch.arange(len(documents)), "documents")}


def naive(batch, starts, back=()):
    """sample -> [(order, modality, value before, value asked for)] by going through each document token by token."""
    found = {}
    parts = {name: batch[name] for name in ("image", "text")}
    plain = all(t.order is None for t in parts.values())
    for s in range(len(batch["seed"])):
        tokens = []
        for number, (name, t) in enumerate(parts.items()):
            place = 0
            for r in range(len(t.x)):
                for i in range(t.x.shape[1]):
                    if t.real()[r, i] and t.sample()[r, i] == s:
                        turn = (-number if s in back else number) if plain else int(t.order[r, i])
                        tokens.append((turn, number, place, name, t.x[r, i], t.position[r, i]))
                        place += 1
        tokens.sort(key=lambda token: token[:3])
        line, held = [], None
        for i, (*_, name, value, position) in enumerate(tokens):
            begins = i == 0 or tokens[i - 1][3] != name
            line.append((name, starts[name] if begins else held, value, position))
            held = value
            if i + 1 == len(tokens) or tokens[i + 1][3] != name:
                behind = torch.zeros_like(position)
                behind[0] = position[0] + 1
                line.append((name, held, None, behind))
        found[s] = line
    return found


def starts(model):
    return {"image": torch.zeros(model.encoder("image").features).double(), "text": torch.tensor(model.encoder("text").start)}


@pytest.mark.parametrize("rows", [None, [[0, 2], [3, 1]]])
def test_places_are_those_of_a_walk_through_the_document(rows):
    model, given = small(), batch(DOCUMENTS, rows)
    task = Interleaved(model).task(given)
    expected = naive(given, starts(model))
    for s, line in expected.items():
        got = []
        for name in ("image", "text"):
            t, answers = task[name], task["answers"][name]
            for r, i in (t.real() & (t.sample() == s)).nonzero().tolist():
                asked = answers.x[r, i] if answers.real()[r, i] else None
                got.append((int(t.order[r, i]), name, t.x[r, i], asked, t.position[r, i]))
        got.sort(key=lambda place: place[0])
        assert len({order for order, *_ in got}) == len(got)  # no two places at once
        assert len(got) == len(line)
        for (_, name, held, asked, position), (n, h, a, p) in zip(got, line, strict=True):
            assert name == n
            assert torch.equal(held, h)
            assert torch.equal(position, p)
            assert asked is a or torch.equal(asked, a)


def alone(model, line):
    """The losses of one document, as one sequence in its own order under a triangular mask: {modality: (sum, number)}."""
    fusion, x, position = model.fusion, [], []
    for name, held, _, where in line:
        encoder = model.encoder(name)
        x.append(encoder(Tokens(encoder.stem(held[None, None]), where[None, None])).x[0, 0] + fusion.entry.kind[name])
        position.append(F.pad(where, (0, 5 - len(where))))
    y = fusion.trunk(Tokens(torch.stack(x)[None], torch.stack(position)[None]), causal=True).x[0]
    found = {"image": [], "text": []}
    for k, (name, _, asked, _) in enumerate(line):
        if asked is not None:
            answer = model.encoder(name).unembed(y[k])
            if name == "text":
                found[name].append(answer.logsumexp(-1) - answer[asked])
            else:
                found[name].append(((answer - asked) ** 2).sum() / len(asked))
    return found


def test_loss_and_gradient_are_those_of_one_plain_sequence():
    model, given = small(), batch(DOCUMENTS)
    objective = Interleaved(model, weights={"image": 0.5})
    terms = objective(model, objective.task(given))
    losses = [alone(model, line) for line in naive(given, starts(model)).values()]
    expected = {name: torch.stack([cost for found in losses for cost in found[name]]) for name in ("image", "text")}
    for name, costs in expected.items():
        assert int(terms[f"interleaved/{name}"].number) == len(costs)
        assert_close(terms[f"interleaved/{name}"].total, costs.sum(), check_dtype=False, rtol=1e-5, atol=1e-5)
    assert terms["interleaved/image"].weight == 0.5
    total = sum(t.total.double() for t in terms.values())
    got = torch.autograd.grad(total, [*model.parameters()], allow_unused=True)
    want = torch.autograd.grad(sum(c.sum() for c in expected.values()), [*model.parameters()], allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [0, 1])
def test_answers_see_all_that_came_before_and_nothing_later(depth):
    """Gradient of every answer by every input, over both modalities: below the diagonal of the orders, none above."""
    model, given = small(depth=depth), batch(DOCUMENTS[:1])
    task = Interleaved(model).task(given)
    embedded = {
        n: t._replace(x=t.x.detach().requires_grad_()) for n, t in model.embed({n: task[n] for n in ("image", "text")}).items()
    }
    y = model(embedded, True)
    orders = {n: t.order[0] for n, t in embedded.items()}
    weight = random.normal(torch.tensor(0), (16,), "readout").double()
    for name in embedded:
        for i in range(len(orders[name])):
            grads = torch.autograd.grad((y[name].x[0, i] * weight).sum(), [t.x for t in embedded.values()], retain_graph=True)
            for other, grad in zip(embedded, grads, strict=True):
                felt = grad[0].abs().sum(-1) > 0
                assert torch.equal(felt, orders[other] <= orders[name][i])


def test_the_text_behind_a_picture_sees_its_last_patch():
    model, given = small(), batch(DOCUMENTS[:1])
    objective = Interleaved(model)

    def costs(image):
        task = objective.task({**given, "image": image})
        y = model(model.embed({n: task[n] for n in ("image", "text")}), True)["text"].x
        asked = task["answers"]["text"].real()
        return F.cross_entropy(model.encoder("text").unembed(y[asked]), task["answers"]["text"].x[asked], reduction="none")

    image = given["image"]
    other = image._replace(x=image.x.clone())
    other.x[0, 3] += 1  # the last patch of the first picture
    a, b = costs(image), costs(other)
    assert torch.equal(a[:3], b[:3])  # "ab" and its end mark come before
    assert (a[3:] != b[3:]).all()


def test_pairs_come_in_both_directions():
    model = small()
    samples = [
        {"image": t, "text": w}
        for t, w in zip(model.encoder("image").reader.example(40, 0), model.encoder("text").reader.example(40, 0))
    ]
    given = batch(samples)
    objective = Interleaved(model, flip=0.3)
    task = objective.task(given)
    back = random.uniform(given["seed"], (), "interleaved/flip") < 0.3
    assert 0 < back.sum() < 40
    first = task["text"].order[:, 0] < task["image"].order[:, 0]
    assert torch.equal(first, back)
    found = naive(given, starts(model), back.nonzero()[:, 0].tolist())
    for s in range(40):
        assert next(name for name, *_ in found[s]) == ("text" if back[s] else "image")


def test_a_span_is_closed_once_however_many_tokens_share_a_moment():
    order = torch.tensor([[0, 0, 0, 1, 1, 1]])
    video = Tokens(torch.arange(6.0).reshape(1, 6, 1), torch.zeros(1, 6, 3, dtype=torch.int32), order=order)
    words = Tokens(torch.arange(2)[None], torch.arange(2)[None, :, None])
    at_words, at_video = turns([words, video])  # word 0, frame 0, word 1, frame 1
    assert at_words.order.tolist() == [[0, 6]]
    assert at_video.order.tolist() == [[2, 3, 4, 8, 9, 10]]
    places, answers = opened(video, at_video, video.real(), None)
    assert places.x[0, :, 0].tolist() == [0, 0, 1, 2, 0, 3, 4, 5]
    assert answers.x[0, answers.real()[0], 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert places.position[0, 3].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modalities": ["text"]}, "two or more"),
        ({"weights": {"audio": 1.0}}, "weights name audio"),
        ({"flip": 1.5}, "flip 1.5"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Interleaved(small(), **arguments)


@pytest.mark.parametrize("fuse", [Project, lambda widths: Bottleneck(widths, 2)])
def test_fusions_that_mix_in_no_order_are_refused(fuse):
    with pytest.raises(ValueError, match="take JointTokens"):
        Interleaved(small(fuse))


def test_known_spans_are_laid_out_as_in_training():
    model = small()
    samples = [
        {"image": t, "text": w} for t, w in zip(*(model.encoder(n).reader.example(5, 0) for n in ("image", "text")), strict=True)
    ]
    given = batch(samples)
    task = Interleaved(model).task(given)
    found, count = before({"image": given["image"]}, {"image": None})
    assert all(torch.equal(a, b) for a, b in zip(found["image"][:2], task["image"][:2], strict=True))
    assert torch.equal(found["image"].order, task["image"].order)
    assert torch.equal(count, task["text"].order[:, 0])


@pytest.fixture(scope="module")
def translator():
    """Knows three pictures and their names by heart, in both directions."""
    model = small(width=32).float()
    signals = {"image": [picture(k) for k in range(3)], "text": ["red dog", "blue", "a cat sits"]}
    pairs = Backbone(model, {}).batch(signals)
    rows = {name: t.map(lambda field: field.repeat(8, *[1] * (field.ndim - 1))) for name, t in pairs.items()}
    objective, step = Interleaved(model, flip=0.5), torch.optim.Adam(model.parameters(), lr=5e-3)
    for number in range(150):
        task = objective.task({**rows, "seed": random.fold(torch.arange(24), number)})
        step.zero_grad()
        cases.loss(objective(model, task)).backward()
        step.step()
    return model.eval(), signals


def test_what_was_learned_is_generated_in_both_directions(translator):
    model, signals = translator
    names = generate(model, "text", layout="interleaved", temperature=0, image=signals["image"])
    assert names == signals["text"]
    painted = generate(model, "image", layout="interleaved", text=signals["text"])
    apart = [[np.abs(made.astype(float) - true).mean() for true in signals["image"]] for made in painted]
    assert max(apart[k][k] for k in range(3)) < 20
    assert min(apart[k][j] for k in range(3) for j in range(3) if j != k) > 40


def test_joined_pairs_take_turns():
    """The data module's `arrange.join`: picture, title, picture, title."""
    readers = small().readers
    pairs = [{"image": readers["image"].tokens(picture(k)), "text": readers["text"].tokens(w)} for k, w in enumerate(("ab", "c"))]
    given = batch([join(pairs)])
    line = naive(given, starts(small()))[0]
    assert [name for name, *_ in line] == ["image"] * 5 + ["text"] * 4 + ["image"] * 5 + ["text"] * 3
    task = Interleaved(small()).task(given)
    assert task["text"].order.tolist() == [[5, 6, 7, 8, 14, 15, 16]]
