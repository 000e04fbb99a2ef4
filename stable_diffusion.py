"""Stable Diffusion as one object: load a model folder, encode prompts, sample, decode.

    sd = StableDiffusion.load("models/tiny")
    latents = sd.sample("a red circle", steps=30, freeu=FreeU(1.3, 1.4, 0.9, 0.2))
    images = sd.decode(latents)        # (1, 3, 64, 64) in [0, 1]

Start at `StableDiffusion.sample`; the loop it runs is `sampler.generate`. Shapes: B images, H W pixels, h w latent
pixels, L text tokens, D text width, P width of SDXL's pooled text vector.
"""
import contextlib
import warnings
from collections.abc import Callable, Iterator
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clip_text import TextEncoder, Tokenizer
from command import InputError
from folder import ModelConfig, build, check_digests, check_size, load_tokenizer, load_weights, read_config
from freescale import FreeScale, enlarge
from reward import add_rewards, load_reward
from sampler import Condition, Plan, draw_noise, generate, plan
from unet import UNet, sinusoid
from vae import VAE, tile_side, together

KNOWN = 64         # texts whose encodings are kept, see `known`: 15 MB for SD 1.5 and 40 MB for SDXL in float32
SHAPES = ("; this tiny model knows drawn shapes only, such as 'a red circle left of a blue square': --model takes "
          "another model, such as your own")
Prompt = str | list[str] | Tensor | tuple[Tensor, Tensor | None]


