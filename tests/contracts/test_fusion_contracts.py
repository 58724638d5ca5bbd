"""What every exported fusion keeps."""

import copy
import json

import pytest
import torch
from contracts import cases
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from headwater import distributed, fusion
from headwater.init import audit, initialise
from headwater.objectives import Masked
from headwater.spec import build
from headwater.tokens import Tokens

every = pytest.mark.parametrize("name", cases.FUSIONS)
WIDTHS = {"text": 24, "action": 16, "video": 16}


# What of one part reaches what of another in a sample: "all" in causal passes up to the own order, "known" = whatever the order,
# "own" = the same token alone, None = nothing. behind: for tokens that stand behind those that were given.
def full(q, k, behind, causal):
    return "all"


def apart(q, k, behind, causal):
    return "own" if q == k else None


def one_way(q, k, behind, causal):
    return "all" if q == "text" or k != "text" else None


def others(q, k, behind, causal):
    return "own" if q == k else "all"


def text_asks(q, k, behind, causal):
    return others(q, k, behind, causal) if q == "text" else apart(q, k, behind, causal)


def made(q, k, behind, causal):
    return "all" if behind else apart(q, k, behind, causal)


def prefix(q, k, behind, causal):
    """Behind the projector runs the text's own trunk."""
    if q == "latent":
        return None if k == "text" else "known"
    if q != "text":
        return apart(q, k, behind, causal)
    if k == "text":
        return None if behind and causal else "all"
    return "known"


REACH = {
    "Chain": prefix,
    "Complete": made,
    "CrossAttend": others,
    "CrossAttend gated": text_asks,
    "JointTokens levels": one_way,
    "Project": prefix,
    "Project mlp": prefix,
    "Resampler": made,
}


def make(name, seed=0):
    """The fusion with a little noise on all parameters, so that what starts closed is open."""
    torch.manual_seed(seed)
    made = cases.FUSIONS[name](WIDTHS).double()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.05 * torch.randn_like(p)
    return made


def parts(packed=False, padded=False):
    model = cases.model(fuse=None)
    batch = cases.batch(model.readers, cases.examples(model.readers, n=4), packed=packed)
    return model.embed({name: cases.pad(batch[name]) if padded else batch[name] for name in WIDTHS})


def run(made, given, causal=False):
    """The fusion, and behind it what the model runs behind it."""
    out = made(given, causal)
    if made.last in out:
        torch.manual_seed(7)
        out[made.last] = cases.trunk(WIDTHS[made.last]).double()(out[made.last], causal)
    return out


def vectors(out, samples=4):
    """(part, sample) -> its real tokens, in order."""
    return {(n, s): t.x[(t.sample() == s) & t.real()] for n, t in out.items() for s in range(samples)}


def test_every_export_has_a_case():
    assert {type(make(name)).__name__ for name in cases.FUSIONS} >= set(fusion.__all__)


@every
def test_places_keys_and_widths_are_as_promised(name):
    made, given = make(name), parts()
    out = made(given)
    assert set(given) <= set(out) <= set(made.widths)
    assert {n: t.x.shape[-1] for n, t in out.items()} == {n: made.widths[n] for n in out}
    for n, t in given.items():
        length = t.x.shape[1]
        assert torch.equal(out[n].real()[:, :length], t.real())
        assert torch.equal(out[n].sample()[:, :length], t.sample())
        assert out[n].position.shape[-1] == t.position.shape[-1]


@every
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_tokens_reach_what_is_declared_and_never_backwards_or_across_samples(name, packed, causal):
    made, given = make(name), parts(packed)
    given = {n: t._replace(x=t.x.detach().requires_grad_()) for n, t in given.items()}
    if causal and not made.keeps_order:
        with pytest.raises(ValueError, match="causal pass"):
            made(given, causal)
        return
    out = run(made, given, causal)
    order = {n: t.place() if t.order is None else t.order for n, t in given.items()}
    for q, t in out.items():
        length = given[q].x.shape[1] if q in given else 0
        probe = torch.randn_like(t.x[0, 0])  # a plain sum has no gradient behind a LayerNorm
        for i in [*range(0, length, 3), *range(length, t.x.shape[1], 2)]:
            grads = torch.autograd.grad(
                (t.x[:, i] @ probe)[t.real()[:, i]].sum(), [k.x for k in given.values()], retain_graph=True, allow_unused=True
            )
            for (k, key), grad in zip(given.items(), grads, strict=True):
                how = REACH.get(name, full)(q, k, i >= length, causal)
                allowed = key.real() & (key.sample() == t.sample()[:, i : i + 1]) & t.real()[:, i : i + 1] & (how is not None)
                if how == "all" and causal and i < length:
                    allowed &= order[k] <= order[q][:, i : i + 1]
                if how == "own":
                    allowed &= torch.arange(key.x.shape[1]) == i
                felt = torch.zeros_like(allowed) if grad is None else grad.abs().amax(-1) > 0
                assert torch.equal(felt, allowed), f"{k} -> {q}[{i}]"


