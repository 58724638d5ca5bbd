"""What was learned with Causal is generated in the same order; draws, beams and choices do what their definitions say."""

import copy
import subprocess
import sys
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from contracts import cases
from torch.testing import assert_close

import headwater
from headwater import random
from headwater.fusion import Chain, CrossAttend, JointTokens, Project, Resampler
from headwater.generation import Settings, generate, infill, stream
from headwater.generation.choosing import Choices, choose, nucleus, only, top
from headwater.generation.infill import filled, joined
from headwater.generation.signals import fill
from headwater.generation.stepwise import Stepwise
from headwater.generation.unfold import Frame, beam_search, masked, unfold
from headwater.hub import Backbone
from headwater.modalities import Action, ActionTokens, Autoencoder, Codec, Image, Text, Tokenised, Video
from headwater.modalities.bottlenecks import FSQ
from headwater.model import Model
from headwater.objectives import Causal, Denoising, DiscreteDiffusion, Flow, Prefixed
from headwater.trunk import Trunk

TEXTS = ["a red boat", "hi", "two birds sing", "no"]
rng = np.random.default_rng(0)
PICTURES = [np.kron(rng.integers(0, 255, (2, 2, 3)), np.ones((8, 8, 1))).astype(np.uint8) for _ in TEXTS]
FILMS = [np.kron(rng.integers(0, 255, (n, 2, 2, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8) for n in (4, 2, 3, 4)]
ACTS = [rng.integers(0, 5, n) for n in (4, 2, 3, 4)]
MOVES = [rng.normal(size=(n, 3)).astype(np.float32) for n in (4, 2, 3, 4)]
SOUNDS = [rng.integers(0, 8, (3, 2)) for _ in TEXTS]


def trunk(depth=2, **options):
    return Trunk(32, depth, 2, **{"position": "rotary", **options})


def encoders(**more):
    torch.manual_seed(0)
    return {"text": Text(trunk(), length=24), "image": Image(trunk(1), 16, 8), **more}


def learned(model, objective, signals, steps=400, lr=3e-3, below=0.01):
    """Trained on a few samples until they are known by heart."""
    batch = Backbone(model, {}).batch(signals)
    made = objective(model)
    optimizer = torch.optim.AdamW([*model.parameters(), *made.parameters()], lr=lr, weight_decay=0)
    for step in range(steps):
        batch["seed"] = random.fold(torch.arange(len(TEXTS)), step)
        optimizer.zero_grad()
        loss = sum(t.total / t.number for t in made(model, made.task(batch)).values())
        loss.backward()
        optimizer.step()
        if loss.item() < below:
            break
    return model


@pytest.fixture(scope="module")
def writer():
    """Texts alone, by heart but for the first letter, which is one of four."""
    return learned(Model({"text": encoders()["text"]}), Causal, {"text": TEXTS}, 150)


@pytest.fixture(scope="module")
def describer():
    """Text given a picture, by joint tokens."""
    model = Model(encoders(), lambda widths: JointTokens(widths, trunk(1)))
    return learned(model, partial(Causal, prefix=["image"]), {"image": PICTURES, "text": TEXTS})


def test_texts_are_continued_as_they_were_learned(writer):
    beginnings = ["a", "hi", "two b", "n"]
    for beams in (1, 3):
        assert generate(writer, temperature=0, beams=beams, text=beginnings) == TEXTS
    assert set(generate(writer, samples=40, top_p=0.9)) == set(TEXTS)


FUSED = {
    "joint": lambda widths: JointTokens(widths, trunk(1)),
    "project": partial(Project, mlp=True),
    "resampled": lambda w: Chain(
        w, [partial(Resampler, modalities=["image"], queries=3, heads=2), partial(Project, modalities=["latent"])], last="text"
    ),
    "cross": partial(CrossAttend, heads=2),
}


@pytest.mark.parametrize("fusion", FUSED)
def test_texts_are_told_by_pictures_through_every_fusion(fusion):
    model = Model(encoders(), FUSED[fusion])
    learned(model, partial(Causal, prefix=["image"]), {"image": PICTURES, "text": TEXTS})
    assert generate(model, temperature=0, image=PICTURES) == TEXTS
    assert generate(model, temperature=0, image=PICTURES[::-1], text=["", None, "hi", "a r"]) == TEXTS[::-1]


def test_ids_of_pictures_are_told_by_texts():
    torch.manual_seed(0)
    tokeniser = Autoencoder(Image(trunk(1), 16, 4), FSQ([4, 4, 3]), trunk(1))
    painter = Tokenised(tokeniser, trunk())
    model = Model(encoders(image=painter), lambda widths: JointTokens(widths, trunk(1)))
    learned(model, partial(Causal, modality="image", prefix=["text"]), {"image": PICTURES, "text": TEXTS})
    codes = Backbone(model, {}).batch({"image": PICTURES})["image"]
    *_, made = stream(model, "image", Settings(temperature=0), {"text": TEXTS})
    assert torch.equal(made.x, codes.x)
    assert torch.equal(made.position, codes.position)
    for found, wanted in zip(generate(model, "image", temperature=0, text=TEXTS), range(4), strict=True):
        assert np.array_equal(found, painter.restore(codes.map(lambda field, k=wanted: field[k : k + 1])))


@pytest.mark.parametrize("kind", ["ids", "vectors"])
def test_actions_unfold_beside_frames_and_a_mission(kind):
    """As many steps as the frames of each sample; step t sees the frames up to t, and no later one."""
    hand = Action(trunk(1), choices=5, steps=4) if kind == "ids" else Action(trunk(1), slots=3, steps=4)
    wanted = ACTS if kind == "ids" else MOVES
    model = Model(encoders(video=Video(trunk(1), 16, 8, frames=4), action=hand), lambda widths: JointTokens(widths, trunk(1)))
    given = {"text": TEXTS, "video": FILMS}
    below = 0.01 if kind == "ids" else 0.0005
    learned(
        model, partial(Causal, modality="action", prefix=["text"], context=["video"]), {**given, "action": wanted}, 500, below=below
    )
    for found, right in zip(generate(model, "action", temperature=0, **given), wanted, strict=True):
        assert_close(found, right, rtol=0, atol=0.2)
    short = generate(model, "action", temperature=0, text=TEXTS, video=[film[:2] for film in FILMS])
    for found, right in zip(short, wanted, strict=True):  # later frames have no part in what comes before them
        assert_close(found, right[:2], rtol=0, atol=0.2)
    begun = generate(model, "action", temperature=0, action=wanted, begin=1, **given)
    assert_close(begun[0], wanted[0], rtol=0, atol=0.2)


@pytest.mark.parametrize("pattern", ["delay", "flatten"])
def test_codes_of_sounds_unfold_in_their_pattern(pattern):
    model = Model(
        encoders(sound=Codec(trunk(), codebooks=2, size=8, steps=3, pattern=pattern)), lambda widths: JointTokens(widths, trunk(1))
    )
    learned(model, partial(Causal, modality="sound", prefix=["text"]), {"sound": SOUNDS, "text": TEXTS})
    assert all(map(np.array_equal, generate(model, "sound", temperature=0, text=TEXTS), SOUNDS))
    wild = generate(model, "sound", temperature=50.0, text=TEXTS)  # every place keeps to its codebook, or reading would refuse it
    assert all(found.shape == (3, 2) for found in wild)


def test_patches_are_said_one_by_one():
    model = Model(encoders(), lambda widths: JointTokens(widths, trunk(1)))
    learned(model, partial(Causal, modality="image", prefix=["text"]), {"image": PICTURES, "text": TEXTS}, below=0.0005)
    for found, right in zip(generate(model, "image", text=TEXTS), PICTURES, strict=True):
        assert np.abs(found.astype(int) - right).mean() < 12
    half = generate(model, "image", image=PICTURES, text=TEXTS, begin=2)
    assert np.array_equal(half[0][:8], PICTURES[0][:8])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_any_precision_generate(describer, dtype):
    assert generate(copy.deepcopy(describer).to(dtype), temperature=0, image=PICTURES) == TEXTS


def test_a_row_does_not_depend_on_those_beside_it(describer):
    many = generate(describer, image=PICTURES, text=["", "t", "", "a r"], seed=3, temperature=1.5)
    for rows in (1, 2, 3):
        assert generate(describer, image=PICTURES[:rows], text=["", "t", "", "a r"][:rows], seed=3, temperature=1.5) == many[:rows]
    assert generate(describer, image=PICTURES, text=["", "t", "", "a r"], seed=4, temperature=1.5) != many


def test_streams_tell_what_there_is_after_every_token(writer):
    told = [writer.encoder("text").restore(t) for t in stream(writer, "text", Settings(temperature=0), {"text": ["a r"]})]
    assert told == [TEXTS[0][:n] for n in range(4, 11)] + [TEXTS[0]]  # the last token is the end
    assert writer.training  # as it was before


def test_choices_are_all_that_is_said(describer):
    animals = ["cat", "dog", "doe"]
    said = generate(describer, image=PICTURES, choices=animals, temperature=5.0, samples=8)
    assert set(said) == set(animals)
    begun = generate(describer, image=PICTURES[:2], text=["the ", "my old "], choices=animals)
    assert begun[0] in [f"the {a}" for a in animals]
    assert begun[1] in [f"my old {a}" for a in animals]
    assert generate(describer, image=PICTURES, choices=TEXTS, temperature=0) == TEXTS
    mixed = [*TEXTS[1:], "a red bean", "a red boat and more"]
    costs = {text: cost(describer, PICTURES[0], text) for text in mixed}
    assert generate(describer, image=PICTURES[:1], choices=mixed, beams=9) == [min(costs, key=costs.get)]


@torch.no_grad()
def cost(model, picture, text):
    """-log p of a text given a picture, as it is trained."""
    objective = Causal(model, prefix=["image"])
    batch = Backbone(model, {}).batch({"image": [picture], "text": [text]})
    return objective(model, objective.task({**batch, "seed": torch.zeros(1)}))["causal"].total.item()


def test_guidance_moves_logits_away_from_what_is_said_without_the_others():
    model = Model(encoders(), lambda widths: JointTokens(widths, trunk(1))).eval()
    seen = {"image": PICTURES[:2]}
    free = [generate(model, temperature=0, samples=2, length=8)] * 2
    assert generate(model, temperature=0, length=8, guidance=0.0, **seen) == free[0]
    plain, pushed = (
        [t.x for t in stream(model, "text", Settings(temperature=0, length=1, guidance=g), seen)][-1] for g in (1.0, 3.0)
    )
    batch = Backbone(model, {}).batch({"text": ["x", "x"], **seen})
    with torch.no_grad():
        logits = []
        for names in (("text", "image"), ("text",)):
            made = Causal(model, prefix=[n for n in names if n != "text"])
            task = made.task({**batch, "seed": torch.arange(2)})
            logits.append(made.predict(model, task)[:, 0])
    known, unknown = logits
    assert torch.equal(plain[:, 0], known.argmax(-1))
    assert torch.equal(pushed[:, 0], (unknown + 3 * (known - unknown)).argmax(-1))
    with pytest.raises(ValueError, match="guidance"):
        generate(model, guidance=2.0)


def test_the_best_of_enough_beams_is_the_best_of_all():
    """Against all sequences of a random Markov chain over 3 ids, of which 0 ends."""
    torch.manual_seed(1)
    table = torch.randn(2, 4, 4, 3)  # row, last two ids or 3 = none -> logits

    def ask(x, rows=None):
        rows = torch.arange(2) if rows is None else rows
        last = torch.cat([torch.full((len(x), 2), 3), x], 1)[:, -2:]
        return table[rows, last[:, 0], last[:, 1]]

    def score(row, ids):
        total = 0.0
        for n, i in enumerate(ids):
            total += float(ask(torch.tensor([ids[:n]], dtype=torch.long).reshape(1, n), torch.tensor([row]))[0].log_softmax(-1)[i])
            if i == 0:
                return total, ids[: n + 1]
        return total, ids

    state = {"rows": torch.arange(2)}

    def take(rows):
        state["rows"] = state["rows"][rows]

    frame = Frame(torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0]]), torch.tensor([0, 1]), torch.tensor([4, 3]), 0)
    found = beam_search(frame, lambda x: ask(x, state["rows"]), take, [], beams=60)
    for row, (room, known) in enumerate([(4, []), (3, [1])]):
        every = {}
        for ids in product(range(3), repeat=room - len(known)):
            total, cut = score(row, [*known, *ids])
            every[tuple(cut)] = total - (score(row, known)[0] if known else 0)
        best = max(every, key=every.get)
        assert tuple(found.x[row, : found.length[row]].tolist()) == best


