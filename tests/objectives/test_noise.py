import math
from collections import Counter

import pytest
import torch
from torch.testing import assert_close

from headwater import random
from headwater.datamodules.collate import collate
from headwater.objectives.noise import Delete, Infill, Insert, Permute, Replace, Rotate, Shuffle
from headwater.objectives.noise.operators import Ids, poisson, sentences
from headwater.tokens import Tokens

IDS = Ids(1000, range(1000, 1008))
TABLE = {n: [500 + n, 600 + n] for n in range(0, 50, 2)}
EVERY = [
    Delete(0.2),
    Insert(0.2),
    Replace(0.2),
    Replace(0.5, TABLE),
    Shuffle(3),
    Permute(size=3),
    Permute(0.5, ends=[*range(7, 20)]),
    Rotate(),
    Rotate(0.5),
    Infill(0.3, 3.0),
]


def documents(count, low, high, seed=0):
    """Samples of `low` to `high` ids below 50."""
    draw = random.uniform(random.fold(torch.arange(count), seed), (high + 1,), "documents")
    lengths = low + (draw[:, 0] * (high - low + 1)).long()
    return [(row[1 : 1 + n] * 50).long() for row, n in zip(draw, lengths.tolist(), strict=True)]


def batched(ids, rows=None):
    samples = [{"it": Tokens(x, torch.arange(len(x), dtype=torch.int32)[:, None])} for x in ids]
    return collate(samples, ["it"], rows)["it"]


def told(t, count):
    """Of every sample its ids and the places that they came from, as lists."""
    found, real = [([], []) for _ in range(count)], t.real()
    for x, place, sample in zip(*(f[real].tolist() for f in (t.x, t.position[..., 0], t.sample())), strict=True):
        found[sample][0].append(x)
        found[sample][1].append(place)
    return found


def noised(noise, ids, rows=None, seed=0, progress=0.0):
    return told(noise(batched(ids, rows), random.fold(torch.arange(len(ids)), seed), IDS, progress), len(ids))


@pytest.mark.parametrize("noise", EVERY, ids=lambda noise: type(noise).__name__)
def test_samples_are_changed_by_their_seed_alone(noise):
    """Not by the row, by what is packed beside them, by padding, or by one another."""
    ids = documents(9, 1, 25)
    alone = noised(noise, ids)
    assert noised(noise, ids, [[0, 1, 2], [3], [4, 5, 6, 7, 8]]) == alone
    assert noised(noise, ids, [[0, 5, 8], [1, 2, 3, 4, 6, 7]]) == alone
    t = batched(ids)
    rubbish = t.map(lambda f: f.new_full((9, 5, *f.shape[2:]), 3))._replace(valid=torch.zeros(9, 5, dtype=torch.bool))
    wider = Tokens(*(None if f is None else torch.cat([f, g], 1) for f, g in zip(t, rubbish, strict=True)))
    assert told(noise(wider, random.fold(torch.arange(9), 0), IDS), 9) == alone
    assert noised(noise, ids, seed=1) != alone


@pytest.mark.parametrize("noise", EVERY, ids=lambda noise: type(noise).__name__)
def test_nothing_at_all_stays_nothing(noise):
    t = batched(documents(2, 3, 3))
    gone = t._replace(valid=torch.zeros_like(t.valid))
    assert told(noise(gone, torch.arange(2), IDS), 2) == [([], [])] * 2


@pytest.mark.parametrize(
    ("noise", "left"),
    [(Delete(0.2), 0.8), (Delete(0.05), 0.95), (Insert(0.2), 1.2)],
)
def test_numbers_of_tokens(noise, left):
    """Rates are met within 2 % over documents of 2 to 30 tokens, though 0.2 of 2 is no whole number."""
    ids = documents(10_000, 2, 30)
    total = sum(map(len, ids))
    found = noise(batched(ids), torch.arange(len(ids)), IDS)
    assert abs(int(found.real().sum()) - left * total) < 0.02 * abs(left - 1) * total


def test_deletion_keeps_the_order_of_what_is_left():
    ids = documents(200, 1, 30)
    for x, (left, place) in zip(ids, noised(Delete(0.3), ids), strict=True):
        assert place == sorted(set(place))
        assert left == x[place].tolist()


