"""What the contract tests sweep over: every exported encoder, fusion and objective, and the batches they meet.

An export whose arguments all have defaults is swept by itself; one that needs arguments gets a line in a table below.
"""

import copy
import inspect
from functools import partial
from pathlib import Path

import numpy as np
import torch

from headwater import fusion, modalities, objectives, random
from headwater.datamodules.collate import collate
from headwater.datamodules.plan import pack
from headwater.modalities.bottlenecks import FSQ, KL, VQ, Gumbel, Plain
from headwater.modalities.label import Numbers
from headwater.modalities.record_turns import Template
from headwater.modalities.record_values import Binned, Choice, FreeText
from headwater.model import Encoder, Model
from headwater.objectives import (
    Anchored,
    Balanced,
    Causal,
    Contrastive,
    Distilled,
    Dropped,
    Flow,
    Latent,
    Masked,
    Matched,
    Paired,
    Related,
    Weighted,
    label_losses,
    transformed,
)
from headwater.objectives.comparison import Prototypes, Regression
from headwater.objectives.contrast.consistency import Consistent
from headwater.objectives.contrast.gaussian import Gaussian
from headwater.objectives.contrast.hard_negatives import HardNegatives, WithoutFalse
from headwater.objectives.contrast.losses import Bound, Margin, Sigmoid
from headwater.objectives.contrast.positives import Alike, SameLabel
from headwater.objectives.contrast.scores import Cosine
from headwater.objectives.contrast.soft_positives import Momentum, Nearest, NoiseAware
from headwater.objectives.contrast.token_sets import LateInteraction, Transport
from headwater.objectives.flow import Times
from headwater.objectives.likelihood import Anchor, Confidence, HashDrop, Likelihood, Rewarded, Soft, Tempered
from headwater.objectives.masks.policies import Blocks, Spans, Suffix, Uniform, Units, Words
from headwater.objectives.masks.salient import Salient
from headwater.objectives.noise import Delete, GapSentences, Prefix, Reconstruction, Replace, Shuffle, SpanCorruption
from headwater.objectives.reconstructed import Adversary, Perceptual
from headwater.objectives.replaced import AnyId, Elsewhere, Unigram
from headwater.objectives.self_distillation import Hidden
from headwater.objectives.targets.codes import Clusters, Quantiser, RandomProjection
from headwater.objectives.targets.features import Features
from headwater.objectives.targets.target import Places, Values
from headwater.objectives.weighted import Alternate, Draw
from headwater.process import Process
from headwater.tokens import Tokens
from headwater.trunk import Trunk

SMALL = {"size": 16, "patch": 8, "bands": 4, "frames": 4, "length": 24, "width": 16, "depth": 1}  # argument -> a value for tests


def small(cls, *given):
    """`cls` with cheap values for the arguments in SMALL; `given` fills its first arguments. None when others are required."""
    rest = list(inspect.signature(cls).parameters.values())[len(given) :]
    if any(p.default is p.empty and p.name not in SMALL for p in rest):
        return None
    return partial(cls, *given, **{p.name: SMALL[p.name] for p in rest if p.name in SMALL})


def trunk(width=16, **options):
    return Trunk(width, depth=1, heads=2, mlp_ratio=2.0, **options)


def exports(package):
    return [cls for cls in (getattr(package, name) for name in package.__all__) if isinstance(cls, type)]


def deeper(t):
    """The same kind of trunk with two blocks."""
    return Trunk(**t.spec["init_args"] | {"depth": 2})


FIXTURES = Path(__file__).parent.parent / "fixtures"

KINDS = {"what": FreeText(), "size": Binned(bins=4), "kind": Choice(["near", "far"])}
ANSWERS = Template("{what}\nHow?", "{size} {kind}", KINDS)

