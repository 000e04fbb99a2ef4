"""Pictures as files: read safely, written with their settings, compared, and laid out as a sheet."""
import contextlib
import hashlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from torch import Tensor

from command import InputError, replacing


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An open picture file, of which Pillow has read only the header. InputError for what Pillow can't read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)        # memory is checked elsewhere
            with Image.open(path) as file:
                yield file
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"can't read the picture {path} ({error})") from None


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width as it is displayed, each rounded to a multiple of 8."""
    with opened(path) as file:
        turned = file.getexif().get(ExifTags.Base.Orientation, 1) > 4
        width, height = (max(round(side / 8) * 8, 8) for side in (file.size[::-1] if turned else file.size))
        return height, width


def open_picture(path: Path) -> Image.Image:
    """A picture as it is displayed: upright, in RGB, on white if it is transparent. InputError if it can't be read."""
    with opened(path) as file:
        picture = ImageOps.exif_transpose(file)
        if picture.mode.startswith("I"):                               # 16 bits of gray, which Pillow would clip
            picture = Image.fromarray((np.asarray(picture) // 256).astype(np.uint8))
        if picture.has_transparency_data:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
        return picture.convert("RGB")


def read_image(path: Path, height: int | None = None, width: int | None = None) -> Tensor:
    """A picture as (1, 3, H, W) in [0, 1], resized to this height and width; None: its own, see `picture_size`."""
    own = picture_size(path)
    picture = open_picture(path).resize((width or own[1], height or own[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def read_parameters(path: Path) -> str | None:
    """The settings in a PNG's text chunk "parameters"; None if there are none or the file can't be read."""
    with contextlib.suppress(InputError), opened(path) as file:
        return file.info.get("parameters")
    return None


def save_png(image: Tensor, path: Path, parameters: str) -> None:
    """Write one image (3, H, W) in [0, 1]; its settings go to the text chunk "parameters", which other tools read."""
    pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", parameters)
    with replacing(path) as part:
        Image.fromarray(pixels).save(part, format="PNG", pnginfo=info)


def save_grid(paths: list[Path], path: Path) -> None:
    """Write a sheet of finished pictures of one size; its grid is as square as their number allows."""
    pictures = [Image.open(p).convert("RGB") for p in paths]
    columns, (w, h) = math.ceil(math.sqrt(len(pictures))), pictures[0].size
    sheet = Image.new("RGB", (columns * w, math.ceil(len(pictures) / columns) * h))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * w, i // columns * h))
    with replacing(path) as part:
        sheet.save(part, format="PNG")


def psnr(a: Tensor, b: Tensor) -> float:
    """The peak signal-to-noise ratio of two images in [0, 1], in dB: 10 log10 of 1 over their mean squared error."""
    return -10 * math.log10(max((a - b).square().mean().item(), 1e-12))


def file_digest(path: Path) -> str:
    """A file's name and the first digits of its contents' SHA-256."""
    try:
        return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"
    except OSError as error:
        raise InputError(f"can't read {path} ({error.strerror})") from None
