"""Backbones in somebody else's code: three lines, audited loading, a plain module."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image as Pictures
from safetensors.torch import load_file, save_file

import headwater
from headwater.fusion import JointTokens
from headwater.modalities import Action, Audio, Image, Text, Video
from headwater.model import Model
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
    with pytest.raises(ValueError, match=r"only \d+\.\d% (?s:.)*missing: .*attn.qkv(?s:.)*unexpected: .*layer.qkv"):
        headwater.load_backbone(folder)
    assert headwater.load_backbone(folder, coverage=0.5).model is not None


def test_changed_weights_fail_the_golden_output(model, tmp_path):
    folder = headwater.save_backbone(model, tmp_path / "b")
    weights = load_file(folder / "weights.safetensors")
    weights["encoders.text.stem.weight"] *= -1
    save_file(weights, folder / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights of text.*differs"):
        headwater.load_backbone(folder)


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


PICTURES = [
    Pictures.fromarray((np.random.default_rng(i).random(s) * 255).astype(np.uint8))
    for i, s in enumerate([(90, 70, 3), (40, 80, 3)])
]


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_timm_towers_give_timms_own_features(name):
    import timm

    b = headwater.load_backbone(f"timm/{name}", pretrained=False)
    tower = b.model.encoders["image"].tower
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(tower), is_training=False)
    with torch.no_grad():
        expected = tower.forward_head(tower.forward_features(torch.stack([transform(p) for p in PICTURES])), pre_logits=True)
        torch.testing.assert_close(b(image=PICTURES)["image"], expected, atol=1e-5, rtol=1e-4)


def test_a_timm_tower_exports_and_loads(tmp_path):
    b = headwater.load_backbone("timm/test_vit", pretrained=False)
    folder = headwater.save_backbone(b.model, tmp_path / "b")
    torch.testing.assert_close(headwater.load_backbone(folder).embed(image=PICTURES), b.embed(image=PICTURES))


def test_other_timm_models_are_refused_by_name():
    with pytest.raises(ValueError, match=r"resnet18 is a ResNet.*VisionTransformer"):
        headwater.load_backbone("timm/resnet18", pretrained=False)


def test_open_clip_towers_give_open_clips_own_features():
    import open_clip

    torch.manual_seed(0)
    theirs, _, transform = open_clip.create_model_and_transforms("ViT-B-32")
    theirs.eval()
    ours = headwater.load_backbone("open_clip/ViT-B-32", pretrained=False)
    image, text = ours.model.encoders["image"], ours.model.encoders["text"]
    image.tower.load_state_dict(theirs.visual.state_dict())
    text.tokens.load_state_dict(theirs.token_embedding.state_dict())
    text.tower.load_state_dict(theirs.transformer.state_dict())
    text.norm.load_state_dict(theirs.ln_final.state_dict())
    with torch.no_grad():
        text.position.copy_(theirs.positional_embedding)
        text.projection.copy_(theirs.text_projection)
        captions = ["a dog", "a longer caption of a boat & the sea"]
        pictures = torch.stack([transform(p) for p in PICTURES])
        torch.testing.assert_close(ours(image=PICTURES)["image"], theirs.encode_image(pictures), atol=1e-5, rtol=1e-4)
        expected = theirs.encode_text(open_clip.get_tokenizer("ViT-B-32")(captions))
        torch.testing.assert_close(ours(text=captions)["text"], expected, atol=1e-5, rtol=1e-4)
