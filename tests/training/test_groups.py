"""Groups: a partition of what trains, layers counted as timm counts them, rules by name."""

import pytest
import torch
from torch import nn

from headwater.fusion import JointTokens
from headwater.init import MuP, factors
from headwater.modalities import Image, Text
from headwater.model import Model
from headwater.objectives import Masked
from headwater.pretrainer import Pretrainer
from headwater.training.groups import Groups, Rule, check_options, depths
from headwater.trunk import Trunk


def make(fusion=True, registers=0, **options):
    def small(depth):
        return Trunk(16, depth=depth, heads=2, mlp_ratio=2.0, registers=registers, entry_norm=True)

    model = Model(
        {"image": Image(small(3), size=16), "text": Text(small(2), length=24)},
        (lambda w: JointTokens(w, small(2))) if fusion else None,
        space=8,
    )
    return Pretrainer(model, lambda m: Masked(m, "image", ratio=0.5, width=16), **options)


def by_name(module, groups):
    """Parameter -> its group, without parameters."""
    names = {id(p): n for n, p in module.named_parameters()}
    return {names[id(p)]: {k: v for k, v in group.items() if k != "params"} for group in groups for p in group["params"]}


def test_groups_partition_what_trains():
    pretrainer = make(registers=1)
    pretrainer.backbone.encoder("text").head.weight.requires_grad_(False)
    groups = Groups(0.7, [Rule("bias$", factor=0.5), Rule("encoders.text", weight_decay=0.3, options={"betas": [0.5, 0.9]})]).of(
        pretrainer
    )
    every = [id(p) for group in groups for p in group["params"]]
    assert len(set(every)) == len(every)
    assert set(every) == {id(p) for p in pretrainer.parameters() if p.requires_grad}
    assert id(pretrainer.backbone.encoder("text").head.weight) not in every


def test_plain_groups_are_matrices_and_the_rest():
    pretrainer = make(registers=1)
    found = by_name(pretrainer, Groups().of(pretrainer))
    assert len(Groups().of(pretrainer)) == 3
    for name, p in pretrainer.named_parameters():
        still = p.ndim < 2 or name == "backbone.encoders.text.stem.weight"
        assert ("weight_decay" in found[name]) == still, name
    hidden = {name for name, group in found.items() if group.get("hidden")}
    assert "backbone.encoders.image.trunk.blocks.0.attn.qkv.weight" in hidden
    assert "backbone.fusion.trunk.blocks.1.mlp.fc2.weight" in hidden
    assert not {n for n in hidden if "head" in n or "stem" in n or "registers" in n or n.endswith("bias")}


def test_layers_of_our_trunks_slow_down_with_depth():
    pretrainer = make(registers=1)
    deep = depths(pretrainer)
    image, text, fusion = "backbone.encoders.image.", "backbone.encoders.text.", "backbone.fusion."
    for block in range(3):
        assert deep[f"{image}trunk.blocks.{block}.attn.qkv.weight"] == 3 - block
    assert {deep[f"{image}{n}"] for n in ("stem.weight", "stem.bias", "trunk.registers", "trunk.norm_pre.weight")} == {4}
    assert {deep[f"{image}{n}"] for n in ("trunk.norm.weight", "head.weight")} == {0}
    assert (
        deep[f"{text}stem.weight"],
        deep[f"{text}trunk.blocks.0.norm1.weight"],
        deep[f"{fusion}trunk.blocks.1.mlp.fc1.bias"],
    ) == (3, 2, 1)
    found = by_name(pretrainer, Groups(0.5).of(pretrainer))
    for name, group in found.items():
        assert group.get("factor", 1.0) == 0.5 ** deep.get(name, 0)
        assert name.startswith("backbone.") or "factor" not in group
    assert "factor" not in found["backbone.projections.image.weight"]


def test_layers_rules_and_mup_multiply():
    pretrainer = make(init=MuP(base=4))
    given = factors(pretrainer, pretrainer.init)
    name = "backbone.encoders.image.trunk.blocks.1.attn.qkv.weight"
    assert given[name] == 4 / 16
    rules = [Rule("encoders.image", factor=0.1), Rule("qkv", factor=3.0, weight_decay=0.2), Rule(r"blocks\.1", weight_decay=0.4)]
    found = by_name(pretrainer, Groups(0.5, rules).of(pretrainer, given))
    assert found[name] == {"factor": pytest.approx(0.25 * 0.5**2 * 0.1 * 3), "weight_decay": 0.4, "hidden": True}
    assert found["backbone.encoders.text.trunk.blocks.1.attn.qkv.weight"]["factor"] == pytest.approx(0.25 * 0.5 * 3)
    assert found["backbone.encoders.image.trunk.blocks.1.attn.qkv.bias"]["weight_decay"] == 0.4


def test_options_reach_the_optimizer():
    pretrainer = make()
    groups = Groups(rules=[Rule("^objective", options={"betas": [0.5, 0.9]}), Rule("head", options={"hidden": False})]).of(
        pretrainer
    )
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    check_options(optimizer, groups)
    betas = {name: group["betas"] for name, group in by_name(pretrainer, optimizer.param_groups).items()}
    assert all(pair == ((0.5, 0.9) if name.startswith("objective") else (0.9, 0.999)) for name, pair in betas.items())
    typo = Groups(rules=[Rule("^objective", options={"beta": 0.5})]).of(pretrainer)
    with pytest.raises(ValueError, match="'beta' for AdamW; expected one of: amsgrad, betas"):
        check_options(torch.optim.AdamW(typo), typo)


