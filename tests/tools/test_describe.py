"""`headwater describe`: exact counts of parameters, FLOPs by formula, activations by the profiler, and kernels as they are."""

import json
import math
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from headwater import attention, cli
from headwater.fusion import JointTokens
from headwater.init import Normal
from headwater.modalities import Image, Text
from headwater.model import Model
from headwater.objectives import Contrastive, Masked, Weighted
from headwater.objectives.contrast.soft_positives import Momentum
from headwater.objectives.objective import Objective, Term, weighted_sum
from headwater.objectives.weighted import Draw
from headwater.pretrainer import Pretrainer
from headwater.tools import curves
from headwater.tools.cost import ROWS, example, longest, measure, stretch
from headwater.tools.describe import built, describe, kernels
from headwater.training.schedules import WSD, Geometric, HalfCosine, Linear, Step
from headwater.trunk import Trunk


def pair(on="meta", **options):
    """Two encoders, a fusion and two objectives, one of which compares all samples."""
    with torch.device(on):
        encoders = {"image": Image(Trunk(64, depth=2), size=32), "text": Text(Trunk(96, depth=1, heads=3), length=40)}
        model = Model(encoders, lambda widths: JointTokens(widths, Trunk(64, depth=1)), space=32)
        parts = {"mask": partial(Masked, context=["text"], mode="substitute"), "pair": Contrastive}
        return Pretrainer(model, partial(Weighted, parts=parts), **options)


class Whole(Objective):
    """Asks the encoder of pictures for all its tokens."""

    needs = ("image",)

    def __init__(self, model):
        super().__init__()

    def numbers(self, batch):
        return {"whole": torch.tensor(1)}

    def forward(self, model, batch):
        return {"whole": Term(model(model.embed({"image": batch["image"]}))["image"].x.sum(), torch.tensor(1))}


class Looks(Whole):
    """Asks for a value that came out of the model."""

    def forward(self, model, batch):
        terms = super().forward(model, batch)
        assert float(terms["whole"].total.detach()) < math.inf
        return terms


def test_flops_of_a_vision_transformer_follow_the_formula():
    width, depth, size, patch = 192, 12, 224, 16
    with torch.device("meta"):
        pretrainer = Pretrainer(Model({"image": Image(Trunk(width, depth), size=size, patch=patch)}), Whole)
    found, _ = measure(pretrainer, "32-true", 8)
    n, features = (size // patch) ** 2, 3 * patch**2
    stem, linear, scores = 2 * n * features * width, depth * 24 * n * width**2, depth * 4 * n * n * width
    cost = found["encoder image"]
    assert cost.forward / 8 == pytest.approx(stem + linear + scores, rel=0.02)
    assert cost.backward / 8 == pytest.approx(stem + 2 * linear + 2.5 * scores, rel=0.02)  # scores are made again
    assert cost.forward / 8 == pytest.approx(2 * 1.26e9, rel=0.02)  # DeiT-Ti has 1.3 G multiply-adds, arXiv:2012.12877


@pytest.mark.parametrize("rows", [5, 24])
def test_activations_are_what_a_real_run_keeps(rows):
    real, options = pair("cpu"), {"activities": [ProfilerActivity.CPU], "profile_memory": True}
    batch = example(real, rows, None)
    task = real.objective.task(batch)
    with profile(**options) as seen:
        loss = weighted_sum(real.objective(real.backbone, task), real.objective.numbers(task), 1)
    kept = sum(event.self_cpu_memory_usage for event in seen.events())  # what was taken and not given back
    found, _ = measure(pair(), "32-true", rows)
    assert loss.isfinite()
    counted = sum(cost.activations for cost in found.values())
    print(f"{rows} samples: counted {counted / 1e6:.2f} MB, kept by a real run {kept / 1e6:.2f} MB")
    assert counted == pytest.approx(kept, rel=0.1)


def test_a_parabola_through_three_batches_is_exact():
    a, b = (measure(pair(), "32-true", rows)[0] for rows in (ROWS[1], 30))
    import headwater.tools.cost as cost

    before, cost.ROWS = cost.ROWS, (ROWS[0], 17, 30)
    try:
        again = measure(pair(), "32-true", 30)[0]
    finally:
        cost.ROWS = before
    assert {name: tuple(map(round, c)) for name, c in b.items()} == {name: tuple(map(round, c)) for name, c in again.items()}
    assert b["objective pair"].activations > 30 / ROWS[1] * a["objective pair"].activations  # all samples are compared


def test_every_part_has_its_own_costs():
    found, _ = measure(pair(), "32-true", 8)
    assert set(found) == {"encoder image", "encoder text", "fusion", "projections", "objective mask", "objective pair"}
    assert all(cost.activations > 0 for cost in found.values())
    assert all(1.2 * cost.forward < cost.backward < 2.5 * cost.forward for cost in found.values())
    mixed, _ = measure(pair(), "bf16-mixed", 8)
    for name in found:
        assert mixed[name][:2] == found[name][:2]
    total, half = (sum(c.activations for c in costs.values()) for costs in (found, mixed))
    assert 0.45 * total < half < 0.75 * total


@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [(torch.optim.AdamW, 2), (partial(torch.optim.SGD, lr=0.1), 0), (partial(torch.optim.SGD, lr=0.1, momentum=0.9), 1)],
)
def test_optimizer_state_is_that_of_one_step(optimizer, copies):
    pretrainer = pair(optimizer=optimizer)
    count = sum(p.numel() for p in pretrainer.parameters())
    _, state = measure(pretrainer, "32-true", 4)
    assert state == pytest.approx(4 * copies * count, rel=0.001)


