"""Distilled answers, features, attention and relations against their formulas typed anew."""

from functools import partial

import pytest
import torch
from contracts import cases
from torch.nn import functional as F
from torch.testing import assert_close

from headwater import modalities
from headwater.model import Model
from headwater.objectives import Causal, Distilled, Masked, Matched, Related
from headwater.objectives.distilled import divergence, entropy, soften
from headwater.objectives.guide import Guide
from headwater.objectives.inside import attention_scores, heard
from headwater.objectives.matched import inside, rows_apart
from headwater.tokens import Tokens
from headwater.trunk import Trunk


def given(model, objective=None, **changes):
    readers = model.readers if objective is None else cases.readers(model, objective)
    return cases.batch(readers, cases.examples(readers), **changes)


def shaken(objective):
    """With teachers that are not the student."""
    torch.manual_seed(5)
    with torch.no_grad():
        for module in objective.modules():
            if isinstance(module, Guide):
                for p in module.parameters():
                    p.add_(0.3 * torch.randn_like(p))
    return objective


def distilled(model, **options):
    return shaken(Distilled(model, **{"inner": Causal} | options).double())


def softmax(z):
    return z.exp() / z.exp().sum()


def kl(p, q):
    """Over what p holds possible."""
    some = p > 0
    return (p[some] * (p[some] / q[some]).log()).sum()


def tokens_of(task):
    """(row, place) of every token that is asked for."""
    return task["asked"].nonzero().tolist()


def test_without_weight_it_is_next_token_prediction_and_no_teacher_is_asked():
    model = cases.model()
    objective = distilled(model, weight=lambda progress: 1 - progress)
    objective.teachers[0].model.forward = None  # whoever calls it fails
    task = objective.task(given(model) | {"progress": 1.0})
    base = objective.inner(model, task)["causal"]
    term = objective(model, task)["distilled"]
    assert_close(term.total, base.total)
    assert term.number == base.number
    weights = [p for p in model.parameters() if p.requires_grad]
    both = (torch.autograd.grad(t.total, weights, allow_unused=True) for t in (term, base))
    for a, b in zip(*both, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b)
    with pytest.raises(TypeError):
        objective(model, task | {"progress": 0.5})


@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_is_hintons(packed):
    """(1 - w) CE + w T^2 KL(softmax(t / T) || softmax(s / T)) of every token; at w = 1 the divergence alone."""
    model, temperature = cases.model(), 2.0
    for weight in (1.0, 0.3):
        objective = distilled(model, weight=weight, temperature=temperature)
        task = objective.task(given(model, packed=packed))
        student = objective.inner.predict(model, task)
        teacher = objective.inner.predict(objective.teachers[0].model, task).detach()
        expected = 0.0
        for row, place in tokens_of(task):
            s, t = student[row, place], teacher[row, place]
            divergence = temperature**2 * kl(softmax(t / temperature), softmax(s / temperature))
            truth = -softmax(s)[task["answer"][row, place]].log()
            expected = expected + weight * divergence + (0 if weight == 1 else (1 - weight) * truth)
        term = objective(model, task)["distilled"]
        assert_close(term.total, expected, rtol=1e-5, atol=1e-5)
        wanted, got = (
            torch.autograd.grad(x, model.encoder("text").stem.weight, retain_graph=True)[0] for x in (expected, term.total)
        )
        assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        term.total.backward()
        assert all(p.grad is None for p in objective.teachers.parameters())


def test_the_divergence_is_torchs():
    s, t = torch.randn(2, 4, 6, 11, dtype=torch.float64)
    expected = 9 * F.kl_div((s / 3).log_softmax(-1), (t / 3).softmax(-1), reduction="none").sum(-1)
    assert_close(divergence(s, soften(t, 3.0), 3.0), expected)
    assert_close(entropy(soften(t)), torch.distributions.Categorical(logits=t).entropy())