def test_few_beams_find_no_less_than_one(writer):
    assert generate(writer, beams=2, text=["two"], length=8) == ["two bird"]


def test_draws_follow_the_probabilities_that_are_left():
    torch.manual_seed(0)
    logits, seeds = torch.randn(7), random.fold(torch.tensor(5), torch.arange(20_000))
    for temperature, k, p in ((1.0, None, None), (0.5, None, None), (1.0, 3, None), (1.0, None, 0.6), (2.0, 5, 0.8)):
        weight = (logits / temperature).softmax(-1)
        order = weight.argsort(descending=True).tolist()[:k]
        share = weight[order] / weight[order].sum()
        kept, total = [], 0.0
        for i, w in zip(order, share.tolist(), strict=True):
            if p is None or total < p:
                kept.append(i)
            total += w
        right = torch.zeros(7).index_put((torch.tensor(kept),), weight[kept])
        drawn = choose(logits.expand(20_000, -1), seeds, temperature, k, p)
        assert_close(drawn.bincount(minlength=7) / 20_000, right / right.sum(), rtol=0, atol=0.02)
    assert choose(logits[None], seeds[:1], 0.0).tolist() == [int(logits.argmax())]


def test_top_and_nucleus_keep_what_they_say():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
    assert top(logits, 2).isfinite().tolist() == [[True, True, False, False], [False, False, True, True]]
    assert nucleus(logits, 0.79).isfinite().tolist() == [[True, True, False, False], [False, False, True, True]]
    assert nucleus(logits, 0.81).isfinite().sum(-1).tolist() == [3, 3]
    assert nucleus(logits, 1e-9).isfinite().sum(-1).tolist() == [1, 1]
    assert torch.equal(top(logits, 9), logits)


