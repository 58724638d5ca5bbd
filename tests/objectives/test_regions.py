import math

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater import modalities
from headwater.modalities.scaling import window
from headwater.objectives import Regions
from headwater.objectives.regions import Places, answered, answers, moments, overlap
from headwater.tokens import Pooled, Tokens
from headwater.view import View


def grid(rows, columns, sample=None):
    place = torch.tensor([[0, r, c] for r in range(rows) for c in range(columns)])[None]
    return Tokens(torch.randn(1, rows * columns, 2), place, None, sample)


def test_overlap_is_the_area_of_the_patch_inside_of_the_box():
    box = torch.tensor([[[0.1, 0.0, 0.6, 0.5], [0.0, 0.0, 1.0, 1.0], [0.5, 0.75, 0.5, 1.0]]]).double()
    found = overlap(Tokens(box, torch.arange(3)[None, :, None]), grid(2, 4))[0]
    for k, (left, top, right, bottom) in enumerate(box[0].tolist()):
        for n in range(8):
            y, x = n // 4, n % 4
            wide = max(0, min(right * 4, x + 1) - max(left * 4, x))
            tall = max(0, min(bottom * 2, y + 1) - max(top * 2, y))
            assert found[k, n].item() == pytest.approx(wide * tall)


def test_spans_hold_whole_tokens_of_their_own_sample():
    document = torch.tensor([[0, 0, 0, 1, 1]])
    t = Tokens(torch.zeros(1, 5), torch.tensor([0, 1, 2, 0, 1])[None, :, None], document=document)
    spans = Tokens(torch.tensor([[[1.0, 3.0], [0.0, 1.0]]]), torch.zeros(1, 2, 1), document=torch.tensor([[0, 1]]))
    assert overlap(spans, t)[0].tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]


def test_moments_are_spans_of_time_within_a_sample():
    t = Tokens(
        torch.zeros(2, 4), torch.tensor([[0, 1, 2, 5], [0, 0, 3, 9]])[..., None], torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    )
    place, inside = moments(t, 2.0)
    assert place.sample.tolist() == [0, 0, 0, 1, 1]
    assert place.number.tolist() == [0, 1, 2, 0, 1]
    assert inside.tolist() == [0, 0, 1, 2, 3, 3, 4]


@pytest.mark.parametrize(("near", "apart"), [(0.0, False), (1.0, False), (0.7, True)])
def test_answers_equal_loops(near, apart):
    rows = Places(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 4, 1, 2, 0]))
    columns = Places(torch.tensor([0, 0, 1, 1, 3]), torch.tensor([0, 1, 1, 5, 0]))
    found = answers(rows, columns, near, apart)
    for i, (s, n) in enumerate(zip(*rows, strict=True)):
        weight = []
        for r, m in zip(*columns, strict=True):
            d = abs(int(n) - int(m))
            kernel = math.exp(-(d**2) / (2 * near**2)) * (d <= 3 * near) if near else float(d == 0)
            weight.append(kernel * float(s == r) * float(d > 0 or not apart))
        expected = [w / sum(weight) for w in weight] if any(weight) else [0.0] * 5
        assert_close(found[i], torch.tensor(expected).double())
    assert_close(answered(rows, columns, near, apart), found.any(1))


def asked(model, objective, numbers=None):
    readers = cases.readers(model, objective)
    given = cases.batch(readers, cases.examples(readers), numbers)
    return given, objective(model, given)["regions"]


