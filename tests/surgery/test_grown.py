from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from headwater import distributed, init
from headwater.datamodules.collate import collate
from headwater.hub import load_backbone, pretrained, save_backbone
from headwater.modalities import Image, Text
from headwater.model import Model
from headwater.objectives import Causal
from headwater.objectives.objective import weighted_sum
from headwater.pretrainer import Pretrainer, count
from headwater.surgery import Growing, deeper, grown, wider
from headwater.surgery.depth import sources
from headwater.surgery.growing import multilinear
from headwater.surgery.width import grow_rows, share_columns
from headwater.training.sharding import shard
from headwater.trunk import Trunk

LLAMA = {"position": "rotary", "norm": "rms", "activation": "silu", "gated": True, "bias": "none", "kv_heads": 2}
PLAIN = {"position": "rotary"}


def text(depth=2, width=16, heads=4, tied=False, length=16, pooling="mean", seed=0, **trunk):
    torch.manual_seed(seed)
    made = Text(Trunk(width, depth, heads, **(trunk or PLAIN)), length=length, tied=tied, pooling=pooling)
    for p in made.parameters():  # nothing is zero, one or small by its start
        torch.nn.init.normal_(p, std=0.4) if p.ndim > 1 else torch.nn.init.normal_(p, 0.7, 0.3)
    return made.double().eval()


def answers(encoder, causal=True):
    t = collate([{"it": x} for x in encoder.reader.example(4, 0)], ["it"])["it"]
    with torch.no_grad():
        y = encoder(encoder.embed(encoder.prepare(t)), causal)
        return encoder.unembed(y.x[:, : t.x.shape[1]])[t.real()]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """What surgery builds is built in float64 here."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


KINDS = {
    "plain": PLAIN,
    "llama": LLAMA,
    "no positions": {"position": "none"},
    "parallel": PLAIN | {"parallel": True},
    "scaled": PLAIN | {"layer_scale": 0.3},
    "registers": PLAIN | {"registers": 3},
    "tanh": PLAIN | {"norm": "tanh"},
    "large eps": PLAIN | {"eps": 0.1},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("width", [16, 32, 40, 56])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wider_model_says_the_same(kind, width, tied):
    encoder = text(tied=tied, **KINDS[kind])
    made = wider(encoder, width, hidden=150)
    assert made.width == width
    assert made.trunk.hidden == 150
    assert made.trunk.size == encoder.trunk.size
    for causal in (True, False):
        assert_close(answers(made, causal), answers(encoder, causal), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [PLAIN | {"post": True}, PLAIN | {"entry_norm": True}, PLAIN | {"qk_norm": True}], ids=str)
def test_norms_elsewhere_want_a_multiple(options):
    encoder = text(**options)
    assert_close(answers(wider(encoder, 32)), answers(encoder), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="multiple"):
        wider(encoder, 40)


def test_more_heads_and_hidden_units_alone():
    encoder = text(position="sincos")
    made = wider(encoder, heads=7, hidden=100)
    assert (made.width, made.trunk.heads, made.trunk.hidden) == (16, 7, 100)
    assert_close(answers(made), answers(encoder), rtol=1e-9, atol=1e-9)


def test_pictures_grow_too():
    torch.manual_seed(0)
    encoder = Image(Trunk(16, 2, 2, position="rotary", registers=1), size=16, patch=8, pooling="class").double().eval()
    made = wider(encoder, 32)
    raw = encoder.prepare(collate([{"it": x} for x in encoder.reader.example(3, 0)], ["it"])["it"])
    raw = raw._replace(x=raw.x.double())
    with torch.no_grad():
        assert_close(made.pool(made(made.embed(raw))).x, encoder.pool(encoder(encoder.embed(raw))).x.repeat(1, 2))


def test_shares_add_up_and_differ():
    w, index = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1, 0])
    made = share_columns(w, index, 7, "a")
    back = torch.stack([made[:, index == i].sum(1) for i in range(3)], 1)
    assert_close(back, w)
    assert not torch.allclose(made[:, 0], made[:, 3])
    assert not torch.allclose(made[:, 0] / made[:, 3], (made[0, 0] / made[0, 3]).expand(5))


def test_copies_learn_to_differ():
    torch.set_default_dtype(torch.float32)
    made = wider(text().float(), 32)
    model = Model({"text": made})
    t = collate([{"it": x} for x in made.reader.example(4, 0)], ["it"])["it"]
    objective = Causal(model)
    optimizer = torch.optim.Adam(made.parameters(), 1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        objective(model, objective.task({"text": t, "seed": torch.arange(4)}))["causal"].total.backward()
        optimizer.step()
    hidden = made.trunk.blocks[0].mlp.fc1.weight.detach()
    assert (hidden[:64] - hidden[64:]).abs().max() > 1e-3


def test_the_upper_block_gives_what_is_new():
    """bert2BERT's AKI: new rows of a matrix are those of the block above, of the last block its own."""
    encoder = text(3)
    same, upper = wider(encoder, 32), wider(encoder, 32, kind="upper")
    a, b = same.state_dict(), upper.state_dict()
    for name in ("trunk.blocks.2.mlp.fc1.weight", "stem.weight", "head.weight", "trunk.blocks.0.norm1.weight"):
        assert_close(a[name], b[name], rtol=0, atol=0)
    old = encoder.state_dict()
    assert_close(b["trunk.blocks.0.mlp.fc1.bias"], torch.cat([old[f"trunk.blocks.{k}.mlp.fc1.bias"] for k in (0, 1)]))
    assert_close(b["trunk.blocks.0.attn.proj.bias"], torch.cat([old[f"trunk.blocks.{k}.attn.proj.bias"] for k in (0, 1)]))
    rows = b["trunk.blocks.1.mlp.fc1.weight"]
    assert_close(rows[:, :16] + rows[:, 16:], torch.cat([old[f"trunk.blocks.{k}.mlp.fc1.weight"] for k in (1, 2)]))
    index = torch.tensor([0, 1, 1, 0])
    assert grow_rows(torch.tensor([1.0, 2.0]), index, torch.tensor([10.0, 20.0])).tolist() == [1, 2, 20, 10]


