"""What every form has in common: names, starts, files, dense equals, two ranks."""

from functools import partial

import pytest
import torch
import towers
from contracts import cases
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import headwater
from headwater import distributed, init
from headwater.attention import higher_order
from headwater.forms import (
    FP8,
    NVFP4,
    Bottleneck,
    LoRA,
    LowRank,
    Masked,
    Prefix,
    Rescaled,
    SparseLowRank,
    Ternary,
    add,
    additions,
    densified,
    save_additions,
)
from headwater.forms.form import Formed
from headwater.fusion import JointTokens
from headwater.modalities import Text
from headwater.model import Model
from headwater.objectives import Causal
from headwater.objectives.objective import weighted_sum
from headwater.pretrainer import Pretrainer, count
from headwater.training.schedules import Linear
from headwater.training.sharding import shard
from headwater.trunk import Trunk

FORMS = {
    "LoRA": lambda: [LoRA(rank=2, alpha=3.0)],
    "LoRA lengths": lambda: [LoRA(rank=2, lengths=True)],
    "LowRank": lambda: [LowRank(rank=3)],
    "LowRank svd": lambda: [LowRank(rank=0.5, start="svd")],
    "SparseLowRank": lambda: [SparseLowRank(rank=2, density=0.1)],
    "SparseLowRank alone": lambda: [SparseLowRank(rank=0, density=0.25)],
    "Masked": lambda: [Masked(sparsity=0.5)],
    "Masked magnitude": lambda: [Masked(sparsity=0.6, by="magnitude")],
    "Masked pattern": lambda: [Masked(by="magnitude", pattern=(2, 4))],
    "Ternary": lambda: [Ternary()],
    "Ternary weights": lambda: [Ternary(bits=None)],
    "NVFP4": lambda: [NVFP4()],
    "FP8": lambda: [FP8()],
    "Bottleneck": lambda: [Bottleneck(size=3)],
    "Rescaled": lambda: [Rescaled("qkv$", share=0.667), Rescaled("fc2$", side="in")],
    "Prefix": lambda: [Prefix(count=3)],
    "LoRA on sparse": lambda: [SparseLowRank(rank=2), LoRA("qkv$", rank=2)],
}
MERGE = sorted(set(FORMS) - {"Ternary", "NVFP4", "FP8", "Bottleneck", "Prefix"})
PURE = [name for name in MERGE if name not in ("Rescaled", "LoRA on sparse")]  # one form with one weight
ADD = ["LoRA", "LoRA lengths", "Bottleneck", "Rescaled", "Prefix"]


def model(forms=(), width=16):
    """A language model in float64 whose start depends on nothing but its forms."""
    torch.manual_seed(0)
    made = Model({"text": Text(Trunk(width, 2, 2, mlp_ratio=2.0), length=24)}, forms=forms)
    init.initialise(made, 0, init.FanIn())
    for form in made.forms:
        form.at(made, 0.0)
    return made.double()


def bare(made):
    """The model inside of the additions."""
    added = {n for n, _ in additions(made)}
    plain = model()
    plain.load_state_dict({n.replace(".base.", "."): p for n, p in made.state_dict().items() if n not in added})
    return plain


