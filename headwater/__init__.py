"""headwater: multimodal foundation-model pretraining. Any signal, any fusion and any objective compose."""

__version__ = "0.1.0"