def test_truncated_teachers():
    """The `top` likeliest, and the fewest that hold `mass`, renormalised; one by one."""
    z = torch.randn(20, 9, dtype=torch.float64) * 2
    for row in z:
        p = softmax(row)
        by_chance = sorted(range(9), key=lambda k, p=p: -float(p[k]))
        for top, mass in ((3, None), (None, 0.8), (2, 0.99), (1, None), (None, 1.0), (9, None)):
            kept, held = [], 0.0
            for k in by_chance:
                if (mass is None or held < mass) and (top is None or len(kept) < top):
                    kept.append(k)
                    held += float(p[k])
            expected = torch.tensor([float(p[k]) / held if k in kept else 0.0 for k in range(9)], dtype=torch.float64)
            assert_close(soften(row, 1.0, top, mass), expected)


def test_a_truncated_teacher_is_off_by_the_mass_that_it_lost():
    """The cross entropy of the kept ids, and of all: they differ by at most the dropped mass times the largest cost, twice."""
    s, t = torch.randn(2, 50, 200, dtype=torch.float64) * 3
    whole, short = soften(t), soften(t, top=20)
    lost = 1 - (whole * (short > 0)).sum(-1)
    cost = -s.log_softmax(-1)
    assert (((whole - short) * cost).sum(-1).abs() <= 2 * lost * cost.amax(-1) + 1e-12).all()


def test_logits_are_squared_and_several_teachers_are_averaged():
    model = cases.model()
    for match in ("squared", "cross_entropy"):
        objective = distilled(model, teachers=["start", "average"], weight=1.0, match=match, temperature=2.0)
        task = objective.task(given(model))
        student = objective.inner.predict(model, task)
        said = [objective.inner.predict(teacher.model, task) for teacher in objective.teachers]
        assert not torch.equal(*said)
        expected = 0.0
        for row, place in tokens_of(task):
            s, both = student[row, place], [t[row, place] for t in said]
            if match == "squared":
                expected += sum((x - (y + z) / 2) ** 2 for x, y, z in zip(s, *both, strict=True)) / len(s)
            else:
                p = (softmax(both[0] / 2) + softmax(both[1] / 2)) / 2
                expected += -4 * (p * softmax(s / 2).log()).sum()
        assert_close(objective(model, task)["distilled"].total, expected, rtol=1e-5, atol=1e-5)


def test_where_teachers_are_certain_the_truth_counts():
    model = cases.model()
    objective = distilled(model, weight=0.6)
    task = objective.task(given(model))
    student = objective.inner.predict(model, task)
    doubt = entropy(soften(objective.inner.predict(objective.teachers[0].model, task)))
    objective.certain = float(doubt[task["asked"]].median())
    truth = F.cross_entropy(student.flatten(0, 1), task["answer"].flatten(), reduction="none").view_as(doubt)
    p = soften(objective.inner.predict(objective.teachers[0].model, task))
    share = 0.6 * (doubt >= objective.certain)
    assert 0 < (share * task["asked"]).count_nonzero() < task["asked"].sum()
    expected = (((1 - share) * truth + share * divergence(student, p)) * task["asked"]).sum()
    assert_close(objective(model, task)["distilled"].total, expected, rtol=1e-5, atol=1e-5)


def test_a_teacher_with_a_hint_sees_what_the_student_does_not():
    model = cases.model()
    objective = distilled(model, guide=partial(Causal, prefix=["image"]), weight=1.0)
    assert objective.needs == ("text", "image")
    assert objective.parts["objective"].needs == objective.needs
    batch = given(model)
    other = batch | {"image": batch["image"]._replace(x=batch["image"].x + 1)}
    (a, student), (b, same) = (
        (objective(model, task)["distilled"].total, objective.inner.predict(model, task))
        for task in map(objective.task, (batch, other))
    )
    assert torch.equal(student, same)
    assert not torch.equal(a, b)
    knows = objective.guide.predict(objective.teachers[0].model, objective.guide.task(batch))
    expected = (divergence(student, soften(knows)) * batch["text"].real()).sum()
    assert_close(a, expected, rtol=1e-5, atol=1e-5)


def test_a_larger_model_teaches():
    model = cases.model()
    larger = Model({"text": modalities.Text(Trunk(32, 2, 2), length=24)})
    objective = Distilled(model, Causal, teachers=larger).double()
    assert objective(model, objective.task(given(model)))["distilled"].total.isfinite()
    with pytest.raises(ValueError, match="same tokenizer"):
        Distilled(model, Causal, teachers=modalities.Text(Trunk(32, 1, 2), end=""))


