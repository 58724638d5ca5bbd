"""Causal passes piece by piece within a cache equal one pass over everything."""

import copy
from functools import partial

import pytest
import torch
from contracts import cases
from torch.testing import assert_close

from headwater.cache import Cache, current
from headwater.fusion import Chain, JointTokens, MixtureOfTransformers, Project, Resampler, Routed
from headwater.generation.stepwise import Stepwise, cacheable
from headwater.modalities import Action, Codec, Image, Text, Video
from headwater.model import Model
from headwater.position import Learned
from headwater.sequence import shift, unfolding
from headwater.tokens import Tokens
from headwater.trunk import Trunk

OPTIONS = {
    "sincos": {},
    "rotary, grouped": {"position": "rotary", "kv_heads": 1, "norm": "rms", "gated": True, "activation": "silu", "bias": "none"},
    "alibi": {"position": "alibi", "qk_norm": True},
    "learned, post": {"position": Learned((9,)), "post": True, "entry_norm": True},
    "registers": {"position": "rotary", "registers": 2, "layer_scale": 0.5},
    "parallel": {"parallel": True, "norm": "tanh", "head_size": 12},
}


def trunk(name, dtype=torch.float64):
    torch.manual_seed(1)
    made = Trunk(16, 2, heads=2, **copy.deepcopy(OPTIONS[name])).to(dtype)
    for n, p in made.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in n else 0.0, std=0.3)
    return made.eval()


def sequence(n=9, dtype=torch.float64, **fields):
    torch.manual_seed(0)
    return Tokens(torch.randn(2, n, 16, dtype=dtype), torch.arange(n)[None, :, None].expand(2, -1, -1), **fields)


@torch.no_grad()
def in_pieces(trunk, t, ends):
    """What a trunk says of t, told piece by piece; only the given tokens."""
    said, start = [], 0
    with Cache() as cache:
        for end in ends:
            piece = t.map(lambda f, a=start, b=end: f[:, a:b])
            said.append(trunk(piece, causal=True).x[:, : end - start])
            start = end
    return torch.cat(said, 1), cache


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_pieces_equal_one_pass(name, dtype):
    made, t = trunk(name, dtype), sequence(dtype=dtype)
    with torch.no_grad():
        whole = made(t, causal=True).x[:, :9]
    said, cache = in_pieces(made, t, [3, 4, 5, 7, 8, 9])
    assert_close(said, whole, rtol=0.1 if dtype == torch.bfloat16 else 1e-9, atol=0.1 if dtype == torch.bfloat16 else 1e-9)
    assert [len(kept.layers) for kept in cache.kept.values()] == [2]


def test_prefixes_spans_and_padding_are_kept():
    """A bidirectional prefix of two lengths, then a span of equal order, then single tokens."""
    order = torch.tensor([0, 0, 0, 3, 4, 4, 4, 8, 9]).expand(2, -1)
    valid = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0, 1, 1]]).bool()
    t = sequence(order=order, valid=valid)
    for name in ("sincos", "alibi", "registers"):
        made = trunk(name)
        with torch.no_grad():
            whole = made(t, causal=True).x[:, :9]
        said, _ = in_pieces(made, t, [4, 7, 8, 9])
        assert_close(said[valid], whole[valid])


def test_a_cache_belongs_to_causal_passes_inside_of_it():
    made, t = trunk("sincos"), sequence()
    assert current() is None
    with torch.no_grad(), Cache() as outer:
        with Cache() as inner:
            assert current() is inner
        assert current() is outer
        free, causal = made(t).x, made(t, causal=True).x
        assert outer.of(made).seen.position.shape[1] == 9  # of the causal pass alone
        assert_close(made(t).x, free)
    assert current() is None
    with torch.no_grad():
        assert_close(made(t, causal=True).x, causal)


def test_rows_can_be_dropped_doubled_and_put_in_another_order():
    made, t = trunk("rotary, grouped"), sequence()
    rows = torch.tensor([1, 1, 0])
    cut = [t.map(lambda f, a=a, b=b: f[:, a:b]) for a, b in ((0, 5), (5, 9))]
    with torch.no_grad(), Cache() as cache:
        made(cut[0], causal=True)
        cache.take(rows)
        said = made(cut[1]._replace(order=torch.arange(5, 9).expand(2, -1)).map(lambda f: f[rows]), causal=True).x
    with torch.no_grad():
        assert_close(said, made(t, causal=True).x[rows][:, 5:])


