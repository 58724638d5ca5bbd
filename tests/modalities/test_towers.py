"""Adapters give what the libraries themselves give, on whole signals and on parts of them."""

import numpy as np
import pytest
import timm
import torch
import towers
from PIL import Image as Pictures
from timm.layers.pos_embed_sincos import apply_keep_indices_nlc
from torch.testing import assert_close

import headwater
from headwater.datamodules.collate import collate
from headwater.hub import Backbone
from headwater.modalities import open_clip_tower, timm_tower, transformers_tower
from headwater.model import Model
from headwater.objectives import Causal, Masked
from headwater.tokens import Tokens

PICTURES = [
    Pictures.fromarray((np.random.default_rng(i).random(s) * 255).astype(np.uint8))
    for i, s in enumerate([(90, 70, 3), (40, 80, 3)])
]
TEXTS = ["a dog sees the red boat", "two birds fly", "night"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def stir(model):
    """Makes what begins as zero or as one something else, so that leaving it out would show."""
    for p in model.parameters():
        if p.ndim == 1 or p.shape[:1] == (1,):
            p.data += 0.1 * torch.randn_like(p)
    return model.eval()


def peer(name):
    """timm's model and ours with the same weights."""
    theirs, ours = stir(timm.create_model(name)), timm_tower.make(name)
    missing, extra = ours.tower.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing
    assert all(key.startswith(("head", "fc", "classifier")) for key in extra)
    return theirs, Backbone(Model({"image": ours}), {}).eval()


SMALL = ["test_vit", "test_vit2", "deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224", "test_resnet", "test_efficientnet"]
SMALL += ["test_convnext", "mobilenetv3_small_050", "resnet18", "efficientnet_b2", "eva02_tiny_patch14_224", "coat_tiny"]
LARGE = ["vit_base_patch16_224", "deit_small_distilled_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]
LARGE += ["vit_base_patch16_siglip_224", "vit_small_patch16_rope_mixed_224", "convnext_tiny", "swin_tiny_patch4_window7_224"]
LARGE += ["efficientnet_b0", "inception_v3", "vgg11", "naflexvit_base_patch16_gap", "beit_base_patch16_224", "levit_128s"]


@pytest.mark.parametrize("name", SMALL + [pytest.param(name, marks=pytest.mark.slow) for name in LARGE])
@torch.no_grad()
def test_timm_features_are_timms_own(name):
    theirs, ours = peer(name)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs), is_training=False)
    expected = theirs.forward_head(theirs.forward_features(torch.stack([transform(p) for p in PICTURES])), pre_logits=True)
    assert_close(ours(image=PICTURES)["image"] / expected.abs().max(), expected / expected.abs().max(), **CLOSE)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224"])
@torch.no_grad()
def test_visible_tokens_alone_are_timms_forward_on_them(name):
    """timm's own parts, patches dropped between its embedding and its blocks as in MAE."""
    theirs, ours = peer(name)
    raw = ours.batch({"image": PICTURES})["image"]
    keep = torch.rand(raw.x.shape[:2]).argsort(1)[:, : raw.x.shape[1] // 4].sort(1).values
    x = theirs._pos_embed(theirs.patch_embed(pixels(ours, raw)))
    patches, prefix = x[:, theirs.num_prefix_tokens :], x[:, : theirs.num_prefix_tokens]
    x = theirs.norm_pre(torch.cat([prefix, patches.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))], 1))
    for block in theirs.blocks:
        x = block(x)
    compare(theirs, ours, raw, keep, theirs.norm(x))


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"])
@torch.no_grad()
def test_rotary_positions_follow_the_visible_tokens(name):
    """As timm gathers them for its PatchDropoutWithIndices."""
    theirs, ours = peer(name)
    theirs.blocks, ours.model.encoders["image"].tower.blocks = (m.blocks[:2] for m in (theirs, ours.model.encoders["image"].tower))
    raw = ours.batch({"image": PICTURES})["image"]
    keep = torch.rand(raw.x.shape[:2]).argsort(1)[:, : raw.x.shape[1] // 4].sort(1).values
    x, rope = theirs._pos_embed(theirs.patch_embed(pixels(ours, raw)))
    patches, prefix = x[:, theirs.num_prefix_tokens :], x[:, : theirs.num_prefix_tokens]
    x = theirs.norm_pre(torch.cat([prefix, patches.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))], 1))
    rope = apply_keep_indices_nlc(x, rope, keep)
    rope = rope.transpose(0, 1) if theirs.rope_mixed else rope[:, None].expand(2, -1, 1, -1, -1).transpose(0, 1)
    for i, block in enumerate(theirs.blocks):
        x = block(x, rope=rope[i] if theirs.rope_mixed else rope[:, 0])
    compare(theirs, ours, raw, keep, theirs.norm(x))


