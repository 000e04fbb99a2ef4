"""The text side of Stable Diffusion: prompts to token ids (`Tokenizer`), ids to embeddings (`TextEncoder`).

Start at `TextEncoder.forward`. Three published towers fit it: CLIP ViT-L (SD 1.x, SDXL's first), OpenCLIP ViT-H (SD
2.x) and OpenCLIP bigG (SDXL's second); they differ only in `TextConfig`.
Shapes: B prompts, L tokens (77), D width, P width of the pooled vector.
Source: "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020, section 2.4.
Checked against transformers 5.23 (CLIPTextModel, CLIPTextModelWithProjection). Parameter names are the published ones.
"""
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TextConfig:
    """What differs between towers. The defaults are those of CLIP ViT-L as in Stable Diffusion 1.x."""
    vocab: int = 49408
    length: int = 77                  # L: every prompt is cut or padded to this many tokens
    width: int = 768                  # D
    layers: int = 12
    heads: int = 12
    hidden: int = 3072                # width inside the MLPs
    activation: str = "quick_gelu"    # "quick_gelu" (OpenAI) or "gelu" (OpenCLIP)
    output: str = "final"             # "final": the last layer's, normed; "penultimate": the layer's before it (SDXL)
    projection: int | None = None     # P: width of the projected pooled vector; None: no pooled vector
    pad: int = 49407                  # id that pads after the end token: the end token's own (OpenAI) or 0 (OpenCLIP)


CONFIGS = {
    "vit-l": TextConfig(),
    "vit-l-penultimate": TextConfig(output="penultimate"),
    # SD 2.x doesn't use the last of ViT-H's 24 layers, and its Hugging Face folders don't store it
    "vit-h": TextConfig(width=1024, layers=23, heads=16, hidden=4096, activation="gelu", pad=0),
    "bigg": TextConfig(width=1280, layers=32, heads=20, hidden=5120, activation="gelu", output="penultimate",
                       projection=1280, pad=0),
    "tiny": TextConfig(vocab=55, length=24, width=128, layers=3, heads=4, hidden=512, pad=0),
}


class Tokenizer:
    """Prompts to ids: start token, the prompt's tokens, end token, padding.

    The end token must have the largest id: CLIP takes the pooled vector at the position of the largest id.
    """

    def __init__(self, path: str | Path):
        self.model = tokenizers.Tokenizer.from_file(str(path))
        self.start = self.model.token_to_id("<|startoftext|>")
        self.end = self.model.token_to_id("<|endoftext|>")
        self.unknown = self.model.token_to_id("<|unknown|>")     # only in the tiny model's vocabulary of whole words
        if self.start is None or self.end is None:
            raise ValueError(f"{path} has no <|startoftext|> and <|endoftext|> tokens: it isn't a CLIP tokenizer")

    def __call__(self, prompts: list[str], length: int, pad: int) -> tuple[Tensor, list[str]]:
        """Ids (B, length), and each prompt's words that the model doesn't see: cut off, or not in the vocabulary."""
        rows, lost = [], []
        for prompt in prompts:
            encoding = self.model.encode(prompt, add_special_tokens=False)
            room = length - 2                                    # the start and the end token always stay
            ids = [self.start, *encoding.ids[:room], self.end]
            rows.append(ids + [pad] * (length - len(ids)))
            spans = [span for id, span in zip(encoding.ids[:room], encoding.offsets) if id == self.unknown]
            if len(encoding.ids) > room:
                spans.append((encoding.offsets[room][0], len(prompt)))
            lost.append(" ".join(prompt[a:b].strip() for a, b in spans))
        return torch.tensor(rows), lost


class Attention(nn.Module):
    """Self-attention. causal (for texts): tokens attend to themselves and earlier ones. (B, L, D) -> (B, L, D)"""

    def __init__(self, config: TextConfig, causal: bool):
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"a width of {config.width} can't be split into {config.heads} heads")
        self.heads, self.causal = config.heads, causal
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)          # (B, heads, L, D / heads)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """(B, L, D) -> (B, L, D)"""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.activation = config.activation
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        h = h * torch.sigmoid(1.702 * h) if self.activation == "quick_gelu" else F.gelu(h)
        return self.fc2(h)


class Layer(nn.Module):
    """Pre-norm transformer layer. (B, L, D) -> (B, L, D)"""

    def __init__(self, config: TextConfig, causal: bool):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.self_attn = Attention(config, causal)
        self.layer_norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """Token and position embeddings. Ids (B, L) -> (B, L, D)"""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab, config.width)
        self.position_embedding = nn.Embedding(config.length, config.width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[:ids.shape[1]]


class Encoder(nn.Module):
    """Container for the layers; `TextEncoder.forward` calls them (in `reward.py`, `ImageEncoder.forward` does)."""

    def __init__(self, config: TextConfig, causal: bool = True):
        super().__init__()
        self.layers = nn.ModuleList([Layer(config, causal) for _ in range(config.layers)])


class TextModel(nn.Module):
    """Container that gives its parameters their published names, which begin with "text_model."."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width)


class TextEncoder(nn.Module):
    """Token ids (B, L) -> embeddings (B, L, D) for cross-attention, and the pooled vector (B, P) or None"""

    def __init__(self, config: TextConfig = TextConfig()):
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        if config.projection is not None:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        x = before = self.text_model.embeddings(ids)
        for layer in self.text_model.encoder.layers:
            x, before = layer(x), x                              # before: the input of the last layer
        final = self.text_model.final_layer_norm(x)
        pooled = None
        if self.config.projection is not None:
            end = ids.argmax(dim=-1)                             # position of the end token: the first largest id
            pooled = self.text_projection(final[torch.arange(len(ids), device=ids.device), end])
        return (before if self.config.output == "penultimate" else final), pooled