@pytest.mark.parametrize("negatives", ["batch", "sample"])
def test_neighbours_in_time_equal_loops(negatives):
    model = cases.model()
    torch.manual_seed(0)
    objective = Regions(model, "action", "action", near=0.7, negatives=negatives, head=[6]).double()
    given, term = asked(model, objective)
    t = model.encode(model.embed({"action": given["action"]}))["action"]
    regions = [
        (int(s), int(p), objective.heads["action"](x))
        for s, p, x, r, g in zip(
            *(f.flatten(0, 1) for f in (t.sample(), t.position[..., 0], t.x, t.real(), t.given())), strict=True
        )
        if r and g
    ]
    scale, total, number = objective.loss.log_scale.exp(), 0, 0
    for s, p, x in regions:
        weight = [math.exp(-((p - q) ** 2) / 0.98) * (r == s and 0 < abs(p - q) <= 2.1) for r, q, _ in regions]
        if not any(weight):
            continue
        logits = [scale * torch.cosine_similarity(x, y, dim=0) for _, _, y in regions]
        others = [(r, q) != (s, p) and (negatives == "batch" or r == s) for r, q, _ in regions]
        below = torch.cat([v for v, o in zip(logits, others, strict=True) if o]).logsumexp(0)
        total = total - sum(w / sum(weight) * (v - below) for w, v in zip(weight, logits, strict=True) if w)
        number += 1
    assert int(term.number) == number
    assert_close(term.total, total[0])
    parameters = [*objective.parameters(), *model.encoder("action").trunk.parameters()]
    ours, theirs = (torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in (term.total, total[0]))
    assert all((a is None and b is None) or torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))


def test_regions_of_two_views_are_area_weighted_means():
    model = cases.model()
    torch.manual_seed(0)
    readers = {f"image@{k}": modalities.Cells(2, follows=f"image@{k}") for k in (0, 1)}
    objective = Regions(model, "image@0", "image@1", readers, near=0.0, head=[6]).double()
    given, _ = asked(model, objective)
    found = objective.average(model, {name: given[name] for name in objective.needs})["image@0"]
    t = model.encode(model.embed({"image@0": given["image@0"]}))["image@0"]
    boxes = given["regions/image@0"]
    expected = []
    for row in range(len(boxes.x)):
        for k in range(boxes.x.shape[1]):
            if boxes.real()[row, k]:
                weight = overlap(boxes, t)[row, k].double()
                expected.append((weight[:, None] * t.x[row]).sum(0) / weight.sum())
    assert isinstance(found, Pooled)
    assert_close(found.x, torch.stack(expected))


def test_pieces_equal_the_whole():
    for arguments in (
        {},
        {"a": "image@0", "b": "image@1", "regions": {f"image@{k}": modalities.Cells(2, f"image@{k}") for k in (0, 1)}},
    ):
        totals = []
        for chunks in (1, 3):
            model = cases.model()
            torch.manual_seed(0)
            objective = Regions(model, **arguments, near=1.0).double()
            model.chunks = chunks
            _, term = asked(model, objective)
            term.total.backward()
            totals.append((term, [p.grad for p in model.parameters()]))
        (a, grads), (b, others) = totals
        assert_close(a.total, b.total)
        assert all((g is None and h is None) or torch.allclose(g, h) for g, h in zip(grads, others, strict=True))


def test_cells_follow_a_view_to_the_same_part_of_the_picture():
    cells, view = modalities.Cells(2), View(share=(0.3, 0.3), seed=7)
    signal = (cells._boxes(), 80, 80)
    whole, seen = cells.tokens(signal), cells.tokens(signal, view)
    assert whole.x.tolist() == [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]
    top, left, tall, wide = window(80, 80, view)
    for box, number in zip(seen.x.tolist(), seen.position[:, 0].tolist(), strict=True):
        edges = [40 * (number % 2), 40 * (number // 2), 40 * (number % 2) + 40, 40 * (number // 2) + 40]
        inside = [min(max(e - o, 0), n) / n for e, o, n in zip(edges, (left, top) * 2, (wide, tall) * 2, strict=True)]
        assert box == pytest.approx(inside)


@pytest.mark.parametrize(
    "arguments",
    [
        {"near": 0.0},
        {"span": 0.0},
        {"regions": {"image": modalities.Boxes()}},
        {"regions": {"video": modalities.Category(3)}},
        {"views": {"image@0": View()}},
    ],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=r"found|neither"):
        Regions(cases.model(), **arguments)
