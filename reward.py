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
Shapes: B pictures and their prompts, H W pixels, S the image tower's own side, N = (S / patch)^2 + 1 image tokens of
width D, L text tokens of width T, P width of the space that CLIP's two towers share.
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


# --------------------------------------------------------------------------------------------------- CLIP's image tower

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


class Embeddings(nn.Module):
    """The class token, then one token per patch. (B, 3, S, S) -> (B, N, D)"""

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
    """Container that gives its parameters their published names, which begin with "vision_model."."""

    def __init__(self, config: ImageConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width)                  # the spelling of every checkpoint
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.width)


class ImageEncoder(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] -> embeddings (B, P) in the space shared with texts, not normalised"""

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
    """(B, 3, H, W) in [0, 1] -> (B, 3, S, S): the short side is resized to S (bicubic, antialiased), the centre is
    cropped, and the colours are normalised by the config's mean and std. Differentiable."""
    h, w = images.shape[-2:]
    if min(h, w) != config.size:
        size = (config.size * h // min(h, w), config.size * w // min(h, w))     # rounded down, as published code does
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
    top, left = ((side - config.size) // 2 for side in images.shape[-2:])
    images = images[..., top:top + config.size, left:left + config.size]
    mean, std = (torch.tensor(x, device=images.device, dtype=images.dtype)[:, None, None]
                 for x in (config.mean, config.std))
    return (images - mean) / std


class ClipReward:
    """The cosine similarity of the embeddings that one CLIP's two towers give a picture and its prompt."""

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
        self.ids = [self.model.token_to_id(token) for token in ("[CLS]", "[SEP]", "[PAD]")]
        if None in self.ids:
            raise ValueError("it has no [CLS], [SEP] and [PAD] tokens")

    def __call__(self, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Ids (B, length), and their mask (B, length): false for padding. Long prompts are cut."""
        start, end, pad = self.ids
        rows = [[start, *self.model.encode(prompt, add_special_tokens=False).ids[:length - 2], end]
                for prompt in prompts]
        sizes = torch.tensor([[len(row)] for row in rows])
        return torch.tensor([row + [pad] * (length - len(row)) for row in rows]), torch.arange(length) < sizes


class Bag(nn.Module):
    """Container that gives its parts the checkpoint's names; `RewardModel.forward` calls them."""

    def __init__(self, **parts: nn.Module | nn.Parameter):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


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
        # As published, there is no activation between these layers, so the five act as one. In training, dropout
        # followed each of the first three. That is why the layers' numbers in the checkpoint have gaps.
        self.mlp = Bag(layers=nn.Sequential(*(part for i, linear in enumerate(linears)
                                              for part in ((linear, nn.Identity()) if i < 3 else (linear,)))))

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        tower = self.blip.visual_encoder
        x = tower.patch_embed.proj(preprocess(images, self.config)).flatten(2).transpose(1, 2)
        x = torch.cat([tower.cls_token.expand(len(x), 1, -1), x], dim=1) + tower.pos_embed       # (B, N, D)
        for block in tower.blocks:
            x = block(x)
        image = tower.norm(x)

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
    ImageReward. Each entry has a .safetensors file of its name. Both kinds have tokenizer.json. InputError if anything
    is missing, damaged or doesn't fit.
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
        pieces = load_word_pieces(folder / "tokenizer.json", model.config.vocab)
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


def load_word_pieces(path: Path, vocab: int) -> WordPieces:
    """tokenizer.json of ImageReward, checked against the size of the text tower's vocabulary."""
    if not path.is_file():
        raise InputError(f"there is no file {path}; convert the model again")
    try:
        tokenizer = WordPieces(path)
    except Exception as error:                   # the tokenizers library raises nothing narrower
        raise InputError(f"{path} is not BERT's tokenizer ({error}); convert the model again") from None
    if tokenizer.model.get_vocab_size() > vocab:
        raise InputError(f"{path} has {tokenizer.model.get_vocab_size()} tokens, but the text tower knows {vocab}; "
                         "convert the model again with the vocabulary that belongs to it")
    return tokenizer


def add_rewards(rewards: list[ClipReward | ImageReward]) -> Callable[[Tensor, list[str]], Tensor]:
    """Several rewards as one: minus MaskUNet's released loss, the sum of ReLU(2 - ImageReward) and 5 (1 - cosine).

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
