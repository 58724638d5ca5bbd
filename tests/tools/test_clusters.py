"""`headwater clusters`: centres of raw tokens and of a tower's features, which the target then reads."""

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from headwater import cli, modalities
from headwater.hub import pretrained, save_backbone
from headwater.model import Model
from headwater.objectives.targets.codes import Clusters, kmeans, nearest
from headwater.tools.clusters import batches, clusters
from headwater.trunk import Trunk

SHARDS = "embedded:speech-train-000.tar"
RECIPE = """
model:
  backbone:
    encoders:
      audio: {class_path: Audio, init_args: {bands: 8, frames: 8, seconds: 1.0, trunk: {width: 16, depth: 2, heads: 2}}}
  objective: {class_path: Nonsense}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return "small.yaml"


def encoder():
    torch.manual_seed(0)
    return modalities.Audio(Trunk(16, 2, heads=2), bands=8, seconds=1.0)


def test_centres_of_raw_tokens_serve_the_target(recipe, capsys):
    cli.main(["clusters", SHARDS, "out.safetensors", "--recipe", recipe, "--size", "8", "--samples", "40"])
    said = capsys.readouterr().out
    seen = list(batches(SHARDS, encoder().reader, 40, 0))
    assert [len(t.x) for t in seen] == [32, 8]
    x = torch.cat([t.x[t.real()] for t in seen])
    assert f"out.safetensors: 8 clusters of {len(x):,} tokens explain" in said
    assert_close(load_file("out.safetensors")["centres"], kmeans(x, 8, 0))
    model = Model({"audio": encoder()})
    target = Clusters(model, "audio", file="out.safetensors")
    batch = {"audio": seen[1], "seed": torch.arange(8)}
    assert torch.equal(target.look(model, batch), nearest(seen[1].x, target.centres))
    explained = float(said.split("explain ")[1].split("%")[0]) / 100
    left = (x - target.centres[nearest(x, target.centres)]).square().sum() / (x - x.mean(0)).square().sum()
    assert explained == pytest.approx(1 - left.item(), abs=1e-3)
    assert explained > 0.3


def test_centres_of_a_tower(recipe, capsys):
    save_backbone(Model({"audio": encoder()}), "tower")
    clusters(SHARDS, "deep.safetensors", tower="tower", layer=1, size=5, samples=10)
    tower = pretrained("tower")
    target = Clusters(Model({"audio": encoder()}), "audio", file="deep.safetensors", tower=tower, layer=1)
    (seen,) = batches(SHARDS, tower.reader, 10, 0)
    x = target.vectors(seen)[seen.real()]
    assert_close(target.centres, kmeans(x, 5, 0))
    assert "5 clusters" in capsys.readouterr().out


def test_another_seed_draws_other_samples_and_the_same_one_the_same(recipe):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        clusters(SHARDS, name, recipe=recipe, size=4, samples=5, seed=seed)
    a, b, c = (load_file(name)["centres"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_what_cannot_work_is_refused(recipe):
    with pytest.raises(ValueError, match="one of the two"):
        clusters(SHARDS, "out")
    with pytest.raises(ValueError, match="modality 'text'"):
        clusters(SHARDS, "out", recipe=recipe, modality="text")
    with pytest.raises(ValueError, match="found 6 tokens for 50 clusters"):
        clusters(SHARDS, "out", recipe=recipe, size=50, samples=1)
    clusters(SHARDS, "out", recipe=recipe, size=4, samples=2)
    with pytest.raises(FileExistsError, match="out exists"):
        clusters(SHARDS, "out", recipe=recipe)
