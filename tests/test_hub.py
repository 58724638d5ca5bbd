"""Backbones in somebody else's code: three lines, audited loading, a plain module."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image as Pictures
from safetensors.torch import load_file, save_file

import headwater
from headwater.datamodules.datamodule import ShardDataModule, Source
from headwater.datamodules.stream_source import open_source
from headwater.fusion import JointTokens
from headwater.hub import pretrained
from headwater.hub.card import manifest, provenance
from headwater.init import Normal
from headwater.modalities import Action, Audio, Image, Text, Video
from headwater.model import Model
from headwater.objectives import Contrastive
from headwater.pretrainer import Pretrainer
from headwater.trunk import Trunk


def small():
    return Trunk(32, 1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    encoders = {
        "image": Image(small(), size=32),
        "text": Text(small()),
        "audio": Audio(small()),
        "video": Video(small(), size=16, frames=4),
        "action": Action(small(), slots=3),
    }
    return Model(encoders, lambda widths: JointTokens(widths, small()), space=16)


def test_a_fresh_process_embeds_what_this_one_does(model, tmp_path):
    headwater.save_backbone(model, tmp_path / "backbone")
    here = headwater.load_backbone(tmp_path / "backbone").embed(image=[np.full((20, 30, 3), 90, np.uint8)], text=["a dog"])
    code = f"""
import headwater, numpy as np
b = headwater.load_backbone({str(tmp_path / "backbone")!r})
z = b.embed(image=[np.full((20, 30, 3), 90, np.uint8)], text=["a dog"])
print(*z["image"][0].tolist(), *z["text"][0].tolist())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    torch.testing.assert_close(torch.tensor([float(x) for x in out.split()]), torch.cat([here["image"][0], here["text"][0]]))


def test_every_signal_embeds_to_unit_vectors(model, tmp_path):
    headwater.save_backbone(model, tmp_path / "b")
    b = headwater.load_backbone(tmp_path / "b")
    z = b.embed(
        image=[Pictures.new("RGBA", (50, 20)), Pictures.new("L", (9, 9))],
        text=["a", "a longer text"],
        audio=[(torch.randn(8000), 44100), torch.randn(16000)],
        video=[np.zeros((3, 20, 20, 3), np.uint8), np.zeros((2, 20, 20, 3), np.uint8)],
        action=[np.zeros((4, 3), np.float32), np.zeros((2, 2), np.float32)],
    )
    for name, vectors in z.items():
        assert vectors.shape == (2, 16), name
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))
    assert (b.card["modalities"]["audio"], b.reader["audio"].rate) == ("AudioReader", 16000)


def test_a_backbone_trains_as_a_plain_module(model, tmp_path):
    headwater.save_backbone(model, tmp_path / "b")
    b = headwater.load_backbone(tmp_path / "b").train()
    head = torch.nn.Linear(16, 2)
    picture = Pictures.new("RGB", (32, 32), "red")
    head(b(image=[picture])["image"]).sum().backward()
    assert b.model.encoders["image"].stem.weight.grad.abs().sum() > 0


def test_padding_beside_a_sample_does_not_change_it(model):
    b = headwater.hub.Backbone(model, {}).eval()
    together, alone = b.embed(text=["hi", "a much longer text"])["text"][0], b.embed(text=["hi"])["text"][0]
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_renamed_weights_are_refused_with_the_table(model, tmp_path):
    folder = headwater.save_backbone(model, tmp_path / "b")
    weights = load_file(folder / "weights.safetensors")
    save_file({n.replace("trunk.blocks.0.attn.qkv", "layer.qkv"): w for n, w in weights.items()}, folder / "weights.safetensors")
    with pytest.raises(ValueError, match=r"fits only 87.7% of") as caught:
        headwater.load_backbone(folder)
    table = str(caught.value)
    assert "missing      encoders.image.trunk.blocks.0.attn.qkv.bias  [96], perhaps encoders.image.layer.qkv.bias" in table
    assert "unexpected   encoders.text.layer.qkv.weight  [96, 32]" in table
    loaded = headwater.load_backbone(folder, coverage=0.5)
    assert loaded.report.coverage == pytest.approx(0.877, abs=1e-3)


def test_changed_weights_are_noticed_by_their_hash_and_by_the_golden_output(model, tmp_path):
    folder = headwater.save_backbone(model, tmp_path / "b")
    weights = load_file(folder / "weights.safetensors")
    weights["encoders.text.stem.weight"] *= -1
    save_file(weights, folder / "weights.safetensors")
    with pytest.raises(ValueError, match=r"SHA-256 .* was changed or damaged"):
        headwater.load_backbone(folder)
    card = yaml.safe_load((folder / "card.yaml").read_text())
    card["sha256"] = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    (folder / "card.yaml").write_text(yaml.safe_dump(card))
    with pytest.raises(ValueError, match=r"weights of text.*differs"):
        headwater.load_backbone(folder)


