"""`headwater relabel`: labels and texts by models, chosen by vote, confidence and rule, written with where they come from."""

import io
import itertools
import json
import math
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from PIL import Image as Pictures
from torch.testing import assert_close

from headwater import cli, hub, init, random
from headwater.datamodules.files import expand
from headwater.datamodules.index import load_index
from headwater.datamodules.writer import ShardWriter
from headwater.evaluation.likelihood import causal_log_p
from headwater.modalities import Category, Image, Text, Video
from headwater.model import Model
from headwater.objectives import Causal, Supervised
from headwater.tools.built import built
from headwater.tools.relabel import Head, Keep, Names, Neighbours, Texts, Thoughts, relabel
from headwater.tools.relabelling.choosing import evidence, importance, plurality, resampled, surest, vote
from headwater.tools.relabelling.heads import AVERAGE, Headed, trained
from headwater.tools.relabelling.labels import Labels
from headwater.tools.relabelling.similar import near
from headwater.trunk import Trunk

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 220)}
RECIPE = """
model:
  backbone:
    encoders:
      image: {class_path: Image, init_args: {size: 16, patch: 8, trunk: {width: 16, depth: 1, heads: 2}}}
  objective: {class_path: Supervised, init_args: {label: {class_path: Category, init_args: {classes: [red, green, blue]}}}}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
data: {batch_size: 8, workers: 0}
trainer: {max_steps: 30}
"""


def picture(name, number):
    """A noisy patch of colour."""
    noise = np.random.default_rng(number).integers(-20, 20, (16, 16, 3))
    file = io.BytesIO()
    Pictures.fromarray((np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8)).save(file, "png")
    return file.getvalue()


def colours(pattern, count, labelled, **more):
    """Shards with so many pictures, whose true colours are told by their keys."""
    with ShardWriter(pattern, samples=10) as writer:
        for number in range(count):
            name = [*COLOURS][number % 3]
            label = {"category": name} if labelled else {"category": None, "note": number}
            writer.write(f"{name}-{number:03d}", {"png": picture(name, number), "json": json.dumps(label).encode()} | more)
    return str(pattern).replace("{:05d}", "*")


def written(shards):
    """Key -> members of every sample."""
    found = {}
    for path in expand(str(shards)):
        index = load_index(path)
        assert not index.faults
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """labelled/ and plain/ shards, and a run that learned the labels."""
    folder = tmp_path_factory.mktemp("relabel")
    colours(folder / "labelled" / "some-{:05d}.tar", 12, True)
    colours(folder / "plain" / "others-{:05d}.tar", 24, False)
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(RECIPE)
    made = built(yaml.safe_load(RECIPE), "cpu")
    optimizer = torch.optim.AdamW(made.parameters(), 0.02)
    samples = list(written(folder / "labelled").values())
    reader = made.backbone.readers["image"]
    t = hub.Backbone(made.backbone, {}).batch({"image": [reader.decode(m) for m in samples]})["image"]
    x = torch.tensor([[*COLOURS].index(json.loads(m["json"])["category"]) for m in samples])
    for _ in range(20):
        optimizer.zero_grad()
        logits = made.objective.head(made.backbone.represent({"image": t})["image"].x)
        torch.nn.functional.cross_entropy(logits, x).backward()
        optimizer.step()
    weights = dict(made.state_dict())
    torch.save({"state_dict": weights}, run / "checkpoints" / "last.ckpt")
    return folder


def run(*given):
    cli.main(["relabel", *map(str, given)])


