"""Kinds of values in records: each writes a value as text, and reads from text exactly what it would have written.

Whatever else comes is refused with a ValueError. Characters from MARKS on stand for ids that no text has, so none can be forged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Real
from string import Formatter
from typing import Any

from headwater import random
from headwater.spec import Described

MARKS = 0xF0000  # the first private-use character of plane 15: mark k is chr(MARKS + k)
MOST = 0xFFFD  # so many marks the plane holds
PRIVATE = f"{chr(MARKS)}-{chr(MARKS + MOST)}"
ESCAPES = {"\\": "\\\\", "\n": "\\n", "|": "\\|"}


def clean(text: Any) -> str:
    """The text, if it is one and holds no mark."""
    if not isinstance(text, str):
        raise ValueError(f"found {text!r}; expected a text")
    if found := re.search(f"[{PRIVATE}]", text):
        raise ValueError(f"found the private character U+{ord(found[0]):X} in a text; these stand for marks. Take it out")
    return text


class Value(Described):
    """One kind of value. pattern: a regular expression that matches all that `write` gives. marks: how many it uses."""

    pattern: str
    marks: int = 0

    def __init__(self) -> None:
        """A kind without settings."""

    def write(self, value: Any) -> str:
        """The value as text; ValueError when it is none of this kind."""
        raise NotImplementedError(f"{type(self).__name__} must write a value as text")

    def read(self, text: str) -> Any:
        """The value of a text that matches `pattern`; ValueError when it means nothing."""
        raise NotImplementedError(f"{type(self).__name__} must read a value from text")

    def example(self, seed: int) -> Any:
        """Some value."""
        raise NotImplementedError(f"{type(self).__name__} has no examples")


class FreeText(Value):
    """Any text. Line breaks, bars and backslashes are written as \\n, \\| and \\\\, so that these can end it."""

    pattern = rf"(?:[^\\\n|{PRIVATE}]|\\[\\n|])*"

    def write(self, value: str) -> str:
        return "".join(ESCAPES.get(letter, letter) for letter in clean(value))

    def read(self, text: str) -> str:
        back = {written: letter for letter, written in ESCAPES.items()}
        return re.sub(r"\\[\\n|]", lambda found: back[found[0]], text)

    def example(self, seed: int) -> str:
        letters = random.uniform_of(seed, (1 + seed % 5,), "words") * 26
        return "".join(chr(97 + int(letter)) for letter in letters)


class Choice(Value):
    """One of several classes, each written as a word of its own (a verbaliser: Schick and Schuetze 2020, arXiv:2001.07676).

    Args:
        classes: their names, or class -> the word for it. Classes that are not texts are named as Python writes them ("True").
    """

    def __init__(self, classes: list[str] | dict[str, str]) -> None:
        self.word = dict(classes) if isinstance(classes, Mapping) else {name: name for name in classes}
        self.name = {clean(word): name for name, word in self.word.items()}
        if not self.name or len(self.name) < len(self.word) or len(self.word) < len(classes) or "" in self.name:
            raise ValueError(f"found the classes {classes}; expected one or more, each with a word of its own")
        self.pattern = "(?:" + "|".join(re.escape(word) for word in sorted(self.name, key=len, reverse=True)) + ")"

    def write(self, value: Any) -> str:
        if str(value) not in self.word:
            raise ValueError(f"found the class {value!r}; expected one of {', '.join([*self.word][:20])}")
        return self.word[str(value)]

    def read(self, text: str) -> str:
        return self.name[text]

    def example(self, seed: int) -> str:
        return [*self.word][seed % len(self.word)]


class Number(Value):
    """A number with a fixed count of digits behind the point, rounded to it; without any it is read as an integer.

    Args:
        low, high: the range, ends included, with no more digits than that.
        digits: behind the point.
    """

    def __init__(self, low: float, high: float, digits: int = 0) -> None:
        if not low < high or digits < 0 or (round(low, digits), round(high, digits)) != (low, high):
            raise ValueError(f"found low {low}, high {high} and {digits} digits; expected low below high, with so many digits")
        self.low, self.high, self.digits = low, high, digits
        self.pattern = r"-?\d+" + (rf"\.\d{{{digits}}}" if digits else "")

    def write(self, value: float) -> str:
        if isinstance(value, bool) or not isinstance(value, Real) or not self.low <= value <= self.high:
            raise ValueError(f"found {value!r}; expected a number from {self.low} to {self.high}")
        text = f"{value:.{self.digits}f}"
        return text if float(text) else text.removeprefix("-")  # there is one zero

    def read(self, text: str) -> float | int:
        number = float(text) if self.digits else int(text)
        if self.write(number) != text:
            raise ValueError(f"found the number {text!r}; expected it written as {self.write(number)!r}")
        return number

    def example(self, seed: int) -> float | int:
        number = self.low + (self.high - self.low) * float(random.uniform_of(seed, (1,), "number")[0])
        return round(number, self.digits) if self.digits else round(number)


class Binned(Value):
    """A number as one mark: that of the bin it lies in, of `bins` equal ones (Pix2Seq, Chen et al. 2021, arXiv:2109.10852).

    Args:
        low, high: the range, ends included.
        bins: how many.
        first: mark of the first bin; values that share a range share marks.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0, bins: int = 64, first: int = 0) -> None:
        if not low < high or bins < 2 or first < 0 or first + bins > MOST:
            raise ValueError(f"found low {low}, high {high}, {bins} bins from {first}; expected a range, and 2 bins or more")
        self.low, self.high, self.bins, self.first, self.marks = low, high, bins, first, first + bins
        self.pattern = f"[{chr(MARKS + first)}-{chr(MARKS + first + bins - 1)}]"

    def write(self, value: float) -> str:
        if not isinstance(value, Real) or not self.low <= value <= self.high:
            raise ValueError(f"found {value!r}; expected a number from {self.low} to {self.high}")
        share = (float(value) - self.low) / (self.high - self.low)
        return chr(MARKS + self.first + min(int(share * self.bins), self.bins - 1))

    def read(self, text: str) -> float:
        """The middle of the bin."""
        number = ord(text) - MARKS - self.first
        return self.low + (number + 0.5) / self.bins * (self.high - self.low)

    def example(self, seed: int) -> float:
        return self.low + (self.high - self.low) * float(random.uniform_of(seed, (1,), "binned")[0])


