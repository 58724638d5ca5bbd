"""Likelihoods of held-out signals against explicit sums, and what is made of them."""

import math
import tarfile
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from contracts import cases
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.testing import assert_close

from headwater import distributed, random
from headwater.datamodules.datamodule import ShardDataModule
from headwater.datamodules.files import expand
from headwater.datamodules.sources import Source
from headwater.evaluation import Bits
from headwater.evaluation.choices import (
    Choice,
    Continuation,
    Scored,
    accuracy,
    continuations,
    credit,
    facts,
    pairs,
    rank,
    reciprocal_rank,
    scores,
    shots,
)
from headwater.evaluation.likelihood import (
    bits_per_byte,
    by_id,
    by_objective,
    causal_log_p,
    confident_nll,
    copy_gain,
    interleaved_log_p,
    pseudo_log_p,
    sizes,
)
from headwater.hub.backbone import Backbone
from headwater.modalities import Text
from headwater.model import Model
from headwater.objectives import Causal, Interleaved, Masked
from headwater.pretrainer import Pretrainer
from headwater.tokens import Tokens
from headwater.trunk import Trunk


def small(width=16, depth=1, **options):
    torch.manual_seed(0)
    return Model({"text": Text(Trunk(width, depth, 2, "rotary"), **({"length": 40} | options))})


def backbone(model):
    return Backbone(model, {}).eval()


