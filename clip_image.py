"""The image side of CLIP: pictures to vectors in the space that they share with texts (`clip_text.py`).

Start at `ImageEncoder.forward`. Shapes: B images, H W pixels, S the tower's own side, N = (S / patch)^2 + 1 tokens, D
width, P width of the shared space.
Source: "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020, section 2.4.
Checked against transformers 5.23 (CLIPVisionModelWithProjection). Parameter names are the published ones.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_text import Encoder


@dataclass(frozen=True)
class ImageConfig:
    """What differs between towers. The defaults are those of OpenAI's CLIP ViT-L/14."""
    size: int = 224                   # S: pictures are resized and cropped to S x S
    patch: int = 14
    width: int = 1024                 # D
    layers: int = 24
    heads: int = 16
    hidden: int = 4096                # width inside the MLPs
    activation: str = "quick_gelu"    # "quick_gelu" (OpenAI) or "gelu" (OpenCLIP)
    projection: int = 768             # P
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)       # of the red, green and blue it was trained on
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


CONFIGS = {
    "vit-l": ImageConfig(),
    "vit-h": ImageConfig(width=1280, layers=32, hidden=5120, activation="gelu", projection=1024),
    "tiny": ImageConfig(size=64, patch=8, width=128, layers=4, heads=4, hidden=512, projection=64,
                        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
}


class Embeddings(nn.Module):
    """A token for every patch, behind one that will gather the whole. (B, 3, S, S) -> (B, N, D)"""

    def __init__(self, config: ImageConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch, config.patch, bias=False)
        self.position_embedding = nn.Embedding((config.size // config.patch) ** 2 + 1, config.width)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embedding(x).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(x), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionModel(nn.Module):
    """A bag of layers that exists for the checkpoints' names, all of which begin with "vision_model."."""

    def __init__(self, config: ImageConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width)                  # spelt so in every checkpoint
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.width)


class ImageEncoder(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] -> their vectors (B, P) in the space shared with texts, not normalised"""

    def __init__(self, config: ImageConfig = ImageConfig()):
        super().__init__()
        self.config = config
        self.vision_model = VisionModel(config)
        self.visual_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        model = self.vision_model
        x = model.pre_layrnorm(model.embeddings(preprocess(images, self.config)))
        for layer in model.encoder.layers:
            x = layer(x)
        return self.visual_projection(model.post_layernorm(x[:, 0]))


def preprocess(images: Tensor, config: ImageConfig) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3, S, S): the short side becomes S (bicubic, antialiased), the middle is cut out,
    and each colour is brought to the mean and spread that the tower knows. Differentiable."""
    h, w = images.shape[-2:]
    if min(h, w) != config.size:
        size = (config.size * h // min(h, w), config.size * w // min(h, w))     # rounded down, as published code does
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
    top, left = ((side - config.size) // 2 for side in images.shape[-2:])
    images = images[..., top:top + config.size, left:left + config.size]
    mean, std = (torch.tensor(x, device=images.device, dtype=images.dtype)[:, None, None]
                 for x in (config.mean, config.std))
    return (images - mean) / std