def test_recipes_are_built_without_memory_and_counted_exactly(capsys):
    describe("flow", batch=2, json=True)
    told = json.loads(capsys.readouterr().out)
    real = real_flow()
    assert told["total"]["parameters"] == sum(p.numel() for p in real.parameters())
    for name in ("encoder image", "encoder text", "fusion", "objective"):
        prefix = {"fusion": "backbone.fusion.", "objective": "objective."}.get(name, f"backbone.encoders.{name[8:]}.")
        assert told["parts"][name]["parameters"] == sum(p.numel() for n, p in real.named_parameters() if n.startswith(prefix))
    assert told["memory"]["parameters"] == 4 * told["total"]["parameters"]
    assert told["memory"]["sum"] == sum(n for name, n in told["memory"].items() if name != "sum")
    assert told["tokens"] == {"image": 64, "text": 77}
    assert told["batch"] == 2
    assert told["notes"] == []


def real_flow():
    from headwater.objectives import Flow

    encoders = {
        "image": Image(Trunk(192, 4, conditional=True), size=64, patch=8),
        "text": Text(Trunk(192, 2)),
    }
    model = Model(encoders, lambda widths: JointTokens(widths, Trunk(192, 2)))
    return Pretrainer(model, partial(Flow, modality="image", context=["text"]))


def test_the_command_prints_tables(capsys):
    cli.main(["describe", "clip", "--batch", "4096", "--init"])
    said = capsys.readouterr().out
    for part in ("encoder image", "projections", "4096 samples", "attention on cpu", "\n0 of ", "optimizer 10.3 MB"):
        assert part in said
    with pytest.raises(SystemExit, match="found no recipe 'klip'"):
        cli.main(["describe", "klip"])