def test_what_was_inserted_can_be_taken_out():
    ids = documents(200, 1, 30)
    made = noised(Insert(0.3), ids)
    for x, (found, place) in zip(ids, made, strict=True):
        assert [i for i, p in zip(found, place, strict=True) if p >= 0] == x.tolist()
    new = [i for found, place in made for i, p in zip(found, place, strict=True) if p < 0]
    assert max(new) < 1000
    assert abs(sum(new) / len(new) - 500) < 30  # all ids alike


def test_replacement_keeps_lengths_and_places_and_meets_its_rate():
    ids = [x + 2000 for x in documents(5000, 2, 30)]  # so that every replacement shows
    made = noised(Replace(0.15), ids)
    assert all(place == list(range(len(x))) for x, (_, place) in zip(ids, made, strict=True))
    changed = sum(int((torch.tensor(found) != x).sum()) for x, (found, _) in zip(ids, made, strict=True))
    assert abs(changed - 0.15 * sum(map(len, ids))) < 0.02 * 0.15 * sum(map(len, ids))


def test_a_table_replaces_the_share_of_what_it_has_and_leaves_the_rest():
    ids = documents(5000, 2, 30)
    known = changed = 0
    taken = Counter()
    for x, (found, _) in zip(ids, noised(Replace(0.4, TABLE), ids), strict=True):
        for old, new in zip(x.tolist(), found, strict=True):
            known, changed = known + (old in TABLE), changed + (old != new)
            assert new == old or new in TABLE[old]
            taken[new - old] += old != new
    assert abs(changed - 0.4 * known) < 0.02 * 0.4 * known
    assert abs(taken[500] / changed - 0.5) < 0.02


def test_rates_may_follow_a_schedule():
    ids = documents(300, 20, 30)
    share = [sum(len(x) for x, _ in noised(Delete(lambda p: 0.5 * p), ids, progress=p)) for p in (0.0, 0.5, 1.0)]
    assert share[0] == sum(map(len, ids))
    assert_close(torch.tensor(share) / share[0], torch.tensor([1.0, 0.75, 0.5]), atol=0.01, rtol=0)


@pytest.mark.parametrize("window", [1, 3, 10])
def test_a_local_shuffle_is_the_papers(window):
    """sigma sorts i + u_i with u_i uniform on [0, k + 1); so |sigma(i) - i| <= k, and the alignment takes it back."""
    ids = documents(300, 1, 40)
    draws = random.uniform(random.token_seed(random.fold(torch.arange(300), 0), batched(ids)), (), "shuffle").double()
    moved = 0
    for x, draw, (found, place) in zip(ids, draws, noised(Shuffle(window), ids), strict=True):
        assert place == sorted(range(len(x)), key=lambda i, draw=draw: i + float(draw[i]) * (window + 1))
        assert found == x[place].tolist()
        assert all(abs(i - p) <= window for i, p in enumerate(place))
        moved += sum(i != p for i, p in enumerate(place))
    assert moved > 0.2 * sum(map(len, ids))


def units(x, noise):
    """Places of a document by its units."""
    if noise.size:
        return [list(range(i, min(i + noise.size, len(x)))) for i in range(0, len(x), noise.size)]
    made = [[]]
    for i, token in enumerate(x):
        if i and x[i - 1] in noise.ends and token not in noise.ends:
            made.append([])
        made[-1].append(i)
    return made


@pytest.mark.parametrize("noise", [Permute(size=4), Permute(ends=[3, 4, 5, 6]), Permute(0.5, ends=[3, 4, 5, 6])])
def test_units_change_places_and_stay_whole(noise):
    ids = documents(500, 1, 60)
    number = stayed = 0
    for x, (found, place) in zip(ids, noised(noise, ids), strict=True):
        expected = units(x.tolist(), noise)
        got, rest = [], list(place)
        while rest:
            unit = next(unit for unit in expected if unit[0] == rest[0])
            assert rest[: len(unit)] == unit
            got, rest = [*got, unit], rest[len(unit) :]
        assert sorted(got) == expected
        assert found == x[place].tolist()
        if len(expected) > 9:
            number, stayed = number + len(expected), stayed + sum(a == b for a, b in zip(got, expected, strict=True))
    share = stayed / number  # of a permutation of n units one stays on average, beside those that were not chosen
    assert abs(share - (1 - noise.rate)) < 0.15


