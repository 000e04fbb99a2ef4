"""ImageReward: how well a picture fits its prompt, as people judge it, learnt from their comparisons. Differentiable.

    images --preprocess--> image tower (BLIP's ViT) --> tokens --.
                                                                 | cross-attention in every layer
    prompts --WordPieces--> text tower (BERT) <------------------'
                               '--> first token --> five linear layers --> score (B,)

Start at `RewardModel.forward`. Shapes: B images and their prompts, H W pixels, S the tower's own side,
N = (S / patch)^2 + 1 image tokens of width D, L text tokens of width T.
Source: "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", arXiv 2304.05977.
Checked against transformers 5.23 (BlipVisionModel, BlipTextModel). Parameter names are those of ImageReward.pt.
"""
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_image import preprocess
from folder import InputError, build, from_json, load_weights


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
    head: tuple[int, ...] = (1024, 128, 64, 16)                         # widths between the linear layers
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)       # of red, green and blue: CLIP's
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    score_mean: float = 0.16717362830052426                             # so that scores have mean 0 and spread 1
    score_std: float = 1.0333394966054072


class WordPieces:
    """Prompts to the ids of BERT's uncased tokens: [CLS], the prompt's, [SEP], padding."""

    def __init__(self, path: str | Path):
        self.model = tokenizers.Tokenizer.from_file(str(path))
        self.ids = [self.model.token_to_id(token) for token in ("[CLS]", "[SEP]", "[PAD]")]
        if None in self.ids:
            raise ValueError("it has no [CLS], [SEP] and [PAD] tokens")

    def __call__(self, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Ids (B, length), and (B, length), true where they are no padding. What is too long is cut off."""
        start, end, pad = self.ids
        rows = [[start, *self.model.encode(prompt, add_special_tokens=False).ids[:length - 2], end]
                for prompt in prompts]
        sizes = torch.tensor([[len(row)] for row in rows])
        return torch.tensor([row + [pad] * (length - len(row)) for row in rows]), torch.arange(length) < sizes


class Bag(nn.Module):
    """Parts under the names of the checkpoint; `RewardModel.forward` calls them itself."""

    def __init__(self, **parts: nn.Module | nn.Parameter):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """(B, L, D), (B, N, D), (B, N, D) -> (B, L, D). mask: (B, N), true for the tokens that may be looked at."""
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
    """Post-norm attention of texts to themselves or to images. (B, L, T), (B, N, width of what is seen) -> (B, L, T)"""

    def __init__(self, config: ImageRewardConfig, seen: int):
        super().__init__()
        self.heads, width = config.text_heads, config.text_width
        self.self = Bag(query=nn.Linear(width, width), key=nn.Linear(seen, width), value=nn.Linear(seen, width))
        self.output = Bag(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))

    def forward(self, x: Tensor, seen: Tensor, mask: Tensor | None = None) -> Tensor:
        h = attend(self.self.query(x), self.self.key(seen), self.self.value(seen), self.heads, mask)
        return self.output.LayerNorm(x + self.output.dense(h))


class TextLayer(nn.Module):
    """Tokens look at each other, both ways, then at the image. (B, L, T), (B, L), (B, N, D) -> (B, L, T)"""

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
        # As published, no activation stands between these layers, so the five act as one. In training a dropout
        # followed each of the first three, which is why the published numbers of the layers have gaps.
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

    @staticmethod
    def load(folder: str | Path, device: str | torch.device = "cpu",
             dtype: torch.dtype = torch.float32) -> "ImageReward":
        """Read a folder that `convert_weights.py --reward imagereward` wrote.

        It holds config.json (with "image_reward"), image_reward.safetensors and tokenizer.json. InputError where
        anything is absent, damaged or doesn't fit.
        """
        folder = Path(folder)
        path = folder / "config.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))["image_reward"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{folder} holds no ImageReward (its config.json has no \"image_reward\"); make one: "
                             f"python convert_weights.py ImageReward.pt {folder} --reward imagereward") from None
        model = build(RewardModel, from_json(ImageRewardConfig, data, f"{path}, image_reward"))
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"there is no file {path}; convert the model again")
        try:
            tokenizer = WordPieces(path)
        except Exception as error:                   # the tokenizers library raises nothing narrower
            raise InputError(f"{path} is not BERT's tokenizer ({error}); convert the model again") from None
        if tokenizer.model.get_vocab_size() > model.config.vocab:
            raise InputError(f"{path} has {tokenizer.model.get_vocab_size()} tokens, but the text tower knows "
                             f"{model.config.vocab}; convert the model again with the vocabulary that belongs to it")
        load_weights(model, folder / "image_reward.safetensors", device, dtype)
        return ImageReward(model, tokenizer)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B texts -> (B,); gradients flow to the pictures."""
        device = self.model.blip.visual_encoder.cls_token.device
        ids, mask = (x.to(device) for x in self.tokenizer(prompts, self.model.config.length))
        return self.model(images, ids, mask)
