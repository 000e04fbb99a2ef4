"""Our modules, samplers and pipeline against diffusers and transformers, on narrow models with random weights.

`pytest -s tests/test_parity.py` prints every figure: the largest error, relative to the peer's largest value. In
float32 a wrong eps of a norm costs 4e-6, little more than rounding: that is what the gates in float64 are for.
"""
import copy
import functools
from collections import defaultdict
from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import seeded
from torch import Tensor, nn

from clip_text import TextConfig, TextEncoder
from folder import ModelConfig
from sampler import SAMPLERS, Condition, NoiseSchedule, generate, invert, plan
from unet import UNet, UNetConfig, sinusoid
from vae import VAE, VAEConfig

MERGES = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>")]
VOCAB = 2 * 256 + len(MERGES) + 2
FLOAT32, TRAJECTORY, IMAGE = 5e-6, 5e-5, 1e-4

_vae, _schedule = VAEConfig((16, 32, 32, 32), layers=1, groups=8), NoiseSchedule(spacing="leading")
_text = TextConfig(vocab=VOCAB, width=32, layers=3, heads=4, hidden=64, pad=VOCAB - 1)
_text_2 = replace(_text, width=48, activation="gelu", output="penultimate", projection=40, pad=0)
MODELS = {
    "sd15": ModelConfig("sd15", "epsilon", 64, _schedule, UNetConfig(
        channels=(32, 64, 64, 64), heads=(4, 4, 4, 4), context_dim=32, groups=8), _vae, _text),
    "sd21": ModelConfig("sd21", "v", 64, _schedule, UNetConfig(
        channels=(32, 64, 64, 64), heads=(1, 2, 4, 4), context_dim=48, linear_proj=True, upcast_attention=True,
        groups=8), _vae, replace(_text, width=48, layers=2, activation="gelu", pad=0)),
    "sdxl": ModelConfig("sdxl", "epsilon", 64, _schedule, UNetConfig(
        channels=(32, 64, 64), depth=(0, 2, 3), mid_depth=3, heads=(1, 2, 4), context_dim=80, linear_proj=True,
        add_dim=40 + 6 * 8, add_time_dim=8, groups=8), VAEConfig((16, 32, 32, 32), 1, 4, 8, 0.13025, True),
        replace(_text, output="penultimate"), _text_2, zero_negative=True),
}
GATES = [("sd15", torch.float64, 1e-7), ("sd21", torch.float64, 1e-7), ("sdxl", torch.float64, 1e-6),
         *((family, torch.float32, FLOAT32) for family in MODELS)]
pytestmark = pytest.mark.filterwarnings("ignore:__array__")            # diffusers with NumPy 2
FIGURES: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))   # what: largest error, gate


@pytest.fixture(autouse=True, scope="module")
def peers():
    for name in ("diffusers", "transformers"):
        module = pytest.importorskip(name, reason=f"{name} is a peer: pip install -r requirements-dev.txt")
        module.utils.logging.set_verbosity_error()
    with torch.no_grad():
        yield
    print(f"\n{'largest error':>14} {'gate':>8}")
    for what, (error, gate) in FIGURES.items():
        print(f"{error:14.1e} {gate:8.0e}  {what}")


def check_error(what: str, ours: Tensor, theirs: Tensor, gate: float) -> None:
    assert ours.shape == theirs.shape
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    FIGURES[what] = max(FIGURES[what], (error, gate))
    assert error <= gate, f"{what}: {error:.1e}"


# ---- the same random weights in their modules and in ours ----

