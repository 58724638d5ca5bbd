import math
from collections import Counter
from itertools import groupby

import pytest
import torch
from torch.testing import assert_close

from headwater import random
from headwater.objectives.masks.policies import Around, Blocks, Policy, Spans, Suffix, Uniform, Units, Words, indices, number
from headwater.objectives.masks.salient import Salient
from headwater.tokens import Tokens

POLICIES = {
    "uniform": Uniform(),
    "spans": Spans(),
    "spans fixed": Spans(mean=3, fixed=True),
    "blocks": Blocks(),
    "blocks of time": Blocks(axes=[0, 1, 2]),
    "around": Around(),
    "tubes": Units([1, 2]),
    "moments": Units(),
    "suffix": Suffix(),
    "attended": Salient(),
    "drawn by loss": Salient("loss", temperature=0.5),
}


def grid(times, rows, columns, samples=1):
    """Films of so many times, rows and columns, with a score per token."""
    axes = torch.meshgrid(*(torch.arange(n) for n in (times, rows, columns)), indexing="ij")
    position = torch.stack(axes, -1).reshape(1, -1, 3).expand(samples, -1, -1)
    return Tokens(torch.zeros(samples, position.shape[1]), position, order=position[..., 0])


def seeds(samples, salt="test"):
    return random.fold(torch.arange(samples), salt)


def hide(policy, t, ratio, samples, name="mask"):
    score = random.uniform(random.token_seed(seeds(samples), t), (), "score")
    return policy(t, seeds(samples), ratio, name, score)


