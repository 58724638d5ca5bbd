"""Blocks that join modalities: dict[str, Tokens] -> dict[str, Tokens]."""

from headwater.fusion.joint import JointTokens

__all__ = ["JointTokens"]