@functools.cache
def theirs(family: str) -> dict[str, nn.Module]:
    """unet, vae, text_encoder (SDXL: text_encoder_2) of the peers. Norms' weights and biases are not 1 and 0."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def text(c: TextConfig) -> nn.Module:
        kind = CLIPTextModel if c.projection is None else CLIPTextModelWithProjection
        return kind(CLIPTextConfig(
            vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.hidden, num_hidden_layers=c.layers,
            num_attention_heads=c.heads, max_position_embeddings=c.length, hidden_act=c.activation,
            projection_dim=c.projection or 8, bos_token_id=0, eos_token_id=2, pad_token_id=1))    # as published

    model = MODELS[family]
    u, v, levels = model.unet, model.vae, len(model.vae.channels)
    sdxl = {"addition_embed_type": "text_time", "addition_time_embed_dim": u.add_time_dim,
            "projection_class_embeddings_input_dim": u.add_dim} if u.add_dim else {}
    torch.manual_seed(0)
    modules = {
        "unet": UNet2DConditionModel(
            sample_size=8, block_out_channels=u.channels, layers_per_block=u.layers, norm_num_groups=u.groups,
            cross_attention_dim=u.context_dim, attention_head_dim=u.heads, upcast_attention=u.upcast_attention,
            down_block_types=tuple("CrossAttnDownBlock2D" if d else "DownBlock2D" for d in u.depth),
            up_block_types=tuple("CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(u.depth)),
            transformer_layers_per_block=tuple(max(d, 1) for d in u.depth),
            use_linear_projection=u.linear_proj, **sdxl),
        "vae": AutoencoderKL(
            block_out_channels=v.channels, layers_per_block=v.layers, norm_num_groups=v.groups,
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
            scaling_factor=v.scaling, force_upcast=v.force_upcast),
        "text_encoder": text(model.text_encoder)}
    if model.text_encoder_2:
        modules["text_encoder_2"] = text(model.text_encoder_2)
    for module in modules.values():
        for name, p in module.eval().named_parameters():
            p.data += 0.2 * torch.randn_like(p) * ("norm" in name)
    modules["unet"].conv_out.weight.data *= 3                          # predictions as large as noise
    return modules


@functools.cache
def both(family: str, part: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Our module and theirs, with the same weights under the same names."""
    peer = copy.deepcopy(theirs(family)[part]).to(dtype)
    kind = {"unet": UNet, "vae": VAE}.get(part, TextEncoder)
    mine = kind(getattr(MODELS[family], part)).to(dtype).eval()
    weights = peer.state_dict()
    if part == "text_encoder":                                         # transformers 5 leaves the prefix out
        weights = {"text_model." + name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    mine.load_state_dict(weights)
    return mine, peer


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def conditions(family: str, batch: int, dtype: torch.dtype, seed: int = 2) -> tuple[Tensor, Tensor | None, dict]:
    """context and added for our U-Net, added_cond_kwargs for theirs."""
    u, added, kwargs = MODELS[family].unet, None, None
    if u.add_dim:
        pooled = random(batch, 40, seed=seed, dtype=dtype)
        sizes = torch.tensor([[1024, 768, 16, 0, 1000, 900]]).expand(batch, -1)
        added = torch.cat([pooled, sinusoid(sizes.flatten(), 8).reshape(batch, -1).to(dtype)], dim=-1)
        kwargs = {"text_embeds": pooled, "time_ids": sizes}
    return random(batch, 7, u.context_dim, seed=seed + 50, dtype=dtype), added, kwargs


@pytest.mark.parametrize("family,dtype,gate", GATES)
def test_unet(family, dtype, gate):
    mine, peer = both(family, "unet", dtype)
    context, added, kwargs = conditions(family, 5, dtype)
    for size in ((8, 8), (16, 8), (7, 5)):
        x = random(5, 4, *size, dtype=dtype)
        for t in (torch.tensor([0, 1, 500, 999, 321.7]), torch.tensor(1), torch.tensor(999)):
            check_error(f"unet {family} {dtype}", mine(x, t, context, added),
                  peer(x, t, context, added_cond_kwargs=kwargs).sample, gate)


@pytest.mark.parametrize("dtype,gate", [(torch.float64, 1e-7), (torch.float32, FLOAT32)])
def test_vae(dtype, gate):
    mine, peer = both("sd15", "vae", dtype)
    for h, w in ((8, 8), (5, 9)):
        distribution = peer.encode(random(2, 3, 8 * h, 8 * w, dtype=dtype)).latent_dist
        mean, logvar = mine.encode(random(2, 3, 8 * h, 8 * w, dtype=dtype))
        check_error(f"vae encode, mean {dtype}", mean, distribution.mean, gate)
        check_error(f"vae encode, log-variance {dtype}", logvar, distribution.logvar, gate)
        z = random(2, 4, h, w, dtype=dtype)
        check_error(f"vae decode {dtype}", mine.decode(z), peer.decode(z).sample, gate)


@pytest.mark.parametrize("dtype,gate", [(torch.float64, 1e-7), (torch.float32, FLOAT32)])
@pytest.mark.parametrize("family,part", [*product(MODELS, ["text_encoder"]), ("sdxl", "text_encoder_2")])
def test_text_encoder(family, part, dtype, gate):
    mine, peer = both(family, part, dtype)
    ids = torch.randint(1, VOCAB - 2, (2, 77), generator=torch.Generator().manual_seed(0))
    ids[0, 9:], ids[1, 76] = mine.config.pad, VOCAB - 1
    ids[0, 9] = VOCAB - 1
    out, (context, pooled) = peer(ids, output_hidden_states=True), mine(ids)
    peer_context = out.last_hidden_state if mine.config.output == "final" else out.hidden_states[-2]
    what = f"{family} {part}, {mine.config.activation}, {mine.config.output}"
    check_error(f"{what} {dtype}", context, peer_context, gate)
    assert (pooled is None) == (part == "text_encoder")
    if pooled is not None:
        check_error(f"{what}, pooled {dtype}", pooled, out.text_embeds, gate)


# ---- samplers ----

def scheduler(name: str, prediction: str, spacing: str | None = None):
    import diffusers
    kind, settings = {
        "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
        "inverse": (diffusers.DDIMInverseScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
        "dpm++2m": (diffusers.DPMSolverMultistepScheduler, {}), "euler": (diffusers.EulerDiscreteScheduler, {}),
        "euler-a": (diffusers.EulerAncestralDiscreteScheduler, {}),
        "heun": (diffusers.HeunDiscreteScheduler, {})}[name.removesuffix("-karras")]
    settings = settings | ({"use_karras_sigmas": True} if "karras" in name else {})
    return kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[prediction],
                **settings, **({"timestep_spacing": spacing} if spacing else {}))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_spacing_of_a_sampler_is_the_peers_unless_the_model_has_its_own(sampler):
    assert plan(sampler, 6).spacing == scheduler(sampler, "epsilon").config.timestep_spacing


@pytest.mark.parametrize("family,spacing", [("sd15", "leading"), ("sd15", "linspace"), ("sd15", "trailing"),
                                            ("sd21", "trailing"), ("sdxl", "leading")])
@pytest.mark.parametrize("sampler,eta", [*((s, 0.0) for s in SAMPLERS), ("ddim", 0.5)])
def test_every_step_of_every_sampler(sampler, eta, spacing, family):
    (mine, peer), prediction = both(family, "unet", torch.float32), MODELS[family].prediction
    noise = random(2, 4, 8, 8)
    context, added, kwargs = conditions(family, 2, torch.float32)
    negative, negative_added, negative_kwargs = conditions(family, 2, torch.float32, seed=3)
    kwargs = kwargs and {key: torch.cat([negative_kwargs[key], kwargs[key]]) for key in kwargs}

    schedule = scheduler(sampler, prediction, spacing)
    schedule.set_timesteps(6)
    x, steps = noise * schedule.init_noise_sigma, []
    noisy = {"generator": seeded(5, 6)} if sampler in ("ddim", "euler-a") else {}
    for i, t in enumerate(schedule.timesteps):
        x_in = schedule.scale_model_input(torch.cat([x, x]), t)
        out = peer(x_in, t, torch.cat([negative, context]), added_cond_kwargs=kwargs).sample
        out = out[:2] + 7.5 * (out[2:] - out[:2])
        x = schedule.step(out, t, x, **noisy, **({"eta": eta} if sampler == "ddim" else {})).prev_sample
        scale = (1 + schedule.sigmas[i + 1] ** 2) ** 0.5 if sampler.startswith(("euler", "heun")) else 1
        steps.append(x / scale)                                        # Euler's and Heun's x is ours times this

    ours = list(generate(mine, noise, Condition(context, added), Condition(negative, negative_added),
                         plan(sampler, 6, spacing=spacing, eta=eta, prediction=prediction), generators=seeded(5, 6)))
    assert [i for i, _ in ours] == list(range(11 if "heun" in sampler else 6))
    for (_, a), b in zip(ours, steps, strict=True):
        check_error(f"every step of {sampler}, eta {eta:g}, {family}", a, b, TRAJECTORY)


@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_ddim_inversion(family):
    (mine, peer), prediction = both(family, "unet", torch.float32), MODELS[family].prediction
    x = latents = random(2, 4, 8, 8)
    context, _, _ = conditions(family, 2, torch.float32)
    schedule = scheduler("inverse", prediction)
    schedule.set_timesteps(8)
    ours = list(invert(mine, latents, Condition(context), plan("ddim", 8, prediction=prediction)))
    assert [i for i, _ in ours] == list(range(7, -1, -1))
    for (_, a), t in zip(ours, schedule.timesteps, strict=True):
        x = schedule.step(peer(x, t, context).sample, t, x).prev_sample
        check_error(f"every step of DDIM inversion, {family}", a, x, TRAJECTORY)


# ---- the whole pipeline ----

@pytest.fixture(scope="module", params=MODELS)
def pipelines(request, tmp_path_factory):
    """Their pipeline, and ours made of the folder that theirs saved."""
    import diffusers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    from convert_weights import convert
    from stable_diffusion import StableDiffusion
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    letters = sorted(ByteLevel.alphabet())
    tokens = ["!", *(c for c in letters if c != "!")] + [c + "</w>" for c in letters] + [a + b for a, b in MERGES]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}

    def tokenizer(pad: int):
        return CLIPTokenizer(vocab=vocab, merges=MERGES, model_max_length=77,
                             pad_token="!" if pad == 0 else "<|endoftext|>")

    model, parts = MODELS[family], dict(theirs(family))
    parts |= {"scheduler": scheduler("ddim", model.prediction, "leading"),
              "tokenizer": tokenizer(model.text_encoder.pad)}
    if model.text_encoder_2:
        pipe = diffusers.StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer(0), add_watermarker=False)
    else:
        pipe = diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                                 requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "theirs")
    convert(folder / "theirs", folder / "ours")
    sd = StableDiffusion.load(folder / "ours")
    assert sd.config == model
    return family, pipe, sd