# encoders: name -> function of a trunk
robotic = (modalities.Action, modalities.ActionTokens, modalities.State)  # want to know the size
plain = [cls for cls in exports(modalities) if issubclass(cls, Encoder) and small(cls, None) and cls not in robotic]
ENCODERS = {cls.__name__: partial(lambda cls, t: small(cls, t)(), cls) for cls in plain} | {
    "Action choices": lambda t: modalities.Action(t, choices=5),
    "Action slots": lambda t: modalities.Action(t, slots=3),
    "Action chunks": lambda t: modalities.Action(t, slots=["x", "y", "gripper"], chunk=2),
    "ActionTokens bins": lambda t: modalities.ActionTokens(t, slots=3),
    "ActionTokens fast": lambda t: modalities.ActionTokens(t, "fast", slots=2, tokenizer=str(FIXTURES / "fast.json")),
    "ActionTokens words": lambda t: modalities.ActionTokens(t, "words", slots=2),
    "State": lambda t: modalities.State(t, slots=3),
    "Audio patches": lambda t: modalities.Audio(t, bands=4, frames=4, height=2),
    "Autoencoder": lambda t: modalities.Autoencoder(modalities.Image(t, 16, 8), VQ(16, 4), trunk(12)),
    "Autoencoder residual": lambda t: modalities.Autoencoder(
        modalities.Action(t, slots=3), VQ(8, 4, 2, normalise=False, decay=0.9), trunk(12), causal=True
    ),
    "Tokenised": lambda t: modalities.Tokenised(
        modalities.Autoencoder(modalities.Image(trunk(), 16, 8), FSQ((5, 4)), trunk(12)), t
    ),
    "Tokenised residual": lambda t: modalities.Tokenised(
        modalities.Autoencoder(modalities.Video(trunk(), 16, 8, frames=4), VQ(8, 4, 2, normalise=False), trunk(12)), t
    ),
    "Tokenised vectors": lambda t: modalities.Tokenised(
        modalities.Autoencoder(modalities.Series(trunk(), channels=3, steps=4), KL(4), trunk(12)), t
    ),
    "Codec flatten": lambda t: modalities.Codec(t, codebooks=3, size=16, pattern="flatten"),
    "Graph": lambda t: modalities.Graph(t, node_features=2, edge_features=1),
    "Graph directed": lambda t: modalities.Graph(t, node_features=1, nodes=24, directed=True),
    "Image native": lambda t: modalities.Image(t, 24, 8, "native"),
    "Points": lambda t: modalities.Points(t, groups=6, neighbours=4),
    "Points extra": lambda t: modalities.Points(t, groups=4, neighbours=8, extra=1),
    "Records": lambda t: modalities.Records(t, ANSWERS, length=64),
    "Series": lambda t: modalities.Series(t, channels=3, steps=4),
    "Series joint": lambda t: modalities.Series(t, channels=2, steps=4, joint=True, scale=2.0),
    "Spectral": lambda t: modalities.Spectral(t, [100.0, 50.0, 7.0], [30.0, 20.0, 2.0], [[0, 2], [1]], 16, 8),
    "Table": lambda t: modalities.Table(t, {"age": [40.0, 12.0], "income": [1.0, 2.0, 30.0]}, {"kind": ["a", "b", "c"]}),
    "Video factorised": lambda t: modalities.Video(deeper(t), 16, 8, frames=4, attention="factorised"),
    "Wave": lambda t: modalities.Wave(t, rate=1600, channels=8, kernels=(10, 4), strides=(5, 4)),
}

prefix = partial(fusion.Project, modalities=["latent"])

# fusions: name -> function of {modality: width}
FUSIONS = {cls.__name__: partial(lambda cls, w: small(cls, w)(), cls) for cls in exports(fusion) if small(cls, None)} | {
    "JointTokens": lambda widths: fusion.JointTokens(widths, trunk()),
    "JointTokens levels": lambda widths: fusion.JointTokens(widths, trunk(), levels={"text": 1}),
    "Bottleneck": lambda widths: fusion.Bottleneck(widths, 2, width=16, heads=2, mlp_ratio=2.0),
    "Chain": lambda widths: fusion.Chain(widths, [partial(fusion.Resampler, queries=3, depth=1), prefix], last="text"),
    "Chain complete": lambda widths: fusion.Chain(
        widths, [partial(fusion.Complete, modalities=["text", "action"], queries=2), FUSIONS["JointTokens"]]
    ),
    "Complete": lambda widths: fusion.Complete(widths, ["text", "action"], queries=2, heads=2),
    "CrossAttend": lambda widths: fusion.CrossAttend(widths, heads=2, mlp_ratio=2.0),
    "CrossAttend gated": lambda widths: fusion.CrossAttend(
        widths, {"text": [n for n in widths if n != "text"]}, heads=2, mlp_ratio=2.0, gated=True
    ),
    "MixtureOfTransformers": lambda widths: fusion.MixtureOfTransformers(widths, trunk(qk_norm=True, layer_scale=0.5)),
    "MixtureOfTransformers mlp": lambda widths: fusion.MixtureOfTransformers(widths, trunk(), separate="mlp"),
    "Project": lambda widths: fusion.Project(widths),
    "Project mlp": lambda widths: fusion.Project(widths, mlp=True),
    "Resampler": lambda widths: fusion.Resampler(widths, queries=3, depth=1, heads=2),
    "Routed": lambda widths: fusion.Routed(widths, trunk(), experts=3, every=1),
    "Routed one": lambda widths: fusion.Routed(widths, trunk(gated=True), experts=2, top=1, shared=True, every=1),
    "Routed skills": lambda widths: fusion.Routed(widths, trunk(), every=1, skills={n: [n, "common"] for n in widths}),
}

