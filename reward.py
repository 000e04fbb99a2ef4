"""Reward models, CLIP and ImageReward: a differentiable score of how well a picture fits its prompt.

    pictures --preprocess--> ImageEncoder --.
                                          cosine --> score (B,)                                            ClipReward
    prompts --Tokenizer--> TextEncoder -----'

    pictures --preprocess--> image tower (BLIP's ViT) --> tokens --.
                                                                   | cross-attention in every layer        ImageReward
    prompts --WordPieces--> text tower (BERT) <--------------------'
                               '--> first token --> five linear layers --> score (B,)

Start at `load_reward`, then `ClipReward.__call__` and `RewardModel.forward`. HPSv2 is a CLIP too, a ViT-H/14 trained on
people's choices between pictures; its published tables show the cosine times 100.
Shapes: B pictures and their prompts; H W pixels; S side of the pictures that the image tower sees; N image tokens of
width D, (S / patch)^2 + 1; L text tokens of width T; P width of the space that CLIP's two towers share.
Sources: CLIP, arXiv 2103.00020, section 2; HPSv2, arXiv 2306.09341; ImageReward, arXiv 2304.05977.
Checked against transformers 5.23 (CLIPVisionModelWithProjection, BlipVisionModel, BlipTextModel) and open_clip 3.3.
Parameter names are the published ones: those of CLIP on Hugging Face, and of ImageReward.pt.
"""
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from clip_text import Encoder, TextConfig, TextEncoder, Tokenizer
from command import InputError, replacing
from folder import build, from_json, load_tokenizer, load_weights, write_config

COLOR_MEAN = (0.48145466, 0.4578275, 0.40821073)                       # of red, green and blue, from OpenAI's CLIP
COLOR_STD = (0.26862954, 0.26130258, 0.27577711)


# ----------------------------------------------------------------------------------------------- what both kinds share

class Bag(nn.Module):
    """Modules and parameters under their names in the checkpoint. The model that has the bag calls them."""

    def __init__(self, **parts: nn.Module | nn.Parameter):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def preprocess(images: Tensor, config: "ImageConfig | ImageRewardConfig") -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] to what the image tower sees, (B, 3, S, S). Differentiable.

    The short side is resized to S (bicubic, antialiased), the centre is cropped, colours are normalised.
    """
    h, w = images.shape[-2:]
    if min(h, w) != config.size:
        size = (config.size * h // min(h, w), config.size * w // min(h, w))     # rounded down, as published code does
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
    top, left = ((side - config.size) // 2 for side in images.shape[-2:])
    images = images[..., top:top + config.size, left:left + config.size]
    mean, std = (torch.tensor(x, device=images.device, dtype=images.dtype)[:, None, None]
                 for x in (config.mean, config.std))
    return (images - mean) / std


def embed(x: Tensor, patches: nn.Conv2d, first: Tensor, positions: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, N, D): the class token `first` (D,), then one token per patch; their positions are added."""
    x = patches(x).flatten(2).transpose(1, 2)
    return torch.cat([first.expand(len(x), 1, -1), x], dim=1) + positions


# ---------------------------------------------------------------------------------------------------------------- CLIP

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
    mean: tuple[float, ...] = COLOR_MEAN
    std: tuple[float, ...] = COLOR_STD