def test_a_head_labels_the_rest_and_says_where_it_comes_from(folder, tmp_path, capsys):
    out = tmp_path / "round-1"
    by = ("--by", "Head", "--by.runs", folder / "run", "--by.views", "2")
    run(folder / "plain", out, *by, "--keep.score", "0.5", "--number", "3", "--samples", "10")
    before, after = written(folder / "plain"), written(out)
    assert len(after) == 24
    for key, members in after.items():
        said = json.loads(members["json"])
        assert members["png"] == before[key]["png"]
        assert said["category"] == key.partition("-")[0]
        assert said["note"] == int(key[-3:])
        record = said["made"]["category"]
        assert (record["round"], record["by"], record["agreement"]) == (3, "Head", 1.0)
        assert record["models"] == [{"name": str(folder / "run" / "checkpoints" / "last.ckpt")}]
        parent, _, name = record["parent"].rpartition("/")
        assert name == key
        assert key in load_index(parent).keys.to_pylist()
        assert said["category_weight"] == record["score"] > 0.5
    assert sorted(path.name for path in out.glob("*.tar")) == ["others-00000.tar", "others-00001.tar", "others-00002.tar"]
    summary = json.loads((out / "relabel.json").read_text())
    assert summary["classes"] == dict.fromkeys(COLOURS, 8)
    assert summary["kept"] == 24
    assert "24 answers kept" in capsys.readouterr().out


def test_the_same_call_gives_the_same_bytes_and_rows_do_not_matter(folder, tmp_path):
    for name, rows in (("a", 32), ("b", 32), ("c", 5)):
        relabel(str(folder / "plain"), str(tmp_path / name), Head(str(folder / "run"), views=2), rows=rows)
    a, b, c = (written(tmp_path / name) for name in "abc")
    assert a == b
    scores = [[json.loads(m["json"])["category_weight"] for m in found.values()] for found in (a, c)]
    assert_close(*map(torch.tensor, scores), atol=1e-5, rtol=0)


def test_what_people_said_stays_and_what_models_said_is_said_anew(folder, tmp_path):
    by = Head(str(folder / "run"))
    with pytest.raises(ValueError, match="12 by labelled by people"):
        relabel(str(folder / "labelled"), str(tmp_path / "no"), by)
    assert not (tmp_path / "no").exists()
    relabel(str(folder / "labelled"), str(tmp_path / "yes"), by, known=True)
    relabel(str(folder / "plain"), str(tmp_path / "one"), by)
    relabel(str(tmp_path / "one"), str(tmp_path / "two"), by, number=2)
    for key, members in written(tmp_path / "two").items():
        record = json.loads(members["json"])["made"]["category"]
        assert record["round"] == 2
        assert record["parent"].startswith(str(tmp_path / "one"))
        assert json.loads(written(tmp_path / "one")[key]["json"])["made"]["category"]["round"] == 1


def test_classes_are_balanced_by_the_surest(folder, tmp_path):
    relabel(str(folder / "plain"), str(tmp_path / "all"), Head(str(folder / "run")))
    relabel(str(folder / "plain"), str(tmp_path / "few"), Head(str(folder / "run")), Keep(most=2))
    scores = {k: json.loads(m["json"])["category_weight"] for k, m in written(tmp_path / "all").items()}
    few = written(tmp_path / "few")
    assert Counter(key.partition("-")[0] for key in few) == dict.fromkeys(COLOURS, 2)
    for name in COLOURS:
        mine = {key: score for key, score in scores.items() if key.startswith(name)}
        assert {key for key in few if key.startswith(name)} == set(sorted(mine, key=mine.get)[-2:])


def test_one_head_of_several_and_the_average_of_the_weights(tmp_path):
    part = "{class_path: Supervised, init_args: {name: %s, label: {class_path: Category, init_args: {field: %s, classes: 2}}}}"
    parts = ", ".join(f"{name}: {part % (name, name)}" for name in ("shape", "size"))
    start = RECIPE.index("  objective:")
    recipe = f"{RECIPE[:start]}  objective: {{class_path: Weighted, init_args: {{parts: {{{parts}}}}}}}\n"
    made = built(yaml.safe_load(recipe), "cpu")
    average = {f"{AVERAGE}{name}": w * 2 for name, w in made.backbone.state_dict().items()}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text(recipe)
    torch.save({"state_dict": made.state_dict() | average}, tmp_path / "checkpoints" / "last.ckpt")
    for mean, factor in ((True, 2), (False, 1)):
        model, objective = trained(str(tmp_path), "size", mean)
        assert_close(model.encoder("image").stem.weight, made.backbone.encoder("image").stem.weight * factor)
        assert torch.equal(objective.head.weight, made.objective.parts["size"].head.weight)
    assert Head(str(tmp_path), part="size").field == "size"
    with pytest.raises(ValueError, match="those for shape, size; found part None"):
        Head(str(tmp_path))


