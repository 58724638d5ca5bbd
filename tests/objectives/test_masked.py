import math
from functools import partial

import numpy as np
import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater import fusion, modalities, random
from headwater.datamodules.collate import collate
from headwater.model import Model
from headwater.objectives import Masked
from headwater.objectives.likelihood import Anchor, Focal, HashDrop, Likelihood
from headwater.objectives.masks.amounts import dealt
from headwater.objectives.masks.policies import Suffix, Uniform, Units
from headwater.objectives.masks.salient import Salient, attended
from headwater.objectives.objective import Term
from headwater.objectives.targets.errors import error, select
from headwater.objectives.targets.target import Asked, Places, Target, Values, cell
from headwater.tokens import Tokens, cat
from headwater.trunk import Trunk

NAN = math.nan


def given(**options):
    """A model of all modalities, an objective, and a batch after `task`."""
    model = cases.model(fuse=options.pop("fuse", "JointTokens"))
    torch.manual_seed(1)
    objective = Masked(model, **{"width": 16} | options).double()
    batch = cases.batch(model.readers, cases.examples(model.readers))
    return model, objective, objective.task(batch, objective.look(model, batch))


def at_places(values, batch, name):
    """Rows of values (B, N, ...) at the real hidden places, in their order."""
    return torch.cat([values[b][batch["hidden"][name][b]] for b in range(len(values))])


def asked(predicted, batch, name):
    """The same of what was predicted, (B, K, ...)."""
    real = batch["places"][name].real
    return predicted.flatten(0, 1) if real is None else predicted[real]


# the presets' losses, typed anew


def test_masked_language_model_is_the_cross_entropy_of_hidden_ids():
    model, objective, batch = given(modality="text", ratio=0.4, mode="substitute")
    parts = model.embed({"text": batch["text"]})
    parts["text"] = parts["text"]._replace(
        x=torch.where(batch["hidden"]["text"][..., None], objective.way.mask.text, parts["text"].x)
    )
    logits = objective.out["text"](model(parts)["text"].x)
    loss = 0
    for b, n in batch["hidden"]["text"].nonzero().tolist():
        loss = loss - logits[b, n].log_softmax(-1)[batch["text"].x[b, n]]
    term = objective(model, batch)["masked"]
    assert_close(term.total.double(), loss, rtol=1e-5, atol=1e-5)
    assert term.number == batch["hidden"]["text"].sum()


@pytest.mark.parametrize("normalize", [False, True])
def test_masked_autoencoder_is_the_squared_error_of_hidden_patches(normalize):
    model, objective, batch = given(modality="image", target=partial(Values, normalize=normalize))
    loss = 0.0
    for row in range(len(batch["image"].x)):  # every picture alone, as MAE would have it
        hidden = batch["hidden"]["image"][row]
        visible, masked = (~hidden).nonzero()[:, 0], hidden.nonzero()[:, 0]
        raw = batch["image"].map(lambda field, row=row: field[row : row + 1])
        seen = model({"image": model.embed({"image": raw})["image"].take(visible[None])})["image"]
        seen = seen._replace(x=objective.way.enter["image"](seen.x))
        query = raw.take(masked[None])
        query = query._replace(x=objective.way.mask["image"].expand(1, len(masked), -1))
        answer = objective.out["image"](objective.way.decoder(cat([query, seen])).x[0, : len(masked)])
        for one, patch in zip(answer, raw.x[0, masked], strict=True):
            wanted = (patch - patch.mean()) / (patch.var() + 1e-6) ** 0.5 if normalize else patch
            loss = loss + ((one - wanted) ** 2).mean()
    assert_close(objective(model, batch)["masked"].total, loss)