def test_a_rule_for_nothing_is_an_error_that_names_what_is_near():
    pretrainer = make()
    with pytest.raises(ValueError, match=r"matches no parameter.*Near it: .*encoders\.image"):
        Groups(rules=[Rule(r"^backbone\.encoder\.image")]).of(pretrainer)
    pretrainer.backbone.encoder("text").requires_grad_(False)
    with pytest.raises(ValueError, match=r"all frozen, such as backbone\.encoders\.text"):
        Groups(rules=[Rule("encoders.text")]).of(pretrainer)
    with pytest.raises(ValueError, match="as hidden; expected a matrix"):
        Groups(rules=[Rule("bias", options={"hidden": True})]).of(pretrainer)


@pytest.mark.parametrize(
    ("make_it", "match"),
    [
        (lambda: Rule("("), "no regular expression"),
        (lambda: Rule("a", factor=0.0), "freeze it"),
        (lambda: Rule("a", weight_decay=-1.0), "0 or more"),
        (lambda: Rule("a", options={"lr": 1.0}), "use its factor"),
        (lambda: Groups(0.0), "above 0 and up to 1"),
        (lambda: Groups(1.5), "above 0 and up to 1"),
        (lambda: Groups(0.5).of(nn.Linear(2, 2)), "made of blocks"),
        (lambda: Groups().of(nn.Linear(2, 2).requires_grad_(False)), "everything is frozen"),
    ],
)
def test_bad_settings_are_refused(make_it, match):
    with pytest.raises(ValueError, match=match):
        make_it()


def deep_of(encoder):
    return {name.removeprefix("encoders.it."): depth for name, depth in depths(Model({"it": encoder})).items()}


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
def test_towers_of_timm_are_counted_as_timm_counts_them(name):
    import timm
    from timm.optim import param_groups_layer_decay

    from headwater.modalities.timm_tower import make as tower

    encoder = tower(name)
    found = by_name(encoder, Groups(0.5).of(encoder))
    theirs = timm.create_model(name, num_classes=3)
    expected = {
        "tower." + n: scale
        for group in param_groups_layer_decay(theirs, layer_decay=0.5)
        for n, p in theirs.named_parameters()
        for scale in [group["lr_scale"]]
        if any(p is q for q in group["params"])
    }
    assert {n: group.get("factor", 1.0) for n, group in found.items()} == {n: expected[n] for n in found}
    assert min(expected.values()) < 0.2
    if name == "test_vit":
        assert all("weight_decay" in found[f"tower.{n}"] for n in ("pos_embed", "cls_token"))
        assert found["tower.blocks.0.attn.qkv.weight"]["hidden"]


def test_towers_of_open_clip(tmp_path):
    import open_clip
    from towers import open_clip_config

    from headwater.modalities.open_clip_tower import OpenClipImage, OpenClipText

    open_clip_config("groups-plain", "plain", tmp_path / "tokens")
    assert "groups-plain" in open_clip.list_models()
    image, text = OpenClipImage("groups-plain"), OpenClipText("groups-plain")
    deep = deep_of(image)
    assert [deep[f"tower.transformer.resblocks.{i}.attn.in_proj_weight"] for i in (0, 1)] == [2, 1]
    assert {deep[f"tower.{n}"] for n in ("class_embedding", "positional_embedding", "conv1.weight", "ln_pre.weight")} == {3}
    assert {deep.get(f"tower.{n}", 0) for n in ("proj", "ln_post.weight")} == {0}
    deep = deep_of(text)
    assert [deep[f"tower.resblocks.{i}.mlp.c_fc.weight"] for i in (0, 1)] == [2, 1]
    assert {deep[n] for n in ("tokens.weight", "position")} == {3}
    assert {deep.get(n, 0) for n in ("projection", "norm.weight")} == {0}
    hidden = {n for n, g in by_name(text, Groups().of(text)).items() if g.get("hidden")}
    assert "tower.resblocks.0.attn.in_proj_weight" in hidden
    assert not hidden & {"tokens.weight", "position", "projection"}


@pytest.mark.parametrize(
    ("kind", "first", "last", "stem", "behind"),
    [
        ("gpt2", "tower.h.0.attn.c_attn.weight", "tower.h.1.attn.c_attn.weight", "tower.wpe.weight", "tower.ln_f.weight"),
        (
            "llama",
            "tower.layers.0.mlp.up_proj.weight",
            "tower.layers.1.mlp.up_proj.weight",
            "tower.embed_tokens.weight",
            "tower.norm.weight",
        ),
        (
            "bert",
            "tower.encoder.layer.0.output.dense.weight",
            "tower.encoder.layer.1.output.dense.weight",
            "tower.embeddings.LayerNorm.weight",
            "head.cls.predictions.transform.dense.weight",
        ),
        (
            "wav2vec2",
            "tower.encoder.layers.0.feed_forward.output_dense.weight",
            "tower.encoder.layers.1.feed_forward.output_dense.weight",
            "tower.feature_projection.projection.weight",
            None,
        ),
    ],
)
def test_towers_of_transformers(tmp_path, kind, first, last, stem, behind):
    from towers import folder

    from headwater.modalities.transformers_tower import encoder

    made = encoder(str(folder(kind, tmp_path / kind)), False)
    deep = deep_of(made)
    assert (deep[first], deep[last]) == (2, 1)
    assert deep[stem] == 3
    assert behind is None or deep.get(behind, 0) == 0
    found = by_name(made, Groups(0.5).of(made))
    assert (found[first]["hidden"], found[first]["factor"]) == (True, 0.25)
    assert all("weight_decay" in group for name, group in found.items() if "embed_tokens" in name or "wte" in name)
