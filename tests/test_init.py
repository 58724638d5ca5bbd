"""How parameters start: a function of seed and name, on the meta device too, with the deviations that rules promise; and muP."""

import math
import tarfile
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from contracts import cases
from torch import nn

from headwater.datamodules.collate import collate
from headwater.embedded import place
from headwater.fusion import JointTokens
from headwater.init import CUT, TABLE, FanIn, MuP, Normal, Rule, audit, factors, initialise, lines, materialise, places
from headwater.modalities import Image, Text
from headwater.model import Model
from headwater.objectives import Causal, Contrastive, Masked, Weighted
from headwater.objectives.contrast.losses import Softmax
from headwater.pretrainer import Pretrainer
from headwater.training.groups import Groups
from headwater.trunk import Trunk

PARTS = {"mask": partial(Masked, ratio=0.5, width=16), "pair": partial(Contrastive, loss=partial(Softmax, 0.1))}


def make(init=None, seed=0, names=("image", "text")):
    """A pretrainer with every kind of parameter that the core has."""
    kinds = {
        "image": lambda: Image(Trunk(16, depth=2, heads=2, conditional=True, registers=2, layer_scale=0.1), size=16),
        "text": lambda: Text(Trunk(24, depth=1, heads=2, norm="tanh"), length=24, pooling="attention"),
    }
    model = Model({n: kinds[n]() for n in names}, lambda w: JointTokens(w, Trunk(16, depth=1, heads=2)), space=8)
    return Pretrainer(model, partial(Weighted, parts=PARTS), seed=seed, init=init)


def values(module):
    return {name: x.clone() for name, x in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def swept():
    every = {f"encoder {n}": lambda n=n: cases.ENCODERS[n](cases.trunk()) for n in cases.ENCODERS}
    every |= {f"fusion {n}": lambda n=n: cases.model(fuse=n).fusion for n in cases.FUSIONS}
    return every | {f"objective {n}": lambda n=n: cases.objective(n, cases.model()) for n in cases.OBJECTIVES}


@pytest.mark.parametrize("name", swept())
def test_every_exported_part_has_a_rule_for_every_parameter(name):
    module = swept()[name]()
    where = places(module)
    assert [n for n, _ in module.named_parameters() if where[n].rule is None and not where[n].settled] == []
    initialise(module, 3)
    assert [row for row in audit(module, 3) if row.fault] == []


@pytest.mark.parametrize("name", swept())
def test_built_without_memory_the_weights_are_the_same(name):
    built = swept()[name]()
    if any(place.settled for place in places(built).values()):
        pytest.skip("it holds a teacher that was loaded")
    initialise(built, 5)
    with torch.device("meta"):
        hollow = swept()[name]()
    materialise(hollow, "cpu", 5)
    assert same(values(hollow), values(built))
    assert dict(hollow.named_buffers()).keys() == dict(built.named_buffers()).keys()
    assert all(torch.equal(x, y) for x, y in zip(hollow.buffers(), built.buffers(), strict=True))


def test_a_start_is_a_function_of_seed_and_name_alone():
    torch.manual_seed(1)
    one = values(make(Normal(), seed=7))
    torch.manual_seed(2)
    other = make(seed=7)  # built as constructors do
    assert not same(values(other), one)
    initialise(other, 7)
    assert same(values(other), one)
    assert not torch.equal(
        values(make(Normal(), seed=8))["backbone.encoders.text.stem.weight"], one["backbone.encoders.text.stem.weight"]
    )
    turned = values(make(Normal(), seed=7, names=("text", "image")))
    assert all(torch.equal(turned[n], x) for n, x in one.items())
    drawn = [x.flatten()[:8] for x in one.values() if x.numel() > 8 and x.std() > 1e-4]
    assert len({tuple(x.tolist()) for x in drawn}) == len(drawn)  # no two parameters share their numbers


def test_the_number_of_threads_and_the_dtype_do_not_matter():
    many, one = nn.Linear(300, 301), nn.Linear(300, 301)
    torch.set_num_threads(4)
    initialise(many, 0)
    torch.set_num_threads(1)
    initialise(one, 0)
    assert same(values(many), values(one))
    half = nn.Linear(300, 301, dtype=torch.bfloat16)
    initialise(half, 0)
    assert torch.equal(half.weight, one.weight.bfloat16())


def start_of_a_rank():
    from headwater import distributed

    torch.manual_seed(distributed.rank())
    return values(make(Normal()))


def test_ranks_start_equal(ranks):
    a, b = ranks(start_of_a_rank)
    assert same(a, b)


def test_constants_of_constructors_come_back():
    with torch.device("meta"):
        hollow = make()
    materialise(hollow, "cpu", 0)
    found = values(hollow)
    assert float(found["objective.parts.pair.pairs.0.loss.log_scale"]) == pytest.approx(-math.log(0.1))
    assert (found["backbone.encoders.image.trunk.blocks.1.ls2.gamma"] == 0.1).all()
    assert (found["backbone.encoders.text.trunk.norm.alpha"] == 0.5).all()
    assert not found["backbone.encoders.image.trunk.blocks.0.modulation.weight"].any()
    norm = nn.BatchNorm1d(3, device="meta")
    materialise(norm, "cpu", 0)
    assert norm(torch.randn(5, 3)).isfinite().all()
    assert int(norm.num_batches_tracked) == 1


def test_shared_parameters_stay_shared():
    with torch.device("meta"):
        pair = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        pair["b"].weight = pair["a"].weight
    materialise(pair, "cpu", 0)
    assert pair["a"].weight is pair["b"].weight
    assert pair["a"].weight.std() > 0


def test_towers_of_other_libraries_are_left_alone():
    model = Model({"image": "timm/test_vit", "text": Text(Trunk(16, depth=1, heads=2))})
    before = values(model)
    initialise(model, 9)
    after = values(model)
    changed = {name.split(".")[1] for name, x in before.items() if not torch.equal(x, after[name])}
    assert changed == {"text"}
    assert {row.rule for row in audit(model, 9) if ".image." in row.name} == {"settled"}
    with torch.device("meta"):
        hollow = Model({"image": "timm/test_vit"})
    with pytest.raises(ValueError, match=r"no rule can fill: encoders\.image\.tower"):
        materialise(hollow, "cpu", 0)


class Odd(nn.Module):
    """A parameter of its own and no rule."""

    def __init__(self, names=()):
        super().__init__()
        self.own, self.names = nn.Parameter(torch.full((3,), 7.0)), names

    def init_rules(self):
        return dict.fromkeys(self.names, TABLE)


def test_what_has_no_rule_stays_and_is_named():
    odd = Odd()
    initialise(odd, 0)
    assert (odd.own == 7).all()
    (row,) = audit(odd)
    assert (row.rule, row.fault) == ("none", "no rule")
    with torch.device("meta"):
        odd = Odd()
    with pytest.raises(ValueError, match="no rule can fill: own"):
        materialise(odd, "cpu", 0)
    with pytest.raises(ValueError, match=r"Odd\.init_rules names 'other'"):
        initialise(Odd(["other"]), 0)
    initialise(given := Odd(["own"]), 0)
    assert (given.own.abs() < 0.05).all()


def test_an_outer_class_wins():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))

        def init_rules(self):
            return {"last.1.weight": Rule("path", value=0.0)}

    head = Head()
    initialise(head, 0)
    assert head.last[0].weight.std() > 0.1
    assert not head.last[1].weight.any()