def test_cells_of_a_table_are_scored_in_their_own_slots():
    torch.manual_seed(0)
    table = modalities.Table(Trunk(16, 1, 2), {"age": [40.0, 12.0], "size": [1.0, 2.0]}, {"kind": ["a", "b", "c"]})
    model = Model({"table": table}).double()
    rows = [{"age": 30, "size": 2.0, "kind": "b"}, {"age": 50, "kind": "c"}, {"size": 0.5, "kind": "a"}]
    raw = table.reader.prepare(collate([{"table": table.reader.tokens(row)} for row in rows], ["table"])["table"])
    raw = raw._replace(x=raw.x.double())
    objective = Masked(model, "table", ratio=0.4, mode="substitute").double()
    batch = objective.task({"table": raw, "seed": torch.arange(3)})
    predicted, loss = objective.predict(model, batch)["table"], 0.0
    for b in range(3):
        for k, column in enumerate(batch["places"]["table"].column[b].tolist()):
            if not batch["places"]["table"].real[b, k]:
                continue
            number = int(raw.position[b, column, 1])
            slots = {0: [0], 1: [1], 2: [2, 3, 4]}[number]
            loss = loss + sum((predicted[b, k, s] - raw.x[b, column, s]) ** 2 for s in slots) / len(slots)
    assert_close(objective(model, batch)["masked"].total, loss)
    assert batch["hidden"]["table"].sum() == 3  # of rows of 3, 2 and 2 columns: one each


def naive_select(predicted, wanted, samples, real, temperature):
    """-log exp(cos(h_i, t_i) / T) / sum over hidden j of the sample of exp(cos(h_i, t_j) / T), loop by loop."""
    cos = torch.nn.functional.cosine_similarity
    out = []
    for b in range(len(predicted)):
        for i in range(predicted.shape[1]):
            scores = [cos(predicted[b, i], wanted[b, i], 0) / temperature]
            for j in range(predicted.shape[1]):
                same = j != i and real[b, j] and samples[b][j] == samples[b][i]
                if same and cos(wanted[b, i], wanted[b, j], 0) < 1 - 1e-6:
                    scores.append(cos(predicted[b, i], wanted[b, j], 0) / temperature)
            out.append(-scores[0] + torch.stack(scores).exp().sum().log())
    return torch.stack(out).view(predicted.shape[:2])


def test_hashed_ids_are_hidden_and_not_asked_for():
    rules = Likelihood(Focal(), drop=HashDrop(2.0, 2))
    model, objective, batch = given(modality="text", ratio=0.5, mode="substitute", likelihood=rules)
    asked_for = batch["hidden"]["text"] & objective.likelihood.keeps(batch["text"])
    logits, loss = objective.predict(model, batch)["text"], 0.0
    for b, n in asked_for.nonzero().tolist():
        k = batch["places"]["text"].column[b].tolist().index(n)
        p = logits[b, k].softmax(-1)[batch["text"].x[b, n]]
        loss = loss - (1 - p) ** 2 * p.log()
    term = objective(model, batch)["masked"]
    assert_close(term.total, loss)
    assert 0 < term.number == asked_for.sum() < batch["hidden"]["text"].sum()
    with pytest.raises(ValueError, match="use Causal"):
        Masked(model, "text", likelihood=Likelihood(anchor=Anchor()))
    with pytest.raises(ValueError, match="only ids can be hashed"):
        Masked(model, "image", likelihood=Likelihood(drop=HashDrop()))


@pytest.mark.parametrize("packed", [False, True])
def test_select_is_the_contrastive_loss_of_wav2vec(packed):
    draw = torch.Generator().manual_seed(0)
    predicted, wanted = (torch.randn(2, 7, 5, dtype=torch.float64, generator=draw).requires_grad_() for _ in range(2))
    with torch.no_grad():
        wanted[0, 3] = wanted[0, 1]  # the same code twice: no distractor
    samples = [[0, 0, 0, 0, 1, 1, 1], [2, 2, 3, 3, 3, 3, 3]] if packed else [[0] * 7, [1] * 7]
    real = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1] * 7]).bool()
    places = Tokens(wanted, torch.zeros(2, 7, 1), real, torch.tensor(samples) if packed else None)
    a, b = select(predicted, places, 0.2) * real, naive_select(predicted, wanted, samples, real, 0.2) * real
    assert_close(a, b)
    for x, y in zip(*(torch.autograd.grad(v.sum(), (predicted, wanted)) for v in (a, b)), strict=True):
        assert_close(x, y)


def test_in_sample_selection_is_scored_at_hidden_places_alone():
    model, objective, batch = given(modality="audio", ratio=0.5, mode="substitute", loss="select", temperature=0.3)
    predicted, raw = objective.predict(model, batch)["audio"], batch["audio"].take(*batch["places"]["audio"])
    wrong = naive_select(predicted, raw.x, [[b] * raw.x.shape[1] for b in range(7)], raw.real(), 0.3)
    assert_close(objective(model, batch)["masked"].total, (wrong * raw.real()).sum())