def test_rows_end_where_they_end():
    frame = Frame(torch.tensor([[0] * 5, [7, 8, 0, 0, 0], [0] * 5]), torch.tensor([0, 2, 0]), torch.tensor([5, 5, 2]), 9)
    script = torch.tensor([[1, 9, 3, 4, 5], [1, 2, 3, 9, 5], [1, 2, 3, 4, 5]])
    pick = lambda answer, x: (answer, torch.zeros(3, dtype=torch.bool))  # noqa: E731
    *_, last = unfold(frame, lambda x: script[:, x.shape[1]], pick)
    assert [last.x[r, : last.length[r]].tolist() for r in range(3)] == [[1, 9], [7, 8, 3, 9], [1, 2]]
    everything = Frame(torch.tensor([[4, 5]]), torch.tensor([2]), torch.tensor([2]))
    assert [f.length.tolist() for f in unfold(everything, lambda x: x, pick)] == [[2]]


def test_a_walk_along_choices_allows_their_ways_alone():
    made = Choices(torch.tensor([[[1, 2, 3], [1, 4, 0]], [[5, 5, 0], [5, 5, 6]]]), torch.tensor([[3, 2], [2, 3]]), 8)
    ways = lambda *x: [m.nonzero()[:, 0].tolist() for m in made(torch.tensor(x))]  # noqa: E731
    assert made.common.tolist() == [1, 2]
    assert ways([1], [5]) == [[2, 4], [5]]
    assert ways([1, 4], [5, 5]) == [[], [6]]  # the first has ended
    assert ways([1, 2], [1, 2], [5, 5], [5, 1]) == [[3], [3], [6], []]  # two beams per row
    logits, stops = masked(torch.zeros(2, 8), torch.tensor([[1, 4], [5, 5]]), [made, only([3, 6], 8)])
    assert stops.tolist() == [True, False]
    assert logits[1].isfinite().nonzero().tolist() == [[6]]