def test_packed_rows_are_refused():
    with Cache(), pytest.raises(ValueError, match="packed"):
        trunk("sincos")(sequence(document=torch.zeros(2, 9).long()), causal=True)


def joint(widths, **options):
    return JointTokens(widths, Trunk(16, 2, heads=2, **options))


def chain(widths):
    return Chain(widths, [partial(Resampler, modalities=["image"], queries=3, depth=1, heads=2), prefix], last="text")


prefix = partial(Project, modalities=["latent"], mlp=True)
FUSIONS = {
    "joint": joint,
    "joint rotary registers": partial(joint, position="rotary", registers=2),
    "joint alibi": partial(joint, position="alibi"),
    "project": partial(Project, modalities=["image", "video"]),
    "chain": chain,
    "experts": lambda widths: Routed(widths, cases.trunk(), experts=3, every=1),
    "apart": lambda widths: MixtureOfTransformers(widths, cases.trunk()),
    "cross": cases.FUSIONS["CrossAttend"],
}
CASES = [  # target, prefix, context, fusion, is exact
    ("text", (), (), None, True),
    *(("text", ("image",), (), name, name not in ("apart", "cross")) for name in FUSIONS),
    ("text", ("image", "video"), (), "joint", True),
    ("text", ("image", "video"), (), "project", True),
    ("action", ("text",), ("video",), "joint", True),
    ("action", (), ("video",), "joint rotary registers", True),
    ("video", ("text",), ("action",), "joint alibi", True),
    ("image", ("text",), (), "joint", True),
    ("codec", ("text",), (), "joint", True),
]


def model(fusion):
    torch.manual_seed(0)
    made = Model(
        {
            "text": Text(Trunk(24, 1, 2, position="rotary", registers=1), length=12),
            "image": Image(Trunk(16, 1, 2, registers=1), 16, 8),
            "video": Video(Trunk(16, 1, 2), 16, 8, frames=4),
            "action": Action(Trunk(16, 1, 2), choices=5, steps=4),
            "codec": Codec(Trunk(16, 1, 2), codebooks=2, size=8, steps=4),
        },
        FUSIONS[fusion] if fusion else None,
    )
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made.double().eval()


@torch.no_grad()
@pytest.mark.parametrize(("target", "known", "beside", "fusion", "exact"), CASES)
def test_steps_answer_as_training_asks(target, known, beside, fusion, exact):
    """Rows of several lengths, modalities that some samples lack: logits at every place, one by one and all at once."""
    made = model(fusion)
    batch = cases.batch(made.readers, [s for s in cases.examples(made.readers, 4) if target in s])
    raw = batch[target]
    places, others = unfolding(raw, {n: batch[n] for n in known}, {n: batch[n] for n in beside})
    y = made(made.embed({**others, target: shift(places, made.encoder(target).start)}), True)[target].x
    whole = made.encoder(target).unembed(y[:, : raw.x.shape[1]])
    assert cacheable(made, [target, *beside]) == exact
    for cached in (True, False):
        steps = Stepwise(made, target, raw, {n: batch[n] for n in known}, {n: batch[n] for n in beside}, cached=cached)
        assert (steps.cache is not None) == (cached and exact)
        first = 2  # the first question is about several places at once
        said = [steps.ask(raw.x[:, :n]) for n in range(first, raw.x.shape[1])]
        real = raw.real()[:, first:]
        assert_close(torch.stack(said, 1)[real], whole[:, first:][real], rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_steps_go_on_with_other_rows():
    made = model("project")
    batch = cases.batch(made.readers, [s for s in cases.examples(made.readers, 4) if "text" in s])
    raw, rows = batch["text"], torch.tensor([2, 0, 0])
    seen = {"image": batch["image"]}
    for cached in (True, False):
        a, b = (
            Stepwise(made, "text", t, given, {}, cached=cached)
            for t, given in ((raw, seen), (pick(raw, rows), {"image": pick(batch["image"], rows)}))
        )
        a.ask(raw.x[:, :3])
        a.take(rows)
        b.ask(raw.x[rows, :3])
        assert_close(a.ask(raw.x[rows, :5]), b.ask(raw.x[rows, :5]))


def pick(t, rows):
    return t.map(lambda field: field[rows])


def test_a_pass_over_few_new_tokens_computes_few():
    """The work of a cached step does not grow with what came before, but for attention itself."""
    made, counted = trunk("sincos"), []
    made.blocks[0].mlp.register_forward_hook(lambda module, given, out: counted.append(out.shape[1]))
    in_pieces(made, sequence(), [6, 7, 8, 9])
    assert counted == [6, 1, 1, 1]