def test_pooled_vectors_are_matched():
    """Sum over samples of 1 - cos, here with a teacher of another size that cuts the picture into other patches."""
    model = cases.model()
    teacher = modalities.Image(Trunk(24, 1, 2), 16, 4)
    objective = Matched(model, teacher, "image").double()
    batch = given(model, objective)
    assert objective.needs == ("image", "teacher-image")
    assert objective.readers["teacher-image"].follows == "image"
    assert batch["teacher-image"].x.shape[1:] == (16, 48)
    mine = model.represent({"image": batch["image"]})["image"].x
    theirs = objective.teacher.model.represent({"image": batch["teacher-image"]})["image"].x
    expected = sum(1 - (objective.out(a) @ b) / (objective.out(a).norm() * b.norm()) for a, b in zip(mine, theirs, strict=True))
    assert_close(objective(model, batch)["matched"].total, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_of_blocks_are_matched(packed):
    """Mean square between a projection of the student's first block and the normalised last block of the teacher."""
    model = cases.model()
    model.encoders["text"] = modalities.Text(Trunk(16, 2, 2), length=24).double()
    torch.manual_seed(3)
    teacher = modalities.Text(Trunk(24, 3, 2), length=24)
    objective = Matched(model, teacher, "text", "tokens", (0, -1), "squared", normalize=True, weight=0.5).double()
    term = objective(model, given(model, packed=packed))["matched"]
    expected, number = 0.0, 0
    for sample in cases.examples(model.readers):
        if "text" not in sample:
            continue
        raw = Tokens(sample["text"].x[None], sample["text"].position[None])
        features = []
        for encoder, blocks in ((model.encoder("text"), 1), (objective.teacher.encoder("text"), 3)):
            part = encoder.trunk
            kept, part.blocks, norm, part.norm = part.blocks, part.blocks[:blocks], part.norm, torch.nn.Identity()
            features.append(encoder(encoder.embed(raw)).x[0])
            part.blocks, part.norm = kept, norm
        for a, b in zip(objective.out(features[0]), features[1], strict=True):
            b = (b - b.mean()) / (b.var(correction=0) + 1e-5).sqrt()
            expected, number = expected + ((a - b) ** 2).mean(), number + 1
    assert_close(term.total, expected)
    assert (int(term.number), term.weight) == (number, 0.5)
    term.total.backward()
    assert all(p.grad is None for p in objective.teacher.parameters())


@pytest.mark.parametrize("options", [{}, {"kv_heads": 1}, {"position": "rotary", "qk_norm": True}, {"position": "alibi"}])
@pytest.mark.parametrize("causal", [False, True])
def test_the_scores_are_those_that_attention_uses(options, causal):
    encoder = modalities.Text(
        Trunk(16, 2, 2, **options),
        length=24,
    ).double()
    encoder.causal = causal
    raw = given(cases.model())["text"]
    attn = encoder.trunk.blocks[1].attn
    with heard(attn) as calls:
        scores, _ = attention_scores(attn, lambda: encoder(encoder.embed(raw)))
    (x, *_), said = calls[0]
    rows = scores.softmax(-1)
    v = attn.qkv(x)[..., -attn.kv_heads * attn.size :].unflatten(-1, (attn.kv_heads, attn.size)).transpose(1, 2)
    by_hand = attn.proj((rows @ v.repeat_interleave(2 // attn.kv_heads, 1)).transpose(1, 2).flatten(2))
    assert_close(by_hand[raw.real()], said[raw.real()])


def test_rows_of_attention_are_matched():
    """Mean over heads of KL(teacher's row || student's row); over the mean of the heads where their numbers differ."""
    a, b, more = torch.randn(5, 2, 7).double(), torch.randn(5, 2, 7).double(), torch.randn(5, 3, 7).double()
    for t in range(5):
        heads = [kl(softmax(b[t, h]), softmax(a[t, h])) for h in range(2)]
        assert_close(rows_apart(a, b)[t], sum(heads) / 2)
        mean = [sum(softmax(z) for z in x[t]) / len(x[t]) for x in (more, a)]
        assert_close(rows_apart(a, more)[t], kl(*mean))
    model = cases.model()
    objective = shaken(Matched(model, "start", "text", "attention").double())
    batch = given(model)
    scores = [
        inside(m, "text", batch["text"], -1, True).transpose(1, 2)[batch["text"].real()] for m in (model, objective.teacher.model)
    ]
    term = objective(model, batch)["matched"]
    assert_close(term.total, rows_apart(*scores).sum())
    assert term.total > 0
    other = batch["text"]._replace(x=torch.where(batch["text"].real(), batch["text"].x, 7))  # padding is no key
    assert_close(objective(model, batch | {"text": other})["matched"].total, term.total)


def test_a_match_fades_and_is_zero_at_the_start():
    model = cases.model()
    objective = Matched(model, "start", "image", weight=lambda progress: max(0.0, 1 - 2 * progress)).double()
    batch = given(model)
    assert abs(objective(model, batch)["matched"].total) < 1e-9
    assert objective(model, batch | {"progress": 0.25})["matched"].weight == 0.5
    objective.teacher.model.represent = None
    term = objective(model, batch | {"progress": 0.5})["matched"]
    assert (float(term.total), term.weight, int(term.number)) == (0, 0, 7)


@pytest.mark.parametrize("b", [None, "text"])
def test_relations_are_matched(b):
    """KL(softmax(cos of the teacher / its T) || softmax(cos of the student / T)) of every row, a sample itself left out."""
    model = cases.model()
    objective = Related(
        model, cases.other(image="Image", text="Text"), "image", b, temperature=0.3, teacher_temperature=0.2
    ).double()
    batch = given(model)
    with_text = batch["text"].samples().tolist() if b else list(range(7))
    tables = []
    for who, temperature in ((objective.teacher.model, 0.2), (model, 0.3)):
        pooled = who.represent({name: batch[name] for name in ("image", "text")})
        rows = {int(s): F.normalize(x, dim=0) for x, s in zip(*pooled["image"], strict=True)}
        columns = {int(s): F.normalize(x, dim=0) for x, s in zip(*pooled[b or "image"], strict=True)}
        tables.append([[rows[i] @ columns[j] / temperature for j in with_text if b or i != j] for i in with_text])
    expected = sum(kl(*(softmax(torch.stack(row)) for row in pair)) for pair in zip(*tables, strict=True))
    term = objective(model, batch)["related"]
    assert_close(term.total, expected)
    assert int(term.number) == len(with_text)


def test_relations_in_pieces_are_those_of_the_batch():
    found = []
    for chunks in (1, 3):
        model = cases.model()
        model.chunks = chunks
        torch.manual_seed(0)
        objective = Related(model, cases.other(image="Image"), "image").double()
        total = objective(model, given(model))["related"].total
        total.backward()
        found.append((total, [p.grad for p in model.encoder("image").parameters()]))
    (a, grads), (b, others) = found
    assert_close(a, b)
    assert all((x is None) == (y is None) and (x is None or torch.allclose(x, y)) for x, y in zip(grads, others, strict=True))


def test_what_cannot_work_is_said():
    model = cases.model()
    for wrong, options in (
        ("expected Causal on ids", {"inner": partial(Masked, modality="image")}),
        ("weight 2", {"weight": 2.0}),
        ("temperature 0", {"temperature": 0.0}),
        ("no difference to square", {"match": "squared", "top": 3}),
        ("found teacher 'large'", {"teachers": "large"}),
    ):
        with pytest.raises(ValueError, match=wrong):
            Distilled(model, **{"inner": Causal} | options)
    with pytest.raises(ValueError, match="so their tokens do not belong together"):
        Matched(model, modalities.Image(Trunk(24, 1, 2), 16, 4), "image", "tokens")
    with pytest.raises(ValueError, match="layer 4 of the student"):
        Matched(model, "start", "text", "tokens", (4, 0))
    with pytest.raises(ValueError, match="rows of attention, which are distributions"):
        Matched(model, "start", "text", "attention", normalize=True)
    with pytest.raises(ValueError, match="leave layers out"):
        Matched(model, "start", layers=(0, 0))
    with pytest.raises(ValueError, match="the model has no encoder"):
        Matched(model, cases.other(image="Image"), "text")
    with pytest.raises(ValueError, match="found temperatures"):
        Related(model, "start", temperature=0.0)
    with pytest.raises(ValueError, match="give both the same settings"):
        Related(model, Model({"image": modalities.Image(Trunk(24, 1, 2), 16, 4)}), "image")
