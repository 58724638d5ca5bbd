"""Records as turns of text, and back: questions, classes, tables, boxes and dialogues as one kind of task.

A codec writes a record as turns, each of which has a role, and reads exactly these turns back. What it cannot tell apart, and what
it would not have written, it refuses with a ValueError: nothing is guessed. That all tasks are text to text is T5's idea (Raffel et
al. 2019, arXiv:1910.10683).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from headwater.modalities.record_values import FreeText, Row, Value, clean, entry
from headwater.spec import Described


class Turn(NamedTuple):
    """What one role says. text: None = it shall speak now, which is a question and can only be the last turn."""

    role: str
    text: str | None


class Codec(Described):
    """Records as turns, and back. roles: all that speak. fields: a record has them. marks: how many marks its values use."""

    roles: tuple[str, ...]
    fields: tuple[str, ...]
    marks: int = 0

    def write(self, record: Mapping[str, Any]) -> list[Turn]:
        """All turns of a record; one without an answer is a question."""
        raise NotImplementedError(f"{type(self).__name__} must write a record as turns")

    def read(self, turns: Sequence[Turn]) -> dict[str, Any]:
        """The record of turns; ValueError when they are none that `write` gives."""
        raise NotImplementedError(f"{type(self).__name__} must read a record from turns")

    def example(self, seed: int) -> dict[str, Any]:
        """Some record."""
        raise NotImplementedError(f"{type(self).__name__} has no examples")


class Template(Codec):
    """A prompt and its answer, which is left open where one of its fields is missing or null.

    Questions, classes, tables, cloze patterns and boxes differ in the kinds of their fields only.

    Args:
        prompt, answer: texts with fields in braces: "{question}\n", "{answer}".
        fields: name -> kind of value.
    """

    roles = ("prompt", "answer")

    def __init__(self, prompt: str, answer: str, fields: dict[str, Value]) -> None:
        self.sides = Row(prompt, fields), Row(answer, fields)
        self.fields = tuple(dict.fromkeys(name for side in self.sides for name in side.fields))
        self.marks = max(side.marks for side in self.sides)

    def write(self, record: Mapping[str, Any]) -> list[Turn]:
        prompt, answer = self.sides
        known = all(record.get(name) is not None for name in answer.fields)
        return [Turn("prompt", prompt.write(record)), Turn("answer", answer.write(record) if known else None)]

    def read(self, turns: Sequence[Turn]) -> dict[str, Any]:
        if tuple(turn.role for turn in turns) != self.roles:
            raise ValueError(f"found turns of {[turn.role for turn in turns]}; expected a prompt and an answer")
        prompt, answer = (side.read(turn.text or "") for side, turn in zip(self.sides, turns, strict=True))
        if any(prompt[name] != answer[name] for name in prompt.keys() & answer.keys()):
            raise ValueError(f"found {prompt} in the prompt and {answer} in the answer; expected the same in both")
        return prompt | answer

    def example(self, seed: int) -> dict[str, Any]:
        return self.sides[0].example(seed) | self.sides[1].example(seed)


class Dialogue(Codec):
    """Turns as they are: {"turns": [{"role": "user", "text": ...}, {"role": "assistant", "text": ...}]}; a null last asks for one.

    Args:
        roles: who may speak.
        field: of the list.
    """

    def __init__(self, roles: list[str] | None = None, field: str = "turns") -> None:
        self.roles, self.field, self.fields = tuple(roles or ("system", "user", "assistant")), field, (field,)

    def write(self, record: Mapping[str, Any]) -> list[Turn]:
        said = [(str(entry(turn, "role")), entry(turn, "text")) for turn in entry(record, self.field)]
        return self._known([Turn(role, None if text is None else clean(text)) for role, text in said])

    def read(self, turns: Sequence[Turn]) -> dict[str, Any]:
        return {self.field: [{"role": turn.role, "text": turn.text} for turn in self._known(turns)]}

    def example(self, seed: int) -> dict[str, Any]:
        return {self.field: [{"role": role, "text": FreeText().example(seed + k)} for k, role in enumerate(self.roles)]}

    def _known(self, turns: Sequence[Turn]) -> list[Turn]:
        if not turns or (stray := {turn.role for turn in turns} - {*self.roles}):
            raise ValueError(f"found turns of {sorted(stray) if turns else 'nobody'}; expected some of {', '.join(self.roles)}")
        return [*turns]


class Examples(Codec):
    """Several records of one codec in a row, the last of them the question: {"examples": [record, record, record]}.

    Answers of the others have a role of their own, "shown" before the name: they may be learned or only seen.

    Args:
        codec: of each record.
        field: of the list.
    """

    def __init__(self, codec: Template, field: str = "examples") -> None:
        self.codec, self.field, self.fields, self.marks = codec, field, (field,), codec.marks
        self.roles = (*codec.roles, "shown")

    def write(self, record: Mapping[str, Any]) -> list[Turn]:
        *shown, last = entry(record, self.field)
        return [*self._shown(shown), *self.codec.write(last)]

    def read(self, turns: Sequence[Turn]) -> dict[str, Any]:
        pairs = [turns[start : start + 2] for start in range(0, len(turns), 2)]
        if not pairs or any(pair[-1].role != "shown" for pair in pairs[:-1]):
            raise ValueError(
                f"found turns of {[turn.role for turn in turns]}; expected prompts and answers, all but the last shown"
            )
        shown = [[pair[0], Turn("answer", pair[1].text)] for pair in pairs[:-1]]
        return {self.field: [self.codec.read(pair) for pair in (*shown, pairs[-1])]}

    def example(self, seed: int) -> dict[str, Any]:
        return {self.field: [self.codec.example(seed + k) for k in range(2)]}

    def _shown(self, records: Sequence[Mapping[str, Any]]) -> list[Turn]:
        turns = [turn for record in records for turn in self.codec.write(record)]
        return [turn._replace(role="shown") if turn.role == "answer" else turn for turn in turns]