def test_a_recipe_that_is_wrong_is_refused(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text("model: {backbone: {encoders: {image: {class_path: Image, init_args: {sise: 3}}}}, objective: Masked}")
    with pytest.raises(SystemExit, match="found the option 'sise' for Image"):
        cli.main(["describe", str(path)])


def test_recipes_start_by_rules_and_towers_are_counted(tmp_path, capsys):
    recipe = {"backbone": {"encoders": {"image": "timm/test_vit"}}, "objective": {"class_path": "Masked"}}
    pretrainer = built({"model": recipe})
    assert isinstance(pretrainer.init, Normal)
    assert all(p.is_meta for p in pretrainer.parameters())
    (tmp_path / "tower.yaml").write_text(json.dumps({"model": recipe}))
    describe(str(tmp_path / "tower.yaml"), json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["parts"]["encoder image"]["built"] == "VisionTransformer"
    assert told["parts"]["encoder image"]["forward"] > 1e6
    assert told["notes"] == []


def looking(recipe, device="meta"):
    with torch.device(device):
        return Pretrainer(Model({"image": Image(Trunk(64, depth=1))}), Looks)


def test_an_objective_that_looks_at_values_runs_for_real(capsys, monkeypatch):
    import headwater.tools.describe as module

    monkeypatch.setattr(module, "built", looking)
    describe("mae", batch=100, json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["notes"][0].startswith("a step without memory failed, DataDependentOutput")
    assert len(told["notes"]) == 1
    with torch.device("meta"):
        hollow = Pretrainer(looking(None).backbone, Whole)
    expected = measure(hollow, "32-true", 100)[0]["encoder image"]
    found = told["parts"]["encoder image"]
    assert found["forward"] == pytest.approx(expected.forward / 100)
    assert found["backward"] == pytest.approx(expected.backward / 100)
    assert found["activations"] == pytest.approx(expected.activations, rel=0.01)


def test_what_cannot_run_at_all_is_said_and_the_rest_told(capsys, monkeypatch):
    import headwater.tools.describe as module

    monkeypatch.setattr(module, "built", looking)
    monkeypatch.setattr(Looks, "numbers", lambda self, batch: {})
    describe("mae")
    said = capsys.readouterr().out
    assert "a real step failed, KeyError" in said
    assert f"{sum(p.numel() for p in looking(None).parameters()):,}" in said


def test_the_table_of_kernels_is_that_of_attention():
    found = kernels("cpu", "32-true", 32)
    assert found["used"].keys() == attention.kernels("cpu").keys()
    assert all(not found["kernels"][kernel][kind] for kind, kernel in found["used"].items())
    assert set(found["used"].values()) == {"flash"}
    assert found["kernels"]["math"] == dict.fromkeys([*found["used"], "double backward", "forward mode", "vmap"], "")
    assert "not implemented" in found["kernels"]["flash"]["double backward"]
    assert "accelerator" in found["kernels"]["varlen"]["packed"]


def test_examples_are_stretched_to_the_longest_sample():
    reader = Text(Trunk(16, depth=1), length=40).reader
    assert longest(reader) == 40
    one = stretch(reader.example(1, 0)[0], 40)
    assert one.position[:, 0].tolist() == list(range(40))
    assert one.x.shape == (40,)


def test_every_schedule_of_a_run_is_found_and_drawn(tmp_path):
    weights = {"mask": Linear(1.0, 0.5), "pair": lambda progress: 2 * progress}
    parts = {"mask": partial(Masked, ratio={"image": Linear(0.9, 0.1)}, context=["text"], mode="substitute"), "pair": Contrastive}
    model = Model(
        {"image": Image(Trunk(32, depth=1), size=32), "text": Text(Trunk(32, depth=1), length=16)},
        lambda w: JointTokens(w, Trunk(32, depth=1)),
    )
    share = partial(Contrastive, positives=partial(Momentum, share=Geometric(0.4, 0.1)), momentum=HalfCosine(0.9))
    turns = Draw({"pair": Step(1.0, 0.0, 0.5)})
    pretrainer = Pretrainer(
        model,
        partial(Weighted, parts=parts | {"soft": share}, weights=weights, turns=turns),
        optimizer=partial(torch.optim.AdamW, lr=0.1, weight_decay=0.2),
        schedule=WSD(0.1, 0.5),
        weight_decay=Linear(1.0, 0.0),
    )
    found = curves.course(pretrainer, 10, "all")
    assert found.values["learning rate"] == pytest.approx([0.1] * 5 + [0.08, 0.06, 0.04, 0.02, 0])
    assert found.values["weight decay"] == pytest.approx([0.2 * (1 - k / 10) for k in range(1, 11)])
    ends = {name: (values[0], values[-1]) for name, values in found.values.items() if name.startswith("objective.")}
    assert ends == {
        "objective.parts.mask.ratio.image": pytest.approx((0.9, 0.18)),
        "objective.weights.mask": pytest.approx((1.0, 0.55)),
        "objective.weights.pair": pytest.approx((0, 1.8)),
        "objective.turns.shares.pair": (1.0, 0.0),
        "objective.parts.soft.momentum": pytest.approx((0.9, HalfCosine(0.9)(0.9))),
        "objective.parts.soft.positives.share": pytest.approx((0.4, 0.4 * 0.25**0.9)),
    }
    rates = [0.1 * WSD(0.1, 0.5)((k + 1) / 10) for k in range(10)]
    assert curves.sums(pretrainer, 10).s1 == pytest.approx(sum(rates))
    assert len(curves.course(pretrainer, 5000).at) == curves.POINTS
    curves.plot([found, curves.course(pretrainer, 20, "more")], str(tmp_path / "all.png"))
    curves.plot([curves.course(pretrainer, None)], str(tmp_path / "time.png"))
    for name in ("all", "time"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_plan_is_described_stage_by_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    describe("stages", batch=2, json=True, plot="plan.png")
    told = json.loads(capsys.readouterr().out)
    assert [line["stage"] for line in told["stages"]] == ["begin", "mix", "decay"]
    assert told["rates"]["decay"]["s1"] == pytest.approx(0.001 * sum(k / 100 for k in range(100)))
    assert told["rates"]["begin"]["s2"] == 0
    assert (tmp_path / "plan.png").stat().st_size > 5000