def documents(lengths, padding=0):
    """One row that holds documents of these lengths and then padding."""
    total = sum(lengths) + padding
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor([*lengths[:-1], lengths[-1] + padding]))[None]
    place = Tokens(torch.zeros(1, total), torch.zeros(1, total, 1), document=document).place()
    position = torch.stack([torch.zeros_like(place), place // 5, place % 5], -1)
    return Tokens(torch.zeros(1, total), position, torch.arange(total)[None] < sum(lengths), document)


@pytest.mark.parametrize("ratio", [0.15, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("name", POLICIES)
def test_the_realised_rate_is_within_one_percent_of_what_was_asked(name, ratio):
    t = grid(20, 4, 5, samples=1000)
    rate = hide(POLICIES[name], t, ratio, 1000).float().mean()
    assert abs(rate - ratio) < 0.01 * ratio


@pytest.mark.parametrize("ratio", [0.15, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if policy.exact])
def test_each_document_hides_its_exact_share(name, ratio, padding):
    lengths = [1, 2, 3, 10, 17, 40]
    t = documents(lengths, padding)
    hidden = hide(POLICIES[name], t, ratio, 6)
    for k, n in enumerate(lengths):
        expected = 1 if n == 1 else min(max(round(ratio * n), 1), n - 1)
        assert int(hidden[0][t.document[0] == k].sum()) == expected
    assert not (hidden & ~t.valid).any()


@pytest.mark.parametrize("name", POLICIES)
def test_ratios_of_one_and_zero_hide_all_and_nothing(name):
    t = documents([1, 2, 7, 30], 4)
    assert torch.equal(hide(POLICIES[name], t, 1.0, 4), t.valid)
    assert not hide(POLICIES[name], t, 0.0, 4).any()
    own = hide(POLICIES[name], t, torch.tensor([1.0, 0.0, 1.0, 0.0]), 4)
    assert torch.equal(own, t.valid & (t.document % 2 == 0))


@pytest.mark.parametrize("name", POLICIES)
def test_packing_padding_and_neighbours_change_nothing(name):
    lengths = [9, 4, 25]
    packed = documents(lengths, 3)
    hidden = hide(POLICIES[name], packed, 0.4, 3)
    row = 0
    for k, n in enumerate(lengths):
        alone = packed.map(lambda field, start=row, n=n: field[:, start : start + n])._replace(document=None, valid=None)
        row += n
        score = random.uniform(random.token_seed(seeds(3)[k : k + 1], alone), (), "score")
        assert torch.equal(POLICIES[name](alone, seeds(3)[k : k + 1], 0.4, "mask", score), hidden[:, row - n : row])


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("suffix", "attended")])
def test_another_name_or_seed_hides_other_tokens(name):
    t = grid(4, 5, 5, samples=3)
    score = torch.zeros(t.position.shape[:2])
    a, b, c = (
        POLICIES[name](t, *given, score) for given in ((seeds(3), 0.5, "a"), (seeds(3), 0.5, "b"), (seeds(3, "x"), 0.5, "a"))
    )
    assert (a != b).any(1).all()
    assert (a != c).any(1).all()
    assert torch.equal(a, POLICIES[name](t, seeds(3), 0.5, "a", score))


def test_every_token_is_hidden_as_often():
    t = Tokens(torch.zeros(4000, 8), torch.zeros(4000, 8, 1))
    hidden = Uniform()(t, torch.arange(4000), 0.25)
    assert (hidden.sum(1) == 2).all()
    assert (hidden.float().mean(0) - 0.25).abs().max() < 4 * (0.25 * 0.75 / 4000) ** 0.5
    together = (hidden[:, :1] & hidden[:, 1:]).float().mean(0)  # pairs too: 2/8 * 1/7
    assert (together - 2 / 8 / 7).abs().max() < 4 * (0.036 / 4000) ** 0.5


def runs(hidden):
    """Lengths of the unbroken runs in a list of bools."""
    return [len(list(run)) for value, run in groupby(hidden) if value]


def test_spans_are_those_of_a_naive_loop():
    """Starts in the order of their draws, each with its whole span, the last one cut: wav2vec 2.0 until the count is reached."""
    policy, n = Spans(mean=4, most=6), 60
    t = Tokens(torch.zeros(5, n), torch.zeros(5, n, 1))
    hidden = policy(t, seeds(5), 0.5, "m")
    start = random.uniform(random.token_seed(seeds(5), t), (), "m")
    length = policy.lengths(random.uniform(random.token_seed(seeds(5), t), (), "m/length"))
    for row in range(5):
        chosen = []
        for first in start[row].argsort().tolist():
            span = range(first, min(n, first + int(length[row, first])))
            chosen += [j for j in span if j not in chosen]
        assert sorted(chosen[:30]) == hidden[row].nonzero()[:, 0].tolist()


def test_lengths_of_spans_are_geometric_and_clipped():
    """SpanBERT: lengths from Geo(0.2) clipped at 10 have mean 3.8."""
    draw = random.uniform(torch.tensor(3), (200_000,), "draw")
    found = Spans(mean=5, most=10).lengths(draw)
    assert abs(found.mean() - sum(0.8**k for k in range(10)) * 1.0) < 0.01 * 4.46
    counts = Counter(found.int().tolist())
    for k in range(1, 10):
        assert abs(counts[k] / 200_000 - 0.8 ** (k - 1) * 0.2) < 0.01 * 0.2
    assert abs(counts[10] / 200_000 - 0.8**9) < 0.002
    assert (Spans(mean=7, fixed=True).lengths(draw) == 7).all()


def test_fixed_spans_stay_whole_but_for_the_last():
    t = Tokens(torch.zeros(50, 200), torch.zeros(50, 200, 1))
    hidden = Spans(mean=10, fixed=True)(t, seeds(50), 0.1)
    found = [length for row in hidden.tolist() for length in runs(row)]
    assert sum(hidden.sum(1) == 20) == 50
    assert sum(length >= 10 for length in found) > 0.6 * len(found)  # shorter ones were cut by the count or by the end


def test_boxes_have_the_share_and_the_aspect_that_were_asked():
    """BEiT: area = share * grid; rows = sqrt(area * aspect), columns = sqrt(area / aspect), top and left within the grid."""
    policy = Blocks(share=(0.15, 0.2), aspect=(0.75, 1.5), tries=4)
    low, extent = torch.tensor([[3.0, 5.0]]).repeat(2000, 1), torch.tensor([[64.0, 64.0]]).repeat(2000, 1)
    corner, size = policy.boxes(low, extent, seeds(2000), "m")
    share = size.prod(-1) / 64**2
    assert abs(share.mean() - 0.175) < 0.01 * 0.175
    assert share.min() > 0.145
    assert share.max() < 0.21
    aspect = size[..., 0] / size[..., 1]
    assert abs(aspect.log().mean() - (math.log(0.75) + math.log(1.5)) / 2) < 0.01
    assert 0.7 < aspect.min() < 0.78
    assert 1.44 < aspect.max() < 1.6
    assert (corner >= low[:, None]).all()
    assert (corner + size <= (low + extent)[:, None]).all()
    assert (corner.amin((0, 1)) == torch.tensor([3.0, 5.0])).all()


def test_a_first_box_is_hidden_as_a_rectangle():
    t = grid(1, 12, 12, samples=200)
    hidden = Blocks(share=(0.3, 0.3), tries=1)(t, seeds(200), 0.2).view(200, 12, 12)
    for one in hidden:  # 29 of the some 43 cells of the box: its first rows, the last of them perhaps in part
        rows, columns = one.any(1).nonzero()[:, 0], one.any(0).nonzero()[:, 0]
        full = one[rows[0] : rows[-1], columns[0] : columns[-1] + 1]
        assert full.all()
        assert len(columns) == columns[-1] - columns[0] + 1


def test_boxes_of_films_are_tubes():
    hidden = Blocks(share=(0.25, 0.25), aspect=(1, 1), tries=1)(grid(4, 8, 8, samples=20), seeds(20), 0.25).view(20, 4, 64)
    assert (hidden == hidden[:, :1]).all()
    assert (hidden[:, 0].sum(1) == 16).all()


def test_around_hides_the_nearest():
    t = grid(1, 9, 9, samples=30)
    hidden = Around()(t, seeds(30), 0.3)
    for row in range(30):
        place = t.position[row].float()
        near = [torch.cdist(place[k : k + 1], place)[0] for k in range(81)]
        reach = [d[hidden[row]].max() <= d[~hidden[row]].min() for d in near]
        assert any(reach)  # one token has all hidden ones nearer than any other


def test_units_are_never_cut():
    t = grid(3, 5, 7, samples=40)
    films = Units([1, 2])(t, seeds(40), 0.6).view(40, 3, 35)
    assert (films == films[:, :1]).all()
    assert set(films[:, 0].sum(1).tolist()) == {21}
    moments = Units()(t, seeds(40), 0.5).view(40, 3, 35)
    assert (moments == moments[:, :, :1]).all()
    assert set(moments[:, :, 0].sum(1).tolist()) == {1, 2}  # of three moments one or two, at 1.5 on average


def test_a_sample_of_one_unit_is_hidden_as_often_as_the_ratio_says():
    t = Tokens(torch.zeros(4000, 3), torch.zeros(4000, 3, 1))
    hidden = Units([0])(t, seeds(4000), 0.3)
    assert (hidden == hidden[:, :1]).all()
    assert abs(hidden.float().mean() - 0.3) < 0.03


def test_words_are_hidden_as_a_whole():
    texts = [b"a small dog sees the red boat", b"one word more", b"single"]
    length = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts])
    valid = torch.arange(length) < torch.tensor([[len(text)] for text in texts])
    t = Tokens(ids, torch.arange(length).expand(3, -1)[..., None], valid)
    found = set()
    for salt in range(20):
        hidden = Words([32])(t, seeds(3, str(salt)), 0.4)
        for row, text in enumerate(texts[:2]):
            shown, first = [], 0
            for k, word in enumerate(text.split(b" ")):
                size = len(word) + (k > 0)
                (whole,) = set(hidden[row, first : first + size].tolist())
                shown.append(whole)
                first += size
            assert 0 < sum(shown) < len(shown)
            found.add((row, tuple(shown)))
    assert len(found) > 8