def small(seed, **encoders):
    model = Model(encoders or {"image": Image(Trunk(16, 1, 2), 16, 8), "text": Text(Trunk(16, 1, 2), length=24)}, space=8)
    init.initialise(model, seed, init.Normal())
    return model.eval()


def test_names_are_compared_as_clip_does(folder, tmp_path):
    for seed in (0, 1):
        hub.save_backbone(small(seed), tmp_path / f"b{seed}")
    sentences, names = ["a {} thing", "{}"], [*COLOURS]
    by = Names([str(tmp_path / f"b{seed}") for seed in (0, 1)], names, sentences, temperature=0.1)
    samples = list(written(folder / "plain").values())
    answers = by(samples, range(len(samples)))
    p = 0
    for seed in (0, 1):
        backbone = hub.load_backbone(tmp_path / f"b{seed}")
        pictures = backbone.embed(image=[backbone.reader["image"].decode(m) for m in samples])["image"]
        titles = [backbone.embed(text=[s.format(n) for s in sentences])["text"].sum(0) for n in names]
        titles = torch.stack([x / x.norm() for x in titles])
        p = p + (pictures @ titles.T / 0.1).exp() / (pictures @ titles.T / 0.1).exp().sum(1, keepdim=True) / 2
    assert [one.value for one in answers] == [names[k] for k in p.argmax(1)]
    assert_close(torch.tensor([one.score for one in answers]), p.max(1).values)
    assert {model["name"] for model in by.models} == {str(tmp_path / f"b{seed}") for seed in (0, 1)}
    assert all(len(model["sha256"]) == 64 for model in by.models)


def test_neighbours_lend_their_labels(folder, tmp_path):
    hub.save_backbone(small(0), tmp_path / "b")
    run(
        folder / "plain",
        tmp_path / "out",
        "--by",
        "Neighbours",
        "--by.backbones",
        tmp_path / "b",
        "--by.labelled",
        folder / "labelled",
        "--by.k",
        "3",
    )
    found = written(tmp_path / "out")
    assert len(found) == 24
    assert all(json.loads(m["json"])["category"] == key.partition("-")[0] for key, m in found.items())
    torch.manual_seed(0)
    similarity, number = torch.rand(5, 9, dtype=torch.float64), torch.arange(9) % 4
    for row, p in zip(similarity, near(similarity, number, 4, 3, 0.2)):
        votes = dict.fromkeys(range(4), 0.0)
        for place in sorted(range(9), key=lambda k: -row[k])[:3]:
            votes[place % 4] += math.exp(row[place] / 0.2)
        assert_close(p, torch.tensor([*votes.values()], dtype=torch.float64) / sum(votes.values()))


def test_moments_of_a_film_get_a_list(tmp_path):
    model = Model({"video": Video(Trunk(16, 1, 2), 16, 8, frames=4)})
    label = Category(3, "taken")
    objective = Supervised(model, label, modality="video", unit="token")
    by = Labels([Headed(model, objective)], [*label.classes], "taken", "json", several=True)
    shards = expand("embedded:episodes-train-000.tar")
    samples = list(written(shards[0]).values())[:3]
    answers = by(samples, range(3))
    reader = model.readers["video"]
    for one, members in zip(answers, samples):
        t = reader.prepare(reader.tokens(reader.decode(members)).map(lambda field: field[None]))
        moments = t.position[0, :, 0].unique().tolist()
        assert [k for k, value in enumerate(one.value) if value is not None] == moments
        labels = label.tokens(one.value)
        assert labels.position[:, 0].tolist() == moments
        x = model.encode(model.embed({"video": t}))["video"].x[0]
        for place, moment in enumerate(moments):
            p = objective.head(x[t.position[0, :, 0] == moment].mean(0)).softmax(-1)
            assert labels.x[place] == p.argmax()
        assert 0 < one.score < 1
        assert one.group is None


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """A small language model that knows which animal says what."""
    folder = tmp_path_factory.mktemp("speaker") / "backbone"
    model = Model({"text": Text(Trunk(32, 2, 4, position="rotary"), length=32)})
    init.initialise(model, 0, init.Normal())
    texts = ["cat says: meow", "dog says: woof", "cow says: moo"]
    batch = hub.Backbone(model, {}).batch({"text": texts}) | {"seed": torch.arange(3)}
    objective, optimizer = Causal(model), torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(80):
        term = objective(model, objective.task(batch))["causal"]
        optimizer.zero_grad()
        (term.total / term.number).backward()
        optimizer.step()
    return hub.save_backbone(model.eval(), folder)


