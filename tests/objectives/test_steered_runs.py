"""V-Pretraining in runs of the real trainer: every step counts, runs resume, and ranks agree."""

from functools import partial

import pytest
import torch
from runs import UNCOUPLED, make, trainer, whole, write_pairs

from headwater.datamodules.datamodule import ShardDataModule, Source
from headwater.datamodules.feedback import Feedback
from headwater.objectives import Causal, Contrastive, VPretraining, Weighted
from headwater.objectives.designers import PartWeights
from headwater.pretrainer import Pretrainer
from headwater.training.groups import Groups, Rule
from headwater.training.schedules import constant

RULES = Groups(rules=[Rule("^objective\\.designer", factor=50.0, weight_decay=0.0)])


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def steered(micro=1, **options):
    """Two parts, weighed so that pictures and texts find each other."""
    return Pretrainer(
        make().backbone,
        partial(
            VPretraining,
            inner=partial(Weighted, parts=UNCOUPLED),
            **{"feedback": Contrastive, "designer": PartWeights, "every": 2, "after": 2, **options},
        ),
        partial(torch.optim.AdamW, lr=1e-3),
        constant,
        micro=micro,
        clip=0.1,
        groups=RULES if options.get("designer", PartWeights) else None,
    )


def fit(shards, steps=7, sharded=False, resume=None, save=None, micro=1, precision="32-true", **options):
    """Parameters after some steps, and what was logged in the last one."""
    pretrainer = steered(micro, **options)
    run = trainer(steps, sharded, precision=precision)
    data = ShardDataModule({"it": Source(shards)}, batch_size=6, workers=0, feedback=Feedback(Source(shards), 4))
    run.fit(pretrainer, data, ckpt_path=resume, weights_only=resume and True)
    if save:
        run.save_checkpoint(save)
    return {name: whole(p) for name, p in pretrainer.named_parameters()}, {
        name: x.clone() for name, x in run.callback_metrics.items()
    }


def test_a_run_steers_and_tells(shards):
    weights, told = fit(shards)
    assert weights["objective.designer.logits"].any()
    assert {"train/value", "train/alignment", "train/feedback", "train/designer/share/mask"} <= told.keys()
    assert -1 <= told["train/alignment"] <= 1


def test_nothing_of_the_feedback_reaches_the_learner(shards):
    """With a designer that is still, the run is that of the inner objective alone."""
    still, _ = fit(shards, control="still")
    alone = Pretrainer(make().backbone, partial(Weighted, parts=UNCOUPLED), partial(torch.optim.AdamW, lr=1e-3), constant, clip=0.1)
    trainer(7).fit(alone, ShardDataModule({"it": Source(shards)}, batch_size=6, workers=0))
    for name, p in alone.backbone.named_parameters():
        assert torch.equal(still[f"backbone.{name}"], p), name


def test_a_run_that_was_cut_ends_like_the_uninterrupted_one(shards, tmp_path):
    once, _ = fit(shards)
    fit(shards, 5, save=tmp_path / "five.ckpt")
    again, _ = fit(shards, resume=tmp_path / "five.ckpt")
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_pieces_give_the_same_steps(shards):
    a, b = fit(shards)[0], fit(shards, micro=2)[0]
    torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_ranks_learn_what_one_process_learns(ranks, shards, sharded):
    alone, told = fit(shards, 5)
    (a, told_a), (b, _) = ranks(fit, shards, 5, sharded)
    assert all(torch.equal(a[name], b[name]) for name in a)
    torch.testing.assert_close(a, alone, rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(told_a["train/value"], told["train/value"], rtol=1e-3, atol=1e-5)


def test_half_precision_and_feedback_with_a_head_of_its_own(shards):
    weights, told = fit(shards, precision="bf16-mixed", feedback=partial(Causal, prefix=["image"]))
    assert weights["objective.designer.logits"].any()
    assert told["train/value"].isfinite()