@pytest.mark.parametrize(
    ("how", "expected"),
    [("stack", [0, 1, 2, 0, 1]), ("interleave", [0, 0, 1, 1, 2]), ("overlap", [0, 1, 2, 1, 2])],
)
def test_which_block_each_is_a_copy_of(how, expected):
    assert sources(3, 5, how) == expected
    encoder = text(3)
    made = deeper(encoder, 5, how)
    for number, source in enumerate(expected):
        assert_close(made.trunk.blocks[number].state_dict(), encoder.trunk.blocks[source].state_dict(), rtol=0, atol=0)
    assert made.report.coverage == 1


@pytest.mark.parametrize("how", ["stack", "interleave", "overlap"])
@pytest.mark.parametrize("kind", [PLAIN, LLAMA, PLAIN | {"parallel": True}, PLAIN | {"layer_scale": 0.3}], ids=str)
def test_quiet_copies_say_the_same(kind, how):
    encoder = text(**kind)
    if how == "overlap":
        with pytest.raises(ValueError, match="at most 4"):
            deeper(encoder, 5, how)
    assert_close(answers(deeper(encoder, 4 if how == "overlap" else 5, how, quiet=True)), answers(encoder))


@pytest.mark.parametrize("rank", [1, 2])
def test_the_map_is_the_dense_one(rank):
    torch.manual_seed(0)
    small = torch.randn(3, 4, 5, 2, requires_grad=True)
    shapes = {"types": (3, 2), "inputs": (5, 6), "outputs": (4, 7), "layers": (2, 3)}
    cores = {name: torch.randn(rank, *shape, rank, requires_grad=True) for name, shape in shapes.items()}
    made = multilinear(small, **cores)
    dense = torch.einsum("atuc,cope,elmg,gija->upjmtoil", cores["types"], cores["outputs"], cores["layers"], cores["inputs"])
    expected = torch.einsum("upjmtoil,toil->upjm", dense, small)
    assert_close(made, expected)
    weight = torch.randn_like(made)
    got = torch.autograd.grad((made * weight).sum(), [small, *cores.values()])
    assert_close(got, torch.autograd.grad((expected * weight).sum(), [small, *cores.values()]))


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("kind", [PLAIN, LLAMA | {"kv_heads": None}], ids=["plain", "llama"])
def test_growth_starts_as_what_was_there(kind, rank):
    encoder = text(**kind)
    start = Growing(encoder, 32, rank=rank, noise=0.0)
    assert_close(answers(start), answers(encoder))
    made = Growing(encoder, 32, 4, rank=rank, noise=0.05)
    assert_close(answers(grown(made)), answers(made))
    assert not torch.allclose(answers(made), answers(deeper(wider(encoder, 32), 4)), rtol=1e-2)