CONFIGS = {
    "vit-l": ImageConfig(),
    "vit-h": ImageConfig(width=1280, layers=32, hidden=5120, activation="gelu", projection=1024),
    "tiny": ImageConfig(size=64, patch=8, width=128, layers=4, heads=4, hidden=512, projection=64,
                        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
}


class ImageEncoder(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] -> embeddings (B, P) in the space shared with texts, not normalised"""

    def __init__(self, config: ImageConfig = ImageConfig()):
        super().__init__()
        self.config, width = config, config.width
        embeddings = Bag(class_embedding=nn.Parameter(torch.randn(width)),
                         patch_embedding=nn.Conv2d(3, width, config.patch, config.patch, bias=False),
                         position_embedding=nn.Embedding((config.size // config.patch) ** 2 + 1, width))
        self.vision_model = Bag(embeddings=embeddings, pre_layrnorm=nn.LayerNorm(width),      # every checkpoint's typo
                                encoder=Encoder(config, causal=False), post_layernorm=nn.LayerNorm(width))
        self.visual_projection = nn.Linear(width, config.projection, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        model, start = self.vision_model, self.vision_model.embeddings
        x = model.pre_layrnorm(embed(preprocess(images, self.config), start.patch_embedding, start.class_embedding,
                                     start.position_embedding.weight))
        for layer in model.encoder.layers:
            x = layer(x)
        return self.visual_projection(model.post_layernorm(x[:, 0]))


class ClipReward:
    """The cosine similarity of a picture's and its prompt's embeddings, by the two towers of one CLIP."""

    def __init__(self, image: ImageEncoder, text: TextEncoder, tokenizer: Tokenizer):
        if text.config.projection != image.config.projection:
            raise ValueError(f"the image tower ends in {image.config.projection} numbers and the text tower in "
                             f"{text.config.projection}: they are not of one CLIP")
        self.image, self.text, self.tokenizer = image, text, tokenizer

    def save(self, folder: Path) -> None:
        """Write a folder that `load_reward` reads, in float16."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, tower in (("text_encoder", self.text), ("image_encoder", self.image)):
            with replacing(folder / f"{name}.safetensors") as path:
                save_file({key: p.half().contiguous().cpu() for key, p in tower.state_dict().items()}, path)
        with replacing(folder / "tokenizer.json") as path:
            self.tokenizer.model.save(str(path))
        write_config(folder, {"text_encoder": self.text.config, "image_encoder": self.image.config})

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B texts -> (B,) in [-1, 1]; gradients flow to the pictures."""
        return F.cosine_similarity(self.image(images), self.embed_text(prompts), dim=-1)

    @torch.no_grad()
    def embed_text(self, prompts: list[str]) -> Tensor:
        """B texts -> (B, P), not normalised"""
        ids, _ = self.tokenizer(prompts, self.text.config.length, self.text.config.pad)
        return self.text(ids.to(self.image.visual_projection.weight.device))[1]


# ---------------------------------------------------------------------------------------------------------- ImageReward

@dataclass(frozen=True)
class ImageRewardConfig:
    """The defaults are those of the published model: BLIP's ViT-L/16, and BERT base with cross-attention."""
    size: int = 224                   # S: pictures are resized and cropped to S x S
    patch: int = 16
    width: int = 1024                 # D
    layers: int = 24
    heads: int = 16
    hidden: int = 4096                # width inside the MLPs
    vocab: int = 30524                # BERT's 30,522 uncased word pieces, and BLIP's [DEC] and [ENC]
    length: int = 35                  # L: every prompt is cut or padded to this many tokens
    positions: int = 512
    text_width: int = 768             # T
    text_layers: int = 12
    text_heads: int = 12
    text_hidden: int = 3072
    head: tuple[int, ...] = (1024, 128, 64, 16)                         # widths between the final linear layers
    mean: tuple[float, ...] = COLOR_MEAN
    std: tuple[float, ...] = COLOR_STD
    score_mean: float = 0.16717362830052426                             # so that scores have mean 0, deviation 1
    score_std: float = 1.0333394966054072


class WordPieces:
    """Prompts to ids of BERT's uncased vocabulary: [CLS], the prompt's word pieces, [SEP], padding."""

    def __init__(self, path: str | Path):
        self.model = tokenizers.Tokenizer.from_file(str(path))
        self.start, self.end, self.pad = map(self.model.token_to_id, ("[CLS]", "[SEP]", "[PAD]"))
        if None in (self.start, self.end, self.pad):
            raise ValueError("it has no [CLS], [SEP] and [PAD] tokens")

    def __call__(self, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Ids (B, length), and their mask (B, length): false for padding. Long prompts are cut."""
        rows = [[self.start, *self.model.encode(prompt, add_special_tokens=False).ids[:length - 2], self.end]
                for prompt in prompts]
        sizes = torch.tensor([[len(row)] for row in rows])
        return torch.tensor([row + [self.pad] * (length - len(row)) for row in rows]), torch.arange(length) < sizes


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """(B, L, D), (B, N, D), (B, N, D) -> (B, L, D). mask: (B, N), true for the tokens to attend to."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))      # (B, heads, L or N, D / heads)
    mask = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class ImageLayer(nn.Module):
    """Pre-norm transformer layer. (B, N, D) -> (B, N, D)"""

    def __init__(self, config: ImageRewardConfig):
        super().__init__()
        self.heads, width = config.heads, config.width
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Bag(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width))
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Bag(fc1=nn.Linear(width, config.hidden), fc2=nn.Linear(config.hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.attn.proj(attend(q, k, v, self.heads))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class TextAttention(nn.Module):
    """Post-norm self- or cross-attention. x (B, L, T), the tokens attended to (B, N, their width) -> (B, L, T)"""

    def __init__(self, config: ImageRewardConfig, seen: int):
        super().__init__()
        self.heads, width = config.text_heads, config.text_width
        self.self = Bag(query=nn.Linear(width, width), key=nn.Linear(seen, width), value=nn.Linear(seen, width))
        self.output = Bag(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))

    def forward(self, x: Tensor, seen: Tensor, mask: Tensor | None = None) -> Tensor:
        h = attend(self.self.query(x), self.self.key(seen), self.self.value(seen), self.heads, mask)
        return self.output.LayerNorm(x + self.output.dense(h))


class TextLayer(nn.Module):
    """Self-attention (not causal), cross-attention to the image, MLP. (B, L, T), (B, L), (B, N, D) -> (B, L, T)"""

    def __init__(self, config: ImageRewardConfig):
        super().__init__()
        width, hidden = config.text_width, config.text_hidden
        self.attention = TextAttention(config, width)
        self.crossattention = TextAttention(config, config.width)
        self.intermediate = Bag(dense=nn.Linear(width, hidden))
        self.output = Bag(dense=nn.Linear(hidden, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))

    def forward(self, x: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        x = self.crossattention(self.attention(x, x, mask), image)
        return self.output.LayerNorm(x + self.output.dense(F.gelu(self.intermediate.dense(x))))


class RewardModel(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1], ids (B, L) and their mask (B, L) -> scores (B,)"""

    def __init__(self, config: ImageRewardConfig = ImageRewardConfig()):
        super().__init__()
        self.config = config
        width, text_width = config.width, config.text_width
        image = Bag(
            patch_embed=Bag(proj=nn.Conv2d(3, width, config.patch, config.patch)),
            cls_token=nn.Parameter(torch.randn(1, 1, width)),
            pos_embed=nn.Parameter(torch.randn(1, (config.size // config.patch) ** 2 + 1, width)),
            blocks=nn.ModuleList([ImageLayer(config) for _ in range(config.layers)]),
            norm=nn.LayerNorm(width, eps=1e-6))
        text = Bag(
            embeddings=Bag(word_embeddings=nn.Embedding(config.vocab, text_width),
                           position_embeddings=nn.Embedding(config.positions, text_width),
                           LayerNorm=nn.LayerNorm(text_width, eps=1e-12)),
            encoder=Bag(layer=nn.ModuleList([TextLayer(config) for _ in range(config.text_layers)])))
        self.blip = Bag(visual_encoder=image, text_encoder=text)
        linears = [nn.Linear(a, b) for a, b in pairwise((text_width, *config.head, 1))]
        # As published, there is no activation between these layers. In training, dropout followed each of the first
        # three: therefore their numbers in the checkpoint have gaps.
        self.mlp = Bag(layers=nn.Sequential(*(part for i, linear in enumerate(linears)
                                              for part in ((linear, nn.Identity()) if i < 3 else (linear,)))))

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        tower = self.blip.visual_encoder
        x = embed(preprocess(images, self.config), tower.patch_embed.proj, tower.cls_token, tower.pos_embed)
        for block in tower.blocks:
            x = block(x)
        image = tower.norm(x)                                                                    # (B, N, D)

        tower = self.blip.text_encoder
        x = tower.embeddings.word_embeddings(ids) + tower.embeddings.position_embeddings.weight[:ids.shape[1]]
        x = tower.embeddings.LayerNorm(x)                                                        # (B, L, T)
        for layer in tower.encoder.layer:
            x = layer(x, mask, image)

        score = self.mlp.layers(x[:, 0])[:, 0]                                                   # (B,)
        return (score - self.config.score_mean) / self.config.score_std


class ImageReward:
    """The score of pictures for their prompts; about 0 is usual, 2 is very good."""

    def __init__(self, model: RewardModel, tokenizer: WordPieces):
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B texts -> (B,); gradients flow to the pictures."""
        device = self.model.blip.visual_encoder.cls_token.device
        ids, mask = (x.to(device) for x in self.tokenizer(prompts, self.model.config.length))
        return self.model(images, ids, mask)


# ------------------------------------------------------------------------------------------------------- one or several

def load_reward(folder: str | Path, device: str | torch.device = "cpu",
                dtype: torch.dtype = torch.float32) -> ClipReward | ImageReward:
    """The reward in a folder that `convert_weights.py --reward` or `ClipReward.save` wrote.

    The entries of config.json tell its kind: "text_encoder" and "image_encoder" for a CLIP, "image_reward" for
    ImageReward. Each has a .safetensors file of its name. InputError if anything is missing, damaged or doesn't fit.
    """
    folder = Path(folder)
    path = folder / "config.json"
    command = "python convert_weights.py SOURCE OUT_DIR --reward clip (or hps, imagereward)"
    if folder.is_file():
        raise InputError(f"{folder} is a file, not a converted reward; convert it first: {command}")
    try:
        entries = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{folder} holds no reward (its config.json can't be read: {error}); make one: "
                         f"{command}") from None
    if "family" in entries:
        raise InputError(f"{folder} is a model that makes pictures, not a reward model; make one: {command}")

    def part(name: str, kind: Callable[..., nn.Module], config: type) -> nn.Module:
        return build(kind, from_json(config, entries[name], f"{path}, {name}"))

    if "image_reward" in entries:
        model = part("image_reward", RewardModel, ImageRewardConfig)
        pieces = load_tokenizer(folder / "tokenizer.json", model.config.vocab, WordPieces, "BERT's")
        return ImageReward(load_weights(model, folder / "image_reward.safetensors", device, dtype), pieces)
    if not {"text_encoder", "image_encoder"} <= entries.keys():
        raise InputError(f'{folder} holds no reward (its config.json has neither "image_reward" nor "text_encoder" and '
                         f'"image_encoder"); make one: {command}')
    text, image = part("text_encoder", TextEncoder, TextConfig), part("image_encoder", ImageEncoder, ImageConfig)
    tokenizer = load_tokenizer(folder / "tokenizer.json", text.config.vocab)
    for name, tower in (("image_encoder", image), ("text_encoder", text)):
        load_weights(tower, folder / f"{name}.safetensors", device, dtype)
    try:
        return ClipReward(image, text, tokenizer)
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from None


def add_rewards(rewards: list[ClipReward | ImageReward]) -> Callable[[Tensor, list[str]], Tensor]:
    """Several rewards as one: minus the released loss, the sum of ReLU(2 - ImageReward) and 5 (1 - cosine) of a CLIP.

    The paper's eq. 10 (arXiv 2505.03097) is a sum without signs and weights. A single reward is returned unchanged:
    AdamW's steps don't depend on the scale of the reward, and there is no reason to stop at 2.
    """
    if len(rewards) == 1:
        return rewards[0]

    def total(images: Tensor, prompts: list[str]) -> Tensor:
        losses = [F.relu(2 - reward(images, prompts)) if isinstance(reward, ImageReward)
                  else 5 * (1 - reward(images, prompts)) for reward in rewards]
        return -sum(losses)
    return total
