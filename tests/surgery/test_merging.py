from copy import deepcopy

import pytest
import torch
from torch.testing import assert_close

from headwater.hub import load_backbone, save_backbone
from headwater.modalities import Text
from headwater.model import Model
from headwater.surgery import added, combined, greedy, merged, soup
from headwater.surgery.merging import check_kin, kinship
from headwater.trunk import Trunk


def model(seed=0, depth=1):
    torch.manual_seed(seed)
    return Model({"text": Text(Trunk(16, depth, 2, position="rotary"), length=16)}).eval()


def tuned(start, seed, size=0.01):
    made = deepcopy(start)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(size * torch.randn_like(p))
    return made


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """An ancestor, three models that were trained from it, and a stranger, each saved by its name."""
    folder, start = tmp_path_factory.mktemp("family"), model()
    made = {"origin": start, "stranger": model(1), **{name: tuned(start, k) for k, name in enumerate("abc", 2)}}
    for name, one in made.items():
        save_backbone(one, folder / name)
    return folder, {name: one.state_dict() for name, one in made.items()}


def test_the_mean_of_equal_models_is_that_model():
    state = model().state_dict()
    for count in (2, 3, 7):
        made = combined([state] * count, [1 / count] * count)
        assert all(torch.equal(made[n], state[n]) for n in state)


def test_sums_equal_the_formula_tensor_by_tensor(family):
    _, of = family
    weights = [0.2, 0.5, 0.3]
    made = combined([of[n] for n in "abc"], weights)
    for name in made:
        assert_close(made[name], sum(w * of[n][name] for w, n in zip(weights, "abc", strict=True)), rtol=1e-6, atol=1e-7)
    made = added(of["a"], of["origin"], [of["b"], of["c"]], [1.0, -0.5])
    for name in made:
        expected = of["a"][name] + (of["b"][name] - of["origin"][name]) - 0.5 * (of["c"][name] - of["origin"][name])
        assert_close(made[name], expected, rtol=1e-6, atol=1e-6)
    back = added(of["b"], of["b"], [of["c"]], [1.0])
    assert all(torch.equal(back[n], of["c"][n]) for n in back)


def test_folders_are_merged_and_exported(family, tmp_path):
    folder, of = family
    names = [str(folder / n) for n in "abc"]
    made = merged(names, [0.2, 0.5, 0.3])
    assert_close(made.state_dict(), combined([of[n] for n in "abc"], [0.2, 0.5, 0.3]))
    save_backbone(made, tmp_path / "soup")
    assert_close(load_backbone(tmp_path / "soup").model.state_dict(), made.state_dict(), rtol=0, atol=0)
    assert_close(merged(names).state_dict(), combined([of[n] for n in "abc"], [1 / 3] * 3))
    chat = merged(names[:2], origin=str(folder / "origin")).state_dict()
    assert_close(chat, added(of["a"], of["origin"], [of["b"]], [1.0]))
    encoder = soup(names, modality="text")
    assert encoder.settled
    assert_close(encoder.state_dict(), merged(names).encoder("text").state_dict())


def test_strangers_and_other_shapes_are_refused(family, tmp_path):
    folder, of = family
    assert kinship(of["a"], of["b"]) > 0.9
    assert abs(kinship(of["a"], of["stranger"])) < 0.2
    with pytest.raises(ValueError, match="one ancestor"):
        merged([str(folder / "a"), str(folder / "stranger")])
    check_kin([of["a"], of["stranger"]], -1.0)
    with pytest.raises(ValueError, match="differs from the first"):
        combined([of["a"], model(depth=2).state_dict()], [0.5, 0.5])
    with pytest.raises(ValueError, match="add up to 1"):
        combined([of["a"], of["b"]], [0.5, 0.6])
    with pytest.raises(ValueError, match="two or more"):
        merged([str(folder / "a")])
    with pytest.raises(ValueError, match="floating-point"):
        combined([{"n": torch.tensor(1)}, {"n": torch.tensor(2)}], [0.5, 0.5])
    with pytest.raises(ValueError, match="expected one of text"):
        soup([str(folder / "a"), str(folder / "b")], modality="image")


def test_a_greedy_soup_takes_what_does_no_harm():
    """A quadratic bowl: models on both sides of its middle help one another, one far away does not."""
    start = model()
    ways = [tuned(start, 5, 0.1), tuned(start, 6, 0.1), tuned(start, 7, 0.1)]
    with torch.no_grad():
        for one, other, far, middle in zip(*(m.parameters() for m in (*ways, start)), strict=True):
            other.copy_(2 * middle - one + 0.001)
            far.copy_(middle + 3 * (far - middle))

    def score(one):
        return -sum(float((p - q).detach().square().sum()) for p, q in zip(one.parameters(), start.parameters(), strict=True))

    before = {n: p.clone() for n, p in ways[0].state_dict().items()}
    state, taken = greedy(ways, score)
    assert sorted(taken) == [0, 1]
    assert_close(state, combined([ways[0].state_dict(), ways[1].state_dict()], [0.5, 0.5]))
    assert all(torch.equal(before[n], p) for n, p in ways[0].state_dict().items())
