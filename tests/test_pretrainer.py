from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from runs import COUPLED, UNCOUPLED, make, pairs, trainer, write_pairs
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from headwater.objectives import Contrastive
from headwater.pretrainer import check_needs
from headwater.tokens import split_rows
from headwater.training.groups import Groups


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def fit(shards, parts=None, steps=4, micro=1, pack=None, rate=0.5, clip=0.0, sharded=False):
    """Parameters after some steps of plain gradient descent on 5 samples each: they tell the gradients."""
    pretrainer = make(parts, micro=micro, clip=clip, optimizer=partial(torch.optim.SGD, lr=rate))
    run = trainer(steps, sharded)
    run.fit(pretrainer, pairs(shards, pack=pack))
    logged = {k: v for k, v in run.callback_metrics.items() if "scale" not in k and "filled" not in k}  # padding may differ
    parameters = {n: p.detach() for n, p in pretrainer.named_parameters()}
    if sharded:
        assert not [n for n, p in parameters.items() if not isinstance(p, DTensor)]
        parameters = {n: p.full_tensor() for n, p in parameters.items()}
    return parameters, logged


@pytest.mark.parametrize("option", [{"micro": 2}, {"micro": 5}, {"pack": {"image": 8, "text": 60}}], ids=str)
@pytest.mark.parametrize("parts", [UNCOUPLED, COUPLED], ids=["uncoupled", "coupled"])
def test_pieces_and_packing_give_the_same_gradients(shards, option, parts):
    whole, logged = fit(shards, parts, clip=0.1)
    cut, cut_logged = fit(shards, parts, clip=0.1, **option)
    assert any((whole[n] - p).abs().max() > 5e-3 for n, p in make().named_parameters())  # it went somewhere
    assert_close(cut, whole, rtol=1e-4, atol=1e-5)
    assert_close(cut_logged, logged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("parts", "micro"), [(COUPLED, 1), (UNCOUPLED, 2), (COUPLED, 2)], ids=["coupled", "micro", "coupled micro"]
)
def test_two_ranks_train_like_one_process(ranks, shards, parts, micro):
    whole, logged = fit(shards, parts, clip=0.1)
    (a, logged_a), (b, _) = ranks(fit, shards, parts, 4, micro, None, 0.5, 0.1)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert_close(a, whole, rtol=1e-4, atol=1e-5)
    assert_close(logged_a, logged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("parts", "micro"), [(COUPLED, 1), (UNCOUPLED, 2)], ids=["coupled", "micro"])
def test_two_ranks_with_shares_of_the_parameters_train_like_one_process(ranks, shards, parts, micro):
    whole, logged = fit(shards, parts, clip=0.1)
    (a, logged_a), (b, _) = ranks(fit, shards, parts, 4, micro, None, 0.5, 0.1, True)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert_close(a, whole, rtol=1e-4, atol=1e-5)
    assert_close(logged_a, logged, rtol=1e-4, atol=1e-5)


def test_every_piece_of_a_batch_comes_once():
    from contracts import cases

    model = cases.model()
    for packed in (False, True):
        batch = cases.batch(model.readers, cases.examples(model.readers), packed=packed)
        pieces = split_rows(batch, 3)
        for name in model.encoders:
            assert torch.equal(torch.cat([p[name].position for p in pieces]), batch[name].position)
        seeds = [p["seed"][p["image"].samples()] for p in pieces]  # numbers in a piece index the seeds in it
        assert torch.equal(torch.cat(seeds).sort().values, batch["seed"].sort().values)


def test_pieces_of_a_coupled_loss_keep_the_activations_of_one_piece_only():
    from contracts import cases

    model = cases.model()
    batch = cases.batch(model.readers, [cases.examples(model.readers)[0]] * 16)
    kept = {}
    for chunks in (1, 8):
        model.chunks, kept[chunks] = chunks, 0

        def keep(tensor, chunks=chunks):
            kept[chunks] += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            Contrastive(model)(model, batch)["contrastive"].total.backward()
    assert kept[8] < kept[1] / 2


def test_every_parameter_is_in_one_decay_group():
    pretrainer = make()
    pretrainer.backbone.encoder("text").head.weight.requires_grad_(False)
    names = {id(p): n for n, p in pretrainer.named_parameters()}
    groups = Groups().of(pretrainer)
    decayed, still = (
        [names[id(p)] for g in groups if ("weight_decay" in g) == fixed for p in g["params"]] for fixed in (False, True)
    )
    assert sorted(decayed + still) == sorted(n for n in names.values() if n != "backbone.encoders.text.head.weight")
    assert "backbone.encoders.text.stem.weight" in still  # an embedding
    assert "backbone.encoders.image.stem.weight" in decayed
    assert not any(n.endswith("bias") or "norm" in n or ".kind." in n for n in decayed)


def test_missing_modalities_are_named_before_training():
    objective = make().objective
    check_needs(objective, {"pairs": ("image", "text")})
    with pytest.raises(ValueError, match=r"next \(Causal\) needs text, image"):
        check_needs(objective, {"a": ("image",), "b": ("text",)})


def test_accumulation_of_lightning_is_refused(shards):
    with pytest.raises((ValueError, pl.utilities.exceptions.MisconfigurationException), match="accumulate"):
        trainer(1, accumulate_grad_batches=2).fit(make(), pairs(shards))


def go_on(shards, folder, steps, sharded):
    """Trains to `steps`, from the checkpoint in the folder if there is one, and leaves another one."""
    pretrainer = make(COUPLED, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    run = trainer(steps, sharded)
    checkpoint = folder / "last.ckpt"
    run.fit(pretrainer, pairs(shards), ckpt_path=checkpoint if checkpoint.exists() else None, weights_only=True)
    run.save_checkpoint(checkpoint)


def test_checkpoints_go_from_one_process_to_shares_and_back(ranks, shards, tmp_path):
    straight, changing = tmp_path / "straight", tmp_path / "changing"
    straight.mkdir(), changing.mkdir()
    go_on(shards, straight, 8, False)
    go_on(shards, changing, 2, False)
    ranks(go_on, shards, changing, 4, True)
    ranks(go_on, shards, changing, 6, True)
    go_on(shards, changing, 8, False)
    a, b = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (straight, changing))
    assert_close(b["state_dict"], a["state_dict"], rtol=1e-3, atol=1e-4)
    moments = [{i: s["momentum_buffer"] for i, s in ckpt["optimizer_states"][0]["state"].items()} for ckpt in (a, b)]
    assert moments[0].keys() == moments[1].keys()  # what was never used has none
    assert_close(moments[1], moments[0], rtol=1e-3, atol=1e-5)