def test_allowed_ids_and_functions_of_what_was_said(writer):
    digits = [ord(c) for c in "0123456789"]
    assert all(text.isdecimal() for text in generate(writer, samples=4, allowed=digits, length=6))
    only_a = lambda x: torch.zeros(len(x), 257, dtype=torch.bool).index_fill(1, torch.tensor([97 + x.shape[1] % 2]), True)  # noqa: E731
    assert generate(writer, allowed=only_a, length=5) == ["ababa"]


def test_a_language_model_of_transformers_says_what_its_library_says(tmp_path):
    transformers = pytest.importorskip("transformers")
    import towers

    from headwater.modalities.transformers_tower import encoder

    for kind in ("gpt2", "llama"):
        folder = towers.folder(kind, tmp_path / kind)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        ours = Model({"text": encoder(str(folder), True)})
        reader = ours.readers["text"]
        prompt = "a dog sees the red"
        ids = reader.tokens(prompt).x[:-1]
        start = ours.encoder("text").start
        wanted = theirs.generate(torch.cat([torch.tensor([start]), ids])[None], do_sample=False, max_new_tokens=8)[0, 1:]
        *_, made = stream(ours, "text", Settings(temperature=0, length=len(ids) + 8), {"text": [prompt]})
        assert made.x[0].tolist() == wanted[: made.x.shape[1]].tolist()
        assert made.x.shape[1] == len(wanted) or made.x[0, -1] == reader.end