# objectives: name -> function of a model, made by `model()`
PARTS = {
    "mask": partial(Masked, modality="text", mode="substitute"),
    "pair": partial(Contrastive, a="action", b="choice"),
    "next": partial(Causal, modality="audio"),
}
OBJECTIVES = {
    cls.__name__: small(cls, None).func
    for cls in exports(objectives)
    if cls not in (objectives.Objective, objectives.Term) and small(cls, None)
} | {
    "Causal prefix": partial(Causal, prefix=["image"]),
    "Causal context": partial(Causal, modality="choice", context=["video"]),
    "Causal vectors": partial(Causal, modality="video", context=["action"]),
    "Causal likelihood": lambda model: Causal(
        model, likelihood=Likelihood(Tempered(0.5), [Confidence(0.05)], HashDrop(k=3, h=1), Anchor(0.01, power=1.0), Soft(0.05))
    ),
    "Causal rewarded": lambda model: Causal(
        model, likelihood=Likelihood(weights=[Rewarded(Numbers(["reward"]), beta=4.0, label="label")])
    ),
    "Conditioned": partial(objectives.Conditioned, reader=modalities.Facts(["a", "b"]), rate=0.7, label="label"),
    "Conditioned pair": partial(
        objectives.Conditioned,
        reader=modalities.Facts(["a"]),
        inner=partial(Contrastive, a="text", b="image"),
        rate=0.5,
        label="label",
    ),
    "MultiToken": partial(objectives.MultiToken, weights=(0.3, 0.1)),
    "MultiToken chained": partial(objectives.MultiToken, prefix=["image"], weights=(0.3, lambda _: 0.1), chained=True),
    "MultiToken vectors": partial(objectives.MultiToken, modality="audio", chained=True),
    "Registers": partial(objectives.Registers, prefix=["image"], farthest=3, share=0.8),
    "Registers vectors": partial(objectives.Registers, modality="video", context=["action"], farthest=2),
    "Prefixed": partial(objectives.Prefixed, inner=partial(Causal, prefix=["image"]), known=(0.1, 0.7)),
    "Prefixed patches": partial(objectives.Prefixed, inner=partial(Causal, modality="image"), known=(0.2, 0.6)),
    "Prefixed video": partial(objectives.Prefixed, inner=partial(Causal, modality="video", context=["action"])),
    "Roles": lambda model: objectives.Roles(recorded(model)),
    "Slots": partial(objectives.Slots, context=["video"], slots=2, passes=1),
    "Slots pauses": partial(objectives.Slots, modality="audio", passes=0),
    "Contrastive sounds": partial(Contrastive, a="audio", b="video"),
    "Contrastive pairs": partial(
        Contrastive, pairs=[("image", "text", 1), ("text", "action", 0.5), ("image", "action", 2)], tile=12
    ),
    "Contrastive sigmoid": partial(Contrastive, loss=partial(Sigmoid, bias=-2.0), tile=12),
    "Contrastive margin": partial(Contrastive, loss=partial(Margin, others="all"), directions="back"),
    "Contrastive bound": partial(Contrastive, loss=Bound, tile=12),
    "Contrastive views": partial(Contrastive, a="image@0", b="image@1", score=partial(Cosine, head=[12, 6]), within=True),
    "Contrastive late": partial(Contrastive, score=LateInteraction, tile=12),
    "Contrastive query": partial(Contrastive, score=partial(LateInteraction, query="text", reduce="sum", top=2, merge=2)),
    "Contrastive transport": partial(Contrastive, score=partial(Transport, steps=3), tile=12),
    "Contrastive gaussian": partial(Contrastive, score=partial(Gaussian, wide="text"), loss=partial(Sigmoid, bias=5.0)),
    "Contrastive consistent": partial(Contrastive, score=partial(Consistent, tile=2)),
    "Contrastive label": partial(Contrastive, positives=partial(SameLabel, label=modalities.Category(3)), tile=12),
    "Contrastive alike": partial(Contrastive, positives=partial(Alike, label=modalities.Categories(["a", "b", "c"]))),
    "Contrastive hard": partial(
        Contrastive,
        positives=partial(HardNegatives, alpha=0.5, inner=partial(SameLabel, label=modalities.Category(3), share="by score")),
        queue=10,
    ),
    "Contrastive without false": partial(Contrastive, positives=partial(WithoutFalse, above=0.5), within=True),
    "Contrastive momentum": partial(Contrastive, positives=partial(Momentum, temperature=0.5), momentum=0.9, queue=10),
    "Contrastive nearest": partial(Contrastive, positives=partial(Nearest, k=2), queue=10),
    "Contrastive noise": partial(Contrastive, positives=partial(NoiseAware, warmup=1, toward="uniform")),
    "Contrastive past": partial(Contrastive, score=partial(Cosine, head=[6], norm="layer"), momentum=0.9, queue=10),
    "Denoising": lambda model: objectives.Denoising(marked(model)),
    "Denoising several": lambda model: objectives.Denoising(
        marked(model),
        denoisers={
            "short": SpanCorruption(mode=0),
            "words": SpanCorruption(0.5, policy=Words([32]), mode=1),
            "prefix": Prefix((0.3, 1.0), mode=2),
            "causal": Prefix((1.0, 1.0)),
        },
        shares={"prefix": lambda _: 2.0},
        context=["image"],
        places="blanks",
    ),
    "Denoising whole": lambda model: objectives.Denoising(
        marked(model),
        denoisers={"noise": Reconstruction(), "gap": GapSentences(ends=[32], size=2)},
        likelihood=Likelihood(Tempered(0.5), drop=HashDrop(k=3, h=1)),
    ),
    "Denoising choices": partial(
        objectives.Denoising,
        modality="choice",
        denoisers={"noise": Reconstruction([Delete(0.2), Shuffle(2), Replace(0.2)]), "prefix": Prefix()},
        context=["video"],
    ),
    "Denoising into": lambda model: objectives.Denoising(
        marked(model, "source"), denoisers={"spans": SpanCorruption(0.3, 2.0), "causal": Prefix((1.0, 1.0))}, into="source"
    ),
    "DiscreteDiffusion codes": lambda model: objectives.DiscreteDiffusion(coded(model, FSQ((5, 4))), "image", ["text"]),
    "DiscreteDiffusion uniform": partial(objectives.DiscreteDiffusion, modality="choice", corruption="uniform", unroll=0.5),
    "DiscreteDiffusion context": partial(
        objectives.DiscreteDiffusion, context=["image"], schedule="cosine", weight="equal", unroll=1.0, fill=True
    ),
    "Flow context": partial(Flow, modality="action", context=["text"]),
    "Flow latents": lambda model: Flow(coded(model, KL(4)), context=["text"]),
    "Flow v": lambda model: denoised(model, "image", Process("cosine", "v"), times=Times(None), most=5.0),
    "Flow steps": lambda model: denoised(
        model, "action", Process("linear", "noise"), context=["text"], past=["video"], each="step"
    ),
    "Flow told": lambda model: denoised(model, "audio", Process(predicts="signal", told=["choice"]), times=Times(0.5, 1.0, 3.0)),
    "Masked clusters": partial(Masked, modality="audio", ratio=0.4, width=16, target=partial(Clusters, size=4)),
    "Masked clusters of a tower": lambda model: Masked(
        model, "image", 0.4, "substitute", target=partial(Clusters, size=4, tower=trained("image"), layer=1)
    ),
    "Masked projection": partial(
        Masked, modality="video", ratio=0.4, mode="substitute", target=partial(RandomProjection, size=8, width=4), policy=Spans(2)
    ),
    "Masked quantiser": partial(
        Masked, modality="audio", ratio=0.5, mode="substitute", loss="select", target=partial(Quantiser, books=2, codes=5, size=6)
    ),
    "Masked features": partial(
        Masked, modality="audio", ratio=0.5, mode="substitute", loss="smooth", target=partial(Features, top=1, norm="sample")
    ),
    "Masked features of words": partial(Masked, modality="text", ratio=0.3, mode="substitute", target=partial(Features, top=1)),
    "Masked features of a tower": lambda model: Masked(
        model, "image", 0.5, width=16, loss="cosine", target=partial(Features, tower=trained("image"))
    ),
    "Replaced original": partial(objectives.Replaced, generator=Unigram, ask="original", over="hidden", ratio=0.3, weight=1.0),
    "Replaced elsewhere": partial(objectives.Replaced, generator=Elsewhere, ratio=0.4, context=["image"]),
    "Replaced choices": partial(objectives.Replaced, modality="choice", generator=AnyId, ratio=0.4, over="hidden"),
    "Masked tubes": partial(Masked, modality="video", policy=Units([1, 2]), target=partial(Values, normalize=True), width=16),
    "Masked context": partial(Masked, modality="audio", ratio=0.4, context=["video", "text"], policy=Spans(2), width=16),
    "Masked ids": partial(Masked, modality="text", ratio=0.3, mode="substitute", policy=Words([32]), keep=0.1, swap=0.2),
    "Masked select": partial(Masked, modality="audio", ratio=0.6, mode="substitute", loss="select"),
    "Masked several": partial(
        Masked,
        modality=["image", "audio", "text"],
        deal=True,
        whole=0.3,
        loss={"image": "smooth", "audio": "cosine"},
        weights={"text": 0.5},
        width=16,
    ),
    "Masked salient": partial(
        Masked,
        modality=["image", "action"],
        ratio={"image": 0.5, "action": 0.4},
        mode="substitute",
        policy={"image": Salient(), "action": Salient("loss", most=False, temperature=0.5)},
        loss="absolute",
    ),
    "Masked places": partial(
        Masked, ratio=0.5, mode="locate", policy=Blocks(), target=partial(Places, cells=[1, 2, 2]), context=["text"]
    ),
    "Interleaved both ways": partial(objectives.Interleaved, flip=0.5, weights={"image": 0.5}),
    "Interleaved ordered": partial(
        objectives.Interleaved,
        modalities=["text", "video", "choice"],
        likelihood=Likelihood(weights=[Rewarded(Numbers(["reward"]), "linear", label="label")], drop=HashDrop(k=3, h=1)),
    ),
    "JointEmbedding": partial(objectives.JointEmbedding, projector=[16, 8]),
    "JointEmbedding gaussian": partial(
        objectives.JointEmbedding, modalities=["text"], terms={"invariance": 1, "gaussian": 0.1}, views=3, projector=[8], slices=8
    ),
    "JointEmbedding pair": partial(
        objectives.JointEmbedding, modalities=["video", "action"], terms={"alignment": 1.0, "barlow": 0.1, "unit": 0.1}, views=0
    ),
    "JointEmbedding alone": partial(
        objectives.JointEmbedding, modalities=["action"], terms={"orthogonality": 0.1, "spread": 0.1}, views=0, projector=[]
    ),
    "Swapped": partial(objectives.Swapped, prototypes=4, temperature=0.3, entropy=0.2),
    "Swapped shared": partial(objectives.Swapped, a="audio@0", b="audio@1", prototypes=4, shared=True, entropy=0.2),
    "Reconstructed": lambda model: objectives.Reconstructed(
        squeezed(model, "image", VQ(8, 4)),
        distance="absolute",
        perceptual=lambda m, n: Perceptual(m, n, trained(n)),
        adversary=partial(Adversary, trunk=trunk(8)),
    ),
    "Reconstructed moving": lambda model: objectives.Reconstructed(
        squeezed(model, "audio", VQ(8, 4, 2, normalise=False, decay=0.8, revive=0.3), causal=True), "audio"
    ),
    "Reconstructed words": lambda model: objectives.Reconstructed(
        squeezed(model, "text", FSQ((4, 3)), codes="registers", pooling="registers"), "text"
    ),
    "Reconstructed drawn": lambda model: objectives.Reconstructed(squeezed(model, "video", KL(4)), "video", weight=0.01),
    "Reconstructed gumbel": lambda model: objectives.Reconstructed(squeezed(model, "action", Gumbel(6, 4)), "action"),
    "Reconstructed frozen": lambda model: objectives.Reconstructed(
        squeezed(model, "image", Plain(noise=0.2), frozen=True), "image"
    ),
    "Regions views": partial(
        objectives.Regions,
        a="image@0",
        b="image@1",
        regions={f"image@{k}": modalities.Cells(2, follows=f"image@{k}") for k in (0, 1)},
        near=0.0,
        tile=12,
    ),
    "Regions phrases": partial(
        objectives.Regions,
        a="image",
        b="text",
        regions={"image": modalities.Boxes(), "text": modalities.Numbers(["first", "last"], [0, -9], [1.0, 0.5])},
        near=0.0,
    ),
    "Regions sample": partial(objectives.Regions, a="video", b="action", span=2.0, near=1.0, negatives="sample"),
    "SelfDistillation": partial(objectives.SelfDistillation, compare=partial(Prototypes, prototypes=12, sizes=[16, 8])),
    "SelfDistillation audio": partial(
        objectives.SelfDistillation, modality="audio", larges=1, smalls=2, compare=partial(Regression, sizes=[16], hidden=8)
    ),
    "SelfDistillation hidden": partial(
        objectives.SelfDistillation,
        compare=partial(Prototypes, prototypes=12, sizes=[16, 8], balance="sinkhorn"),
        smalls=1,
        hidden=Hidden(Uniform(), share=0.8),
        spread=0.1,
    ),
    "SelfDistillation still": partial(
        objectives.SelfDistillation, modality="text", momentum=None, smalls=0, compare=partial(Regression, sizes=[16, 8], hidden=8)
    ),
    "Supervised": partial(objectives.Supervised, label=modalities.Category(3), told=True),
    "Supervised tags": partial(
        objectives.Supervised,
        label=modalities.Categories(["a", "b", "c"]),
        modality="text",
        loss=label_losses.Binary,
        context=["audio"],
        weight=modalities.Numbers(["sure"]),
    ),
    "Supervised order": partial(
        objectives.Supervised, label=modalities.Category(4), modality="audio", loss=label_losses.Ordinal, unit="token"
    ),
    "Supervised votes": partial(
        objectives.Supervised, label=modalities.Categories(["a", "b"]), modality="video", loss=label_losses.Votes, unit="token"
    ),
    "Supervised numbers": partial(
        objectives.Supervised,
        label=modalities.Numbers(["a", "b"], [1.0, 2.0], [0.5, 2.0]),
        modality="action",
        loss=partial(label_losses.Regression, delta=1.0),
    ),
    "Agreeing": partial(
        objectives.Agreeing, inner=partial(Contrastive, pairs=[("image", "text", 1), ("image", "audio", 0.5)]), modality="image"
    ),
    "CommonMinima": partial(objectives.CommonMinima, inner=partial(Weighted, parts=PARTS)),
    "Episodes": partial(objectives.Episodes, inner=partial(Weighted, parts=PARTS)),
    "Harmonised": partial(objectives.Harmonised, inner=partial(Weighted, parts=PARTS)),
    "Probed": partial(objectives.Probed, label=modalities.Category(3), through=False),
    "Probed numbers": partial(
        objectives.Probed, label=modalities.Numbers(["a", "b"]), modality="audio", unit="token", context=["text"]
    ),
    "VPretraining": partial(
        objectives.VPretraining,
        inner=partial(Masked, modality="image"),
        feedback=partial(objectives.Probed, label=modalities.Category(3)),
    ),
    "Transformed turned": partial(objectives.Transformed, modality="image", transform=transformed.Rotation()),
    "Transformed order": partial(objectives.Transformed, modality="text", transform=transformed.Permutation(3)),
    "Transformed speed": partial(objectives.Transformed, modality="text", transform=transformed.Speed([1, 2], 3)),
    "Positions": partial(objectives.Positions, cells=[1, 2, 2], seen=0.5),
    "Positions audio": partial(objectives.Positions, modality="audio", cells=[8]),
    "Shuffled": partial(objectives.Shuffled, modality="audio", length=8),
    "Shuffled context": partial(objectives.Shuffled, modality="text", ratio=(0.3, 1.0), length=24, context=["video"]),
    "Matching random": partial(objectives.Matching, a="video", b="action", negatives="random"),
    "Segments": partial(objectives.Segments, length=3),
    "Segments bilinear": partial(objectives.Segments, length=3, relations=["next", "other"], scorer="bilinear", negatives="hard"),
    "CTC": partial(objectives.CTC, label=modalities.Transcript("abc")),
    "Latent tubes": partial(
        Latent, modality="video", policy=Units([1, 2]), ratio=0.6, targets=1, context=["text"], distance="absolute", width=16
    ),
    "Latent window": partial(
        Latent,
        modality="audio",
        policy=Uniform(),
        ratio=0.3,
        targets=2,
        window=Uniform(),
        teacher="same",
        distance="cosine",
        width=16,
    ),
    "Latent ahead": partial(
        Latent, modality="video", ahead=1, prefix=["text"], context=["choice"], teacher="start", distance="squared", width=16
    ),
    "Latent flow": partial(Latent, modality="audio", policy=Suffix(), ratio=0.5, targets=1, distance="flow", width=16),
    "Latent from others": partial(
        Weighted,
        parts={
            "image": partial(Latent, ratio=1.0, targets=1, context=["text"], width=16),
            "text": partial(Latent, modality="text", ratio=1.0, targets=1, context=["image"], teacher="start", width=16),
        },
    ),
    "Paired beside next": partial(
        Weighted, parts={"next": partial(Causal, modality="text"), "pair": partial(Paired, b="choice", tokens=2)}
    ),
    "Paired both ways": partial(
        Weighted,
        parts={
            "forth": partial(Paired, a="audio", b="video", tokens=0, teacher="same", causal=False),
            "back": partial(Paired, a="video", b="audio", tokens=2, teacher="average", causal=False),
        },
    ),
    "Paired views": partial(Paired, a="audio@a", b="audio@b", causal=False),
    "Latent views": partial(
        Latent, modality="audio@b", policy=Uniform(), ratio=0.5, targets=1, context=["audio@a"], teacher="same", width=16
    ),
    "Distilled": partial(Distilled, inner=Causal, teachers=["start", "average"], temperature=2.0, top=9, mass=0.9),
    "Distilled hint": partial(
        Weighted,
        parts={
            "next": partial(Causal, prefix=["image"]),
            "alone": partial(
                Distilled, inner=Causal, guide=partial(Causal, prefix=["image"]), weight=lambda _: 0.2, match="cross_entropy"
            ),
        },
    ),
    "Distilled logits": partial(Distilled, inner=partial(Causal, modality="choice", context=["video"]), match="squared"),
    "Matched": lambda model: Matched(model, modalities.Image(trunk(24), 16, 4), "image"),  # it reads other patches
    "Matched blocks": lambda model: beside(model, "video", ENCODERS["Video"](trunk(24)), level="tokens", layers=(0, -1)),
    "Matched attention": lambda model: beside(model, "text", ENCODERS["Text"](Trunk(24, 1, 3)), level="attention"),
    "Related": lambda model: Related(model, other(image="Image"), "image"),
    "Related across": lambda model: Related(model, other(image="Image", text="Text"), "image", "text", temperature=0.2),
    "Weighted": partial(Weighted, parts=PARTS, weights={"mask": 0.5}),
    "Weighted per sample": partial(Weighted, parts=PARTS, turns=Draw({"mask": 2.0}, per="sample")),
    "Weighted in turn": partial(
        Weighted,
        parts={"a": partial(Causal, prefix=["audio"]), "b": partial(Causal, modality="audio", prefix=["text"])},
        turns=Alternate(),
        per_class=True,
    ),
    "Anchored": lambda model: displaced(Anchored(model, "encoders.text")),
    "Anchored fisher": lambda model: beside_anchor(model),
    "Balanced": lambda model: Balanced(routed(model), partial(Masked, modality="audio", context=["text"], width=16), z_weight=0.1),
    "Dropped": partial(
        Dropped, inner=partial(Masked, modality="audio", ratio=0.4, context=["text"], width=16), rates={"audio": 0.2, "text": 0.5}
    ),
    "Dropped weighted": partial(Dropped, inner=partial(Weighted, parts=PARTS), rates={"action": 0.3, "text": 0.3}),
}


