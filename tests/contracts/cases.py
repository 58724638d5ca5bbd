"""What the contract tests sweep over: every exported encoder, fusion and objective, and the batches they meet.

An export whose arguments all have defaults is swept by itself; one that needs arguments gets a line in a table below.
"""

import inspect
from functools import partial

import numpy as np
import torch

from headwater import fusion, modalities, objectives, random
from headwater.datamodules.collate import collate
from headwater.datamodules.plan import pack
from headwater.model import Model
from headwater.objectives import Causal, Contrastive, Flow, Masked, Weighted
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


# encoders: name -> function of a trunk
plain = [cls for cls in exports(modalities) if small(cls, None) and cls is not modalities.Action]  # wants one of two
ENCODERS = {cls.__name__: partial(lambda cls, t: small(cls, t)(), cls) for cls in plain} | {
    "Action choices": lambda t: modalities.Action(t, choices=5),
    "Action slots": lambda t: modalities.Action(t, slots=3),
}

# fusions: name -> function of {modality: width}
FUSIONS = {cls.__name__: partial(lambda cls, w: small(cls, w)(), cls) for cls in exports(fusion) if small(cls, None)} | {
    "JointTokens": lambda widths: fusion.JointTokens(widths, trunk()),
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
    "Contrastive sounds": partial(Contrastive, a="audio", b="video"),
    "Flow context": partial(Flow, modality="action", context=["text"]),
    "Masked normalized": partial(Masked, modality="video", normalize=True, width=16),
    "Masked context": partial(Masked, modality="audio", ratio=0.4, context=["video", "text"], width=16),
    "Masked ids": partial(Masked, modality="text", ratio=0.3, mode="substitute"),
    "Weighted": partial(Weighted, parts=PARTS, weights={"mask": 0.5}),
}


def model(seed=0, fuse="JointTokens"):
    """Every modality, of two widths, joined and with a shared space; a fresh one per call, in float64."""
    torch.manual_seed(seed)
    wide = {"text": 24}  # so that fusion needs its linear layers
    kinds = {name: name.capitalize() for name in ("image", "text", "audio", "video")}
    kinds |= {"action": "Action slots", "choice": "Action choices"}
    conditional = {"image", "action"}
    encoders = {n: ENCODERS[k](trunk(wide.get(n, 16), conditional=n in conditional)) for n, k in kinds.items()}
    return Model(encoders, FUSIONS[fuse] if fuse else None, space=8).double()


def objective(name, model, seed=0):
    torch.manual_seed(seed)
    return OBJECTIVES[name](model).double()


def examples(readers, n=7, seed=0):
    """n samples; every fifth one lacks text, every fifth one actions."""
    columns = {name: reader.example(n, seed) for name, reader in readers.items()}
    lacks = {"text": 3, "action": 2, "choice": 2}
    return [{name: column[i] for name, column in columns.items() if i % 5 != lacks.get(name, -1)} for i in range(n)]


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
