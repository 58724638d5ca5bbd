"""Teachers' features as targets: the formulas typed anew, the moving average, packing, and what is refused."""

import copy

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater import modalities
from headwater.model import Model
from headwater.objectives.targets.features import Features, layers, standardised
from headwater.objectives.targets.target import Asked
from headwater.tokens import Tokens
from headwater.training.schedules import Linear
from headwater.trunk import Trunk


def deep(depth=3, **options):
    torch.manual_seed(0)
    trunk = Trunk(16, depth, heads=2, position="none", **options)
    return Model({"audio": modalities.Audio(trunk, bands=4, frames=4)}).double()


def batch_of(model, n=5, packed=False):
    return cases.batch(model.readers, cases.examples(model.readers, n), packed=packed)


def plain_attention(x, attn):
    """One row (N, D), one head after the other."""
    q, k, v = attn.qkv(x).chunk(3, -1)
    size, out = attn.size, []
    for h in range(attn.heads):
        mine = slice(h * size, (h + 1) * size)
        out.append(((q[:, mine] @ k[:, mine].T) / size**0.5).softmax(-1) @ v[:, mine])
    return attn.proj(torch.cat(out, -1))


def by_hand(encoder, x):
    """What each block and its feed-forward branch give: x (N, D) embedded -> two lists of (N, D)."""
    blocks, branches = [], []
    for block in encoder.trunk.blocks:
        x = x + plain_attention(block.norm1(x), block.attn)
        branches.append(block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(block.norm2(x)))))
        x = x + branches[-1]
        blocks.append(x)
    return blocks, branches


def test_layers_are_those_of_the_blocks():
    model = deep(registers=0)
    encoder, t = model.encoder("audio"), batch_of(model)["audio"]
    blocks, branches = (layers(encoder, t, [0, 2], of) for of in ("block", "feed"))
    for row in range(len(t.x)):
        n = int(t.real()[row].sum())
        expected = by_hand(encoder, encoder.stem(t.x[row, :n]))
        for got, wanted in ((blocks, expected[0]), (branches, expected[1])):
            assert_close(got[0][row, :n], wanted[0], rtol=1e-9, atol=1e-9)
            assert_close(got[1][row, :n], wanted[2], rtol=1e-9, atol=1e-9)
    assert not any(block._forward_hooks or block.mlp._forward_hooks for block in encoder.trunk.blocks)


def test_layers_leave_registers_out():
    model = deep(registers=2)
    t = batch_of(model)["audio"]
    assert layers(model.encoder("audio"), t, [1], "block")[0].shape == (*t.x.shape[:2], 16)


def test_data2vec_targets_are_the_mean_of_normalised_branches():
    """fairseq data2vec_audio.py: instance norm (or layer norm) of each of the top K feed-forward outputs, then their mean."""
    model = deep()
    batch = batch_of(model)
    for norm in ("token", "sample", "none"):
        target = Features(model, "audio", top=2, norm=norm).double()
        found = target.look(model, batch)
        t = batch["audio"]
        for row in range(len(t.x)):
            n, expected = int(t.real()[row].sum()), 0.0
            for y in by_hand(model.encoder("audio"), model.encoder("audio").stem(t.x[row, :n]))[1][1:]:
                axis = {"token": -1, "sample": 0, "none": None}[norm]
                if axis is not None:
                    y = (y - y.mean(axis, keepdim=True)) / (y.var(axis, correction=0, keepdim=True) + 1e-5).sqrt()
                expected = expected + y / 2
            assert_close(found[row, :n], expected, rtol=1e-7, atol=1e-7)


def test_without_blocks_it_is_the_output_of_the_encoder():
    model = deep(registers=1)
    batch = batch_of(model)
    t = batch["audio"]
    found = Features(model, "audio", norm="none").double().look(model, batch)
    expected = model.encode(model.embed({"audio": t}))["audio"].x[:, : t.x.shape[1]]
    assert_close(found, expected)