def displaced(anchored):
    """As if the model had gone some way from where it started."""
    with torch.no_grad():
        for number, p in enumerate(anchored.anchor.parameters()):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
        for p in anchored.importance.parameters() if anchored.importance else ():
            p.fill_(2.0)
    return anchored


def beside_anchor(model):
    """What is learned anew, and a penalty that knows what mattered before."""
    parts = {"next": Causal, "anchor": lambda m: displaced(Anchored(m, "encoders.text", fisher=True))}
    return Weighted(model, parts, weights={"anchor": 0.01})


def beside(model, modality, teacher, **options):
    """What a match of inner parts leaves alone, another objective trains."""
    parts = {"mask": partial(Masked, modality=modality, mode="substitute"), "match": partial(Matched, teacher=teacher)}
    parts["match"] = partial(parts["match"], modality=modality, **options)
    return Weighted(model, parts)


def squeezed(model, modality, bottleneck, **options):
    """The model with an autoencoder around one of its encoders."""
    encoder = model.encoders[modality]
    model.encoders[modality] = modalities.Autoencoder(encoder, bottleneck, trunk(encoder.width), **options).double()
    return model


def other(**kinds):
    """A model to learn from: modality -> kind of encoder."""
    return Model({name: ENCODERS[kind](trunk(24)) for name, kind in kinds.items()}, space=12)


