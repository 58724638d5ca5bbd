"""What an autoencoder lets through, one file per idea."""

from headwater.modalities.bottlenecks.bottleneck import Bottleneck, Coded
from headwater.modalities.bottlenecks.fsq import FSQ
from headwater.modalities.bottlenecks.gumbel import Gumbel
from headwater.modalities.bottlenecks.latents import KL, Plain
from headwater.modalities.bottlenecks.vq import VQ

__all__ = ["FSQ", "KL", "VQ", "Bottleneck", "Coded", "Gumbel", "Plain"]