def test_texts_continue_prompts_and_drafts_vote(speaker, tmp_path):
    with ShardWriter(tmp_path / "in" / "{:05d}.tar") as writer:
        for name in ("cat", "dog", "cow"):
            writer.write(name, {"json": json.dumps({"animal": name}).encode()})
        writer.write("stone", {"cls": b"0"})
    by = ("--by", "Texts", "--by.backbones", speaker, "--by.ask", "{animal} says: ", "--by.draws", "5")
    run(tmp_path / "in", tmp_path / "out", *by, "--keep.agreement", "0.5")
    found = written(tmp_path / "out")
    assert {key: members["txt"].decode() for key, members in found.items()} == {"cat": "meow", "dog": "woof", "cow": "moo"}
    backbone = hub.load_backbone(speaker)
    for key, members in found.items():
        record = json.loads(members["json"])["made"]["txt"]
        batch = backbone.batch({"text": [f"{key} says: {members['txt'].decode()}"]})
        log_p = causal_log_p(backbone.model, batch)[0, len(f"{key} says:") :]
        assert record["score"] == pytest.approx(math.exp(log_p.mean()), rel=1e-4)
        assert record["agreement"] >= 0.5
    with pytest.raises(ValueError, match="4 by no answer"):  # no draft ends so early
        relabel(str(tmp_path / "in"), str(tmp_path / "no"), Texts(str(speaker), "{animal} says:", length=13))
    assert "asks for 'animal'" in (tmp_path / "out" / "skipped.jsonl").read_text()
    with pytest.raises(ValueError, match="3 by pattern"):
        relabel(str(tmp_path / "in"), str(tmp_path / "no"), Texts(str(speaker), "{animal} says:"), Keep(pattern="^quack"))
    run(tmp_path / "in", tmp_path / "rule", *by, "--keep.rule", f"{__name__}.begins_with_m")
    assert {m["txt"].decode()[0] for m in written(tmp_path / "rule").values()} == {"m"}


def begins_with_m(said, members):
    return said.startswith("m") and "animal" in json.loads(members["json"])


def test_drafts_vote_on_their_last_answer(speaker):
    by = Texts(str(speaker), "{animal} says:", answer=r"= ?(\d+)")
    assert by.core("1 + 1 = 2, so 2 + 2 = 4") == by.core("surely =4") == "4"
    assert by.core("  No  Number ") == "no number"


def test_thoughts_join_their_text_by_importance(speaker, tmp_path):
    by = Thoughts(str(speaker), "{txt} says:", "{txt} says: {thought}", draws=6)
    samples = [{"txt": name.encode()} for name in ("cat", "dog")] + [{"json": b"{}"}]
    cat, dog, none = by(samples, [1, 2, 3])
    with ShardWriter(tmp_path / "in" / "{:05d}.tar") as writer:
        for name, members in zip("abc", samples):
            writer.write(name, members)
    relabel(str(tmp_path / "in"), str(tmp_path / "out"), by)
    assert [m["txt"].decode() for m in written(tmp_path / "out").values()] == ["cat says: meow", "dog says: woof"]
    assert (cat.value, dog.value) == ("cat says: meow", "dog says: woof")
    assert "asks for 'txt'" in none
    backbone = hub.load_backbone(speaker)
    log_p = causal_log_p(backbone.model, backbone.batch({"text": [cat.value]}))[0]
    # p is of both together, q of the thought alone: their ratio is what the model gives "cat says:"
    assert cat.more["evidence"] == pytest.approx(float(log_p[: len("cat says:")].sum()), abs=1e-3)