@pytest.mark.parametrize("kind", ["squared", "absolute", "smooth", "cosine"])
def test_errors_count_present_slots_alone(kind):
    draw = torch.Generator().manual_seed(0)
    predicted = torch.randn(3, 4, dtype=torch.float64, generator=draw).mul(2).requires_grad_()
    wanted = torch.tensor([[1.0, 2.0, -1.0, 0.5], [NAN, 0.3, NAN, -2.0], [NAN] * 4], dtype=torch.float64)
    naive = []
    for p, w in zip(predicted, wanted, strict=True):
        here = ~w.isnan()
        p, w = p[here], w[here]
        away = (p - w).abs()
        naive.append(
            {
                "squared": (p - w) ** 2,
                "absolute": away,
                "smooth": torch.where(away < 1, away**2 / 2, away - 0.5),
                "cosine": 1 - (p @ w) / (p.norm() * w.norm()) * torch.ones(1) if here.any() else away,
            }[kind].mean()
            if here.any()
            else p.sum()
        )
    naive = torch.stack(naive)
    found = error(kind, predicted, wanted)
    assert_close(found, naive.double())
    a, b = (torch.autograd.grad(v.sum(), predicted)[0] for v in (found, naive))
    assert_close(a, b)


def test_normalized_targets_are_those_of_mae():
    """engine: target = (target - mean) / (var + 1e-6) ** .5, facebookresearch/mae models_mae.py."""
    target = Values(cases.model(), "image", normalize=True)
    x = torch.rand(2, 3, 48) * 7 + 2
    mean, var = x.mean(dim=-1, keepdim=True), x.var(dim=-1, keepdim=True)
    expected = (x - mean) / (var + 1.0e-6) ** 0.5
    absent = torch.full((2, 3, 4), torch.nan)  # slots that a robot does not have change nothing for the others
    for values, wanted in ((x, expected), (torch.cat([x, absent], -1), torch.cat([expected, absent], -1))):
        raw = Tokens(values, torch.zeros(2, 3, 1))
        assert_close(target.answer(Asked(raw, torch.zeros(2, 3, dtype=torch.int64)))[0], wanted, equal_nan=True)
    ids = torch.tensor([[3, 1]])
    assert torch.equal(Values(cases.model(), "text", normalize=True).answer(Asked(Tokens(ids, ids[..., None]), ids))[0], ids)


# what reaches an answer, and what does not


@pytest.mark.parametrize("options", [{}, {"mode": "substitute"}, {"modality": ["image", "audio"], "deal": True}])
def test_hidden_values_do_not_reach_the_answer(options):
    model, objective, batch = given(**{"modality": "image", "ratio": 0.5} | options)
    raw, hidden = batch["image"], batch["hidden"]["image"][..., None]
    other = batch | {"image": raw._replace(x=torch.where(hidden, raw.x + 5, raw.x))}
    shown = batch | {"image": raw._replace(x=torch.where(hidden, raw.x, raw.x + 5))}
    a, b, c = (asked(objective.predict(model, task)["image"], batch, "image") for task in (batch, other, shown))
    assert torch.equal(a, b)
    assert not torch.isclose(a, c).all(-1).any()


@pytest.mark.parametrize("fuse", ["JointTokens", None])
def test_a_modality_that_is_hidden_as_a_whole_is_painted_from_the_others(fuse):
    model, objective, batch = given(modality="audio", ratio=1.0, context=["text"], fuse=fuse)
    has_text = torch.isin(torch.arange(7), batch["text"].samples())
    assert torch.equal(batch["hidden"]["audio"], batch["audio"].real() & has_text[:, None])  # without a text nothing is asked
    found = objective.predict(model, batch)["audio"]
    without = objective.predict(model, batch | {"audio": batch["audio"]._replace(x=batch["audio"].x + 3)})["audio"]
    other = objective.predict(model, batch | {"text": batch["text"]._replace(x=(batch["text"].x + 1) % 256)})["audio"]
    assert torch.equal(found, without)
    assert not torch.isclose(found, other)[has_text].all(-1).any()
    objective(model, batch)["masked"].total.backward()
    assert all(p.grad is not None and p.grad.any() for p in objective.parameters())