def pixels(ours, raw):
    """The prepared picture, (B, 3, H, W), from its patches."""
    reader = ours.reader["image"]
    side = reader.size // reader.patch
    return raw.x.reshape(-1, side, side, reader.patch, reader.patch, 3).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def compare(theirs, ours, raw, keep, expected):
    encoder, own = ours.model.encoders["image"], theirs.num_prefix_tokens
    out = encoder(encoder.embed(raw).take(keep))
    assert_close(out.x[:, : keep.shape[1]], expected[:, own:], **CLOSE)
    assert_close(out.x[:, keep.shape[1] :], expected[:, :own], **CLOSE)
    assert_close(encoder.pool(out).x, theirs.forward_head(expected, pre_logits=True), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(("name", "size"), [("test_vit", 96), ("test_resnet", 96), ("eva02_tiny_patch14_224", 112)])
def test_another_size_is_timms_own(name, size, tmp_path):
    kind = timm_tower.TimmPicture if name == "test_resnet" else timm_tower.TimmImage
    tower = stir(kind(name, size=size))
    x = torch.randn(2, 3, size, size)
    reader, side = tower.reader, tower.side
    assert reader.size == size
    raw = collate([{"it": reader.tokens(np.zeros((9, 9, 3), np.uint8))}] * 2, ["it"])["it"]
    raw = raw._replace(x=x.unflatten(2, (side, -1)).unflatten(4, (side, -1)).permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2))
    expected = tower.tower.forward_head(tower.tower.forward_features(x), pre_logits=True)
    assert_close(tower.pool(tower(tower.embed(raw))).x, expected, **CLOSE)
    saved = headwater.save_backbone(Model({"image": tower}), tmp_path / "b")
    assert headwater.load_backbone(saved).reader["image"].size == size


def test_a_name_that_timm_lacks_is_refused():
    with pytest.raises(ValueError, match=r"no model 'vit_huge'.*list_models"):
        timm_tower.make("vit_huge")
    with pytest.raises(ValueError, match=r"resnet18 does not work token by token.*TimmPicture"):
        timm_tower.TimmImage("resnet18")