def learn(model, texts, steps=150, rate=1e-2):
    """A language model that knows these texts by heart."""
    given, objective = backbone(model).batch({"text": texts}), Causal(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        terms = objective(model, objective.task(given))
        optimizer.zero_grad()
        cases.loss(terms).backward()
        optimizer.step()
    return model


def explicit(model, ids):
    """log p of each id, from a pass of its own over the ids before it."""
    encoder, line, found = model.encoder("text"), [model.encoder("text").start, *ids], []
    for k, answer in enumerate(ids):
        seen = Tokens(torch.tensor([line[: k + 1]]), torch.arange(k + 1)[None, :, None])
        y = model(model.embed({"text": seen}), causal=True)["text"].x[0, k]
        found.append(encoder.unembed(y).log_softmax(-1)[answer])
    return torch.stack(found)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_causal_likelihood_is_the_explicit_sum(packed, rows):
    model = cases.model(fuse=None)
    samples = cases.examples(model.readers)
    batch = cases.batch(model.readers, samples, packed=packed)
    found, t = causal_log_p(model, batch, rows=rows), batch["text"]
    assert not found[~t.real()].any()
    for s, sample in enumerate(samples):
        if "text" in sample:
            got = found[t.real() & (t.sample() == s)]
            assert_close(got, explicit(model, sample["text"].x.tolist()), rtol=1e-5, atol=1e-6)


def test_a_prefix_counts_as_it_does_in_training():
    model = cases.model()
    objective = Causal(model, "text", prefix=["image"], context=["video"])
    batch = cases.batch(model.readers, cases.examples(model.readers))
    found = causal_log_p(model, batch, "text", ["image"], ["video"])
    term = objective(model, objective.task(batch))["causal"]
    assert_close(-found.sum(), term.total.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_documents_are_scored_as_they_were_learned(packed):
    model = cases.model()
    objective = Interleaved(model, ["image", "text"])
    batch = cases.batch(model.readers, cases.examples(model.readers), packed=packed)
    found = interleaved_log_p(model, batch, rows=2)
    term = objective(model, objective.task(batch))["interleaved/text"]
    assert found.shape == batch["text"].x.shape
    assert torch.equal(found != 0, batch["text"].real())
    assert_close(-found.sum(), term.total.detach(), rtol=1e-5, atol=1e-5)
    first = batch["text"].real() & (batch["text"].place() == 0)
    assert not torch.allclose(found[first], causal_log_p(model, batch)[first])  # the picture counts


def test_vectors_have_no_likelihood():
    model = cases.model()
    batch = cases.batch(model.readers, cases.examples(model.readers))
    with pytest.raises(ValueError, match="likelihoods are of ids"):
        causal_log_p(model, batch, "image")


def test_pseudo_likelihood_hides_one_token_at_a_time():
    model = cases.model()
    batch = cases.batch(model.readers, cases.examples(model.readers))
    t = batch["text"]
    found = pseudo_log_p(model, batch, context=["image"], rows=5)
    for r, c in t.real().nonzero().tolist()[::7]:
        x = t.x.clone()
        x[r, c] = model.encoder("text").start
        y = model(model.embed({"text": t._replace(x=x), "image": batch["image"]}))["text"].x[r, c]
        assert_close(found[r, c].double(), model.encoder("text").unembed(y).log_softmax(-1)[t.x[r, c]], rtol=1e-5, atol=1e-6)
    assert not found[~t.real()].any()
    other = pseudo_log_p(model, batch, fill=by_id("text", 7), context=["image"])
    assert (other != found)[t.real()].all()
    with pytest.raises(ValueError, match="unpack"):
        pseudo_log_p(model, cases.batch(model.readers, cases.examples(model.readers), packed=True))


def test_a_masked_objective_answers_with_its_own_head():
    model = cases.model()
    objective = Masked(model, "text", 0.3, "substitute", context=["image"], keep=0.4, swap=0.3).double()
    batch = cases.batch(model.readers, cases.examples(model.readers))
    t = batch["text"]
    found = pseudo_log_p(model, batch, context=["image"], fill=by_objective(objective), rows=4)
    for r, c in t.real().nonzero().tolist()[::9]:
        parts = model.embed({"text": t, "image": batch["image"]})
        parts["text"].x[r, c] = objective.way.mask["text"]
        y = model(parts)["text"].x[r, c]
        assert_close(found[r, c].double(), objective.out["text"](y).log_softmax(-1)[t.x[r, c]], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="mode 'substitute'"):
        by_objective(Masked(model, "image", 0.5))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    words = ["the dog sees the boat", "the red boat sees the dog", "a dog and a boat and the sea"] * 3
    made.train_from_iterator(words, trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made.save(str(path))
    return str(path)


@pytest.mark.parametrize("form", ["bytes", "bpe"])
def test_continuations_are_scored_from_the_seam_on(form, tokenizer):
    model = small(tokenizer="bytes" if form == "bytes" else tokenizer, length=60)
    asked = [
        Continuation("the dog", " sees the boat"),
        Continuation("the d", "og"),  # the seam is inside of a word that the tokenizer joins
        Continuation("", "a boat"),
    ]
    b = backbone(model)
    reader = model.encoder("text").reader
    for one, got in zip(asked, continuations(b, asked, rows=2), strict=True):
        whole = reader.tokens(one.prefix + one.text).x.tolist()[:-1]
        before = reader.tokens(one.prefix).x.tolist()[:-1] if one.prefix else []
        first = next((k for k, (x, y) in enumerate(zip(whole, before, strict=False)) if x != y), len(before))
        assert got.tokens == len(whole) - first
        assert got.bytes == len(one.text)
        assert got.log_p == pytest.approx(float(explicit(model, whole)[first:].sum().detach()), abs=1e-4)
    (ended,) = continuations(b, asked[:1], end=True)
    assert ended.log_p < continuations(b, asked[:1])[0].log_p
    with pytest.raises(ValueError, match="shorten its prefix"):
        continuations(b, [Continuation("dog " * 80, "boat")])
    with pytest.raises(ValueError, match="nothing to score"):
        continuations(b, [Continuation("the dog", " ")])


def test_texts_can_be_scored_given_a_picture():
    torch.manual_seed(0)
    model = cases.model()
    b = backbone(model.float())
    picture = (255 * random.uniform(torch.tensor(0), (20, 20, 3), "picture")).to(torch.uint8).numpy()
    asked = [Continuation("a", " dog", {"image": p}) for p in (picture, 255 - picture)]
    one, other = continuations(b, asked, partial(causal_log_p, prefix=["image"]))
    batch = b.batch({"text": ["a dog"], "image": [picture]})
    expected = causal_log_p(model, batch, prefix=["image"])[0, 1:5].sum()
    assert one.log_p == pytest.approx(float(expected), abs=1e-4)
    assert one.log_p != other.log_p
    with pytest.raises(ValueError, match="score them apart"):
        continuations(b, [asked[0], Continuation("a", " dog")])


ASKED = {
    ("Q", " a"): Scored(-2.0, 1, 2),
    ("Q", " bcd"): Scored(-3.0, 3, 4),
    ("", " a"): Scored(-1.0, 1, 2),
    ("", " bcd"): Scored(-6.0, 3, 4),
}


@pytest.mark.parametrize(
    ("by", "expected"),
    [("sum", [-2.0, -3.0]), ("token", [-2.0, -1.0]), ("byte", [-1.0, -0.75]), ("gain", [-1.0, 3.0])],
)
def test_ways_to_compare_options(by, expected):
    (found,) = scores(lambda asked: [ASKED[one.prefix, one.text] for one in asked], [Choice("Q", (" a", " bcd"), 1)], by)
    assert found == expected


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="sum, token, byte or gain"):
        scores(lambda asked: [ASKED[one.prefix, one.text] for one in asked], [Choice("Q", (" a", " bcd"), 1)], "max")


def test_ties_are_chance():
    assert credit([1.0, 1.0, 0.0], 0) == 0.5
    assert credit([1.0, 2.0], 0) == 0
    assert rank([3.0, 1.0, 3.0, 0.0], 0) == 1.5
    assert rank([3.0, 1.0, 3.0, 0.0], 3) == 4
    items = [Choice("", ("x", "y", "z"), k % 3) for k in range(9)]
    same = accuracy("toy", items, [[0.0, 0.0, 0.0]] * 9)
    assert same.value == pytest.approx(1 / 3) == same.against["chance"]
    ranks = reciprocal_rank("toy", items, [[0.0, 1.0, 2.0]] * 9)
    assert ranks.value == pytest.approx((1 + 1 / 2 + 1 / 3) / 3) == ranks.against["chance"]


def test_turns_stand_alone():
    with pytest.raises(ValueError, match="expected turns alone"):
        Bits(prefix=["image"], turns=["image", "text"])
    with pytest.raises(ValueError, match="with text among them"):
        Bits(turns=["image", "audio"])


def test_an_untrained_model_is_at_chance_on_every_kind_of_set():
    """Words without meaning, so that nothing but chance decides."""
    letters = (26 * random.uniform(torch.arange(60), (8,), "words")).long() + 97
    words = [bytes(row).decode() for row in letters.tolist()]
    ask = partial(continuations, backbone(small()))
    table = dict(zip(words[:30], words[30:], strict=True))
    sets = {
        "pairs": pairs(list(zip(words[:30], words[30:], strict=True))),
        "facts": facts("{} is", table)[:20],
        "choices": [Choice(f"{a}?", [f" {b}", f" {a}", f" {b[::-1]}"], k % 3) for k, (a, b) in enumerate(table.items())],
    }
    for name, items in sets.items():
        result = accuracy(name, items, scores(ask, items))
        assert result.low <= result.against["chance"] <= result.high


@pytest.fixture(scope="module")
def informed():
    """A model that has learned four facts, and the items that ask for them."""
    table = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"}
    model = learn(small(32), [f"The capital of {a} is {b}" for a, b in table.items()])
    return model, table, facts("The capital of {} is", table)


def test_facts_rise_with_training_and_fall_after_a_conflicting_continuation(informed):
    model, table, items = informed
    fresh = reciprocal_rank("before", items, scores(partial(continuations, backbone(small(32))), items))
    known = reciprocal_rank("after", items, scores(partial(continuations, backbone(model)), items))
    assert known.value == 1
    assert fresh.value < 0.8
    other = dict(zip(table, [*list(table.values())[1:], "Paris"], strict=True))
    changed = small(32)
    changed.load_state_dict(model.state_dict())
    learn(changed, [f"The capital of {a} is {b}" for a, b in other.items()], steps=60)
    assert reciprocal_rank("later", items, scores(partial(continuations, backbone(changed)), items)).value < 0.6


def test_examples_stand_before_the_question_and_never_the_item_itself(informed):
    _, _, items = informed
    shown = shots(items, items, k=2, seed=3)
    for item, one in zip(items, shown, strict=True):
        blocks = one.question.split("\n\n")
        assert len(blocks) == 3
        assert blocks[2] == item.question
        assert item.question not in one.question[: -len(item.question)]
        answers = {i.question + i.options[i.right] for i in items}
        assert set(blocks[:2]) <= answers
        assert one.options == item.options
    assert shots(items, items, 2, seed=3) == shown
    assert shots(items, items, 2, seed=4) != shown
    with pytest.raises(ValueError, match="at least k=4"):
        shots(items, items, 4)


class Fixed(Text):
    """Its ids are as likely as their bytes together, whatever came before: one distribution under any tokenizer."""

    def unembed(self, x):
        share = torch.linspace(1, 2, 256).log_softmax(0)
        reader = self.reader
        if reader.tokenizer == "bytes":
            logits = torch.cat([share, torch.tensor([-3.0])])
        else:
            made = [reader._codec.decode([k]).encode() for k in range(reader.known)]
            logits = torch.tensor([float(share[list(m)].sum()) for m in made] + [-3.0])
        return logits.expand(*x.shape[:-1], -1)


def test_bits_per_byte_do_not_depend_on_the_tokenizer(tokenizer, monkeypatch):
    """With identical predictions; the likelihoods are taken as they are, since sums over all splits would differ."""
    monkeypatch.setattr(
        "headwater.evaluation.likelihood.log_probabilities", lambda unembed, x, answer: unembed(x).gather(-1, answer[:, None])[:, 0]
    )
    texts, found = ["the dog sees the red boat", "a dog and a boat", "the sea"], {}
    for form in ("bytes", tokenizer):
        model = Model({"text": Fixed(Trunk(8, 1, 2), form, 60)})
        t = backbone(model).batch({"text": texts})["text"]
        found[form] = bits_per_byte(causal_log_p(model, {"text": t}).sum(1), sizes(model.encoder("text"), t)), int(t.real().sum())
        assert sizes(model.encoder("text"), t).tolist() == [len(x) for x in texts]
    (a, many), (b, few) = found.values()
    assert few < many
    assert a == pytest.approx(b, rel=0.01)


def test_bits_per_byte_by_hand():
    assert bits_per_byte(torch.tensor([-math.log(8.0), -math.log(2.0)]), torch.tensor([3, 1])) == pytest.approx(1.0)


def test_traces_are_weighted_by_the_confidence_of_another():
    log_p, reference = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-0.1, -3.0, 0.0]])
    w = [math.exp(-0.1), math.exp(-3)]
    assert confident_nll(log_p, reference).item() == pytest.approx((w[0] * 1 + w[1] * 2) / sum(w))