def test_votes_equal_brute_force():
    torch.manual_seed(0)
    p = torch.rand(5, 7, 2, 3, dtype=torch.float64).softmax(-1)
    found = vote(p)
    for i, j in itertools.product(range(7), range(2)):
        mean = [sum(float(p[v, i, j, c]) for v in range(5)) / 5 for c in range(3)]
        winner = mean.index(max(mean))
        same = sum(max(range(3), key=lambda c: float(p[v, i, j, c])) == winner for v in range(5)) / 5
        assert (int(found.label[i, j]), float(found.score[i, j])) == (winner, pytest.approx(max(mean)))
        assert float(found.agreement[i, j]) == pytest.approx(same)
    assert plurality(["a", "b", "a", "b", "c"], [0.1, 0.3, 0.2, 0.1, 0.9]) == (1, 0.4)
    assert plurality(["a", "b"], [0.2, 0.2])[1] == 0.5


def test_the_surest_of_each_class_equal_brute_force():
    rng = np.random.default_rng(0)
    score, group = rng.integers(0, 6, 40) / 6, rng.integers(0, 3, 40).tolist()
    for share, most in ((1.0, None), (0.4, None), (0.01, None), (1.0, 4), (0.5, 3)):
        kept = surest(score, group, share, most)
        for g in range(3):
            inside = sorted((k for k in range(40) if group[k] == g), key=lambda k: (-score[k], k))
            count = min(max(1, round(share * len(inside))), most or 40)
            assert {k for k in inside if kept[k]} == set(inside[:count])


def test_importance_equals_brute_force():
    """All sums over a small table of thoughts and texts; with every thought drawn as q has it, the evidence is exact."""
    torch.manual_seed(0)
    joint = torch.rand(4, 3, dtype=torch.float64)  # p(z, x)
    joint /= joint.sum()
    q = torch.rand(4, 3, dtype=torch.float64).softmax(0)  # q(z | x)
    drawn = torch.tensor([0, 2, 2, 1, 3])
    for x in range(3):
        w = [float(joint[z, x] / q[z, x]) for z in drawn]
        share = importance(joint[drawn, x].log(), q[drawn, x].log())
        assert_close(share, torch.tensor(w, dtype=torch.float64) / sum(w))
        assert float(evidence(joint[drawn, x].log(), q[drawn, x].log())) == pytest.approx(math.log(sum(w) / 5))
        posterior = joint[:, x] / joint[:, x].sum()
        assert float(evidence(joint[:, x].log(), posterior.log())) == pytest.approx(math.log(joint[:, x].sum()))
    draws = resampled(share.expand(20000, -1), torch.arange(20000))
    assert_close(draws.bincount(minlength=5) / 20000, share.float(), atol=0.015, rtol=0)


def test_three_rounds_of_em_raise_the_likelihood_of_what_was_not_seen():
    """Texts of 5 words, each of which depends on a hidden thought alone: thoughts are drawn blindly, and more of them help."""
    words, kinds, count = 5, 3, 1500
    prior, said = (
        torch.tensor([0.5, 0.3, 0.2]),
        torch.tensor([[0.8, 0.1, 0.05, 0.05], [0.1, 0.1, 0.7, 0.1], [0.05, 0.15, 0.1, 0.7]]),
    )
    z = (prior.log() + random.gumbel(torch.arange(2 * count), (kinds,), "z")).argmax(-1)
    x = (said.log()[z][:, None] + random.gumbel(torch.arange(2 * count), (words, 4), "x")).argmax(-1)
    rounds = {}
    for k in (1, 12):
        p_z, p_x = torch.full((kinds,), 1 / kinds), (0.3 * random.uniform(torch.tensor(0), (kinds, 4), "start")).softmax(-1)
        found = rounds.setdefault(k, [])
        for number in range(4):
            both = p_z.log() + p_x.log()[:, x].sum(-1).T  # (samples, kinds): log p(z, x)
            found.append(float(both[count:].logsumexp(-1).mean()))
            drawn = (random.uniform(random.fold(torch.arange(count), number), (k,), "thoughts") * kinds).long()
            share = importance(both[:count].gather(1, drawn), torch.full((count, k), 1 / kinds).log())
            chosen = drawn.gather(1, resampled(share, random.fold(torch.arange(count), number))[:, None])[:, 0]
            p_z = chosen.bincount(minlength=kinds) / count
            p_x = torch.stack([x[:count][chosen == c].flatten().bincount(minlength=4) + 0.1 for c in range(kinds)])
            p_x = p_x / p_x.sum(-1, keepdim=True)
    assert all(b > a for a, b in itertools.pairwise(rounds[12]))
    assert rounds[12][-1] > rounds[1][-1] + 0.05