def test_absent_pictures_do_not_enter_batch_statistics():
    tower = timm_tower.make("test_resnet").train()
    t = tower.embed(collate([{"it": tower.reader.prepare(t)} for t in tower.reader.example(4, 0)], ["it"])["it"])
    before = {n: b.clone() for n, b in tower.named_buffers()}
    tower(t.map(lambda field: field[:2]))
    expected = {n: b.clone() for n, b in tower.named_buffers()}
    assert any(not torch.equal(before[n], b) for n, b in expected.items())
    tower.load_state_dict(before, strict=False)
    tower(t._replace(valid=t.real() & (torch.arange(4) < 2)[:, None]))
    for n, b in tower.named_buffers():
        assert_close(b, expected[n])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(kind)`: a small model of transformers, made once."""
    root, made = tmp_path_factory.mktemp("models"), {}
    return lambda kind: made.setdefault(kind, root / kind) if (root / kind).exists() else towers.folder(kind, root / kind)


@pytest.mark.parametrize("kind", ["plain", "quick", "coca", "resnet", "siglip", "conv"])
@torch.no_grad()
def test_open_clip_features_are_open_clips_own(kind, folder):
    import open_clip

    pytest.importorskip("transformers") if kind == "siglip" else None
    towers.open_clip_config(f"tiny-{kind}", kind, folder("bert"))
    theirs, _, transform = open_clip.create_model_and_transforms(f"tiny-{kind}")
    stir(theirs)
    image = open_clip_tower.make(f"tiny-{kind}#image")
    state = {k.removeprefix("visual."): v for k, v in theirs.state_dict().items() if k.startswith("visual.")}
    if isinstance(image, open_clip_tower.OpenClipTokens):
        image.tower.load_state_dict({k.removeprefix("trunk."): v for k, v in state.items() if not k.startswith("trunk.head")})
        image.last.load_state_dict({k.replace("trunk.head", "0"): v for k, v in state.items() if k.startswith("trunk.head")})
    else:
        image.tower.load_state_dict(state)
    ours = Backbone(Model({"image": image}), {}).eval()
    expected = theirs.encode_image(torch.stack([transform(p) for p in PICTURES]), normalize=False)
    assert_close(ours(image=PICTURES)["image"], expected, **CLOSE)
    if kind in ("plain", "quick", "siglip"):
        text = open_clip_tower.make(f"tiny-{kind}#text")
        source = getattr(theirs, "text", theirs)
        text.tokens, text.tower, text.norm = source.token_embedding, source.transformer, source.ln_final
        text.position, text.projection = source.positional_embedding, source.text_projection
        expected = theirs.encode_text(open_clip.get_tokenizer(f"tiny-{kind}")(TEXTS))
        assert_close(Backbone(Model({"text": text}), {}).eval()(text=TEXTS)["text"], expected, **CLOSE)
    else:
        text = [m for m in theirs.modules() if isinstance(m, open_clip.transformer.TextTransformer)]
        assert len(text) == (kind == "coca")


def test_what_open_clip_has_and_we_do_not_is_said(folder):
    towers.open_clip_config("tiny-coca", "coca", folder("bert"))
    with pytest.warns(UserWarning, match="text tower of tiny-coca.*Only the image tower"):
        assert set(headwater.load_backbone("open_clip/tiny-coca", pretrained=False).reader) == {"image"}
    with pytest.raises(ValueError, match="no model 'ViT-Z'"):
        open_clip_tower.make("ViT-Z#image")


@pytest.mark.slow
@torch.no_grad()
def test_real_siglip_image_tower_is_open_clips_own():
    import open_clip

    theirs, _, transform = open_clip.create_model_and_transforms("ViT-B-16-SigLIP")
    theirs.eval()
    image = open_clip_tower.make("ViT-B-16-SigLIP#image")
    image.tower.load_state_dict(theirs.visual.trunk.state_dict())
    expected = theirs.encode_image(torch.stack([transform(p) for p in PICTURES]))
    assert_close(Backbone(Model({"image": image}), {}).eval()(image=PICTURES)["image"], expected, **CLOSE)


def hidden(path, kind, ids, mask):
    """transformers' own last hidden state."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(path).eval()
    model = model.get_encoder() if kind in ("t5", "bart") else model
    return model(input_ids=ids, attention_mask=mask).last_hidden_state


@pytest.mark.parametrize("kind", towers.TEXT)
@torch.no_grad()
def test_text_features_are_transformers_own(kind, folder):
    """On a padded batch, from their tokenizer to the last hidden state."""
    transformers = pytest.importorskip("transformers")
    path = folder(kind)
    ours = Backbone(Model(transformers_tower.towers(str(path), True)), {}).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(path)(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    ids, mask = tokens.input_ids, tokens.attention_mask
    if ours.model.encoder("text").causal:  # read without the mark in front and with one behind
        ids, mask = (torch.cat([field, field[:, :1]], 1) for field in (ids, mask))
        mask[:, 1:], mask[:, 0] = mask[:, :-1].clone(), 1
        ids[range(3), mask.sum(1) - 1] = 2
    y, out = hidden(path, kind, ids, mask), ours.tokens(text=TEXTS)["text"]
    begins = int(kind == "llama")
    assert torch.equal(out.real(), mask[:, begins:].bool())
    assert_close(out.x[out.real()], y[:, begins:][out.real()], **CLOSE)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
@torch.no_grad()
def test_masked_models_unembed_with_their_own_head(kind, folder):
    transformers = pytest.importorskip("transformers")
    encoder = transformers_tower.encoder(str(folder(kind)), True).eval()
    t = encoder.reader.tokens(TEXTS[0]).map(lambda field: field[None])
    expected = transformers.AutoModelForMaskedLM.from_pretrained(folder(kind)).eval()(input_ids=t.x).logits
    assert_close(encoder.unembed(encoder(encoder.embed(t)).x), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_causal_objective_is_transformers_own_loss(kind, packed, folder):
    transformers = pytest.importorskip("transformers")
    encoder = transformers_tower.encoder(str(folder(kind)), True).eval()
    samples = [{"text": encoder.reader.tokens(text)} for text in TEXTS]
    raw = collate(samples, ["text"], [[0, 1], [2]] if packed else None)["text"]
    model = Model({"text": encoder}).eval()
    objective = Causal(model)
    term = objective(model, objective.task({"text": raw}))["causal"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder(kind)).eval()
    rows = [torch.cat([torch.tensor([encoder.start]), s["text"].x]) for s in samples]
    ids = torch.nn.utils.rnn.pad_sequence(rows, True, -100)
    loss = theirs(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), labels=ids).loss
    assert_close(term.total / term.number, loss, **CLOSE)
    loss.backward()
    (term.total / term.number).backward()
    assert_close(encoder.tower.get_input_embeddings().weight.grad, theirs.get_input_embeddings().weight.grad, **CLOSE)


def wave(samples, seed):
    """A sound that is no noise: a chord that grows, at 16 kHz."""
    time = torch.arange(samples) / 16_000
    return (time[:, None] * torch.tensor([220.0, 331.0, 557.0 + 90 * seed]) * 6.283).sin().mean(1) * (0.1 + time)


@pytest.mark.parametrize("kind", ["wav2vec2", "wav2vec2 layer", "hubert", "wavlm"])
@torch.no_grad()
def test_wave_features_are_transformers_own(kind, folder):
    transformers = pytest.importorskip("transformers")
    encoder = transformers_tower.encoder(str(folder(kind)), True).eval()
    window, stride = encoder.reader.window, encoder.reader.stride
    sounds = [wave(window + stride * n, n) for n in (40, 25, 0)]  # their ends fill their last window
    ours = Backbone(Model({"audio": encoder}), {}).eval().tokens(audio=sounds)["audio"]
    theirs = transformers.AutoModel.from_pretrained(folder(kind)).eval()
    for i, n in enumerate((41, 26, 1)):
        raw = encoder.reader.prepare(encoder.reader.tokens(sounds[i])).x  # half precision, as it is stored
        heard = torch.cat([raw[:, :stride].flatten(), raw[-1, stride:]])
        expected = theirs(heard[None]).last_hidden_state[0]
        assert len(expected) == n == int(ours.real()[i].sum())
        assert_close(ours.x[i, :n], expected, **CLOSE)


@torch.no_grad()
def test_loudness_is_kept_where_a_tower_was_trained_on_it(folder):
    transformers = pytest.importorskip("transformers")
    path = towers.folder("wavlm", folder("wavlm").parent / "loud")
    for normalize in (False, True):
        transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize).save_pretrained(path)
        encoder = transformers_tower.make(str(path))
        found, extracted = encoder.reader.tokens(wave(3000, 0)).x.float(), transformers.AutoFeatureExtractor.from_pretrained(path)
        expected = extracted(wave(3000, 0).numpy(), sampling_rate=16_000, return_tensors="pt").input_values[0]
        if normalize:  # of the whole sound, in half precision
            assert_close(found, expected.unfold(0, 30, 20), atol=2e-3, rtol=1e-3)
        else:
            assert torch.equal(found, expected.unfold(0, 30, 20))


@torch.no_grad()
def test_whisper_features_are_transformers_own(folder):
    transformers = pytest.importorskip("transformers")
    encoder = transformers_tower.encoder(str(folder("whisper")), True).eval()
    sounds = [wave(9_000, 0), wave(16_000, 1), wave(20_000, 2)]  # shorter, as long and longer than its second
    ours = Backbone(Model({"audio": encoder}), {}).eval()
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    mel = extractor([s.numpy() for s in sounds], sampling_rate=16_000, return_tensors="pt").input_features
    expected = transformers.AutoModel.from_pretrained(folder("whisper")).get_encoder().eval()(mel).last_hidden_state
    out = ours.tokens(audio=sounds)["audio"]
    assert out.x.shape == (3, 50, 32)
    assert_close(out.x, expected, **CLOSE)
    assert_close(ours(audio=sounds)["audio"], expected.mean(1), **CLOSE)


def test_a_folder_may_vanish_after_the_export(folder, tmp_path):
    pytest.importorskip("transformers")
    path = towers.folder("gpt2", tmp_path / "gpt2")
    b = headwater.hub.Backbone(Model(transformers_tower.towers(str(path), True)), {}).eval()
    expected = b.embed(text=TEXTS)
    made = headwater.save_backbone(b.model, tmp_path / "b")
    for file in path.iterdir():
        file.unlink()
    assert_close(headwater.load_backbone(made).embed(text=TEXTS), expected)


def test_shared_weights_are_written_once_and_stay_shared(folder):
    pytest.importorskip("transformers")
    encoder = transformers_tower.make(str(folder("gpt2")))
    state = encoder.state_dict()
    assert "tower.wte.weight" in state
    assert not [key for key in state if key.startswith("head.")]
    again = transformers_tower.make(str(folder("gpt2")))
    again.load_state_dict(state)
    assert again.head.lm_head.weight is again.tower.wte.weight
    with pytest.raises(RuntimeError, match="wpe"):
        again.load_state_dict({key: value for key, value in state.items() if "wpe" not in key})


def test_what_cannot_be_done_is_said(folder, tmp_path):
    pytest.importorskip("transformers")
    t5 = transformers_tower.make(str(folder("t5")))
    with pytest.raises(ValueError, match="no head that generates"):
        t5.unembed(torch.zeros(1, 1, 32))
    t = t5.embed(t5.reader.tokens(TEXTS[0]).map(lambda field: field[None]))
    with pytest.raises(ValueError, match="counts places itself"):
        t5(t.take(torch.tensor([[0, 2]])))
    with pytest.raises(ValueError, match=r"no transformers model at .*config.json"):
        transformers_tower.make(str(tmp_path))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    path = towers.folder("bert", tmp_path / "bert")
    weights = load_file(path / "model.safetensors")
    weights.pop("bert.encoder.layer.1.output.dense.weight")
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of BertForMaskedLM.*layer.1.output.dense.weight"):
        transformers_tower.towers(str(path), True)
    assert "text" in transformers_tower.towers(str(path), False)


@torch.no_grad()
def test_sliding_windows_stay(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {**towers.SHAPE, "vocab_size": 24, "num_key_value_heads": 1, "sliding_window": 3, "bos_token_id": 1, "eos_token_id": 2}
    theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**shape, pad_token_id=0)).eval()
    theirs.save_pretrained(tmp_path)
    towers.tokenizer("llama").save_pretrained(tmp_path)
    encoder = transformers_tower.encoder(str(tmp_path), True).eval()
    raw = collate([{"it": encoder.reader.tokens(text)} for text in TEXTS], ["it"], [[0, 1], [2]])["it"]
    out = encoder(encoder.embed(raw), causal=True)
    for s in range(3):
        mine = raw.sample() == s
        expected = theirs.model(raw.x[mine & raw.real()][None]).last_hidden_state[0]
        assert_close(out.x[mine & raw.real()], expected, **CLOSE)
    t = encoder.embed(raw.map(lambda field: field[:1])._replace(document=None))
    with pytest.raises(ValueError, match="counts places itself"):
        encoder(t.take(torch.tensor([[0, 2]])))
    with pytest.raises(ValueError, match="room for texts of"):
        transformers_tower.TransformersText(str(folder("gpt2")), length=49)


def test_positions_may_be_anywhere(folder):
    """A text that begins later is the same text; learned positions are looked up where the tokens say."""
    pytest.importorskip("transformers")
    llama, bert = (transformers_tower.make(str(folder(kind))).eval() for kind in ("llama", "bert"))
    for encoder, moves in ((llama, False), (bert, True)):
        t = encoder.reader.tokens(TEXTS[0]).map(lambda field: field[None])
        late = Tokens(t.x, t.position + 5)
        same = [encoder(encoder.embed(tokens), causal=True).x for tokens in (t, late)]
        assert torch.allclose(*same, atol=1e-5) != moves


def test_a_tower_that_sees_whole_pictures_can_have_parts_of_them_masked():
    model = Model({"image": "timm/test_resnet"})
    encoder = model.encoders["image"]
    objective = Masked(model, ratio=0.5, mode="substitute")
    raw = collate([{"image": t} for t in encoder.reader.example(2, 0)], ["image"])["image"]
    batch = {"image": encoder.reader.prepare(raw), "seed": torch.arange(2), "sample": torch.arange(2)}
    (term,) = objective(model, objective.task(batch)).values()
    term.total.backward()
    (mask,) = objective.way.mask.values()
    assert mask.shape == (encoder.features,)
    assert mask.grad.any()