def test_packed_samples_have_the_same_targets():
    model = deep()
    for options in ({"top": 2, "norm": "sample"}, {"norm": "token"}):
        target = Features(model, "audio", **options).double()
        apart, packed = (batch_of(model, packed=p) for p in (False, True))
        a, b = (target.look(model, batch)[batch["audio"].real()] for batch in (apart, packed))
        owner = [batch["audio"].sample()[batch["audio"].real()] for batch in (apart, packed)]
        for sample in range(5):
            assert_close(a[owner[0] == sample], b[owner[1] == sample], rtol=1e-9, atol=1e-9)


def test_standardised_samples_against_loops():
    torch.manual_seed(0)
    document = torch.tensor([[0, 0, 0, 2, 2, 2], [1, 1, 3, 3, 3, 3]])
    valid = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    x = (torch.randn(2, 6, 3).double() * 4 + 2).masked_fill(~valid[..., None], 1e6).requires_grad_()
    found = standardised(Tokens(x, torch.zeros(2, 6, 1), valid, document), 4)
    total, weight = 0.0, torch.randn(2, 6, 3).double()
    for sample in range(4):
        mine = (document == sample) & valid
        y = x[mine]
        mean = sum(y) / len(y)
        spread = sum((one - mean) ** 2 for one in y) / len(y)
        expected = (y - mean) / (spread + 1e-5).sqrt()
        assert_close(found[mine], expected, rtol=1e-9, atol=1e-9)
        total = total + (expected * weight[mine]).sum()
    naive = torch.autograd.grad(total, x)[0]
    assert_close(torch.autograd.grad((found * weight).sum(), x)[0], naive, rtol=1e-9, atol=1e-9)


def test_the_teacher_is_a_moving_average_and_never_trains():
    model = deep()
    target = Features(model, "audio", momentum=Linear(0.9, 1.0)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    target.start(model)
    start = {name: p.clone() for name, p in model.encoder("audio").named_parameters()}
    assert all(torch.equal(p, start[name.removeprefix("module.")]) for name, p in target.teacher.named_parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    target.after_step(model, 0.5)
    for name, p in target.teacher.named_parameters():
        assert_close(p, 0.95 * start[name.removeprefix("module.")] + 0.05 * 2 * start[name.removeprefix("module.")])
    assert not any(p.requires_grad for p in target.parameters())
    assert not target.look(model, batch_of(model)).requires_grad


def test_a_tower_stays_as_it_was():
    model, other = deep(), deep(2)
    target = Features(model, "audio", tower=other.encoder("audio"), top=1).double()
    before = copy.deepcopy(dict(target.named_parameters()))
    target.start(model)
    target.after_step(model, 0.0)
    assert all(torch.equal(p, before[name]) for name, p in target.named_parameters())
    batch = batch_of(model)
    expected = layers(other.encoder("audio"), batch["audio"], [1], "feed")[0]
    assert_close(target.look(model, batch), torch.nn.functional.layer_norm(expected, (16,)))
    assert target.size == 16


def test_what_cannot_work_is_refused():
    model = deep()
    coarse = modalities.Audio(Trunk(16, 1, heads=2), bands=4, frames=8)
    with pytest.raises(ValueError, match="same settings"):
        Features(model, "audio", tower=coarse)
    with pytest.raises(ValueError, match="found top 4 for audio, whose teacher has 3 blocks"):
        Features(model, "audio", top=4)
    with pytest.raises(ValueError, match=r"momentum 1\.5"):
        Features(model, "audio", momentum=1.5)
    with pytest.raises(ValueError, match="before it looked"):
        Features(model, "audio").answer(Asked(batch_of(model)["audio"], torch.zeros(1)))
    films = Model({"video": modalities.Video(Trunk(16, 2, heads=2), 16, 8, frames=4, attention="factorised")}).double()
    with pytest.raises(ValueError, match="factorised"):
        Features(films, "video", top=1).double().look(films, batch_of(films))