@every
@pytest.mark.parametrize("packed", [False, True])
def test_any_subset_of_the_modalities_is_accepted(name, packed):
    made, given = make(name), parts(packed)
    alone = run(made, {"text": given["text"]})
    empty = {n: t if n == "text" else t._replace(valid=torch.zeros_like(t.real())) for n, t in given.items()}
    length = given["text"].x.shape[1]
    real = given["text"].real()
    assert_close(alone["text"].x[:, :length][real], run(made, empty)["text"].x[:, :length][real])
    pair = run(made, {n: given[n] for n in ("action", "video")})
    assert all(t.x.isfinite().all() for t in pair.values())


@every
def test_the_order_of_modalities_does_not_matter(name):
    made, given = make(name), parts()
    a, b = run(made, given), run(made, dict(reversed(given.items())))
    for n, t in given.items():
        length = t.x.shape[1]
        assert_close(a[n].x[:, :length][t.real()], b[n].x[:, :length][t.real()])


@every
def test_views_use_the_part_of_their_modality(name):
    made, given = make(name), parts()
    assert_close(made({"text@crop0": given["text"]})["text@crop0"].x, made({"text": given["text"]})["text"].x)


@every
@pytest.mark.parametrize("causal", [False, True])
def test_padding_and_packing_are_invisible(name, causal):
    made = make(name)
    if causal and not made.keeps_order:
        pytest.skip("refuses causal passes")
    expected = vectors(run(made, parts(), causal))
    for other in (parts(padded=True), parts(packed=True)):
        got = vectors(run(made, other, causal))
        assert got.keys() == expected.keys()
        for key in expected:
            assert_close(got[key], expected[key], msg=lambda m, key=key: f"{key}: {m}")


@every
def test_every_parameter_gets_a_gradient(name):
    made, given = make(name), parts()
    sum((t.x * torch.randn_like(t.x))[t.real()].sum() for t in made(given).values()).backward()
    assert [n for n, p in made.named_parameters() if p.grad is None or not p.grad.any()] == []


@every
def test_spec_makes_the_same_fusion_again(name):
    made = make(name)
    again = build(json.loads(json.dumps(made.spec))).double()
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in made.named_parameters()}
    assert (again.widths, again.last) == (made.widths, made.last)
    again.load_state_dict(made.state_dict())
    assert_close(vectors(again(parts())), vectors(made(parts())), rtol=0, atol=0)


@every
def test_every_parameter_has_a_rule_for_its_start(name):
    made = cases.FUSIONS[name](WIDTHS)
    initialise(made, 3)
    assert [row for row in audit(made, 3) if row.fault] == []


class Step(nn.Module):
    """Model and objective as one module, as DistributedDataParallel wants it."""

    def __init__(self, model, objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch):
        return cases.loss(self.objective(self.model, batch))


def one_step(name):
    """Parameters before and after a step of a model with all modalities in float32, on this rank's share of the samples."""
    model = cases.model(fuse=name).float()
    rest = [n for n in model.encoders if n != "text"]
    torch.manual_seed(distributed.rank())  # DDP hands out those of rank 0
    objective = Masked(model, "text", ratio=0.4, mode="substitute", context=rest)
    step = Step(model, objective)
    batch = cases.batch(model.readers, cases.examples(model.readers), [[0, 2, 3], [1, 4, 5, 6]][distributed.rank()])
    batch = {n: t._replace(x=t.x.float()) if isinstance(t, Tokens) and t.x.is_floating_point() else t for n, t in batch.items()}
    wrapped = DistributedDataParallel(step, find_unused_parameters=True)
    before = copy.deepcopy(dict(step.named_parameters()))
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    wrapped(objective.task(batch)).backward()
    optimizer.step()
    return {n: p.detach() for n, p in before.items()}, {n: p.detach() for n, p in step.named_parameters()}


@every
def test_two_ranks_hold_equal_parameters_after_a_step_of_ddp(ranks, name):
    (before, a), (_, b) = ranks(one_step, name)
    assert all(torch.equal(a[n], b[n]) for n in a)
    moved = [n for n in a if n.startswith("model.fusion.") and not torch.equal(a[n], before[n])]
    assert moved or name in ("Resampler", "Complete")  # alone they only add tokens that others would use
