"""How an answer joins its sample: the label or text, its score as a weight, and where it comes from."""

from __future__ import annotations

import json
from typing import Any

from headwater.tools.relabelling.annotator import Annotator, Answer, Members

RECORD = "made"  # field of a .json: what models said of the sample, by the name of the answer


def home(by: Annotator) -> str:
    """The .json that holds the record, and the label where that is a field."""
    return by.member if by.field else "json"


def notes(by: Annotator, members: Members) -> dict[str, Any]:
    """What the .json of a sample says; {} where it has none."""
    found = json.loads(members.get(home(by), b"{}"))
    if not isinstance(found, dict):
        raise ValueError(f"found a .{home(by)} that holds {type(found).__name__}; expected an object, which can take a record")
    return found


def labelled(by: Annotator, members: Members) -> bool:
    """Whether people, or an unknown source, have said already what is asked."""
    found = notes(by, members)
    there = found.get(by.field) is not None if by.field else by.member in members and not by.adds
    return there and by.name not in found.get(RECORD, {})


def recorded(by: Annotator, number: int, parent: str, answer: Answer) -> dict[str, Any]:
    """Where an answer comes from: number of the round, the sample that was asked about, and who said it."""
    score = {"score": round(answer.score, 6), "agreement": round(answer.agreement, 6)}
    return {"round": number, "parent": parent, "by": type(by).__name__, "models": by.models, **score, **answer.more}


def answered(by: Annotator, members: Members, answer: Answer, record: dict[str, Any]) -> Members:
    """The members with the answer, its score as NAME_weight, and its record under "made"."""
    found = notes(by, members)
    found |= {f"{by.name}_weight": record["score"], RECORD: {**found.get(RECORD, {}), by.name: record}}
    if by.field:
        found[by.field] = answer.value
    own = {} if by.field else {by.member: str(answer.value).encode()}
    return {**members, **own, home(by): json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode()}
