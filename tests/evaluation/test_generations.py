"""Estimators against brute force, and samples that can be scored again."""

import math
from itertools import combinations, permutations

import numpy as np
import pytest

from headwater.evaluation.generations import (
    Generation,
    copied,
    coverage,
    distinct,
    divergence,
    drawn,
    exact,
    exchanged,
    expected_max,
    from_prompt,
    interrupted,
    ngrams,
    pass_at_k,
    read,
    table,
    write,
)


@pytest.mark.parametrize("k", [1, 2, 4, 7])
@pytest.mark.parametrize("right", [0, 1, 3, 7])
def test_pass_at_k_is_the_mean_over_all_choices_of_k(k, right):
    hits = [1] * right + [0] * (7 - right)
    chosen = [max(c) for c in combinations(hits, k)]
    assert pass_at_k(7, right, k) == pytest.approx(np.mean(chosen))


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_expected_maximum_is_the_mean_over_all_choices_of_k(k):
    scores = [0.3, 0.9, 0.1, 0.9, 0.5, 0.2]
    assert expected_max(scores, k) == pytest.approx(np.mean([max(c) for c in combinations(scores, k)]))
    assert all(expected_max(p, k) == pytest.approx(expected_max(scores, k)) for p in list(permutations(scores))[:20])


def test_estimators_have_no_bias():
    """Their mean over draws is the chance that k fresh samples would have."""
    draws = np.random.default_rng(0).random((20_000, 6)) < 0.2
    estimated = np.mean([pass_at_k(6, int(row.sum()), 3) for row in draws])
    assert estimated == pytest.approx(1 - 0.8**3, abs=0.005)
    assert np.mean(draws[:, :1].any(1)) != pytest.approx(1 - 0.8**3, abs=0.1)


def test_more_samples_than_there_are_cannot_be_asked_for():
    for call in (lambda: pass_at_k(3, 1, 4), lambda: expected_max([0.1], 2), lambda: pass_at_k(3, 1, 0)):
        with pytest.raises(ValueError, match="k from 1 to the number of samples"):
            call()


def test_counts_of_words():
    assert ngrams(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]
    assert distinct(["a b a b", "a b"], 2) == pytest.approx(2 / 4)
    assert distinct(["a a a"], 1) == pytest.approx(1 / 3)
    assert distinct([""], 2) == 0
    assert copied("the red dog", "a red boat and a dog") == pytest.approx(2 / 3)
    assert copied("red dog", "red dog", 2) == 1
    assert copied("red dog", "dog red", 2) == 0
    assert coverage(["a", "a", "x"], ["a", "b"]) == 0.5


def test_divergence_from_a_known_distribution():
    target = {"a": 0.5, "b": 0.25, "c": 0.25}
    assert divergence(["a", "a", "b", "c"], target) == pytest.approx(0)
    assert divergence(["a", "b"], target) == pytest.approx(0.5 * math.log(0.5 / 0.5) + 0.5 * math.log(0.5 / 0.25))
    assert divergence(["a", "x"], target) == math.inf
    rng, names = np.random.default_rng(0), list(target)
    found = [divergence(rng.choice(names, 500, p=[0.5, 0.25, 0.25]).tolist(), target) for _ in range(200)]
    assert np.mean(found) == pytest.approx(2 / (2 * 500), rel=0.25)


def parrot(prompts, seed):
    """Repeats a word of the prompt, which one depends on the seed."""
    return [prompt.split()[seed % len(prompt.split())] for prompt in prompts]


def test_stored_samples_give_the_same_table(tmp_path):
    prompts = ["red dog", "blue cat", "Öl und Wein"]
    generations = drawn(parrot, prompts, n=5, seed=1, references=["red", "cat", "Wein"])
    assert [g.prompt for g in generations] == [p for p in prompts for _ in range(5)]
    assert len({g.seed for g in generations}) == 5
    write(generations, tmp_path / "samples.jsonl")
    stored = read(tmp_path / "samples.jsonl")
    assert stored == generations
    scorers = {"exact": exact, "from prompt": from_prompt, "long": lambda g: len(g.text) / 10}
    results = table("toy", generations, scorers, k=3)
    assert table("toy", stored, scorers, k=3) == results
    found = {r.metric: r for r in results}
    assert found["from prompt"].value == 1
    scores = [[exact(g) for g in generations[5 * i : 5 * i + 5]] for i in range(3)]
    assert found["exact"].value == pytest.approx(np.mean(scores))
    assert found["exact once in 3"].value == pytest.approx(np.mean([pass_at_k(5, int(sum(s)), 3) for s in scores]))
    assert found["exact best of 3"].value == pytest.approx(found["exact once in 3"].value)
    assert found["exact"].n == 3
    assert drawn(parrot, prompts, 5, seed=1)[0].text == generations[0].text


def test_a_trace_is_cut_between_words():
    question, trace = "2 + 3 * 4 = ", "first 12\nthen  14 "
    assert interrupted(question, trace, 1.0, "so ") == question + trace + "so "
    assert interrupted(question, trace, 0.0, "so ") == question + "so "
    half = interrupted(question, trace, 0.5, " so ", update=" (3 is now 5)")
    assert half == question + "first 12" + " (3 is now 5)" + " so "
    lengths = [len(interrupted("", trace, s / 20, "")) for s in range(21)]
    assert lengths == sorted(lengths)
    with pytest.raises(ValueError, match="share 2"):
        interrupted("", "", 2, "")


def sums(prompts, seed):
    """Adds the numbers that it was shown up to "so": the longer the trace, the nearer to the truth."""
    return [str(sum(int(w) for w in prompt.split("=")[1].split() if w.isdigit())) for prompt in prompts]


def test_an_uncut_trace_gives_the_accuracy_of_the_uncut_run():
    asked = [("1 + 2 + 3 =", " 1 2 3", "6"), ("4 + 5 =", " 4 5", "9")]
    whole = [exact(Generation(q, sums([q + t], 0)[0], r)) for q, t, r in asked]
    for share, right in ((1.0, 1.0), (0.5, 0.0)):
        cut = [exact(Generation(q, sums([interrupted(q, t, share, " so")], 0)[0], r)) for q, t, r in asked]
        assert np.mean(cut) == right
    assert np.mean(whole) == 1


def test_exchanged_histories_are_all_anothers_and_take_the_gain_away():
    histories = [f"likes {word}" for word in ("tea", "milk", "wine", "beer")]
    for seed in range(5):
        other = exchanged(histories, seed)
        assert sorted(other) == sorted(histories)
        assert not any(a == b for a, b in zip(histories, other, strict=True))
    gain = [copied(h.split()[1], shown) for h, shown in zip(histories, histories, strict=True)]
    control = [copied(h.split()[1], shown) for h, shown in zip(histories, exchanged(histories), strict=True)]
    assert np.mean(gain) == 1
    assert np.mean(control) == 0
    with pytest.raises(ValueError, match="two or more"):
        exchanged(["only one"])