def test_only_visible_tokens_are_embedded():
    model, objective, batch = given(modality="image", ratio=0.75)
    sizes = []
    model.encoder("image").stem.register_forward_hook(lambda module, inputs, out: sizes.append(out.shape[1]))
    expected = objective(model, batch)["masked"].total
    model.encoder("image").pointwise = False
    assert torch.equal(objective(model, batch)["masked"].total, expected)
    assert sizes == [1, 4]


def test_located_tokens_lose_their_places_and_keep_their_values():
    model, objective, batch = given(ratio=0.5, mode="locate", target=partial(Places, cells=[1, 2, 2]), fuse=None)
    raw, hidden = batch["image"], batch["hidden"]["image"][..., None]
    elsewhere = batch | {"image": raw._replace(position=torch.where(hidden, 1 - raw.position, raw.position))}
    brighter = batch | {"image": raw._replace(x=torch.where(hidden, raw.x + 1, raw.x))}
    a, b, c = (objective.predict(model, task)["image"] for task in (batch, elsewhere, brighter))
    assert torch.equal(a, b)
    assert not torch.isclose(a, c).all(-1).any()
    place = torch.tensor([[0, 1, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]])
    assert cell(place, [1, 2, 2]).tolist() == [2, 3, 1, 0]
    loss = -objective.predict(model, batch)["image"].log_softmax(-1).flatten(0, 1)
    number = 2 * raw.position[..., 1] + raw.position[..., 2]
    expected = loss.gather(1, at_places(number, batch, "image")[:, None].long()).sum()
    assert_close(objective(model, batch)["masked"].total.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_tenth_stays_and_a_tenth_is_swapped():
    """BERT: of the hidden tokens 80 % become the mask vector, 10 % a random id, 10 % stay."""
    n = 400
    model = Model({"text": modalities.Text(Trunk(16, 1, 2), length=n)})
    objective = Masked(model, "text", ratio=0.5, mode="substitute", keep=0.1, swap=0.1)
    ids = torch.randint(0, 256, (50, n), generator=torch.Generator().manual_seed(0))
    batch = objective.task({"text": Tokens(ids, torch.arange(n).expand(50, -1)[..., None]), "seed": torch.arange(50)})
    entered = []
    model.encoder("text").trunk.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0].x))
    objective(model, batch)
    hidden, plain = batch["hidden"]["text"], model.encoder("text").stem(ids)
    masked = (entered[0] == objective.way.mask["text"]).all(-1)
    kept = (entered[0] == plain).all(-1)
    assert kept[~hidden].all()
    assert not (masked & ~hidden).any()
    assert abs(masked[hidden].float().mean() - 0.8) < 0.01
    assert abs(kept[hidden].float().mean() - 0.1 - 0.1 / 256) < 0.01
    swapped = hidden & ~masked & ~kept
    distance = torch.cdist(entered[0][swapped], model.encoder("text").stem.weight)
    assert (distance.amin(1) < 0.01).all()
    assert len(distance.argmin(1).unique()) > 240  # any id may come


# how much of what is hidden


def test_visible_tokens_are_dealt_out_by_a_flat_dirichlet():
    length = torch.tensor([[1000.0, 1000.0, 1000.0]]).repeat(4000, 1)
    draw = random.uniform(torch.arange(4000), (3,), "deal")
    shown = (1 - dealt(length, torch.full((4000, 1), 0.9), draw)) * length
    assert_close(shown.sum(1), torch.full((4000,), 300.0))
    share = shown / 300
    assert (share.mean(0) - 1 / 3).abs().max() < 0.015
    assert (share.var(0) - 2 / 36).abs().max() < 0.004  # Dirichlet(1, 1, 1): 1/3 * 2/3 / 4
    uneven = torch.tensor([[4.0, 100.0, 0.0]]).repeat(4000, 1)
    shown = (1 - dealt(uneven, torch.full((4000, 1), 0.5), draw)) * uneven
    assert_close(shown.sum(1), torch.full((4000,), 52.0))
    assert (shown <= uneven + 1e-4).all()
    assert (shown >= 0).all()


