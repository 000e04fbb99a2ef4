"""From a prompt to a picture: `StableDiffusion` (load, encode, sample, decode) and the command line.

    python txt2img.py "a red circle left of a blue square"
    python txt2img.py "a photograph of an astronaut riding a horse" --model models/sd15 --steps 30 --seed 1

Start at `StableDiffusion.sample`; the loop it runs is `sampler.generate`. Shapes: B images, H W pixels, h w latent
pixels, L text tokens, D text width, P width of SDXL's pooled text vector.
"""
import argparse
import contextlib
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from numbers import Integral
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn
from tqdm import tqdm

try:
    import resource
except ImportError:
    resource = None

from cache import DeepCache, FasterDiffusion, Inherit, TGate
from clip_text import TextEncoder, Tokenizer
from command import InputError, replacing, run_command
from flags import (
    UNREADABLE,
    check_memory,
    parameters_texts,
    parse_arguments,
    read_baseline,
    read_image,
    read_mask_search,
    read_masks,
    read_prompts,
    report,
    sample_settings,
)
from folder import ModelConfig, build, check_size, load_tokenizer, load_weights, read_config
from freescale import FreeScale, enlarge
from freeu import FreeU
from maskunet import Masks, MaskSearch
from sampler import draw_noise, generate
from unet import UNet, sinusoid
from vae import VAE, tile_side, together

KNOWN = 64         # texts of which a command keeps the encoding: 15 MB for SD 1.5 and 40 MB for SDXL in float32
Prompt = str | list[str] | Tensor | tuple[Tensor, Tensor | None]