class Copier(Text):
    """Sure of whatever stood one copy before."""

    length = 8

    def forward(self, t, causal=False, condition=None):
        now = torch.cat([t.x[:, 1:], t.x[:, :1]], 1)  # inputs are shifted by one
        return t._replace(x=torch.cat([torch.zeros_like(now[:, : self.length]), now[:, : -self.length]], 1))


def test_a_model_that_copies_gains_from_the_second_copy():
    torch.manual_seed(0)
    model = Model({"text": Copier(Trunk(64, 1, 2), length=40)})
    torch.nn.init.zeros_(model.encoder("text").head.bias)
    with torch.no_grad():
        model.encoder("text").head.weight.copy_(3 * model.encoder("text").stem.weight[:-1])
    assert copy_gain(model, length=8, samples=4) == pytest.approx(math.log(257))  # all are as likely the first time
    assert abs(copy_gain(small(), length=8)) < 0.5
    assert copy_gain(small(), length=8, seed=1) != copy_gain(small(), length=8)


def validate(model, batch_size, **options):
    """What the callback finds on two held-out sources."""
    callback = Bits(**options)
    pretrainer = Pretrainer(model, Causal)
    sources = {"seen": Source("embedded:things-seen-*.tar", modalities=["text"])}
    sources["episodes"] = Source("embedded:episodes-test-*.tar", modalities=["text"])
    data = ShardDataModule(train=sources, held_out=sources, batch_size=batch_size, workers=0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(accelerator="cpu", callbacks=[callback], **quiet).validate(pretrainer, data, verbose=False)
    return callback.results


def test_the_callback_pays_for_every_held_out_text_once():
    model = small(length=64)
    seen, episodes = validate(model, 32)
    assert (seen.source, episodes.source) == ("seen", "episodes")
    assert seen.metric == "text bits per byte"
    texts = []
    for path in expand("embedded:things-seen-*.tar"):
        with tarfile.open(path) as tar:
            texts += [tar.extractfile(m).read().decode().strip() for m in tar if m.name.endswith(".txt")]
    t = backbone(model).batch({"text": texts})["text"]
    assert seen.n == len(texts)
    assert seen.value == pytest.approx(
        bits_per_byte(causal_log_p(model, {"text": t}).sum(1), sizes(model.encoder("text"), t)), rel=1e-5
    )
    assert seen.against["uniform"] == pytest.approx(float(math.log2(257) * t.real().sum() / sizes(model.encoder("text"), t).sum()))
    assert seen.low < seen.value < seen.high
    again = validate(model, 7, per="token")[0]
    assert again.metric == "text bits per token"
    assert again.value == pytest.approx(float(-causal_log_p(model, {"text": t}).sum() / math.log(2) / t.real().sum()), rel=1e-5)


def shared(shares):
    """The callback's figures when each rank holds some of the samples, one of them twice."""
    model, callback = cases.model().eval(), Bits()
    given = cases.batch(model.readers, cases.examples(model.readers), shares[distributed.rank()])
    data = SimpleNamespace(validation=[SimpleNamespace(name="toy")])
    callback.on_validation_epoch_start(None, None)
    with torch.no_grad():
        callback.on_validation_batch_end(None, SimpleNamespace(backbone=model), None, given, 0)
    callback.on_validation_epoch_end(SimpleNamespace(datamodule=data), SimpleNamespace(backbone=model))
    return callback.results


def test_ranks_score_each_text_once(ranks):
    (alone,) = shared([list(range(7))])
    for (found,) in ranks(shared, [[0, 2, 3, 4], [1, 4, 5, 6]]):
        assert found.n == alone.n == 6  # one sample has no text
        assert found.value == pytest.approx(alone.value)
        assert (found.low, found.high) == pytest.approx((alone.low, alone.high))
