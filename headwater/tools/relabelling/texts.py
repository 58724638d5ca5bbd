"""Texts by vote: captions, answers and translations, of which the likeliest is taken among those that most drafts agree with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from headwater import random
from headwater.datamodules.faults import said
from headwater.generation import Settings
from headwater.hub.backbone import load_backbone
from headwater.tools.relabelling.annotator import Annotator, Answer, Members, identity, listed, read
from headwater.tools.relabelling.choosing import pattern, plurality
from headwater.tools.relabelling.writer import Layout, Writer, filled


class Texts(Annotator):
    """Captions, answers, translations: of all drafts the likeliest of those that most agree with (self-consistency, Wang et al.
    2022, arXiv:2203.11171); with captions and a filter bootstrapping as in BLIP (Li et al. 2022, arXiv:2201.12086).

    The score is the mean probability per token (geometric), as the model that wrote the text finds it.

    Args:
        backbones: folders, checkpoints, or what else `load_backbone` takes; several vote.
        ask: what the text continues, such as "Question: {question} Answer:"; {NAME} is a member that is a text, or a field of
            the .json. White space at its ends is dropped.
        given: modalities that stand before it, such as image.
        member: that the text becomes.
        answer: a regular expression, whose last match (its first group, if there is one) is what drafts vote on; "" = the whole
            text, but for case and white space.
        modality: of the texts.
        draws: drafts per model.
        layout: how the model was trained: causal or interleaved; see headwater.generate.
        length: the most tokens, the prompt's among them; none = as many as the model reads.
        temperature: 0 = the likeliest token each time.
        top_k: only so many tokens are drawn from.
        top_p: only the likeliest tokens that have this probability together are drawn from.
    """

    def __init__(
        self,
        backbones: list[str] | str,
        ask: str = "",
        given: list[str] | None = None,
        member: str = "txt",
        answer: str = "",
        modality: str = "text",
        draws: int = 1,
        layout: Layout = "causal",
        length: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> None:
        super().__init__()
        if draws < 1 or not (ask.strip() or given):
            raise ValueError(f"found draws {draws}, ask {ask!r} and given {given}; expected 1 or more, and something to go on from")
        loaded = [load_backbone(name).eval() for name in listed(backbones)]
        self.writers: Any = nn.ModuleList(Writer(backbone, modality, given or (), layout) for backbone in loaded)
        self.ask, self.given, self.member, self.draws = ask, given or [], member, draws
        self.answer = pattern(answer)
        self.settings = Settings(layout=layout, length=length, samples=draws, temperature=temperature, top_k=top_k, top_p=top_p)
        self.models = [identity(name, backbone.card) for name, backbone in zip(listed(backbones), loaded)]

    def forward(self, samples: Sequence[Members], seeds: Sequence[int]) -> list[Answer | str]:
        prompts, wrong = [], []
        for one in samples:
            try:
                prompts.append((filled(self.ask, one), self._signals(one)))
                wrong.append("")
            except Exception as error:  # decoders raise nearly anything on bad bytes
                wrong.append(said(error))
        if not prompts:
            return list(wrong)
        asked, given = [prompt for prompt, _ in prompts], [signals for _, signals in prompts]
        told = {name: [signals[name] for signals in given] for name in self.given}
        found: list[list[tuple[str, float]]] = [[] for _ in asked]
        first = next(seed for seed, why in zip(seeds, wrong) if not why)  # draws are a function of it and of the row
        for number, writer in enumerate(self.writers):
            drafts = writer.drafts(asked, told, replace(self.settings, seed=random.seed_of(first, number)))
            likely = iter(writer.likely([draft for row in drafts for draft in row]))
            for row, own in zip(found, drafts, strict=True):
                row.extend((draft.text.strip(), math.exp((s := next(likely)).log_p / s.tokens)) for draft in own)
        answers = iter(found)
        return [why or self._chosen(next(answers)) for why in wrong]

    def _signals(self, members: Members) -> dict[str, Any]:
        """What stands before the text; ValueError where it cannot be read, which would cost the whole batch later."""
        readers = {name: self.writers[0].backbone.reader[name] for name in self.given}
        if isinstance(why := read(readers, members), str):
            raise ValueError(why)
        return {name: reader.decode(members) for name, reader in readers.items()}

    def _chosen(self, drafts: Sequence[tuple[str, float]]) -> Answer | str:
        if not drafts:
            return "no draft is whole: the prompt or the text is longer than the model reads, or empty"
        place, agreement = plurality([self.core(text) for text, _ in drafts], [score for _, score in drafts])
        text, score = drafts[place]
        return Answer(text, score, agreement * len(drafts) / (self.draws * len(self.writers)), more={"drafts": len(drafts)})

    def core(self, text: str) -> str:
        """What of a draft votes."""
        matches = list(self.answer.finditer(text)) if self.answer.pattern else []
        found = matches[-1][min(1, matches[-1].re.groups)] if matches else text
        return " ".join(found.casefold().split())