def test_suffix_hides_the_end_by_order():
    t = grid(4, 2, 2, samples=1)
    assert Suffix()(t, seeds(1), 0.5)[0].tolist() == [False] * 8 + [True] * 8
    backwards = t._replace(order=3 - t.order)
    assert Suffix()(backwards, seeds(1), 0.25)[0].tolist() == [True] * 4 + [False] * 12


def test_salient_hides_the_largest_or_the_smallest_scores():
    t = documents([6, 10], 3)
    score = torch.rand(1, 19, generator=torch.Generator().manual_seed(0)).masked_fill(~t.valid, 9.0)
    for most in (True, False):
        hidden = Salient(most=most)(t, seeds(2), 0.5, "m", score)
        for k in range(2):
            mine = (t.document[0] == k) & t.valid[0]
            apart = score[0][mine & hidden[0]], score[0][mine & ~hidden[0]]
            assert apart[0].min() >= apart[1].max() if most else apart[0].max() <= apart[1].min()


def test_gumbel_noise_draws_without_replacement_by_the_softmax_of_scores():
    t = Tokens(torch.zeros(20_000, 4), torch.zeros(20_000, 4, 1))
    score = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(20_000, 4)
    first = Salient(temperature=0.7)(t, seeds(20_000), 0.25, "m", score).float().mean(0)
    z = (score[0] - 1.5) / score[0].std(correction=0)
    assert_close(first, (z / 0.7).softmax(0), atol=0.015, rtol=0)


def test_number_keeps_one_and_hides_one():
    n = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0, 100.0])
    assert number(n, 0.75).tolist() == [0, 1, 1, 2, 8, 75]
    assert number(n, 0.01).tolist() == [0, 1, 1, 1, 1, 1]
    assert number(n, 0.999).tolist() == [0, 1, 1, 2, 9, 99]


def test_indices_list_the_chosen_in_order():
    chosen = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0]]).bool()
    column, real = indices(chosen)
    assert column[real].tolist() == [1, 3, 0]
    assert real.tolist() == [[True, True], [True, False]]
    column, real = indices(chosen[:1], 2)
    assert column.tolist() == [[1, 3]]
    assert real is None
    hidden = Uniform()(
        documents([20, 30], 4), seeds(2), 0.4
    )  # hidden and visible places partition the row and put it together again
    (one, there), (two, here) = indices(hidden), indices(~hidden)
    assert sorted([*one[there].tolist(), *two[here].tolist()]) == list(range(54))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Spans(mean=0.5),
        lambda: Spans(mean=2.5, fixed=True),
        lambda: Blocks(share=(0.5, 0.2)),
        lambda: Blocks(tries=0),
        lambda: Words([]),
        lambda: Salient(temperature=-1),
        lambda: Units([4])(grid(1, 2, 2), seeds(1), 0.5),
        lambda: Salient()(grid(1, 2, 2), seeds(1), 0.5),
    ],
)
def test_bad_arguments_are_refused(make):
    with pytest.raises(ValueError, match=r"expected|hand it"):
        make()


def test_a_policy_has_to_give_keys():
    with pytest.raises(NotImplementedError, match=r"Policy\.key"):
        Policy()(grid(1, 2, 2), seeds(1), 0.5)