def test_draws_are_normal_numbers_cut_at_two_deviations():
    layer = nn.Linear(512, 512)
    initialise(layer, 1)
    x = layer.weight.detach().flatten().double() * math.sqrt(512)
    phi = [math.erf(k / math.sqrt(2)) for k in (1, CUT)]
    parent = 1 / math.sqrt(1 - 2 * CUT * math.exp(-2) / math.sqrt(2 * math.pi) / phi[1])  # of which the ends are cut off
    assert float(x.std()) == pytest.approx(1, abs=0.005)
    assert float(x.abs().max()) == pytest.approx(CUT * parent, abs=0.02)
    assert float((x.abs() < parent).double().mean()) == pytest.approx(phi[0] / phi[1], abs=0.004)


def test_an_audit_finds_what_is_wrong():
    trunk = Trunk(64, depth=1)
    initialise(trunk, 0)
    assert not any(row.fault for row in audit(trunk))
    with torch.no_grad():
        trunk.blocks[0].attn.qkv.weight.mul_(1.2)
        trunk.blocks[0].mlp.fc1.weight.add_(0.01)
        trunk.norm.weight[3] = 2
    found = {row.name: row.fault for row in audit(trunk) if row.fault}
    assert found == {
        "blocks.0.attn.qkv.weight": "too wide",
        "blocks.0.mlp.fc1.weight": "mean not zero",
        "norm.weight": "not the constant",
    }
    assert "norm.weight" in lines(audit(trunk))
    initialise(trunk, 0)
    with torch.device("meta"):
        hollow = Trunk(64, depth=1)
    assert audit(hollow, 0) == audit(trunk, 0)  # drawn for the look