def trained(modality):
    """The encoder of another model, as a tower that was trained before."""
    return model(seed=5, fuse=None).encoder(modality)


def coded(model, bottleneck):
    """The model, which sees pictures as the codes of a tokeniser."""
    tokeniser = modalities.Autoencoder(modalities.Image(trunk(), 16, 8), bottleneck, trunk(12))
    model.encoders["image"] = modalities.Tokenised(tokeniser, trunk(conditional=True)).double()
    return model


def denoised(model, modality, process, **options):
    """Flow along another path than the model's own; see Model.processes."""
    model.processes[modality] = process
    return Flow(model, modality, **options)


def marked(model, source=None):
    """The model with marks among the ids of its texts; source: the name of another encoder of such texts."""
    for name in ("text", source) if source else ("text",):
        model.encoders[name] = modalities.Text(trunk(24, registers=2), length=24, extra=12).double()
    model.fusion = FUSIONS["JointTokens"]({name: encoder.width for name, encoder in model.encoders.items()}).double()
    return model


def recorded(model):
    """The model with records in place of texts."""
    model.encoders["text"] = ENCODERS["Records"](trunk(24, registers=2)).double()
    return model


def routed(model):
    """The model with experts in its fusion."""
    model.fusion = FUSIONS["Routed"]({name: encoder.width for name, encoder in model.encoders.items()}).double()
    return model