def stirred(made):
    """With additions, and what else starts at zero, that have an effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            if not p.any():
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return made


def batch(made, n=5):
    readers = {"text": made.encoder("text").reader}
    return cases.batch(readers, cases.examples(readers, n))


def answers(made):
    given = batch(made)
    return made.encoder("text").unembed(made(made.embed(given), causal=True)["text"].x)


def formed(made):
    return {n: m for n, m in made.named_modules() if isinstance(m, Formed)}


def layer(name):
    """One layer of 24 inputs and 32 outputs in this form, as the name `blocks.0.fc1`, in float64."""
    torch.manual_seed(0)
    made = nn.ModuleDict({"blocks": nn.ModuleDict({"0": nn.ModuleDict({"fc1": nn.Linear(24, 32)})})})
    for form in FORMS[name]():
        form(made)
    return stirred(made.double()).get_submodule("blocks.0.fc1")


@pytest.mark.parametrize("name", PURE)
def test_forward_and_gradient_equal_those_of_the_dense_weight(name):
    ours = layer(name)
    x = torch.randn(3, 5, 24, dtype=torch.float64, requires_grad=True)
    parameters = [x, *(p for p in ours.parameters() if p.requires_grad)]
    mine = ours(x)
    theirs = F.linear(x, ours.weight, ours.bias)
    assert ours.weight.shape == (32, 24)
    assert_close(mine, theirs, rtol=0, atol=1e-10)
    weight = torch.randn_like(mine)
    got = torch.autograd.grad((mine * weight).sum(), parameters)
    assert_close(got, torch.autograd.grad((theirs * weight).sum(), parameters), rtol=0, atol=1e-10)
    with higher_order():
        again = ours(x)
    assert_close(torch.autograd.grad((again * weight).sum(), parameters), got, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["SparseLowRank", "Masked", "Ternary weights"])
def test_the_dense_weight_is_not_kept_for_the_backward_pass(name):
    ours, kept = layer(name), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        ours(torch.randn(5, 24, dtype=torch.float64, requires_grad=True))
    assert torch.Size((32, 24)) not in kept


@pytest.mark.parametrize("name", MERGE)
def test_densifying_changes_no_answer(name):
    ours = stirred(model(FORMS[name]()))
    plain = densified(ours)
    assert not formed(plain)
    assert plain.forms == ()
    assert formed(ours)
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in model().named_parameters()}
    assert_close(answers(plain), answers(ours), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", sorted(set(FORMS) - set(MERGE)))
def test_what_no_plain_layer_does_is_not_densified(name):
    ours = model(FORMS[name]())
    with pytest.raises(ValueError, match="no plain layer"):
        densified(ours)
    if name in ("Ternary", "NVFP4", "FP8"):
        assert not formed(densified(ours, exact=False))


@pytest.mark.parametrize("name", FORMS)
def test_a_backbone_comes_back_from_its_folder(name, tmp_path):
    ours = stirred(model(FORMS[name]())).float()
    headwater.save_backbone(ours, tmp_path / "backbone")
    loaded = headwater.load_backbone(tmp_path / "backbone").model
    assert [type(form) for form in loaded.forms] == [type(form) for form in ours.forms]
    for (n, p), (m, q) in zip(loaded.state_dict().items(), ours.state_dict().items(), strict=True):
        assert n == m
        assert torch.equal(p, q), n


@pytest.mark.parametrize("name", FORMS)
def test_starting_on_the_meta_device_is_starting(name):
    def make():
        return Model({"text": Text(Trunk(16, 2, 2, mlp_ratio=2.0), length=24)}, forms=FORMS[name]())

    if name == "LowRank svd":  # the factors of a weight need the weight
        pytest.skip("an SVD needs the weight")
    with torch.device("meta"):
        empty = make()
    init.materialise(empty, "cpu", 3)
    usual = make()
    init.initialise(usual, 3)
    assert all(torch.equal(p, q) for p, q in zip(empty.state_dict().values(), usual.state_dict().values(), strict=True))
    assert not [row for row in init.audit(usual, 3) if row.fault]


@pytest.mark.parametrize("name", FORMS)
def test_layers_start_with_the_deviation_that_the_weight_would_have(name):
    if name not in ("LowRank", "SparseLowRank alone"):
        pytest.skip("starts with the weight itself, or smaller")
    for scheme in (init.Normal(), init.FanIn()):
        ours, plain = (Model({"text": Text(Trunk(128, 1, 2), length=24)}, forms=f) for f in (FORMS[name](), ()))
        init.initialise(ours, 0, scheme), init.initialise(plain, 0, scheme)
        for n, m in formed(ours).items():
            w = m.weight if name == "LowRank" else m.values
            assert abs(w.std().item() / plain.get_submodule(n).weight.std().item() - 1) < 0.15, (n, scheme)


@pytest.mark.parametrize("name", ADD)
def test_additions_start_without_effect_and_train_alone(name):
    ours = model(FORMS[name]())
    before = bare(ours)
    assert_close(answers(ours), answers(before), rtol=0, atol=1e-12)
    trainable = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in additions(ours)} != set()
    frozen = {n: p.clone() for n, p in ours.state_dict().items() if n not in trainable}
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        answers(ours).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, ours.state_dict()[n]) for n, p in frozen.items())
    assert not torch.allclose(answers(ours), answers(before), atol=1e-6)


@pytest.mark.parametrize("name", ADD)
def test_additions_are_saved_apart_from_their_backbone(name, tmp_path):
    ours = stirred(model(FORMS[name]()))
    path = save_additions(ours, tmp_path / "added.safetensors")
    assert path.stat().st_size < sum(8 * p.numel() for _, p in additions(ours)) + 20000
    assert_close(answers(add(bare(ours), path)), answers(ours), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="another model"):
        add(model(width=32), path)
    with pytest.raises(ValueError, match="no addition"):
        save_additions(model(), path)


def test_additions_have_as_many_parameters_as_their_formulas_say():
    width, hidden, depth, heads = 16, 32, 2, 2
    sizes = {"qkv": (width, 3 * width), "proj": (width, width), "fc1": (width, hidden), "fc2": (hidden, width)}
    expected = {
        "LoRA": depth * sum(2 * (i + o) for i, o in sizes.values()),
        "LoRA lengths": depth * sum(2 * (i + o) + o for i, o in sizes.values()),
        "Bottleneck": depth * 2 * (3 * (2 * width + 1)),
        "Rescaled": depth * (2 * width + hidden),
        "Prefix": depth * (2 * 3 * width + heads),
    }
    for name, number in expected.items():
        assert sum(p.numel() for _, p in additions(model(FORMS[name]()))) == number, name


def test_forms_stand_in_towers_of_other_libraries():
    for name, inside in {
        "timm/vit_tiny_patch16_224": "blocks.3.attn.qkv",
        "open_clip/RN50#text": "resblocks.2.attn.out_proj",
    }.items():
        tower = Model({"it": name}, forms=[LoRA(rank=2)])
        layers = formed(tower)
        assert any(n.endswith(inside) for n in layers)
        reader = tower.encoder("it").reader
        given = {"it": cases.collate([{"it": t} for t in reader.example(2, 0)], ["it"])["it"]}
        given = tower.prepare(given)
        tower.eval()
        first = tower.represent(given)["it"].x
        stirred(tower)
        changed = tower.represent(given)["it"].x
        assert (first - changed).abs().max() > 1e-4
        assert_close(densified(tower).represent(given)["it"].x, changed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_forms_stand_in_language_models_of_transformers(kind, tmp_path):
    pytest.importorskip("transformers")
    match = r"(q|k|v|o|gate|up|down)_proj$" if kind == "llama" else r"layer\..*(query|value|dense)$"
    name = f"transformers/{towers.folder(kind, tmp_path / kind)}"
    tower = Model({"text": name}, forms=[LoRA(match, rank=2), Bottleneck(r"(down_proj|output\.dense)$", size=2)]).eval()
    given = tower.prepare(
        {"text": cases.collate([{"text": t} for t in tower.encoder("text").reader.example(2, 0)], ["text"])["text"]}
    )
    first = tower.represent(given)["text"].x
    changed = stirred(tower).represent(given)["text"].x
    assert (first - changed).abs().max() > 1e-4
    changed.sum().backward()
    assert {n for n, p in tower.named_parameters() if p.grad is not None} <= {n for n, _ in additions(tower)}


def test_attention_that_reads_a_weight_refuses_forms_that_do_more():
    with pytest.raises(ValueError, match="MultiheadAttention"):
        Model({"it": "open_clip/RN50#text"}, forms=[Ternary()])


def test_a_form_that_matches_nothing_says_what_there_is():
    with pytest.raises(ValueError, match=r"found no layer that 'fc3\$' matches.*fc"):
        model([LoRA("fc3$")])


def test_what_bad_arguments_are_told():
    for make in (
        partial(LoRA, rank=0),
        partial(LowRank, rank=1.5),
        partial(SparseLowRank, density=0.0),
        partial(Masked, sparsity=1.0),
        partial(Masked, pattern=(4, 2)),
        partial(Ternary, bits=1),
        partial(Ternary, strength=2.0),
        partial(NVFP4, high=1.0),
        partial(Rescaled, "qkv$", share=0.0),
        partial(Prefix, count=0),
        partial(Bottleneck, size=0),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()


def test_cards_hold_the_last_value_of_a_schedule():
    form = Ternary(strength=Linear(0.0, 0.75))
    assert form.spec["init_args"]["strength"] == 0.75


def test_forms_of_a_fusion_and_half_precision():
    made = Model(
        {name: Text(Trunk(16, 1, 2), length=8) for name in ("a", "b")},
        lambda widths: JointTokens(widths, Trunk(16, 1, 2)),
        forms=[SparseLowRank("fusion.*fc1$", rank=2), Ternary("fusion.*fc2$"), LoRA("fusion.*qkv$"), NVFP4("encoders.*fc1$")],
    )
    assert sum(p.requires_grad for p in made.fusion.parameters()) == 2  # LoRA leaves nothing else to train
    x = torch.randn(4, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        for m in formed(made).values():
            if m.in_features == 16:
                y = m(x)
                assert y.dtype == torch.bfloat16
                y.float().square().sum().backward()


SHARES = [[0, 2, 3, 5, 6], [1, 4]]
ALIKE = sorted(set(FORMS) - {"NVFP4", "FP8"})  # scales of a tensor are those of a rank's tokens
QUICK = ("LoRA lengths", "LowRank", "SparseLowRank", "Masked magnitude", "Ternary", "Prefix")


def steps(name, shares, sharded):
    """Parameters and buffers after some steps, in float64, and the gradients of the first."""
    made = model(FORMS[name]())
    pretrainer = Pretrainer(made, Causal).double()
    samples = cases.examples(pretrainer.readers)
    given = cases.batch(pretrainer.readers, samples, shares[distributed.rank()])
    several = distributed.world() > 1
    if several and sharded:
        shard(pretrainer, init_device_mesh("cpu", (2,)))
    run = pretrainer
    if several and not sharded:

        class Asked(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = pretrainer

            def forward(self, task):
                return self.inner.ask(task)

        run = DistributedDataParallel(Asked(), find_unused_parameters=True)
    optimizer = torch.optim.AdamW([p for p in pretrainer.parameters() if p.requires_grad], lr=0.003, weight_decay=0.1)
    for number in range(3):
        for form in made.forms:
            form.at(made, number / 3)
        task = pretrainer.hide(given)
        numbers = count([pretrainer.objective.numbers(task)])
        terms = run(task) if run is not pretrainer else pretrainer.ask(task)
        optimizer.zero_grad()
        weighted_sum(terms, numbers, distributed.world()).backward()
        optimizer.step()
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in pretrainer.state_dict().items()}


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ALIKE])
def test_two_ranks_learn_what_one_process_learns(ranks, name, sharded):
    whole = steps(name, [[*SHARES[0], *SHARES[1]]], sharded)
    a, b = ranks(steps, name, SHARES, sharded)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert_close(a, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_ranks_in_four_bits_hold_the_same_weights(ranks, sharded):
    a, b = ranks(steps, "NVFP4", SHARES, sharded)
    assert all(torch.equal(a[n], b[n]) for n in a if not n.endswith(".step"))