class StableDiffusion:
    """A model folder in memory: tokenizer, text encoders, U-Net and VAE. Make one with `StableDiffusion.load`."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, text_encoders: list[TextEncoder],
                 unet: UNet, vae: VAE, low_memory: bool = False):
        self.config, self.tokenizer, self.text_encoders = config, tokenizer, text_encoders
        self.unet, self.vae, self.low_memory = unet, vae, low_memory
        self.device, self.dtype = unet.conv_in.weight.device, unet.conv_in.weight.dtype

    @staticmethod
    def load(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
             low_memory: bool = False, compiled: bool = False) -> "StableDiffusion":
        """Read a converted model folder, strictly. InputError where anything is absent, damaged or doesn't fit.

        low_memory: only the U-Net stays on the device, text encoders and VAE come when they are needed; and the halves
            of guidance run one after the other. The same pictures, with less memory and somewhat slower.
        compiled: torch.compile makes one graph of the U-Net, at its first call and again for every other size, batch
            or set of techniques: minutes for a large model, so for many pictures of one kind. Parallel Faster Diffusion
            has a graph of the encoder, and one of the decoder for each number of steps in a batch.
        """
        folder = Path(folder)
        config = read_config(folder)
        tokenizer = load_tokenizer(folder / "tokenizer.json", config.text_encoder.vocab)
        unet, vae = build(UNet, config.unet), build(VAE, config.vae)
        texts = [build(TextEncoder, c) for c in (config.text_encoder, config.text_encoder_2) if c is not None]
        load_weights(unet, folder / "unet.safetensors", device, dtype)
        # SDXL's VAE overflows float16: it stays in float32 there
        guard = config.vae.force_upcast and dtype == torch.float16
        home = "cpu" if low_memory else device
        load_weights(vae, folder / "vae.safetensors", home, torch.float32 if guard else dtype)
        for name, text in zip(("text_encoder", "text_encoder_2"), texts):
            load_weights(text, folder / f"{name}.safetensors", home, dtype)
        if compiled:
            # a CPU's layouts are those of the plain model: the compiler's own, or frozen weights, gain nothing there
            kept = {"layout_optimization": False} if torch.device(device).type == "cpu" else None
            # behind the limit, PyTorch runs without graphs; its own, 8, is less than a few caches and batches need
            unet.compile(dynamic=False, options=kept, recompile_limit=64)
        return StableDiffusion(config, tokenizer, texts, unet, vae, low_memory)

    @contextlib.contextmanager
    def on_device(self, module: nn.Module) -> Iterator[None]:
        """The module beside the U-Net for as long as it is needed; with low_memory it waits in main memory else."""
        module.to(self.device)
        try:
            yield
        finally:
            if self.low_memory:
                module.to("cpu")

    @torch.no_grad()
    def encode_prompt(self, prompts: str | list[str],
                      known: dict[str, tuple[Tensor, Tensor | None]] | None = None) -> tuple[Tensor, Tensor | None]:
        """Texts to context (B, L, D) and, for SDXL, the pooled vector (B, P). Warns of words that are lost.

        known: what earlier calls with it encoded, the last KNOWN texts; the caller's, so that it ends with his weights.
        """
        known = {} if known is None else known
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"a prompt is a text or a list of texts, not {prompts!r}")
        new, hidden, pooled, lost = [text for text in dict.fromkeys(prompts) if text not in known], [], None, []
        for text in self.text_encoders if new else []:
            ids, lost = self.tokenizer(new, text.config.length, text.config.pad)
            with self.on_device(text):
                h, pooled = text(ids.to(self.device))                  # SDXL's pooled vector is the second encoder's
            hidden.append(h)
        for k, (prompt, words) in enumerate(zip(new, lost)):
            known[prompt] = torch.cat([h[k] for h in hidden], dim=-1), None if pooled is None else pooled[k]
            if words:
                warnings.warn(f"the model doesn't see these words of {prompt!r}: {words!r}", stacklevel=2)
        contexts, pools = zip(*(known[prompt] for prompt in prompts))
        while len(known) > KNOWN:
            del known[next(iter(known))]                               # the oldest
        return torch.stack(contexts), None if pools[0] is None else torch.stack(pools)

    def size_conditioning(self, pooled: Tensor, time_ids: Tensor) -> Tensor:
        """SDXL's added condition (B, add_dim): the pooled text (B, P), then a wave for each of six sizes (B, 6).

        time_ids: original height and width, top and left of the crop, target height and width, in pixels.
        """
        waves = sinusoid(time_ids.flatten(), self.config.unet.add_time_dim).reshape(len(time_ids), -1)
        return torch.cat([pooled, waves.to(pooled)], dim=-1)

    def conditions(self, prompt: Prompt | None, batch: int | None, height: int, width: int,
                   known: dict[str, tuple[Tensor, Tensor | None]] | None = None) -> tuple[Tensor, Tensor | None]:
        """What the U-Net is told: context (B, L, D), and for SDXL the added condition (B, add_dim)."""
        if prompt is None and self.config.zero_negative:               # SDXL without a negative prompt: zeros, not ""
            context, pooled = (torch.zeros_like(x) for x in self.encode_prompt([""], known))
        elif isinstance(prompt, Tensor):
            context, pooled = prompt, None
        elif isinstance(prompt, tuple):
            context, pooled = prompt
        else:
            context, pooled = self.encode_prompt("" if prompt is None else prompt, known)
        if batch is not None and len(context) == 1:
            context, pooled = context.expand(batch, -1, -1), None if pooled is None else pooled.expand(batch, -1)
        if batch is not None and len(context) != batch:
            raise InputError(f"there are {len(context)} negative prompts for {batch} prompts; give one, or as many")
        if not self.config.unet.add_dim:
            return context.to(self.device, self.dtype), None
        if pooled is None:
            raise InputError("this model needs the pooled text too: pass (context, pooled) instead of context alone")
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=self.device).expand(len(context), -1)
        return context.to(self.device, self.dtype), self.size_conditioning(pooled, time_ids).to(self.device, self.dtype)

    @torch.no_grad()
    def sample(self, prompt: Prompt, negative_prompt: Prompt | None = "", steps: int = 30, sampler: str = "ddim",
               cfg_scale: float = 7.5, seed: int | list[int] = 0, height: int | None = None, width: int | None = None,
               noise: Tensor | None = None, eta: float = 0.0, spacing: str | None = None, *, freeu: FreeU | None = None,
               cache: DeepCache | FasterDiffusion | Inherit | None = None, tgate: TGate | None = None,
               freescale: FreeScale | None = None, masks: Masks | MaskSearch | None = None,
               init: Tensor | None = None, strength: float = 0.8, tile: int | None = None,
               model: Callable[..., Tensor] | None = None,
               known: dict[str, tuple[Tensor, Tensor | None]] | None = None,
               callback: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """Prompts to latents (B, 4, h, w), VAE-scaled, float32 (or of the noise's dtype).

        prompt: one text or a list of B; or embeddings: context (B, L, D), for SDXL with the pooled vector (B, P).
        negative_prompt: likewise, one for all or B. None: what the model's authors do without one ("", SDXL: zeros).
        seed: image k draws all its noise from a CPU generator of its own, seeded with seed + k; or a list of B seeds.
        height, width: pixels, multiples of 8; None: the model's native size, or that of noise or init.
        noise: (B, 4, h, w), unit variance, to start from. The seeds then draw later noise alone, beginning with their
            first numbers as in diffusers: with eta, "euler-a" and FreeScale, noise must be of other seeds.
        init: latents to start from (see `encode`), of which `strength` (0..1) is redrawn.
        freescale: the stages of a large picture, see `freescale.py`. Height and width, if given, are the last stage's,
            noise is the first one's; init takes the place of the first one's result, and strength doesn't matter.
        tile: of the VAE between FreeScale's stages, as in `decode`.
        model: a function in the U-Net's place, such as `highres_baselines.py` makes; not with cache, T-GATE and masks,
            and with freescale only one that takes that argument, as DemoFusion's does.
        known: encodings of texts to go on using, see `encode_prompt`.
        callback(step, latents) is called after each step; in FreeScale's stage k, steps count from k * steps. Other
            arguments: see `sampler.generate`.
        """
        if model is not None and (cache is not None or tgate is not None or masks is not None):
            raise InputError("caches, T-GATE and masks need the U-Net itself: leave them out, or model")
        if freescale is not None:
            freescale, (height, width) = self.fit(freescale, height, width, init), freescale.resolutions[0]
        factor, native = self.config.vae.factor, self.config.size
        for given in (init, noise):
            if given is not None:
                height = given.shape[-2] * factor if height is None else height
                width = given.shape[-1] * factor if width is None else width
        height, width = check_size(native if height is None else height, native if width is None else width)
        context, added = self.conditions(prompt, None, height, width, known)
        negative, negative_added = None, None
        if cfg_scale != 1:
            negative, negative_added = self.conditions(negative_prompt, len(context), height, width, known)

        seeds = [seed + k for k in range(len(context))] if isinstance(seed, Integral) else list(seed)
        if len(seeds) != len(context):
            raise InputError(f"there are {len(seeds)} seeds for {len(context)} prompts; give one, or as many")
        generators = [torch.Generator().manual_seed(int(s)) for s in seeds]
        if noise is None:
            like = torch.empty(1, self.config.unet.in_channels, height // factor, width // factor, device=self.device)
            noise = draw_noise(generators, like)
        shape = (len(context), self.config.unet.in_channels, height // factor, width // factor)
        if tuple(noise.shape) != shape:
            raise InputError(f"noise has shape {tuple(noise.shape)}, but {shape} is needed")
        if init is not None and tuple(init.shape) not in (shape, (1, *shape[1:])):
            raise InputError(f"init has shape {tuple(init.shape)}, but {shape} is needed")
        init = None if init is None else init.to(self.device)

        def run(noise: Tensor, init: Tensor | None, stage: int, freescale: FreeScale | None) -> Tensor:
            latents = noise
            for i, latents in generate(
                    model or self.unet, noise.to(self.device), context, negative, steps, sampler, cfg_scale,
                    self.config.prediction, added, negative_added, spacing, eta, generators, freeu=freeu, cache=cache,
                    tgate=tgate, freescale=freescale, masks=masks, schedule=self.config.schedule, init=init,
                    strength=strength, low_memory=self.low_memory):
                if callback is not None:
                    callback(stage * steps + i, latents)
            if not latents.isfinite().all():
                raise InputError(not_finite("latents", self.dtype))
            return latents

        if freescale is None:
            return run(noise, init, 0, None)
        latents = run(noise, None, 0, None) if init is None else init.expand(shape).float()
        for stage, size in enumerate(freescale.resolutions[1:], start=1):
            like = latents.new_empty(1, shape[1], *(side // factor for side in size))
            unit = draw_noise(generators, like) if freescale.upsample == "rgb" else None
            with self.on_device(self.vae):
                latents = enlarge(latents, size, freescale.upsample, self.vae, unit, tile_side(tile, like))
            latents = run(draw_noise(generators, like), latents, stage, freescale)
        return latents

    def fit(self, freescale: FreeScale, height: int | None, width: int | None, init: Tensor | None) -> FreeScale:
        """The settings with the model's native size; InputError for stages that aren't what is asked for."""
        last = freescale.resolutions[-1]
        if (height or last[0], width or last[1]) != last:
            raise InputError(f"FreeScale ends with {last[1]}x{last[0]}, so leave height and width at None")
        if len(freescale.resolutions) == 1 and init is not None:
            raise InputError("init takes the place of FreeScale's first stage: give a second, larger resolution")
        if freescale.native is None:
            freescale = replace(freescale, native=self.config.size // self.config.vae.factor)
        return freescale

    @torch.no_grad()
    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """VAE-scaled latents (B, 4, h, w) to images (B, 3, H, W) in [0, 1], float32; large ones one at a time.

        tile: side of the VAE's tiles in latent pixels; None: no tiles up to 128x128 latent pixels, 64 above; 0: never.
        """
        z = latents.to(self.device) / self.config.vae.scaling
        with self.on_device(self.vae):
            images = torch.cat([self.vae.decode(part, tile_side(tile, z)).float() for part in together(z)])
        if not images.isfinite().all():
            raise InputError(not_finite("decoded image", self.vae.post_quant_conv.weight.dtype))
        return (images / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor, tile: int | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to VAE-scaled latents (B, 4, h, w), the means. tile: as in `decode`."""
        x, factor = images.to(self.device) * 2 - 1, self.config.vae.factor
        with self.on_device(self.vae):
            mean, _ = self.vae.encode(x, tile_side(tile, x[:, :, ::factor, ::factor]))
        return mean.float() * self.config.vae.scaling


def not_finite(what: str, dtype: torch.dtype) -> str:
    """The message for NaN and infinity, with what helps."""
    remedy = ("use --dtype bfloat16 or float32" if dtype == torch.float16 else "lower --cfg-scale or the techniques' "
              "factors; if that doesn't help, the weights are damaged: convert them again")
    return f"the {what} are not finite (NaN) in {dtype}: {remedy}"


# ------------------------------------------------------------------------------------------------------------ pictures

def save_png(image: Tensor, path: Path, parameters: str) -> None:
    """One image (3, H, W) in [0, 1], with its settings in the text chunk that other tools read ("parameters")."""
    pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", parameters)
    with replacing(path) as part:
        Image.fromarray(pixels).save(part, format="PNG", pnginfo=info)


def psnr(a: Tensor, b: Tensor) -> float:
    """How alike two images in [0, 1] are, in decibels: 10 log10 of 1 over the mean square of their difference."""
    return -10 * math.log10(max((a - b).square().mean().item(), 1e-12))


def save_grid(paths: list[Path], path: Path) -> None:
    """Finished pictures of one size as a sheet, as square as their number allows."""
    pictures = [Image.open(p).convert("RGB") for p in paths]
    columns, (w, h) = math.ceil(math.sqrt(len(pictures))), pictures[0].size
    sheet = Image.new("RGB", (columns * w, math.ceil(len(pictures) / columns) * h))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * w, i // columns * h))
    with replacing(path) as part:
        sheet.save(part, format="PNG")


# -------------------------------------------------------------------------------------------------------- command line

def picture_paths(args: argparse.Namespace, count: int) -> list[Path]:
    """Where each picture goes: out.png; out_SEED.png for several; 00000_SEED.png, ... in a folder. Makes the folder."""
    seeds = range(args.seed, args.seed + count)
    if args.one_file:
        folder = args.out.parent
        paths = [args.out] if count == 1 else [args.out.with_stem(f"{args.out.stem}_{seed}") for seed in seeds]
    else:
        folder = args.out
        paths = [folder / f"{k:05d}_{seed}.png" for k, seed in enumerate(seeds)]
    if len(os.fsencode(compared(paths[-1]).name)) > 255:
        raise InputError(f"the name {paths[-1].name} is too long; choose a shorter --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):                       # better now than after minutes of work
            pass
    except OSError as error:
        raise InputError(f"can't write to {folder} ({error.strerror}); choose another --out") from None
    return paths


def compared(path: Path) -> Path:
    """Where --compare puts a picture beside the one without techniques."""
    return path.with_stem(f"{path.stem}_compare")


def finished(path: Path, parameters: str) -> bool:
    """Whether an earlier run made this picture, by its text of settings; InputError for another one in its place.

    The text has the name of the model's folder alone, and fingerprints of other files.
    """
    if not path.exists():
        return False
    try:
        with Image.open(path) as file:
            made = file.info.get("parameters")
    except UNREADABLE:
        made = None
    if made != parameters:
        raise InputError(f"{path} is there already, made with another prompt or other settings; choose another --out")
    return True


def main() -> None:
    warnings.showwarning = lambda message, *_: tqdm.write(f"note: {message}", file=sys.stderr)
    args = parse_arguments()
    prompts = read_prompts(args)
    init_image = read_image(args) if args.init_image else None
    config = read_config(args.model)
    settings = sample_settings(args, config, None if init_image is None else init_image.shape[-2:])
    freescale = settings["freescale"]
    stages = 1 if freescale is None else len(freescale.resolutions)
    paths = picture_paths(args, len(prompts))
    parameters = parameters_texts(args, prompts, settings["height"], settings["width"])

    # Under torchrun each process takes every world-th picture; nothing is exchanged: a picture depends on its seed only
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mine = range(rank, len(prompts), world)
    todo = [k for k in mine if args.one_file or not finished(paths[k], parameters[k])
            or args.compare and not compared(paths[k]).exists()]
    if todo:
        device = f"cuda:{os.environ['LOCAL_RANK']}" if world > 1 and args.device == "cuda" else args.device
        search = read_mask_search(args, device)                        # its rewards take memory that a stage can't
        if freescale is not None and args.baseline is None:
            check_memory(args, config, freescale, settings["freeu"], min(args.batch_size, len(todo)),
                         torch.device(device))
        sd = StableDiffusion.load(args.model, device, args.dtype, args.low_memory, args.compile)
        settings["masks"] = read_masks(args, sd.unet)
        report(args, sd, settings, init_image is not None)
        init = None if init_image is None else sd.encode(init_image, args.vae_tile)
        known = {}                                                     # each text is encoded once for all batches

    def draw(batch: list[int], **changes) -> tuple[Tensor, float]:
        """Pictures of these numbers as latents, with changed settings, and the seconds that sampling took."""
        changes = {"model": read_baseline(args, sd, args.seed + batch[0]), **changes}
        if search is not None:
            changes = {"masks": search(sd.vae, [prompts[k] for k in batch]), **changes}
        with tqdm(total=stages * changes.get("steps", args.steps), desc=f"picture {batch[-1] + 1} of {len(prompts)}",
                  unit="step", leave=False, disable=rank > 0) as bar:
            started = time.perf_counter()
            latents = sd.sample(
                [prompts[k] for k in batch], seed=[args.seed + k for k in batch], init=init, known=known,
                callback=lambda i, _: bar.update(i + 1 - bar.n), **settings | changes)
            return latents, time.perf_counter() - started              # `sample` has looked at the result: it is there

    for start in range(0, len(todo), args.batch_size):
        batch, plain, started = todo[start:start + args.batch_size], None, time.time()
        if args.compare:
            if start == 0 or args.compile and len(batch) < args.batch_size:
                draw(batch, steps=1, cache=None, tgate=None)           # the first pass of a process is a slow one
                if args.compile:
                    draw(batch)                                        # makes the graphs of every kind of step
            plain, seconds_plain = draw(batch, cache=None, tgate=None)
            plain = sd.decode(plain, args.vae_tile)
        latents, seconds_sampling = draw(batch)
        images = sd.decode(latents, args.vae_tile)
        seconds = (time.time() - started) / len(batch)
        for i, (k, image) in enumerate(zip(batch, images)):
            save_png(image, paths[k], parameters[k])
            memory = f"peak memory {peak_memory(sd.device):.2f} GB"
            print(f"{paths[k]}  seed {args.seed + k}  {seconds:.1f} s  {memory}", flush=True)
            if plain is not None:
                both = compared(paths[k])
                save_png(torch.cat([plain[i], image], dim=2), both, f"left: without cache and T-GATE\n{parameters[k]}")
                print(f"{both}  PSNR {psnr(image, plain[i]):.1f} dB", flush=True)
        if plain is not None:
            print(f"sampling {seconds_sampling:.2f} s, {seconds_plain:.2f} s without cache and T-GATE: "
                  f"{seconds_plain / seconds_sampling:.2f} times as fast", flush=True)
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} pictures were there already in {args.out}")
    if args.grid:
        sheet = args.out.with_stem(f"{args.out.stem}_grid") if args.one_file else args.out / "grid.png"
        save_grid(paths, sheet)
        print(sheet)


def peak_memory(device: torch.device) -> float:
    """Gigabytes: of the GPU's memory by tensors, or of main memory by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:                           # not getrusage's maximum: that starts with the starting process's own
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e9
    if resource is None:                                               # Windows keeps no such record
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


if __name__ == "__main__":
    run_command(main)