def model(seed=0, fuse="JointTokens"):
    """Every modality, of two widths, joined and with a shared space; a fresh one per call, in float64."""
    torch.manual_seed(seed)
    wide = {"text": 24}  # so that fusion needs its linear layers
    kinds = {name: name.capitalize() for name in ("image", "text", "audio", "video")}
    kinds |= {"action": "Action slots", "choice": "Action choices"}
    options = {"image": {"conditional": True, "registers": 1}, "action": {"conditional": True}, "text": {"registers": 2}}
    encoders = {n: ENCODERS[k](trunk(wide.get(n, 16), **options.get(n, {}))) for n, k in kinds.items()}
    return Model(encoders, FUSIONS[fuse] if fuse else None, space=8).double()


def objective(name, model, seed=0):
    torch.manual_seed(seed)
    return OBJECTIVES[name](model).double()


def readers(model, objective):
    """Of every modality, of the views that the objective asks for, and of its labels."""
    every = {**{name: preparing(e) for name, e in model.encoders.items()}, **objective.readers}
    return every | {name: seen(every[name.partition("@")[0]], name, view) for name, view in objective.views.items()}


def preparing(encoder):
    """The reader of an encoder, which prepares as the encoder does."""
    reader = copy.copy(encoder.reader)
    reader.prepare = encoder.prepare
    return reader


