"""headwater: multimodal foundation-model pretraining. Any signal, any fusion and any objective compose."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "generate", "list_backbones", "load_backbone", "save_backbone"]


def __getattr__(name: str) -> Any:
    """What is heavy is imported when it is first asked for: `import headwater` stays light."""
    if name == "generate":
        from headwater.generation import generate

        return generate
    if name in __all__:
        from headwater import hub

        return getattr(hub, name)
    raise AttributeError(f"headwater has no attribute {name!r}; it offers {', '.join(__all__)}")