def test_what_cannot_work_is_refused(folder, tmp_path, speaker):
    plain = str(folder / "plain")
    with pytest.raises(SystemExit, match="expected --by Head, Names"):
        run(plain, tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="no run at"):
        Head(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="those for label; found part 'voice'"):
        Head(str(folder / "run"), part="voice")
    with pytest.raises(ValueError, match="expected 0 to 1"):
        Keep(share=0)
    with pytest.raises(ValueError, match="regular expression"):
        Keep(pattern="(")
    with pytest.raises(ValueError, match="1 or more per class"):
        Keep(most=0)
    with pytest.raises(ValueError, match="something to go on from"):
        Texts(str(speaker))
    with pytest.raises(ValueError, match="found image; the modalities of this backbone are text"):
        Texts(str(speaker), given=["image"])
    with pytest.raises(ValueError, match="2 or more, and a"):
        Thoughts(str(speaker), joint="{txt}")
    with pytest.raises(ValueError, match="no sample in"):
        Neighbours(str(speaker), plain)
    with pytest.raises(ValueError, match="holds the shards"):
        relabel(plain, plain, Head(str(folder / "run")))


def test_a_broken_sample_costs_itself_alone(folder, tmp_path):
    with ShardWriter(tmp_path / "in" / "{:05d}.tar") as writer:
        writer.write("red-1", {"png": picture("red", 1)})
        writer.write("bad-2", {"png": b"no picture"})
        writer.write("bad-3", {"png": picture("red", 1), "json": b"[1]"})
        writer.write("bad-4", {"txt": b"no picture at all"})
    relabel(str(tmp_path / "in"), str(tmp_path / "out"), Head(str(folder / "run")))
    (key,) = written(tmp_path / "out")
    assert key == "red-1"
    reasons = (tmp_path / "out" / "skipped.jsonl").read_text()
    assert all(word in reasons for word in ("image does not decode", "holds list", "it has no image"))


@pytest.mark.slow
def test_rounds_of_fitting_and_labelling(folder, tmp_path, monkeypatch):
    """The loop of docs/continual.md on the command line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.yaml").write_text(RECIPE)
    cli.main(["fit", "--config", "few.yaml", "--data.train", json.dumps({"few": {"shards": f"{folder}/labelled/*.tar"}})])
    last = "runs/few/000"
    for number in (1, 2):
        out = f"round-{number}"
        run(f"{folder}/plain", out, "--by", "Head", "--by.runs", last, "--keep.share", "0.5", "--number", number)
        sources = {"few": {"shards": f"{folder}/labelled/*.tar"}, "made": {"shards": f"{out}/*.tar", "weight": 2}}
        cli.main(["fit", "--config", "few.yaml", "--data.unit", "sample", "--data.train", json.dumps(sources)])
        last = f"runs/few/00{number}"
    labels = json.loads((tmp_path / "round-2" / "relabel.json").read_text())
    assert labels["models"][0]["name"].startswith(str(tmp_path / "runs" / "few" / "001"))
    right = [json.loads(m["json"])["category"] == key.partition("-")[0] for key, m in written(tmp_path / "round-2").items()]
    assert np.mean(right) > 0.9