class StableDiffusion:
    """A model folder in memory: tokenizer, text encoders, U-Net and VAE. Make one with `StableDiffusion.load`.

    tile: side of the VAE's tiles in latent pixels; None: no tiles up to 128x128 latent pixels, 64 above; 0: never.
    known: None, or a dict that keeps the last KNOWN encoded texts between calls. Set it only while the weights of the
        text encoders stay as they are.
    """
    tile: int | None = None
    known: dict[str, tuple[Tensor, Tensor | None]] | None = None

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, text_encoders: list[TextEncoder],
                 unet: UNet, vae: VAE, low_memory: bool = False, folder: Path | None = None):
        self.config, self.tokenizer, self.text_encoders = config, tokenizer, text_encoders
        self.unet, self.vae, self.low_memory, self.folder = unet, vae, low_memory, folder
        self.device, self.dtype = unet.conv_in.weight.device, unet.conv_in.weight.dtype

    @staticmethod
    def load(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
             low_memory: bool = False, compiled: bool | str = False, verify: bool = False,
             compile_cache: Path | None = None) -> "StableDiffusion":
        """Read a converted model folder, strictly. InputError if anything is missing, damaged or doesn't fit.

        low_memory: only the U-Net stays on the device; text encoders and VAE are moved there when they are needed, and
            the branches of guidance run one after the other. Pictures are the same, memory is less, speed a bit lower.
        compiled: torch.compile makes a graph of the U-Net in its first call, and another for each new size, batch size
            or set of techniques. That takes minutes for a large model and pays off for many pictures of one kind. With
            parallel Faster Diffusion, the encoder is one graph, and the decoder one for each number of steps per batch.
            "openvino": OpenVINO runs these graphs instead of PyTorch's own compiler, on a CPU only.
        compile_cache: a folder in which OpenVINO keeps compiled graphs for the next process.
        verify: compare all files with the digests in config.json (always done for a tiny model, where it is quick).
        """
        folder, on_cpu = Path(folder), torch.device(device).type == "cpu"
        # On a CPU the layouts stay as they are: neither the compiler's own nor frozen weights were faster
        compiler = {"options": {"layout_optimization": False} if on_cpu else None}
        if compiled == "openvino":
            if not on_cpu:
                raise InputError("--compile openvino is for the CPU; a GPU takes --compile torch")
            from openvino_backend import backend  # here: importing OpenVINO takes a while
            precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
            compiler = {"backend": backend(precision, compile_cache)}
        config = read_config(folder)
        tokenizer = load_tokenizer(folder / "tokenizer.json", config.text_encoder.vocab)
        unet, vae = build(UNet, config.unet), build(VAE, config.vae)
        texts = [build(TextEncoder, c) for c in (config.text_encoder, config.text_encoder_2) if c is not None]
        load_weights(unet, folder / "unet.safetensors", device, dtype)
        # SDXL's VAE overflows float16: it stays in float32
        guard = config.vae.force_upcast and dtype == torch.float16
        home = "cpu" if low_memory else device
        load_weights(vae, folder / "vae.safetensors", home, torch.float32 if guard else dtype)
        for name, text in zip(("text_encoder", "text_encoder_2"), texts):
            load_weights(text, folder / f"{name}.safetensors", home, dtype)
        if verify or config.family == "tiny" and config.digests:
            check_digests(folder)
        if compiled:
            # Beyond this many graphs PyTorch falls back to eager mode; its default, 8, is too low for a few caches
            unet.compile(dynamic=False, recompile_limit=64, **compiler)
        return StableDiffusion(config, tokenizer, texts, unet, vae, low_memory, folder)

    @contextlib.contextmanager
    def on_device(self, module: nn.Module) -> Iterator[None]:
        """Moves the module to the U-Net's device inside the block; with low_memory, back to main memory after it."""
        module.to(self.device)
        try:
            yield
        finally:
            if self.low_memory:
                module.to("cpu")

    @torch.no_grad()
    def encode_prompt(self, prompts: str | list[str]) -> tuple[Tensor, Tensor | None]:
        """Texts to context (B, L, D) and, for SDXL, the pooled vector (B, P). Warns of words the model doesn't see."""
        known = {} if self.known is None else self.known
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
                foreign = any(self.tokenizer.model.token_to_id(word) is None for word in words.lower().split())
                hint = SHAPES if self.config.family == "tiny" and foreign else ""
                warnings.warn(f"the model doesn't see these words of {prompt!r}: {words!r}{hint}", stacklevel=2)
        contexts, pools = zip(*(known[prompt] for prompt in prompts))
        while len(known) > KNOWN:
            del known[next(iter(known))]                               # the oldest
        return torch.stack(contexts), None if pools[0] is None else torch.stack(pools)

    def size_conditioning(self, pooled: Tensor, time_ids: Tensor) -> Tensor:
        """SDXL's added condition (B, add_dim): the pooled text (B, P), then a sinusoid for each of six sizes.

        time_ids: (B, 6), original height and width, top and left of the crop, target height and width, in pixels.
        """
        waves = sinusoid(time_ids.flatten(), self.config.unet.add_time_dim).reshape(len(time_ids), -1)
        return torch.cat([pooled, waves.to(pooled)], dim=-1)

    def conditions(self, prompt: Prompt | None, batch: int | None, height: int, width: int) -> Condition:
        """The `Condition` for a batch of this many images (None: one per prompt) of this size in pixels.

        prompt None: what the model's authors use when there is no negative prompt ("", or zeros for SDXL).
        """
        words = ()
        if prompt is None and self.config.zero_negative:
            context, pooled = (torch.zeros_like(x) for x in self.encode_prompt([""]))
        elif isinstance(prompt, Tensor):
            context, pooled = prompt, None
        elif isinstance(prompt, tuple):
            context, pooled = prompt
        else:
            words = ("",) if prompt is None else (prompt,) if isinstance(prompt, str) else tuple(prompt)
            context, pooled = self.encode_prompt(list(words))
        if batch is not None and len(context) == 1:
            context, pooled = context.expand(batch, -1, -1), None if pooled is None else pooled.expand(batch, -1)
            words = words * batch
        if batch is not None and len(context) != batch:
            raise InputError(f"there are {len(context)} negative prompts for {batch} prompts; give one, or as many")
        context = context.to(self.device, self.dtype)
        if not self.config.unet.add_dim:
            return Condition(context, None, words)
        if pooled is None:
            raise InputError("this model needs the pooled text too: pass (context, pooled) instead of context alone")
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=self.device).expand(len(context), -1)
        return Condition(context, self.size_conditioning(pooled, time_ids).to(self.device, self.dtype), words)

    @torch.no_grad()
    def sample(self, prompt: Prompt, negative_prompt: Prompt | None = "", steps: int = 30, sampler: str | None = None,
               cfg_scale: float | None = None, seed: int | list[int] = 0, height: int | None = None,
               width: int | None = None, noise: Tensor | None = None, eta: float = 0.0, spacing: str | None = None, *,
               init: Tensor | None = None, strength: float = 0.8, tile: int | None = None,
               callback: Callable[[int, Tensor], None] | None = None, **techniques: Any) -> Tensor:
        """Prompts to latents (B, 4, h, w), VAE-scaled, float32 (or of the noise's dtype).

        prompt: one text or a list of B; or embeddings: context (B, L, D), for SDXL with the pooled vector (B, P).
        negative_prompt: likewise, one for all or B. None: see `conditions`.
        steps, sampler, cfg_scale, eta, spacing: see `plan_run`.
        seed: image k draws all its noise from a CPU generator of its own, seeded with seed + k; or a list of B seeds.
        height, width: pixels, multiples of 8; None: the model's native size, or that of noise or init.
        noise: (B, 4, h, w), unit variance, to start from. Any later noise uses the seeds' random numbers from the first
            one on, as in diffusers. So with eta, "euler-a" and FreeScale, make `noise` with other seeds.
        init: latents to start from (see `encode`). strength: the fraction (0..1) of the steps that redraw them.
        tile: of the VAE between FreeScale's stages, as in `decode`.
        callback(call, latents) is called after each call of the U-Net; calls are numbered over all FreeScale stages.
        techniques: settings by name, such as freeu=FreeU(1.3, 1.4, 0.9, 0.2), cache=DeepCache(3), tgate=TGate(10),
            masks=MaskFile(path). The names are those of `unet.Techniques`. With freescale=FreeScale(2), height and
            width are the first stage's. With the sizes of all stages, leave them out or give the last stage's. In
            both cases noise is the first stage's, init replaces that stage's result, and strength has no effect.
        """
        techniques = {name: settings for name, settings in techniques.items() if settings is not None}
        redrawn = strength if init is not None and "freescale" not in techniques else None
        calls, cfg_scale = plan_run(self.config, steps, sampler, cfg_scale, negative_prompt, eta, spacing, redrawn)
        for name, settings in techniques.items():
            if hasattr(settings, "check"):
                settings.check(self.config.unet, steps, guided=cfg_scale != 1)
            techniques[name] = settings.bind(self) if hasattr(settings, "bind") else settings
        freescale, height, width = self.stages(techniques, height, width, noise, init)
        demofusion = techniques["highres"] if hasattr(techniques.get("highres"), "stages") else None
        told = (height, width) if demofusion is None else freescale.resolutions[-1]           # to SDXL, in every stage
        condition = self.conditions(prompt, None, *told)
        batch, factor = len(condition.context), self.config.vae.factor
        negative = None if cfg_scale == 1 else self.conditions(negative_prompt, batch, *told)

        seeds = [seed + k for k in range(batch)] if isinstance(seed, Integral) else list(seed)
        if len(seeds) != batch:
            raise InputError(f"there are {len(seeds)} seeds for {batch} prompts; give one, or as many")
        generators = [torch.Generator().manual_seed(int(s)) for s in seeds]
        shape = batch, self.config.unet.in_channels, height // factor, width // factor
        noise = draw_noise(generators, torch.empty(1, *shape[1:], device=self.device)) if noise is None else noise
        for name, given, legal in (("noise", noise, [shape]), ("init", init, [shape, (1, *shape[1:])])):
            if given is not None and tuple(given.shape) not in legal:
                raise InputError(f"{name} has shape {tuple(given.shape)}, but {shape} is needed")
        init = None if init is None else init.to(self.device)

        def run(noise: Tensor, init: Tensor | None, stage: int, **more: Any) -> Tensor:
            latents = noise
            for i, latents in generate(self.unet, noise.to(self.device), condition, negative, calls, cfg_scale, init,
                                       strength, generators, self.low_memory, **techniques, **more):
                if callback is not None:
                    callback(stage * calls.calls + i, latents)
            return finite(latents, "the latents are", self.dtype)

        if freescale is None:
            return run(noise, init, 0)
        latents = first = run(noise, None, 0) if init is None else init.expand(shape).float()
        for stage, size in enumerate(freescale.resolutions[1:], start=1):
            like = latents.new_empty(1, shape[1], *(side // factor for side in size))
            unit = draw_noise(generators, like) if freescale.upsample == "rgb" else None
            with self.on_device(self.vae):
                latents = enlarge(latents, size, freescale.upsample, self.vae, unit, self.tile_of(like, tile))
            latents = run(draw_noise(generators, like), latents, stage, freescale=freescale)
            if demofusion is not None:                                 # with the first stage's mean and deviation
                latents = demofusion.finish(latents, first)
        return latents

    def stages(self, techniques: dict[str, Any], height: int | None, width: int | None, noise: Tensor | None,
               init: Tensor | None) -> tuple[FreeScale | None, int, int]:
        """FreeScale, taken from the techniques, with the sizes of all stages, and the first stage's height and width.

        DemoFusion's stages are FreeScale's too. Without either, the size is the picture's.
        """
        native, factor = self.config.size, self.config.vae.factor
        freescale, highres = techniques.pop("freescale", None), techniques.get("highres")
        if freescale is not None and isinstance(freescale.resolutions, tuple):
            last = freescale.resolutions[-1]
            if (height or last.height, width or last.width) != last:
                raise InputError(f"FreeScale ends with {last}, so leave height and width at None")
            height = width = None
        else:
            of_latents = next((x.shape for x in (init, noise) if x is not None), (native // factor,) * 2)
            height = of_latents[-2] * factor if height is None else height
            width = of_latents[-1] * factor if width is None else width
            if freescale is None and hasattr(highres, "stages"):
                freescale = highres.stages(native, height, width)
        if freescale is None:
            return None, *check_size(height, width)
        try:
            freescale = freescale.fit(native // factor, height or native, width or native)
        except ValueError as error:
            raise InputError(str(error)) from None
        if len(freescale.resolutions) == 1 and init is not None:
            raise InputError("init takes the place of FreeScale's first stage: give a second, larger resolution")
        return freescale, *check_size(*freescale.resolutions[0])

    def tile_of(self, latents: Tensor, tile: int | None = None) -> int | None:
        return tile_side(self.tile if tile is None else tile, latents)

    @torch.no_grad()
    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """VAE-scaled latents (B, 4, h, w) to images (B, 3, H, W) in [0, 1], float32; large ones one at a time.

        tile: side of the VAE's tiles in latent pixels; None: see `StableDiffusion`.
        """
        z = latents.to(self.device) / self.config.vae.scaling
        with self.on_device(self.vae):
            images = torch.cat([self.vae.decode(part, self.tile_of(z, tile)).float() for part in together(z)])
        finite(images, "the decoded image is", self.vae.post_quant_conv.weight.dtype)
        return (images / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor, tile: int | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to VAE-scaled latents (B, 4, h, w): the means. tile: as in `decode`."""
        x, factor = images.to(self.device) * 2 - 1, self.config.vae.factor
        with self.on_device(self.vae):
            mean, _ = self.vae.encode(x, self.tile_of(x[:, :, ::factor, ::factor], tile))
        return mean.float() * self.config.vae.scaling

    def latent_score(self, rewards: tuple[str, ...]) -> Callable[[Tensor, tuple[str, ...]], Tensor]:
        """The combined reward of pictures, as a differentiable function of their latents and prompts: `add_rewards`.

        rewards: "clip", the CLIP in the model's folder, or folders written by convert_weights.py --reward. The function
        takes VAE-scaled latents (B, 4, h, w) and B prompts and returns (B,); larger is better.
        """
        reward = add_rewards([load_reward(self.folder / "clip" if name == "clip" else name, self.device)
                              for name in rewards])

        def score(latents: Tensor, words: tuple[str, ...]) -> Tensor:
            z = latents / self.config.vae.scaling
            images = self.vae.to(latents.device).decode(z, self.tile_of(z)).float() / 2 + 0.5
            return reward(images.clamp(0, 1), list(words))
        return score


def plan_run(config: ModelConfig, steps: int = 30, sampler: str | None = None, cfg_scale: float | None = None,
             negative_prompt: Prompt | None = "", eta: float = 0.0, spacing: str | None = None,
             strength: float | None = None) -> tuple[Plan, float]:
    """The calls of a run, see `sampler.plan`, and its guidance. None for sampler and cfg_scale: the model's defaults.

    strength: of a start picture; None: there is none. InputError for wrong values, and for those without an effect.
    """
    sampler = sampler or config.sampler or "ddim"
    default = 7.5 if config.cfg_scale is None else config.cfg_scale
    scale, negative = default if cfg_scale is None else cfg_scale, negative_prompt is not None
    if isinstance(negative_prompt, str) and not negative_prompt:
        negative = False
    for wrong, message in (
            (scale == 0 and not negative, "a guidance scale of 0 follows only the negative prompt, and there is none: "
             "for no guidance use 1 (where diffusers takes 0)"),
            (scale == 1 and negative, "a negative prompt does nothing without guidance: use a scale other than 1"),
            (spacing is not None and sampler == "dpm++2m-karras", "spacing does nothing with dpm++2m-karras, whose "
             "times follow from Karras' noise levels"),
            (eta > 0 and sampler == "euler-a", "eta does nothing with euler-a, which always has 1: use euler"),
            (strength and int(steps * strength) == 0, f"a strength of {strength} redraws none of {steps} steps: use "
             f"{1 / max(steps, 1):.2g} or more")):
        if wrong:
            raise InputError(message)
    try:
        return plan(sampler, steps, config.schedule, spacing, eta, config.prediction), scale
    except ValueError as error:
        raise InputError(str(error)) from None


def finite(x: Tensor, what: str, dtype: torch.dtype) -> Tensor:
    """x itself; InputError, with a remedy, if it has NaN or infinity."""
    if not x.isfinite().all():
        remedy = ("use --dtype bfloat16 or float32" if dtype == torch.float16 else "lower --cfg-scale or the "
                  "techniques' factors; if that doesn't help, the weights are damaged: convert them again")
        raise InputError(f"{what} not finite (NaN) in {dtype}: {remedy}")
    return x