def test_every_sample_shows_its_share_when_tokens_are_dealt():
    _, objective, batch = given(modality=["image", "audio", "text"], ratio=0.6, deal=True)
    for s in range(7):
        mine = [(batch[n].real() & (batch[n].sample() == s), batch["hidden"][n]) for n in objective.hides]
        total = sum(int(real.sum()) for real, _ in mine)
        seen = sum(int((real & ~hidden).sum()) for real, hidden in mine)
        assert abs(seen - 0.4 * total) <= 3  # each modality is rounded, and keeps one


def test_a_share_of_the_samples_loses_one_modality_as_a_whole():
    n = 3000
    model = cases.model()
    objective = Masked(model, ["image", "audio"], ratio=0.5, whole=0.4)
    plain = Tokens(torch.zeros(n, 4), torch.zeros(n, 4, 1))
    lacks = plain._replace(valid=(torch.arange(n) % 3 > 0)[:, None].expand(n, 4))
    hidden = objective.task({"image": plain, "audio": lacks, "seed": random.fold(torch.arange(n), "s")})["hidden"]
    gone = {name: chosen.all(1) for name, chosen in hidden.items()}
    both = torch.arange(n) % 3 > 0
    assert abs((gone["image"] | gone["audio"])[both].float().mean() - 0.4) < 0.03
    assert abs(gone["image"][both].float().mean() - 0.2) < 0.03
    assert not (gone["image"] & gone["audio"]).any()
    assert not gone["image"][~both].any()  # the only one that it has
    assert (hidden["image"].sum(1)[~both] == 2).all()


def test_ratios_follow_schedules():
    model = cases.model()
    objective = Masked(model, ratio=partial(np.interp, xp=[0, 1], fp=[0.25, 0.75]))
    batch = cases.batch(model.readers, cases.examples(model.readers))
    counts = [
        objective.task(batch | given)["hidden"]["image"].sum(1).tolist() for given in ({}, {"progress": 0.5}, {"progress": 1.0})
    ]
    assert counts == [[1] * 7, [2] * 7, [3] * 7]


def test_rows_of_equal_length_need_no_masks():
    model = cases.model()
    raw = cases.batch(model.readers, cases.examples(model.readers))["image"]._replace(valid=None)
    for policy, none in ((Uniform(), True), (Suffix(), True), (Units([1]), False)):
        places = Masked(model, ratio=0.5, policy=policy).task({"image": raw, "seed": torch.arange(7)})
        assert (places["places"]["image"].real is None) == none
        assert (places["kept"]["image"].real is None) == none


# hints


class Echo(Target):
    """Answers with what it saw, to show that each place gets its own."""

    size = 2
    terms = ("extra",)
    embeds = True

    def look(self, model, batch):
        return torch.stack([batch[self.modality].sample(), batch[self.modality].place()], -1).double()

    def answer(self, asked):
        self.asked = asked
        return asked.seen, {"extra": Term(asked.embedded.sum(), asked.raw.real().sum())}


@pytest.mark.parametrize("mode", ["drop", "substitute"])
def test_targets_are_asked_about_their_own_places(mode):
    model, objective, batch = given(modality="audio", ratio=0.4, mode=mode, target=Echo)
    terms = objective(model, batch)
    assert {k: int(t.number) for k, t in terms.items()} == {k: int(n) for k, n in objective.numbers(batch).items()}
    assert set(terms) == {"masked", "masked/extra"}
    found = objective.targets["audio"].asked
    for b, n in batch["hidden"]["audio"].nonzero().tolist():
        k = batch["places"]["audio"].column[b].tolist().index(n)
        assert found.seen[b, k].tolist() == [b, n]
        assert torch.equal(found.embedded[b, k], model.embed({"audio": batch["audio"]})["audio"].x[b, n])
        own = random.fold(random.token_seed(batch["seed"], batch["audio"]), "audio")[b, n]
        assert found.seed[b, k] == own


