"""How well a picture fits its prompt, as a differentiable number: CLIP's two towers, and what else can say it.

    images --preprocess--> ImageEncoder --.
                                          cosine --> score (B,)
    prompts --Tokenizer--> TextEncoder ---'

Start at `ClipReward.__call__`. HPSv2 is such a CLIP too, a ViT-H/14 that was trained on people's choices between
pictures; its published tables show the cosine times 100. ImageReward is another network: `image_reward.py`.
`load_reward` reads a folder of any kind. Shapes: B images, H W pixels, P width of the space that both towers share.
Source: "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020, section 2, and
"Human Preference Score v2", arXiv 2306.09341. Checked against transformers 5.23 and open_clip 3.3.
"""
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from clip_image import ImageConfig, ImageEncoder
from clip_text import TextConfig, TextEncoder, Tokenizer
from folder import InputError, build, from_json, load_tokenizer, load_weights, replacing
from image_reward import ImageReward


class ClipReward:
    """The cosine between a picture's vector and its prompt's, by the two towers of one CLIP."""

    def __init__(self, image: ImageEncoder, text: TextEncoder, tokenizer: Tokenizer):
        if text.config.projection != image.config.projection:
            raise ValueError(f"the image tower ends in {image.config.projection} numbers and the text tower in "
                             f"{text.config.projection}: they are not of one CLIP")
        self.image, self.text, self.tokenizer = image, text, tokenizer

    @staticmethod
    def load(folder: str | Path, device: str | torch.device = "cpu",
             dtype: torch.dtype = torch.float32) -> "ClipReward":
        """Read both towers from a folder such as models/tiny/clip.

        It holds config.json (with "text_encoder" and "image_encoder"), text_encoder.safetensors,
        image_encoder.safetensors and tokenizer.json. InputError where anything is absent, damaged or doesn't fit.
        """
        folder = Path(folder)
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            text, image = config["text_encoder"], config["image_encoder"]
        except (OSError, ValueError, KeyError, TypeError):
            image = None
        if image is None:
            raise InputError(f"{folder} holds no CLIP with an image tower (its config.json has no \"text_encoder\" "
                             "and \"image_encoder\"); convert one: python convert_weights.py SOURCE OUT_DIR "
                             "--reward clip")
        text = build(TextEncoder, from_json(TextConfig, text, f"{path}, text_encoder"))
        image = build(ImageEncoder, from_json(ImageConfig, image, f"{path}, image_encoder"))
        tokenizer = load_tokenizer(folder / "tokenizer.json", text.config.vocab)
        load_weights(image, folder / "image_encoder.safetensors", device, dtype)
        load_weights(text, folder / "text_encoder.safetensors", device, dtype)
        try:
            return ClipReward(image, text, tokenizer)
        except ValueError as error:
            raise InputError(f"{folder}: {error}") from None

    def save(self, folder: Path) -> None:
        """Write such a folder, in float16; `load` makes the same towers again."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, tower in (("text_encoder", self.text), ("image_encoder", self.image)):
            with replacing(folder / f"{name}.safetensors") as path:
                save_file({key: p.half().contiguous().cpu() for key, p in tower.state_dict().items()}, path)
        with replacing(folder / "tokenizer.json") as path:
            self.tokenizer.model.save(str(path))
        with replacing(folder / "config.json") as path:
            path.write_text(json.dumps({"text_encoder": asdict(self.text.config),
                                        "image_encoder": asdict(self.image.config)}, indent=1) + "\n",
                            encoding="utf-8")

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B texts -> (B,) in [-1, 1]; gradients flow to the pictures."""
        return F.cosine_similarity(self.image(images), self.embed_text(prompts), dim=-1)

    @torch.no_grad()
    def embed_text(self, prompts: list[str]) -> Tensor:
        """B texts -> (B, P), not normalised"""
        ids, _ = self.tokenizer(prompts, self.text.config.length, self.text.config.pad)
        return self.text(ids.to(self.image.visual_projection.weight.device))[1]


def load_reward(folder: str | Path, device: str | torch.device = "cpu",
                dtype: torch.dtype = torch.float32) -> ClipReward | ImageReward:
    """The reward in a folder, of the kind that its config.json tells. InputError where there is none."""
    folder = Path(folder)
    command = "python convert_weights.py SOURCE OUT_DIR --reward clip (or hps, imagereward)"
    if folder.is_file():
        raise InputError(f"{folder} is a file, not a converted reward; convert it first: {command}")
    try:
        entries = set(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder} holds no reward (its config.json can't be read: {error}); make one: "
                         f"{command}") from None
    if "family" in entries:
        raise InputError(f"{folder} is a model that makes pictures, not a reward that judges them; make one: {command}")
    return (ImageReward if "image_reward" in entries else ClipReward).load(folder, device, dtype)


def add_rewards(rewards: list[ClipReward | ImageReward]) -> Callable[[Tensor, list[str]], Tensor]:
    """Several rewards as one: the negative of ReLU(2 - ImageReward) + 5 (1 - cosine), MaskUNet's loss.

    So its released code; the paper's eq. 10 (arXiv 2505.03097) has a sum without signs and weights. A reward alone
    stays as it is: AdamW, which climbs it, doesn't look at its scale, and there is no reason to stop at 2.
    """
    if len(rewards) == 1:
        return rewards[0]

    def total(images: Tensor, prompts: list[str]) -> Tensor:
        losses = [F.relu(2 - reward(images, prompts)) if isinstance(reward, ImageReward)
                  else 5 * (1 - reward(images, prompts)) for reward in rewards]
        return -sum(losses)
    return total