class Row(Value):
    """Several values in a text of their own: a question, a row of a table, a triple, a box with its class.

    Put a line break, a bar or nothing at all behind free text: what cannot be told apart when it is read is not written.

    Args:
        format: text with the fields in braces, "| {name} | {age} |".
        fields: name -> kind, of those that the format names, and perhaps others.
    """

    def __init__(self, format: str, fields: dict[str, Value]) -> None:
        pieces = [(clean(literal), name) for literal, name, *_ in Formatter().parse(format)]
        names = [name for _, name in pieces if name is not None]
        if len(set(names)) < len(names) or not set(names) <= set(fields):
            raise ValueError(f"found {format!r} with the fields {', '.join(fields)}; expected names of these, each once")
        self.fields = {name: fields[name] for name in names}
        self.marks = max((kind.marks for kind in self.fields.values()), default=0)
        self.format = "".join(literal.replace("{", "{{").replace("}", "}}") + ("{}" if name else "") for literal, name in pieces)
        self.pattern, self.groups = (
            "".join(re.escape(literal) + (group % fields[name].pattern if name else "") for literal, name in pieces)
            for group in ("(?:%s)", "(%s)")
        )

    def write(self, value: Mapping[str, Any]) -> str:
        written = [kind.write(entry(value, name)) for name, kind in self.fields.items()]
        text = self.format.format(*written)
        if self._parts(text) != written:
            raise ValueError(f"found {text!r}, in which {written} cannot be told apart; put a line break or a bar between them")
        return text

    def read(self, text: str) -> dict[str, Any]:
        return {name: kind.read(part) for (name, kind), part in zip(self.fields.items(), self._parts(text), strict=True)}

    def example(self, seed: int) -> dict[str, Any]:
        return {name: kind.example(random.seed_of(seed, k)) for k, (name, kind) in enumerate(self.fields.items())}

    def _parts(self, text: str) -> list[str]:
        found = re.fullmatch(self.groups, text)
        if found is None:
            raise ValueError(f"found {text[:200]!r}; expected a text of the form {self.format!r}")
        return [*found.groups()]


class Several(Value):
    """A list of values of one kind: the rows of a table, the boxes of a picture.

    Args:
        item: their kind.
        between: what stands between two of them; "" where they tell by themselves where they end.
    """

    def __init__(self, item: Value, between: str = "\n") -> None:
        self.item, self.between, self.marks = item, clean(between), item.marks
        self.pattern = f"(?:{item.pattern}(?:{re.escape(between)}{item.pattern})*)?"
        self.one = re.compile(f"({item.pattern})(?:{re.escape(between)})?")

    def write(self, value: Sequence[Any]) -> str:
        written = [self.item.write(part) for part in value]
        text = self.between.join(written)
        if self._parts(text) != written:
            raise ValueError(f"found {text!r}, in which {written} cannot be told apart; change `between`, or the kind of value")
        return text

    def read(self, text: str) -> list[Any]:
        return [self.item.read(part) for part in self._parts(text)]

    def example(self, seed: int) -> list[Any]:
        return [self.item.example(random.seed_of(seed, k)) for k in range(1 + seed % 3)]

    def _parts(self, text: str) -> list[str]:
        found = [part[1] for part in self.one.finditer(text) if part[1]]
        if self.between.join(found) != text:
            raise ValueError(f"found {text!r}; expected values with {self.between!r} between them")
        return found


def entry(record: Mapping[str, Any], name: str) -> Any:
    """A field of a record."""
    if name not in record:
        raise ValueError(f"found a record with {', '.join(record) or 'nothing'}; expected a field {name!r}")
    return record[name]