@pytest.mark.parametrize("position", ["sincos", "rotary"])
@pytest.mark.parametrize("registers", [0, 1])
def test_attention_received_is_that_of_the_last_block(position, registers):
    torch.manual_seed(0)
    encoder = modalities.Image(Trunk(16, 2, 2, position, registers=registers), 16, 4).double()
    raw = encoder.reader.prepare(collate([{"x": t} for t in encoder.reader.example(2, 0)], ["x"])["x"])
    raw = raw._replace(x=raw.x.double())
    weights = []

    def attend(q, k, v, route):
        weights.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
        return weights[-1] @ v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headwater.layers.attend", attend)
        encoder(encoder.embed(raw))
    received = weights[-1].mean(1)[:, 16:].sum(1)[:, :16] if registers else weights[-1].mean(1).sum(1)
    assert_close(attended(encoder, raw), received)


@pytest.mark.parametrize("alike", [False, True])
def test_scores_by_loss_are_the_errors_when_each_half_is_hidden(alike):
    model, objective, _ = given(modality="video", ratio=0.3, policy=Salient("loss"))
    batch = cases.batch(model.readers, cases.examples(model.readers))
    if alike:
        batch["video"] = batch["video"].map(lambda field: field[:, :4])._replace(valid=None)
    with torch.no_grad():
        scores = objective.look(model, batch)["scores"]["video"]
    first = Uniform()(batch["video"], batch["seed"], 0.5, "half/video")
    for half in (first, ~first & batch["video"].real()):
        task = objective._hide(batch, {"video": half}, {})
        predicted, raw = objective.predict(model, task)["video"], batch["video"].take(*task["places"]["video"])
        wrong = ((predicted - raw.x) ** 2).mean(-1)
        assert_close(scores[half].double(), asked(wrong, task, "video"), rtol=1e-5, atol=1e-6)


def test_hiding_what_is_attended_to_hides_the_largest():
    model, _, batch = given(ratio=0.5, policy=Salient())
    received = attended(model.encoder("image"), batch["image"])
    for row, hidden in zip(received, batch["hidden"]["image"], strict=True):
        assert row[hidden].min() >= row[~hidden].max()


# arguments


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0.0}, "ratio"),
        ({"ratio": 1.0}, "ratio"),
        ({"ratio": 1.5}, "ratio"),
        ({"modality": ["image", "audio"], "ratio": 1.0}, "ratio"),
        ({"modality": ["image", "audio"], "ratio": {"text": 0.5}}, "ratio names text"),
        ({"modality": ["image", "audio"], "ratio": {"image": 0.5, "audio": 0.6}, "deal": True}, "several ratios"),
        ({"deal": True}, "several modalities"),
        ({"whole": 0.5}, "several modalities"),
        ({"whole": 1.5, "context": ["text"]}, "shares"),
        ({"keep": 0.1}, "mode"),
        ({"mode": "substitute", "swap": 0.1}, "only ids"),
        ({"modality": "text", "mode": "substitute", "keep": 0.6, "swap": 0.6}, "shares"),
        ({"modality": "text", "loss": "squared"}, "likelihood is for ids"),
        ({"loss": "likelihood"}, "likelihood is for ids"),
        ({"weights": {"text": 2.0}}, "weights names text"),
        ({"mode": "locate", "target": partial(Places, cells=[])}, "cells"),
    ],
)
def test_bad_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Masked(cases.model(), **options)


def test_context_needs_a_fusion_only_without_a_decoder():
    model = Model({"image": cases.ENCODERS["Image"](Trunk(16, 1, 2)), "text": cases.ENCODERS["Text"](Trunk(16, 1, 2))})
    Masked(model, context=["text"])
    with pytest.raises(ValueError, match="no fusion"):
        Masked(model, context=["text"], mode="substitute")
    assert Masked(Model(dict(model.encoders), fusion.JointTokens), "text", 0.2, "substitute", ["image"]).classes == 257


def test_each_modality_may_have_its_own_target():
    made = partial(Values, normalize=True)
    objective = Masked(
        cases.model(), ["image", "video", "text"], targets={"image": made}, policy={"text": Suffix()}, loss={"video": "smooth"}
    )
    assert [objective.targets[n].normalize for n in objective.hides] == [True, False, False]
    assert [type(objective.policy[n]).__name__ for n in objective.hides] == ["Uniform", "Uniform", "Suffix"]
    assert [objective.loss[n] for n in objective.hides] == ["squared", "smooth", "likelihood"]