def test_flow_and_discrete_diffusion_are_ways_too():
    model = Model(encoders(image=Image(trunk(conditional=True), 16, 8)), lambda widths: JointTokens(widths, trunk(1)))
    learned(model, partial(Flow, context=["text"]), {"image": PICTURES, "text": TEXTS}, 3)
    a, b = (generate(model, "image", text=TEXTS[:n], steps=3, solver="euler", seed=2) for n in (2, 4))
    assert a[0].shape == (16, 16, 3)
    assert all(map(np.array_equal, a, b))
    sounding = encoders(sound=Codec(trunk(position="sincos"), codebooks=2, size=8, steps=3, pattern="flatten"))
    model = Model(sounding, lambda widths: JointTokens(widths, trunk(1)))
    learned(model, partial(DiscreteDiffusion, modality="sound", context=["text"]), {"sound": SOUNDS, "text": TEXTS})
    made = generate(model, "sound", "diffusion", text=TEXTS, temperature=0)
    assert all(map(np.array_equal, made, SOUNDS))
    begun = generate(model, "text", "diffusion", text=["two b", ""], steps=3)  # untrained
    assert begun[0].startswith("two b")


def test_what_cannot_be_made_is_told(writer, describer):
    for wrong, said in (
        ({"length": 99}, "length 99"),
        ({"beams": 0}, "beams 0"),
        ({"top_p": 0.0}, "top_p"),
        ({"way": "flow"}, "causal or diffusion"),
        ({"way": "diffusion", "beams": 2}, "one by one"),
        ({"allowed": [300]}, "allowed ids"),
        ({"choices": []}, "choices"),
        ({"choices": ["x" * 30 + "a", "x" * 30 + "b"]}, "cut off"),
        ({"context": ["image"]}, "context"),
    ):
        with pytest.raises(ValueError, match=said):
            generate(writer, "text", **wrong)
    with pytest.raises(ValueError, match="different number"):
        generate(describer, image=PICTURES[:2], text=["a"])
    with pytest.raises(ValueError, match="vectors"):
        generate(describer, "image", "diffusion", text=TEXTS)
    with pytest.raises(ValueError, match="one by one"):
        generate(describer, "image", beams=2, text=TEXTS)


PROGRAM = """
import sys
import numpy as np
import headwater
b = headwater.load_backbone(sys.argv[1])
texts = headwater.generate(b, "text", temperature=0, image=list(np.load(sys.argv[2])))
picture, = headwater.generate(b, "image", way="causal", text=["hi"])
assert picture.shape == (16, 16, 3) and picture.dtype == np.uint8
assert not [name for name in sys.modules if name.startswith(("headwater.objectives", "headwater.pretrainer", "lightning"))]
print(*texts, sep="|")
"""