def test_sentences_end_behind_their_marks():
    text = torch.tensor([list(b"Oh?! No... 3.5 km.\n\nYes")])
    t = Tokens(text, torch.arange(text.shape[1])[None, :, None])
    number = sentences(t, [33, 46, 63, 10])[0].tolist()
    made = ["".join(chr(c) for c, n in zip(text[0].tolist(), number, strict=True) if n == k) for k in range(max(number) + 1)]
    assert made == ["Oh?!", " No...", " 3.", "5 km.\n\n", "Yes"]


def test_rotation_begins_anywhere():
    ids = documents(3000, 6, 6)
    begins = Counter()
    for x, (found, place) in zip(ids, noised(Rotate(), ids), strict=True):
        begins[place[0]] += 1
        assert place == [(place[0] + i) % len(x) for i in range(len(x))]
        assert found == x[place].tolist()
    assert all(abs(n / 3000 - 1 / 6) < 0.03 for n in begins.values())
    kept = sum(place[0] == 0 for _, place in noised(Rotate(0.5), ids))
    assert abs(kept / 3000 - (0.5 + 0.5 / 6)) < 0.03


def infilled(x, seed, rate, mean):
    """BART's infilling of one document by the draws of its seed, token by token: (ids, places)."""
    t = batched([x])
    draws = {n: random.uniform(random.token_seed(seed[None], t), (), f"infill/{n}")[0].tolist() for n in ("size", "gap")}
    wanted = math.floor(float(rate * torch.tensor(float(len(x))) + random.uniform(seed, (), "infill/number")))
    found, hidden = [], 0
    for size, gap in zip(draws["size"], draws["gap"], strict=True):
        if hidden >= wanted:
            break
        n, passed = 0, math.exp(-mean)
        while passed <= size:
            n += 1
            passed += math.exp(-mean) * mean**n / math.factorial(n)
        n = min(n, wanted - hidden)
        hidden += n
        found.append((math.floor(gap * (len(x) - wanted + 1)), n))
    out, place = [], 0
    for gap, n in sorted(found, key=lambda span: span[0]):
        while gap > sum(p >= 0 for _, p in out):
            out.append((int(x[place]), place))
            place += 1
        out.append((1000, -1))
        place += n
    out += [(int(x[p]), p) for p in range(place, len(x))]
    return [i for i, _ in out], [p for _, p in out]


def test_infilling_is_barts():
    ids, seed = documents(300, 1, 40), random.fold(torch.arange(300), 0)
    made = noised(Infill(0.3, 3.0), ids)
    assert made == [infilled(x, s, 0.3, 3.0) for x, s in zip(ids, seed, strict=True)]


def test_infilling_meets_its_rate_and_mean():
    ids = documents(300, 900, 1000)
    found = Infill(0.3, 3.0)(batched(ids), torch.arange(300), IDS)
    masks = int(((found.x == 1000) & found.real()).sum())
    hidden = sum(map(len, ids)) - int((found.real() & (found.position[..., 0] >= 0)).sum())
    assert abs(hidden / sum(map(len, ids)) / 0.3 - 1) < 0.02
    assert abs(hidden / masks / 3.0 - 1) < 0.02


def test_lengths_are_from_poissons_distribution():
    draw = random.uniform(torch.tensor(3), (200_000,), "poisson")
    for mean in (0.5, 3.0, 20.0):
        found = poisson(draw, mean)
        assert abs(float(found.mean()) / mean - 1) < 0.01
        assert abs(float(found.var()) / mean - 1) < 0.02
        assert abs(float((found == 0).float().mean()) - math.exp(-mean)) < 0.005


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Delete(1.2), "share from 0 to 1"),
        (lambda: Insert(lambda _: -0.1), "share from 0 to 1"),
        (lambda: Replace(0.1, {}), "table"),
        (lambda: Replace(0.1, {3: []}), "table"),
        (lambda: Shuffle(0), "window"),
        (lambda: Permute(size=0), "size"),
        (lambda: Permute(size=3, ends=[1]), "size"),
        (lambda: Infill(mean=0.0), "mean"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