def trained(model, steps):
    pretrainer = Pretrainer(model, Causal, init=init.Normal())
    t = collate([{"text": x} for x in model.encoder("text").reader.example(8, 0)], ["text"])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        term = pretrainer.ask(pretrainer.hide(t | {"seed": torch.arange(8)}))["causal"]
        (term.total / term.number).backward()
        optimizer.step()
        losses.append(float(term.total.detach() / term.number))
    return losses


def test_cores_learn_are_saved_and_become_plain_weights(tmp_path):
    torch.set_default_dtype(torch.float32)
    model = Model({"text": Text(Trunk(16, 2, 2, position="rotary"), length=16)})
    trained(model, 30)
    save_backbone(model, tmp_path / "small")
    growing = Growing(pretrained(tmp_path / "small"), 32, 4, rank=2)
    before = {name: p.detach().clone() for name, p in growing.named_parameters()}
    small = growing.small.clone()
    losses = trained(Model({"text": growing}), 20)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in growing.named_parameters() if "position" not in name)
    assert torch.equal(growing.small, small)
    save_backbone(Model({"text": growing}), tmp_path / "growing")
    made = grown(pretrained(tmp_path / "growing")).eval()
    assert_close(answers(made), answers(growing.eval()), rtol=1e-4, atol=1e-4)
    save_backbone(Model({"text": made}), tmp_path / "large")
    again = load_backbone(tmp_path / "large").model.encoder("text")
    kept = {name: p.clone() for name, p in again.named_parameters()}
    Pretrainer(Model({"text": again}), Causal, init=init.Normal())  # what was trained is not drawn anew
    assert_close(dict(again.named_parameters()), kept, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("grow", "message"),
    [
        (partial(wider, width=8), "at least as much"),
        (partial(wider, width=32, heads=9), "multiple of 2"),
        (partial(deeper, depth=1), "at least as many"),
        (partial(Growing, width=40), "multiples"),
        (partial(Growing, width=32), "one for keys and values"),
        (grown, "expected Growing"),
    ],
)
def test_what_cannot_grow_is_refused(grow, message):
    with pytest.raises(ValueError, match=message):
        grow(text(**LLAMA))


def test_sines_and_conditions_are_refused():
    with pytest.raises(ValueError, match="sines of the width"):
        wider(text(position="sincos"), 32)
    with pytest.raises(ValueError, match="condition"):
        wider(text(position="rotary", conditional=True), 32)
    with pytest.raises(ValueError, match="attention"):
        wider(text(pooling="attention"), 32)
    with pytest.raises(ValueError, match="norms behind"):
        deeper(text(post=True, position="rotary"), 4, quiet=True)


def grown_on_ranks(sharded):
    """Parameters after two steps of learned growth; every rank has its own half of the texts."""
    torch.set_default_dtype(torch.float64)
    growing = Growing(text(1), 32, 2, rank=2)
    pretrainer = Pretrainer(Model({"text": growing}), Causal)
    texts = growing.reader.example(8, 0)
    mine = texts[distributed.rank() :: distributed.world()]
    batch = collate([{"text": t} for t in mine], ["text"]) | {"seed": torch.arange(len(mine))}
    if sharded:
        shard(pretrainer, init_device_mesh("cpu", (distributed.world(),)))
        assert all(isinstance(p, DTensor) for p in pretrainer.parameters())
    optimizer = torch.optim.SGD(pretrainer.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        task = pretrainer.hide(batch)
        weighted_sum(pretrainer.ask(task), count([pretrainer.objective.numbers(task)]), distributed.world()).backward()
        optimizer.step()
    torch.set_default_dtype(torch.float32)
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in pretrainer.named_parameters()}
    return {n: p.detach() for n, p in whole.items()}


def test_growth_is_learned_in_shares(ranks):
    one = grown_on_ranks(False)
    first, second = ranks(grown_on_ranks, True)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert_close(first, one, rtol=1e-8, atol=1e-8)
