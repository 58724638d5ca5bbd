"""Labels as tokens: what an objective gets to know beside the signals. They are read like any modality and have no encoder.

A label is a field of a sample's .json, or a member of its own. One that a sample lacks, or a null, is no token. A list over time
becomes one token per entry, at the entry's place in the list. None of them is random by itself: views change only labels that
follow a picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from headwater import random
from headwater.embedded import place
from headwater.model import Reader
from headwater.tokens import Tokens
from headwater.view import View

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789' "


class Label(Reader):
    """Where the value of a label stands.

    Args:
        field: of the .json; None = the whole member, as text.
        member: extension of the member.
    """

    def __init__(self, field: str | None, member: str) -> None:
        self.field = field
        self.extensions = (member,)  # type: ignore[misc]

    def decode(self, members: dict[str, bytes]) -> Any:
        """What JSON holds there, or the stripped text; None where the field is absent."""
        content = members[str(self.member(members))].decode("utf-8")
        return content.strip() if self.field is None else fields(content).get(self.field)


class Category(Label):
    """One of several classes -> its number; a list -> one per entry.

    Args:
        classes: their names, or how many where values are numbers from 0, or a file with one name per line.
        field: of the .json; None = the whole member, such as the number in a .cls.
        member: extension of the member.
        others: values outside of `classes` are missing labels; else they are faults of the data.
    """

    def __init__(
        self, classes: list[str] | int | str, field: str | None = "category", member: str = "json", others: bool = False
    ) -> None:
        super().__init__(field, member)
        self.classes, self.others = named(classes), others
        self.vocab, self._file = len(self.classes), classes if isinstance(classes, str) else None

    def tokens(self, signal: Any, view: View | None = None) -> Tokens:
        values = signal if isinstance(signal, list) else [signal]
        found = [(number, k) for k, value in enumerate(values) if (number := self._number(value)) is not None]
        return row([number for number, _ in found], [k for _, k in found])

    def _number(self, value: Any) -> int | None:
        if value is not None and str(value) not in self.classes and not self.others:
            raise ValueError(f"found the class {value!r}; expected one of {', '.join([*self.classes][:20])}, or set others: true")
        return self.classes.get(str(value))

    def restore(self, t: Tokens) -> list[str]:
        names = [*self.classes]
        return [names[k] for k in t.x[0][t.real()[0]].tolist()]

    def blank(self) -> Tokens:
        """One class, so that `generate` classifies."""
        return self.canvas(torch.zeros(1, 1, dtype=torch.int32))

    def files(self) -> dict[str, Path]:
        return {"classes": Path(place(self._file))} if self._file else {}

    def example(self, n: int, seed: int) -> list[Tokens]:
        draws = random.uniform(torch.tensor(seed), (n,), "category") * len(self.classes)
        return [row([int(draw)], [0]) for draw in draws]


class Categories(Label):
    """Several classes at once -> one vector with a number per class.

    A list of names -> 1 for those in it and 0 for the others; an object -> the number that it gives each class, such as votes or
    probabilities, and 0 for the others. Names outside of `classes` are left out: tags are open-ended.

    Args:
        classes: their names, or a file with one name per line.
        field: of the .json.
        member: extension of the member.
    """

    def __init__(self, classes: list[str] | str, field: str = "tags", member: str = "json") -> None:
        super().__init__(field, member)
        self.classes, self._file = named(classes), classes if isinstance(classes, str) else None
        self.features = len(self.classes)

    def tokens(self, signal: Any, view: View | None = None) -> Tokens:
        if signal is None:
            return row([], [], self.features)
        if not isinstance(signal, list | Mapping):
            raise ValueError(f"found {signal!r} in {self.field!r}; expected a list of names, or an object of name: number")
        given = signal if isinstance(signal, Mapping) else dict.fromkeys(map(str, signal), 1.0)
        return row([[float(given.get(name, 0.0)) for name in self.classes]], [0], self.features)

    def blank(self) -> Tokens:
        """One class, so that `generate` classifies."""
        return self.canvas(torch.zeros(1, 1, dtype=torch.int32))

    def files(self) -> dict[str, Path]:
        return {"classes": Path(place(self._file))} if self._file else {}

    def example(self, n: int, seed: int) -> list[Tokens]:
        draws = (random.uniform(torch.tensor(seed), (n, self.features), "categories") * 2).floor()
        return [row([draw.tolist()], [0], self.features) for draw in draws]


class Numbers(Label):
    """Numeric fields -> one vector with a number per field; fields that are lists over time -> one vector per entry.

    A field that is absent, null or NaN is NaN in the vector, and is not scored.

    Args:
        fields: of the .json.
        mean, std: per field, what `prepare` takes away and divides by; None = 0 and 1.
        member: extension of the member.
    """

    def __init__(
        self, fields: list[str], mean: list[float] | None = None, std: list[float] | None = None, member: str = "json"
    ) -> None:
        super().__init__(None, member)
        self.fields, self.features = list(fields), len(fields)
        self.mean, self.std = mean or [0.0] * len(fields), std or [1.0] * len(fields)
        if not len(fields) == len(self.mean) == len(self.std) > 0 or min(self.std) <= 0:
            raise ValueError(f"found fields {fields}, mean {mean} and std {std}; expected one mean and one std above 0 per field")

    def decode(self, members: dict[str, bytes]) -> Any:
        found = fields(members[str(self.member(members))].decode("utf-8"))
        return [found.get(name) for name in self.fields]

    def tokens(self, signal: Sequence[Any], view: View | None = None) -> Tokens:
        """signal: a number, a list of numbers or None per field."""
        columns = [value if isinstance(value, list) else [value] for value in signal]
        rows = [[self._number(value) for value in values] for values in zip_longest(*columns)]
        known = [k for k, values in enumerate(rows) if not all(map(math.isnan, values))]
        return row([rows[k] for k in known], known, self.features)

    def _number(self, value: Any) -> float:
        if value is not None and not isinstance(value, Real):
            raise ValueError(f"found {value!r} in one of {', '.join(self.fields)}; expected a number, or null where it is missing")
        return math.nan if value is None else float(value)

    def prepare(self, t: Tokens) -> Tokens:
        return t._replace(x=(t.x.to(torch.float32) - t.x.new_tensor(self.mean)) / t.x.new_tensor(self.std))

    def restore(self, t: Tokens) -> list[list[float]]:
        """Per token, the numbers as they were."""
        x = t.x[0][t.real()[0]]
        return (x * x.new_tensor(self.std) + x.new_tensor(self.mean)).tolist()

    def example(self, n: int, seed: int) -> list[Tokens]:
        draws = random.normal(torch.tensor(seed), (n, self.features), "numbers")
        scaled = draws * torch.tensor(self.std) + torch.tensor(self.mean)
        return [row([values.tolist()], [0], self.features) for values in scaled]


class Transcript(Label):
    """A text -> the numbers of its letters, in small type; letters outside of the alphabet are left out.

    Args:
        alphabet: all letters.
        field: of the .json; None = the whole member.
        member: extension of the member.
        length: the most letters that are kept.
    """

    def __init__(self, alphabet: str = LETTERS, field: str | None = None, member: str = "txt", length: int = 1024) -> None:
        super().__init__(field, member)
        if not alphabet or len(set(alphabet)) < len(alphabet):
            raise ValueError(f"found the alphabet {alphabet!r}; expected one or more letters, each once")
        self.alphabet, self.vocab, self.most = alphabet, len(alphabet), length
        self.number = {letter: k for k, letter in enumerate(alphabet)}

    def tokens(self, signal: str | None, view: View | None = None) -> Tokens:
        numbers = [self.number[letter] for letter in (signal or "").lower() if letter in self.number][: self.most]
        return row(numbers, [*range(len(numbers))])

    def restore(self, t: Tokens) -> str:
        return "".join(self.alphabet[k] for k in t.x[0][t.real()[0]].tolist())

    def example(self, n: int, seed: int) -> list[Tokens]:
        draws = (random.uniform(torch.tensor(seed), (n, 3), "transcript") * len(self.alphabet)).long().tolist()
        return [row(draw[: 1 + k % 3], [*range(1 + k % 3)]) for k, draw in enumerate(draws)]


def row(values: Sequence[Any], places: Sequence[int], features: int | None = None) -> Tokens:
    """N ids, or N vectors of `features` numbers, at these places of a list."""
    at = torch.tensor(places, dtype=torch.int32)[:, None]
    if features is None:
        return Tokens(torch.tensor(values, dtype=torch.int64), at)
    return Tokens(torch.tensor(values, dtype=torch.float32).reshape(-1, features), at)


def fields(content: str) -> dict[str, Any]:
    """The object that a .json holds."""
    found = json.loads(content)
    if not isinstance(found, dict):
        raise ValueError(f"found {type(found).__name__} in a .json; expected an object with named fields")
    return found


def named(classes: Sequence[str] | int | str) -> dict[str, int]:
    """Name -> number, of names, of how many there are, or of a file with one name per line."""
    if isinstance(classes, str):
        classes = [line for line in Path(place(classes)).read_text(encoding="utf-8").splitlines() if line]
    names = [str(k) for k in range(classes)] if isinstance(classes, int) else [*map(str, classes)]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"found the classes {names[:20]}; expected one or more names, each once")
    return {name: k for k, name in enumerate(names)}