def test_an_exported_backbone_generates_without_the_objective(describer, tmp_path):
    headwater.save_backbone(describer, tmp_path / "backbone")
    np.save(tmp_path / "pictures.npy", np.stack(PICTURES))
    given = [sys.executable, "-c", PROGRAM, str(tmp_path / "backbone"), str(tmp_path / "pictures.npy")]
    done = subprocess.run(given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().split("|") == TEXTS


def test_every_modality_that_has_a_canvas_is_generated():
    """Untrained, with everything else given: what comes out can be read."""
    model = cases.model().float()
    batch = {
        n: [r.restore(r.prepare(t).map(lambda f: f[None])) for t in r.example(2, 0)]
        for n, r in model.readers.items()
        if n in ("text", "image", "video", "choice", "action")
    }
    for name in batch:
        given = {n: v for n, v in batch.items() if n != name}
        made = generate(model, name, **given, **({"steps": 2} if name in ("image", "action") else {}))
        assert len(made) == 2
        assert type(made[0]) is type(batch[name][0])


def test_a_prefix_that_sees_itself_is_continued():
    """SimVLM: beginnings of several lengths, known in both directions."""
    model = Model(encoders(), lambda widths: JointTokens(widths, trunk(1)))
    learned(model, partial(Prefixed, inner=partial(Causal, prefix=["image"])), {"image": PICTURES, "text": TEXTS}, 800)
    given = {"image": PICTURES, "text": [text[:n] for text, n in zip(TEXTS, (3, 1, 5, 1), strict=True)]}
    assert generate(model, layout="prefixed", temperature=0, **given) == TEXTS
    batch = Backbone(model, {}).batch({"image": PICTURES[:2], "text": ["two birds", "a red boa"]})
    raw, known = batch["text"], torch.tensor([4, 4])
    task = Causal(model, prefix=["image"]).task(batch)
    shown = task["text"]._replace(order=torch.where(raw.place() < 4, 0, raw.place()))
    with torch.no_grad():
        whole = model.encoder("text").unembed(model(model.embed({"image": task["image"], "text": shown}), True)["text"].x)
        for cached in (True, False):
            steps = Stepwise(model, "text", raw, {"image": batch["image"]}, {}, mutual=known, cached=cached)
            said = [steps.ask(raw.x[:, :n]) for n in (4, 5, 6)]
            assert_close(torch.stack(said, 1), whole[:, 4:7], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def speller():
    """T5: hidden spans of the texts, by heart."""
    return learned(Model({"text": Text(trunk(), length=24, extra=8)}), Denoising, {"text": TEXTS}, 900, below=0.02)


def test_a_source_is_answered(speller):
    """What is hidden is written behind its mark, as training asks for it; sources have several lengths."""
    objective, right = Denoising(speller), []
    batch = Backbone(speller, {}).batch({"text": TEXTS})
    for seed in range(4):
        task = objective.task({**batch, "seed": random.fold(torch.arange(4), 900 + seed)})
        source = (task["text"].order == 0) & task["text"].real()
        begins = [task["text"].x[row][source[row]] for row in range(4)]
        *_, made = fill(speller, "text", Settings(layout="denoising", temperature=0), 4, {}, begins)
        wanted = [task["answer"][row][task["asked"][row]].tolist() for row in range(4)]
        right += [made.x[row][made.real()[row]].tolist() == wanted[row] for row in range(4)]
    assert sum(right) > 0.7 * len(right)


def test_gaps_are_filled(speller):
    text = TEXTS[2]
    holes = [[text[:n], text[n + 2 :]] for n in range(len(text) - 1)]  # two letters are hidden of one as long
    assert sum(whole == text for whole in infill(speller, holes)) > 0.3 * len(holes)
    many = infill(speller, [["a ", "d b", "t"], ["h", ""]])
    assert many[0].startswith("a ")
    assert "d b" in many[0]
    assert many[1].startswith("h")
    with pytest.raises(ValueError, match="2 to 9"):
        infill(speller, [["alone"]])


def test_choices_are_answers_where_what_is_given_is_a_source(speller):
    made = generate(speller, layout="denoising", text=["two birds", "no"], choices=["yes", "yet"], temperature=2.0)
    assert set(made) <= {"yes", "yet"}


def test_marks_say_which_gap_is_meant():
    reader = Text(trunk(1), extra=3).reader
    marks, letters = reader.extras, reader.ids
    assert joined(reader, ["a ", " b", ""], marks) == [97, 32, marks[0], 32, 98, marks[1]]
    said = torch.tensor([120, marks[1], *letters("two"), marks[0], *letters("one"), reader.end])
    assert filled(reader, ["<", ">-<", ">"], said, marks) == "<one>-<two>"


@pytest.mark.parametrize("codec", ["bins", "words"])
def test_moves_as_ids_unfold_beside_frames(codec):
    """Every slot of a step has its own ids, which come one by one though they share an order."""
    hand = ActionTokens(trunk(1), codec, slots=3, steps=4, bins=16)
    moves = [np.clip(m / 3, -0.95, 0.95) for m in MOVES]
    for move in moves:
        t = hand.reader.tokens(move)
        assert torch.equal(t.position, hand.blank().position[0, : len(t.position)])
        assert torch.equal(t.order, hand.blank().order[0, : len(t.order)])
    model = Model(encoders(video=Video(trunk(1), 16, 8, frames=4), action=hand), lambda widths: JointTokens(widths, trunk(1)))
    given = {"text": TEXTS, "video": FILMS}
    learned(model, partial(Causal, modality="action", prefix=["text"], context=["video"]), {**given, "action": moves}, below=0.02)
    for found, right in zip(generate(model, "action", temperature=0, **given), moves, strict=True):
        assert_close(found, right, rtol=0, atol=1 / 16 + 1e-4)  # half a bin