def test_a_broken_model_is_not_exported(model, tmp_path):
    with torch.no_grad():
        model.encoders["text"].stem.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 tensors, such as encoders.text.stem.weight"):
        headwater.save_backbone(model, tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_the_card_tells_where_weights_come_from(model, tmp_path):
    note = {"step": 7, "licence": "cc-by-4.0", "data": {"things": {"index": "abc"}}, "sha256": "forged", "model": "forged"}
    folder = headwater.save_backbone(model, tmp_path / "b", note)
    card = headwater.load_backbone(folder).card
    assert (card["step"], card["licence"], card["headwater"]) == (7, "cc-by-4.0", headwater.__version__)
    assert card["sha256"] == hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    page = (folder / "README.md").read_text()
    head = yaml.safe_load(page.split("---")[1])
    assert head == {"library_name": "headwater", "tags": ["action", "audio", "image", "text", "video"], "license": "cc-by-4.0"}
    assert "backbone.embed(image=[...])" in page
    assert "{'index': 'abc'}" in page


def test_a_checkpoint_of_a_run_loads_without_its_objective(model, tmp_path):
    run = Pretrainer(model, lambda m: Contrastive(m, "image", "text"))
    found = {"state_dict": run.state_dict(), "global_step": 5}
    torch.save(found, tmp_path / "old.ckpt")
    run.on_save_checkpoint(found)
    torch.save(found, tmp_path / "last.ckpt")
    b = headwater.load_backbone(tmp_path / "last.ckpt")
    assert (b.card["step"], b.report.coverage) == (5, 1.0)
    assert {row.how for row in b.report.rows} == {"renamed", "left out"}
    texts = ["a dog"]
    torch.testing.assert_close(b.embed(text=texts), headwater.hub.Backbone(model, {}).embed(text=texts))
    with pytest.raises(ValueError, match=r"headwater.hub.load_weights"):
        headwater.load_backbone(tmp_path / "old.ckpt")
    assert headwater.hub.load_weights(model, tmp_path / "old.ckpt").coverage == 1.0


def test_a_run_tells_its_data_recipe_and_what_is_left_out(model, tmp_path):
    data = ShardDataModule({"things": Source("embedded:things-train-000.tar")}, {"rest": Source("embedded:things-seen-000.tar")})
    run = Pretrainer(model, lambda m: Contrastive(m, "image", "text"))
    data.sources = [open_source(name, source, model.readers, 0, 1) for name, source in data.train.items()]
    (tmp_path / "config.yaml").write_text("seed_everything: 3")
    note = provenance(run, data, tmp_path / "config.yaml")
    assert note["left_out"] == "of the objective, with numbers of parameters: pairs (1)"
    assert (note["objective"], note["config"]) == ("Contrastive", {"seed_everything": 3})
    assert note["data"]["things"]["shards"] == "embedded:things-train-000.tar"
    other = open_source("things", data.held_out["rest"], model.readers, 0, 1)
    digests = {note["data"]["things"]["index"], manifest(data.sources[0]), manifest(other)}
    assert len(digests) == 2  # the same data give the same, others another
    card = headwater.load_backbone(headwater.save_backbone(model, tmp_path / "b", note)).card
    assert card["data"] == note["data"]
    assert note["data"]["things"]["index"] in (tmp_path / "b" / "README.md").read_text()


def test_loaded_weights_stay_when_training_draws_the_rest(model, tmp_path):
    from headwater.init import initialise

    loaded = headwater.load_backbone(headwater.save_backbone(model, tmp_path / "b")).model
    before = {name: w.clone() for name, w in loaded.state_dict().items()}
    initialise(torch.nn.ModuleDict({"backbone": loaded}), seed=1)
    torch.testing.assert_close(loaded.state_dict(), before, atol=0, rtol=0)


def test_a_card_cannot_import_anything(model, tmp_path):
    folder = headwater.save_backbone(model, tmp_path / "b")
    card = yaml.safe_load((folder / "card.yaml").read_text())
    card["model"]["encoders"]["text"]["class_path"] = "subprocess.Popen"
    (folder / "card.yaml").write_text(yaml.safe_dump(card))
    with pytest.raises(ValueError, match="not among the imported parts"):
        headwater.load_backbone(folder)


def test_a_tokenizer_file_travels_with_the_weights(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["a red dog", "a red cat"], trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    folder = headwater.save_backbone(Model({"text": Text(small(), tokenizer=str(path))}), tmp_path / "b")
    path.unlink()
    reader = headwater.load_backbone(folder).reader["text"]
    assert reader.tokens("a red dog").x.tolist()[:-1] == tokenizer.encode("a red dog").ids


def test_unknown_places_and_inputs_say_what_was_expected(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"card.yaml.*timm/"):
        headwater.load_backbone(tmp_path / "nothing")
    b = headwater.hub.Backbone(model, {})
    with pytest.raises(ValueError, match="encodes"):
        b.embed(smell=["rose"])
    with pytest.raises(ValueError, match="list of signals"):
        b.embed(text="a dog")


def test_list_backbones_finds_exports(model, tmp_path):
    headwater.save_backbone(model, tmp_path / "runs/a/000/backbone")
    assert headwater.list_backbones(tmp_path) == [str(tmp_path / "runs/a/000/backbone")]


def test_a_tower_of_another_library_exports_and_loads(tmp_path):
    pictures = [Pictures.new("RGB", (90, 70), "red"), Pictures.new("RGB", (40, 80), "blue")]
    b = headwater.load_backbone("timm/test_vit", pretrained=False)
    folder = headwater.save_backbone(b.model, tmp_path / "b")
    torch.testing.assert_close(headwater.load_backbone(folder).embed(image=pictures), b.embed(image=pictures))


def test_an_encoder_goes_on_from_where_it_was_saved(model, tmp_path):
    from headwater.objectives import Masked
    from headwater.pretrainer import Pretrainer

    folder = headwater.save_backbone(model, tmp_path / "b")
    again = Model({"image": pretrained(str(folder), "image"), "text": Text(small())})
    fresh = again.encoders["text"].stem.weight.clone()
    Pretrainer(again, Masked, seed=1, init=Normal())
    for name, p in again.encoders["image"].named_parameters():
        assert torch.equal(p, model.encoders["image"].get_parameter(name))  # weights that were loaded are not drawn anew
    assert not torch.equal(again.encoders["text"].stem.weight, fresh)
    with pytest.raises(ValueError, match=r"modality None .* one of image, text"):
        pretrained(str(folder))