def test_mup_is_fan_in_at_its_base_width():
    for width in (64, 128):
        narrow, wide = (make_text(width) for _ in range(2))
        initialise(narrow, 0, MuP(64))
        initialise(wide, 0, FanIn())
        assert same(values(narrow), values(wide)) == (width == 64)
        assert bool(factors(narrow, MuP(64))) == (width != 64)
    assert {row.name for row in audit(make_text(128), scheme=MuP(64)) if row.factor == 0.5} == {
        *(f"trunk.blocks.{n}.{m}.weight" for n in (0, 1) for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
        "head.weight",
    }
    with pytest.raises(ValueError, match="set `tied: false`"):
        initialise(Text(Trunk(64, depth=1), tied=True), 0, MuP(64))


def make_text(width):
    return Text(Trunk(width, depth=2), length=40)


def test_factors_reach_the_optimizer_through_the_schedule():
    pretrainer = Pretrainer(
        Model({"text": make_text(128)}), Causal, partial(torch.optim.AdamW, lr=0.1), lambda p: 0.5, init=MuP(32)
    )
    pretrainer.trainer = pl.Trainer(max_steps=10, accelerator="cpu", logger=False, enable_checkpointing=False)
    optimizer = pretrainer.configure_optimizers()
    pretrainer.apply_schedules(optimizer)
    pretrainer.apply_schedules(optimizer)
    names = {p: n for n, p in pretrainer.named_parameters()}
    rate = {names[p]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    decay = {names[p]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(rate) == len(names)
    assert rate["backbone.encoders.text.trunk.blocks.0.attn.qkv.weight"] == pytest.approx(0.1 * 0.5 / 4)
    assert rate["backbone.encoders.text.head.weight"] == pytest.approx(0.1 * 0.5 / 4)
    assert rate["backbone.encoders.text.stem.weight"] == rate["backbone.encoders.text.head.bias"] == pytest.approx(0.05)
    assert decay["backbone.encoders.text.head.weight"] > decay["backbone.encoders.text.head.bias"] == 0
    assert len(Groups().of(pretrainer)) == 3  # hidden matrices, other matrices, and the rest


@pytest.fixture(scope="module")
def texts():
    with tarfile.open(place("embedded:episodes-train-000.tar")) as tar:
        members = [m for m in tar if m.name.endswith(".txt")][:12]
        return [tar.extractfile(m).read().decode() for m in members]


def activations(texts, width, scheme, rate=0.01, steps=4):
    """Mean |x| after some steps of Adam on real texts: of the residual stream, a branch, and the logits."""
    with torch.device("meta"):
        pretrainer = Pretrainer(Model({"text": make_text(width)}), Causal)
    materialise(pretrainer, "cpu", 0, scheme)
    encoder = pretrainer.backbone.encoder("text")
    batch = {"text": collate([{"text": encoder.reader.tokens(text)} for text in texts], ["text"])["text"]}
    batch = pretrainer.objective.task(batch)
    optimizer, seen = torch.optim.Adam(Groups().of(pretrainer, factors(pretrainer, scheme)), lr=rate), {}
    for group in optimizer.param_groups:
        group["lr"] *= group.get("factor", 1.0)
    for name, module in {"stream": encoder.trunk.norm, "logits": encoder.head, "attention": encoder.trunk.blocks[1].attn}.items():
        module.register_forward_hook(
            lambda _, given, out, name=name: seen.update(
                {name: float((given[0] if name == "stream" else out).detach().abs().mean())}
            )
        )
    for _ in range(steps + 1):
        term = pretrainer.objective(pretrainer.backbone, batch)["causal"]
        optimizer.zero_grad()
        (term.total / term.number).backward()
        optimizer.step()
    return seen


def test_under_mup_activations_do_not_depend_on_the_width(texts):
    widths = (64, 128, 256, 512)
    found = {}
    for name, scheme in {"MuP": MuP(64), "Normal": Normal()}.items():
        rows = [activations(texts, width, scheme) for width in widths]
        found[name] = {key: [row[key] for row in rows] for key in rows[0]}
        for key, line in found[name].items():
            print(f"{name:>7} {key:<10}", "  ".join(f"{w}: {x:.3f}" for w, x in zip(widths, line, strict=True)))
    for key in ("stream", "attention", "logits"):
        assert max(found["MuP"][key]) / min(found["MuP"][key]) < 1.6
    for key in ("stream", "attention"):
        assert found["Normal"][key][-1] > 8 * found["Normal"][key][0]


def test_ids_are_seen_beside_the_sines_of_their_positions():
    encoder = Text(Trunk(128, depth=1))
    initialise(encoder, 0)
    t = encoder.embed(collate([{"text": encoder.reader.tokens("a red boat")}], ["text"])["text"])
    assert 1 < float(t.x.std() / encoder.trunk.position.add(t).std()) < 2
