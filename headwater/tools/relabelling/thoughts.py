"""Thoughts behind texts: one of several drafts, drawn by how much it explains."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from headwater.datamodules.faults import said
from headwater.evaluation.choices import Continuation
from headwater.generation import Settings
from headwater.hub.backbone import load_backbone
from headwater.tools.relabelling.annotator import Annotator, Answer, Members, identity
from headwater.tools.relabelling.choosing import evidence, importance, resampled
from headwater.tools.relabelling.writer import Writer, filled


class Thoughts(Annotator):
    """The E-step of EM over thoughts behind texts: K are drawn for each text, one stays by its importance (Ruan et al. 2025,
    arXiv:2503.18866). Training on what is written is the M-step.

    A thought z of a text x has the weight p(z, x) / q(z | x): p is how likely the model finds both together, q how likely it was to
    draw the thought. The record holds the estimate of log p(x), which rises from round to round. Nothing is cut from
    the distribution that is drawn from, so that q is what it seems. Every round reads the texts without thoughts.

    Args:
        backbone: folder, checkpoint, or what else `load_backbone` takes.
        ask: what a thought continues: {txt} or other texts of the sample. It does not end in white space.
        joint: both together, as the model learns and finds them likely: {thought} and what `ask` has.
        member: that both together become.
        modality: of the texts.
        draws: K.
    """

    adds = True

    def __init__(
        self,
        backbone: str,
        ask: str = "{txt} Thought:",
        joint: str = "{thought} Text: {txt}",
        member: str = "txt",
        modality: str = "text",
        draws: int = 8,
    ) -> None:
        super().__init__()
        if draws < 2 or "{thought}" not in joint or not ask.strip():
            raise ValueError(f"found draws {draws}, ask {ask!r} and joint {joint!r}; expected 2 or more, and a {{thought}}")
        loaded = load_backbone(backbone).eval()
        self.writer, self.ask, self.joint, self.member, self.draws = Writer(loaded, modality), ask, joint, member, draws
        self.models = [identity(backbone, loaded.card)]

    def forward(self, samples: Sequence[Members], seeds: Sequence[int]) -> list[Answer | str]:
        out: list[Answer | str] = []
        prompts: list[str] = []
        for one in samples:
            try:
                prompts.append(filled(self.ask, one))
                out.append("")
            except ValueError as error:
                out.append(said(error))
        good = [place for place, why in enumerate(out) if not why]
        drafts = self.writer.drafts(prompts, {}, Settings(seed=seeds[good[0]], samples=self.draws)) if good else []
        for place, own in zip(good, drafts, strict=True):
            out[place] = self._chosen(samples[place], own, seeds[place])
        return out

    def _chosen(self, members: Members, drafts: Sequence[Continuation], seed: int) -> Answer | str:
        both = [filled(self.joint, members, thought=draft.text.strip()) for draft in drafts]
        fit = [k for k, text in enumerate(both) if self.writer.whole(text)]
        if not fit:
            return "no thought fits: together with the text it is longer than the model reads, or empty"
        p = self.writer.likely([Continuation("", both[k]) for k in fit])
        q = self.writer.likely([drafts[k] for k in fit])
        log_p, log_q = (torch.tensor([s.log_p for s in found], dtype=torch.float64) for found in (p, q))
        share = importance(log_p, log_q)
        k = int(resampled(share[None], torch.tensor([seed])))
        more = {"evidence": float(evidence(log_p, log_q)), "share": float(share[k]), "thoughts": len(fit)}
        effective = float(1 / share.square().sum()) / len(fit)
        return Answer(both[fit[k]], math.exp(p[k].log_p / p[k].tokens), effective, more=more)