PROMPTS = ["a red cat", 3 * "Red, red; the café isn't 42 cats. "]       # the second is longer than 77 tokens


@pytest.mark.filterwarnings("ignore:the model doesn't see these words")
@pytest.mark.parametrize("sampler,eta,negative,given", [
    ("ddim", 0, "cat", "noise"), ("ddim", 1, "", "noise"), ("ddim", 0, None, "seed"), ("euler", 0, "", "noise"),
    ("euler-a", 0, "cat", "seed"), ("dpm++2m", 0, "red red", "noise"), ("dpm++2m-karras", 0, None, "noise"),
    ("heun", 0, "cat", "noise")])
def test_pipeline(pipelines, sampler, eta, negative, given):
    family, pipe, sd = pipelines
    pipe.scheduler = type(scheduler(sampler, "epsilon")).from_config(pipe.scheduler.config,
                                                                      use_karras_sigmas="karras" in sampler)
    noise = random(2, 4, 8, 16) if given == "noise" else None
    latents = pipe(PROMPTS, negative_prompt=None if negative is None else [negative] * 2, latents=noise, height=64,
                   width=128, num_inference_steps=5, guidance_scale=7.5, eta=eta, generator=seeded(11, 12),
                   output_type="latent").images
    ours = sd.sample(PROMPTS, negative, steps=5, sampler=sampler, eta=eta, seed=11, noise=noise, height=64, width=128)
    check_error(f"pipeline {family}, {sampler}, eta {eta:g}, negative {negative!r}, {given}", ours, latents, TRAJECTORY)
    if given == "seed":
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        check_error(f"pipeline {family}, image", sd.decode(ours), pipe.image_processor.postprocess(image, "pt"), IMAGE)