def seen(reader, name, view):
    """The reader, whose examples are a little changed, and fewer tokens where the view is smaller."""
    reader = copy.copy(reader)
    plain = reader.example

    def example(n, seed):
        return [part(t, k) for k, t in enumerate(plain(n, seed))]

    def part(t, k):
        t = t.map(lambda field: field[: max(1, round(view.scale**2 * len(t.position)))])
        noise = random.uniform(torch.tensor(k), t.x.shape, name)
        return t._replace(x=(t.x * (0.9 + 0.2 * noise)).to(t.x.dtype)) if reader.vocab is None else t

    reader.example = example
    return reader


def examples(readers, n=7, seed=0):
    """n samples; of every five one lacks text, another one actions, another one its label."""
    columns = {name: reader.example(n, seed) for name, reader in readers.items()}
    lacks = {"text": 3, "action": 2, "choice": 2, "label": 1}
    return [
        {name: column[i] for name, column in columns.items() if i % 5 != lacks.get(name.partition("@")[0], -1)} for i in range(n)
    ]


def batch(readers, samples, numbers=None, packed=False, salt=0):
    """A prepared float64 batch of the samples with these numbers; a sample has the same seed in any batch."""
    numbers = list(range(len(samples)) if numbers is None else numbers)
    chosen = [samples[i] for i in numbers]
    limits = {name: 2 * max(len(s[name].position) for s in samples if name in s) for name in readers}
    made = {}
    present = [name for name in readers if any(name in s for s in chosen)]
    need = np.array([[len(s[name].position) if name in s else 0 for name in readers] for s in chosen])
    rows = [
        [k for document in row for k in document] for row in pack([[k] for k in range(len(chosen))], need, list(limits.values()))
    ]
    made.update(collate(chosen, present, rows if packed else None))
    for name in set(readers) - set(present):  # as ShardDataset does for a rank that has none
        nothing = collate([{name: readers[name].example(1, 0)[0]}] * len(chosen), [name])[name]
        made[name] = nothing._replace(valid=torch.zeros_like(nothing.valid))
    ready = {name: double(readers[name].prepare(made[name])) for name in readers}
    number = torch.tensor(numbers)
    return {**ready, "sample": number, "seed": random.fold(random.fold(number, "example"), salt)}


def double(t: Tokens):
    return t._replace(x=t.x.double()) if t.x.is_floating_point() else t


def terms(objective, model, batch):
    """The objective's terms on a batch, and the batch after `task`."""
    with torch.no_grad():
        task = objective.task(batch, objective.look(model, batch))
    return objective(model, task), task


def loss(terms):
    """What the Pretrainer would minimise on one rank."""
    return sum(t.weight * t.total / t.number.clamp(min=1) for t in terms.values())


def pad(t):
    """Three more places per row, full of rubbish that is marked as such."""
    rows = t.position.shape[0]
    rubbish = t.map(lambda f: f.new_ones(rows, 3, *f.shape[2:]))
    value = 1e3 if t.x.is_floating_point() else 3
    rubbish = rubbish._replace(x=torch.full_like(rubbish.x, value), valid=torch.zeros(rows, 3, dtype=torch.bool))
    return Tokens(*(None if f is None else torch.cat([f, g], 1) for f, g in zip(t, rubbish, strict=True)))
