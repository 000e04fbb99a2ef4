"""Converts published Stable Diffusion 1.x, 2.x and SDXL checkpoints to the folder that `txt2img.py` loads.

    python convert_weights.py SOURCE OUT_DIR
    python convert_weights.py SOURCE OUT_DIR --reward hps      (or imagereward, clip)

SOURCE is a Hugging Face folder, or one .safetensors or .ckpt file in the original layout. Start at `convert`; for a
reward model (`reward.py`), at `convert_reward`. `checkpoint.py` reads the files.
For each tensor of our modules, `find` gives its name in the source and the transform it needs. Missing and unknown
tensors are then two differences of sets of names. Only one tensor at a time is in memory.
Checked against the names and shapes of the published models, diffusers 0.42.1, transformers 5.23, open_clip 3.3.0.
"""
import gzip
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from tqdm import tqdm

import clip_text
import reward
import unet
from checkpoint import FLOATS, Checkpoint, Stored, check_names, joined, json_object, read_checkpoint, read_folder
from clip_text import TextConfig, TextEncoder
from command import ArgumentParser, HelpFormatter, InputError, replacing, run_command
from folder import ModelConfig, build, checked, short, write_config
from reward import ImageConfig, ImageEncoder, ImageRewardConfig, RewardModel
from sampler import SAMPLERS, NoiseSchedule
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

# The configurations of single files, which don't contain any.
FAMILIES = {
    "sd15": ModelConfig("sd15", "epsilon", 512, NoiseSchedule(), unet.CONFIGS["sd15"], VAEConfig(),
                        clip_text.CONFIGS["vit-l"]),
    "sd21": ModelConfig("sd21", "v", 768, NoiseSchedule(), unet.CONFIGS["sd21"], VAEConfig(),
                        clip_text.CONFIGS["vit-h"]),
    "sdxl": ModelConfig("sdxl", "epsilon", 1024, NoiseSchedule(spacing="leading"), unet.CONFIGS["sdxl"],
                        VAEConfig(scaling=0.13025, force_upcast=True), clip_text.CONFIGS["vit-l-penultimate"],
                        clip_text.CONFIGS["bigg"], zero_negative=True),
}
# The configurations of a reward's components. HPSv2 and ImageReward exist in one size; for other CLIPs see --config.
REWARDS = {
    "hps": {"text_encoder": replace(clip_text.CONFIGS["vit-h"], layers=24, projection=1024),
            "image_encoder": reward.CONFIGS["vit-h"]},
    "imagereward": {"image_reward": ImageRewardConfig()},
}
MODULES = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder, "text_encoder_2": TextEncoder,
           "image_encoder": ImageEncoder, "image_reward": RewardModel}
POSITIONS = "text_model.embeddings.position_embedding.weight"
# Tensors that a checkpoint may contain and no model here uses.
IGNORED = (
    "model_ema.*",                                                           # averaged (EMA) weights: see --ema
    "betas", "*alphas_cumprod*", "posterior_*", "denoiser.sigmas",           # tables of the noise schedule
    "scale_factor", "logvar", "first_stage_model.loss.*", "first_stage_model.model_ema.*",     # only for training
    "*.position_ids", "*.attn_mask", "*logit_scale",                         # constants, a loss's temperature
    "*text_projection", "*text_projection.weight",                           # where no pooled vector is used
)
REWARD_IGNORED = (
    "logit_scale",                                                           # scores are cosines, without this factor
    "*position_ids", "attn_mask",                                            # constants
    "blip.vision_proj.*", "blip.text_proj.*",                                # BLIP's own matching; ImageReward lacks it
)


class Origin(NamedTuple):
    """Where one of our tensors comes from: its name in the source, and the change it needs."""
    key: str
    transform: Callable[[Tensor], Tensor] | None = None


Unused = dict[str, list[str]]                                  # entries of config files without effect, by reason
Origins = dict[str, dict[str, tuple[Origin, torch.Size]]]      # by component and name: the origin, and our shape


@dataclass(frozen=True)
class Summary:
    """What `convert` or `convert_reward` did. The command prints it as text at the end."""
    out_dir: Path
    what: str                          # the model, in a few words
    origins: Origins
    dropped: dict[str, str]            # names of tensors that were left out, and the pattern that each fits
    unused: Unused | None = None
    unused_ema: bool = False           # the file also holds averaged (EMA) weights
    sampler: str = ""                  # what the source's scheduler says about the sampler

    def counts(self, part: str) -> dict[str, int]:
        """How many tensors a component has, and how many of them were renamed or transformed."""
        pairs = [(name, origin) for name, (origin, _) in self.origins[part].items()]
        return {"tensors": len(pairs), "renamed": sum(not origin.key.endswith(name) for name, origin in pairs),
                "transformed": sum(origin.transform is not None for _, origin in pairs)}

    def __str__(self) -> str:
        lines = [f"{self.out_dir}: {self.what}"]
        lines += ["{:15} {tensors:5} tensors, {renamed:5} renamed, {transformed:4} transformed".format(
            part, **self.counts(part)) for part in self.origins]
        runs = Counter(self.dropped.values())
        names = {f"{rule} ({runs[rule]})" if runs[rule] > 3 else name for name, rule in self.dropped.items()}
        lines.append(f"dropped {len(self.dropped)}{': ' if names else ''}{', '.join(sorted(names))}")
        lines.append("left 0")         # an unknown tensor has raised InputError
        if self.unused_ema:
            lines.append("note: these are the plain weights; the file also holds averaged ones, see --ema")
        lines += [f"not used: {reason}: {', '.join(entries)}" for reason, entries in (self.unused or {}).items()]
        if self.sampler:
            lines.append(f"made for {self.sampler}")
        return "\n".join(lines)


def convert(source: str | Path, out_dir: str | Path, *, prediction: str | None = None, ema: bool = False,
            tokenizer: str | Path | None = None, dtype: torch.dtype | None = None,
            config: str | Path | None = None) -> Summary:
    """Write the model folder out_dir from a Hugging Face folder or a single file; on an error leave nothing there.

    prediction: "epsilon" or "v"; None: what the source's scheduler says (an SD 2.x file says nothing: InputError)
    ema: use a single file's averaged (EMA) U-Net. dtype: that of the written weights; None: as stored
    tokenizer: a folder with vocab.json and merges.txt, or tokenizer.json; or bpe_simple_vocab_16e6.txt.gz;
        None: the source's own. config: a Hugging Face folder whose config files replace the source's
    Raises InputError for all kinds of wrong input.
    """
    source, out_dir = Path(source), Path(out_dir)
    check_empty(out_dir)
    configs, unused = source if config is None else Path(config), {}
    if source.is_dir():
        model, sampler = hf_config(configs, prediction, unused)
        given = joined(source, [(f"{part}/", read_folder(source / part)) for part in model.parts])
        layout = {part: (f"{part}/", {}) for part in model.parts}
    else:
        given = read_checkpoint(source)
        family = detect(given)
        if config is None:
            model, sampler = family_config(family, prediction, source), "an unknown sampler: a single file names none"
        else:
            model, sampler = hf_config(configs, prediction, unused)
        if model.family != family:
            raise InputError(f"{source} is {family}, but {config} describes {model.family}; give matching config files")
        layout = single_file_layout(model)
    averaged = [name for name in given.tensors if name.startswith("model_ema.")]
    if ema and not averaged:
        raise InputError(f"{source} holds no averaged weights (model_ema.*); leave --ema out")
    origins, dropped = match(model.parts, layout, given, ignored_by(model, ema), OTHER_WIDTHS, ema)
    own = (source if source.is_dir() else configs) / "tokenizer"
    vocab, merges = read_vocabulary(own if tokenizer is None else Path(tokenizer))
    model = with_tokenizers(model, vocab, merges, configs, unused)
    for part in origins.keys() & {"text_encoder", "text_encoder_2"}:         # shorter texts need fewer positions
        (key, _), shape = origins[part][POSITIONS]
        length = model.parts[part].length
        if length < shape[0]:
            origins[part][POSITIONS] = Origin(key, partial(torch.narrow, dim=0, start=0, length=length)), torch.Size(
                (length, shape[1]))
    write_folder(out_dir, given, origins, build_tokenizer(vocab, merges), model, dtype)
    return Summary(out_dir, f"{model.family}, {model.prediction}, {model.size} pixels", origins, dropped, unused,
                   not ema and len(averaged) >= 100, sampler)


def convert_reward(source: str | Path, out_dir: str | Path, kind: str, *, tokenizer: str | Path | None = None,
                   dtype: torch.dtype | None = None, config: str | Path | None = None) -> Summary:
    """Write the folder out_dir that `reward.load_reward` reads; on an error leave nothing there.

    kind: "hps", the file HPS_v2.1_compressed.pt; "imagereward", the file ImageReward.pt; "clip", a Hugging Face folder
        of a CLIP, or a file of OpenCLIP
    tokenizer: as for `convert`; for ImageReward, BERT's vocab.txt or tokenizer.json, or their folder
    config: for a file of OpenCLIP, the open_clip_config.json that describes its towers. dtype: as for `convert`
    Raises InputError for all kinds of wrong input.
    """
    source, out_dir = Path(source), Path(out_dir)
    check_empty(out_dir)
    if config is not None and (source.is_dir() or kind == "imagereward"):
        raise InputError("--config is for files of OpenCLIP: leave it out")
    if source.is_dir() and kind != "clip":
        raise InputError(f"{source} is a folder; give the published file, such as "
                         f"{'ImageReward.pt' if kind == 'imagereward' else 'HPS_v2.1_compressed.pt'}")
    if source.is_dir():
        configs, given = hf_clip(source), read_folder(source)
    else:
        given = read_checkpoint(source)
        check_reward(given, kind)
        if kind == "clip" and config is None:
            raise InputError(f"{source} doesn't say how many heads its towers have; give the model's "
                             "open_clip_config.json with --config")
        configs = REWARDS[kind] if config is None else openclip_config(Path(config))
    renames = not source.is_dir() and kind != "imagereward"
    layout = {part: ("", openclip_names(config) if renames else {}) for part, config in configs.items()}
    origins, dropped = match(configs, layout, given, REWARD_IGNORED, OTHER_WIDTHS if renames else "download it again")
    if tokenizer is None and not source.is_dir():
        wanted = ("BERT's vocab.txt (that of bert-base-uncased)" if kind == "imagereward" else
                  "a folder with vocab.json and merges.txt, or bpe_simple_vocab_16e6.txt.gz")
        raise InputError(f"{source} holds no vocabulary; pass --tokenizer: {wanted}")
    words = Path(tokenizer or source)
    built = build_word_pieces(read_word_pieces(words)) if kind == "imagereward" else build_tokenizer(
        *read_vocabulary(words))
    size, knows = built.get_vocab_size(), next(iter(configs.values())).vocab
    if size != knows:
        raise InputError(f"{words} has {size} tokens, but the text tower has {knows}; pass the model's own --tokenizer")
    write_folder(out_dir, given, origins, built, configs, dtype)
    total = sum(math.prod(shape) for part in origins.values() for _, shape in part.values())
    return Summary(out_dir, f"{kind}, {total:,} parameters", origins, dropped)


def check_empty(out_dir: Path) -> None:
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise InputError(f"{out_dir} exists and isn't empty; remove it or choose another OUT_DIR")


def ignored_by(model: ModelConfig, ema: bool = False) -> list[str]:
    """Patterns of names that a checkpoint may contain and this model doesn't use, such as SD 2.x's last text layer."""
    return [*IGNORED, f"cond_stage_model.model.transformer.resblocks.{model.text_encoder.layers}.*",
            *(["model.diffusion_model.*"] if ema else [])]


def match(configs: dict[str, Any], layout: dict[str, tuple[str, dict[str, str]]], given: Checkpoint,
          ignored: Iterable[str], remedy: str, ema: bool = False) -> tuple[Origins, dict[str, str]]:
    """The origin of every tensor, and the names of the source that are dropped, with the pattern that each fits.

    InputError for a tensor that is missing, unknown, quantised or of a wrong shape.
    layout: per component, the prefix of its names in the source, and a table from our names to those that differ
    ignored: patterns of names that may be dropped. remedy: advice for a wrong shape
    """
    origins = {part: {name: (find(name, *layout[part], given.tensors), tensor.shape) for name, tensor in
                      build(MODULES[part], config, "check its config files").state_dict().items()}
               for part, config in configs.items()}
    if ema:
        origins["unet"] = {name: (Origin("model_ema." + origin.key.removeprefix("model.").replace(".", "")), shape)
                           for name, (origin, shape) in origins["unet"].items()}
    for name in given.tensors:
        kind = next((kind for mark, kind in QUANTISED.items() if name.endswith(mark)), None)
        if kind is not None:
            raise InputError(f"{given.path} is quantised ({kind}: it holds {name}); {NOT_QUANTISED}")
    every = [pair for named in origins.values() for pair in named.values()]
    keys = {origin.key for origin, _ in every}
    dropped = {name: name for name in given.others}
    dropped |= {name: rule for name in given.tensors if name not in keys for rule in ignored if fnmatchcase(name, rule)}
    for origin, shape in every:
        if origin.key in given.tensors:
            check_tensor(origin, given, shape, remedy)
    check_names([name for name in given.tensors if name not in dropped], sorted(keys), str(given.path))
    return origins, dropped


# Ends of the names of tensors that only quantised checkpoints hold.
QUANTISED = {".SCB": "bitsandbytes, 8 bits", ".absmax": "bitsandbytes, 4 bits", ".qweight": "GPTQ or AWQ",
             ".scale_weight": "scaled float8", "scaled_fp8": "scaled float8", "._data": "quanto"}
NOT_QUANTISED = "get a version in float16, bfloat16 or float32"
OTHER_WIDTHS = "if this is a model with other widths, give its config files with --config"


def check_tensor(origin: Origin, given: Checkpoint, shape: torch.Size, remedy: str) -> None:
    """InputError unless the stored tensor is floating point and its transform gives it the wanted shape."""
    have = given.tensors[origin.key]
    if have.dtype not in FLOATS.values():
        kind = str(have.dtype).removeprefix("torch.")
        raise InputError(f"{given.path}: {origin.key} is quantised ({kind}, not floating point); {NOT_QUANTISED}")
    try:
        result = torch.empty(have.shape, device="meta")
        result = result if origin.transform is None else origin.transform(result)
    except RuntimeError:
        result = None
    if result is None or result.shape != shape:
        raise InputError(f"{given.path}: {origin.key} has shape {have.shape}, but {tuple(shape)} is needed; {remedy}")


# ---- what the source is ----

# What a single file can be, by a text that its tensors' names contain; \n stands for the beginning of a name.
KINDS = {
    "\nmodel.diffusion_model.input_blocks.0.0.weight": "a Stable Diffusion model: leave out --reward",
    "\nln_final.weight": "a CLIP of OpenCLIP: --reward clip, or hps if it is HPSv2's",
    "\nblip.visual_encoder.cls_token": "ImageReward: --reward imagereward",
    "\nvision_model.post_layernorm.weight": "a CLIP of Hugging Face: give its folder, with --reward clip",
    "lora": "a LoRA", "joint_blocks.": "Stable Diffusion 3", "double_blocks.": "Flux", "control_model.": "a ControlNet",
    "decoder.": "an autoencoder alone", "text_model.": "a text encoder alone",
    "down_blocks.": "one part of a Hugging Face folder: give the folder",
}


def kind_of(given: Checkpoint) -> str:
    names = "\n" + "\n".join(given.tensors)
    first = next(iter(given.tensors), "absent")
    return next((f"it is {kind}" for text, kind in KINDS.items() if text in names), f"its first tensor is {first}")


def detect(given: Checkpoint) -> str:
    """The family of a single file, from its tensors' names; InputError if it is something else."""
    source, conv_in = given.path, given.tensors.get("model.diffusion_model.input_blocks.0.0.weight")
    if conv_in is None:
        raise InputError(f"{source} is not a whole SD 1.x, 2.x or SDXL model in the original layout ({kind_of(given)})")
    check_inputs(conv_in.shape[1] if len(conv_in.shape) == 4 else 4, source)
    texts = {"sdxl": "conditioner.embedders.1.", "sd21": "cond_stage_model.model.",
             "sd15": "cond_stage_model.transformer.", "refiner": "conditioner.embedders.0.model."}
    found = [family for family, text in texts.items() if any(name.startswith(text) for name in given.tensors)]
    if found[:1] == ["refiner"]:
        raise InputError(f"{source} is the SDXL refiner, which isn't supported; give the SDXL base model")
    if not found:
        raise InputError(f"{source} has no text encoder (cond_stage_model.* or conditioner.*); get the complete model")
    return found[0]


def check_reward(given: Checkpoint, kind: str) -> None:
    """InputError unless a file has the tensor names of this kind of reward."""
    wanted, mark = {"hps": ("HPSv2 in OpenCLIP's layout", "ln_final.weight"),
                    "clip": ("a CLIP in OpenCLIP's layout", "ln_final.weight"),
                    "imagereward": ("ImageReward", "blip.visual_encoder.cls_token")}[kind]
    if mark not in given.tensors:
        raise InputError(f"{given.path} is not {wanted} ({kind_of(given)})")


def check_inputs(channels: int, where: Path) -> None:
    kinds = {5: "a depth-to-image model", 8: "an InstructPix2Pix model", 9: "an inpainting model"}
    if channels in kinds:
        raise InputError(f"{where} belongs to {kinds[channels]} ({channels} input channels), which isn't supported; "
                         f"give a text-to-image model")


def family_config(family: str, prediction: str | None, source: Path) -> ModelConfig:
    if family == "sd21" and prediction is None:
        raise InputError(f"{source} is of the SD 2.x family, whose weights don't show what the U-Net predicts; "
                         f"pass --prediction v (768-pixel models) or --prediction epsilon (512-pixel base models)")
    model = replace(FAMILIES[family], prediction=prediction or FAMILIES[family].prediction)
    return replace(model, size=512) if (family, prediction) == ("sd21", "epsilon") else model


# ---- config files: an entry is obeyed, or refused, or named as not used ----

ANOTHER = "use another model"


class Fields(NamedTuple):
    """How each entry of one kind of config file is treated. An entry in none of these is named as not used."""
    obeyed: str                                  # names of entries that the functions below read or check
    only: dict[str, tuple]                       # the values that are supported; others are refused
    unused: dict[str, tuple]                     # not used; named in the summary unless it has one of these defaults
    inert: str                                   # names of entries that can't change a picture


UNET = Fields(
    "in_channels out_channels block_out_channels layers_per_block down_block_types up_block_types attention_head_dim "
    "transformer_layers_per_block cross_attention_dim use_linear_projection upcast_attention norm_num_groups "
    "addition_embed_type addition_time_embed_dim projection_class_embeddings_input_dim sample_size",
    {"_class_name": ("UNet2DConditionModel",), "act_fn": ("silu", "swish"), "attention_type": ("default",),
     "center_input_sample": (False,), "class_embed_type": (None,), "class_embeddings_concat": (False,),
     "conv_in_kernel": (3,), "conv_out_kernel": (3,), "cross_attention_norm": (None,), "downsample_padding": (1,),
     "dual_cross_attention": (False,), "encoder_hid_dim": (None,), "encoder_hid_dim_type": (None,),
     "flip_sin_to_cos": (True,), "freq_shift": (0,), "mid_block_only_cross_attention": (None, False),
     "mid_block_scale_factor": (1,), "mid_block_type": ("UNetMidBlock2DCrossAttn",), "norm_eps": (1e-5,),
     "num_attention_heads": (None,), "num_class_embeds": (None,), "only_cross_attention": (False,),
     "quantization_config": (None,), "resnet_out_scale_factor": (1,), "resnet_skip_time_act": (False,),
     "resnet_time_scale_shift": ("default",), "reverse_transformer_layers_per_block": (None,),
     "time_cond_proj_dim": (None,), "time_embedding_act_fn": (None,), "time_embedding_dim": (None,),
     "time_embedding_type": ("positional",), "timestep_post_act": (None,)},
    {}, "dropout addition_embed_type_num_heads")
AUTOENCODER = Fields(
    "block_out_channels down_block_types up_block_types layers_per_block latent_channels norm_num_groups "
    "scaling_factor force_upcast",
    {"_class_name": ("AutoencoderKL",), "act_fn": ("silu", "swish"), "in_channels": (3,), "out_channels": (3,),
     "mid_block_add_attention": (True,), "use_quant_conv": (True,), "use_post_quant_conv": (True,),
     "shift_factor": (None, 0), "latents_mean": (None,), "latents_std": (None,), "quantization_config": (None,)},
    {}, "sample_size")
TEXT = Fields(
    "vocab_size max_position_embeddings hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
    "projection_dim eos_token_id",
    {"model_type": ("clip_text_model",), "layer_norm_eps": (1e-5,), "use_attention_mask": (False, None),
     "quantization_config": (None,)},
    {}, "architectures attention_dropout bos_token_id chunk_size_feed_forward dropout dtype id2label "
    "initializer_factor initializer_range is_encoder_decoder label2id output_attentions output_hidden_states "
    "pad_token_id problem_type return_dict torch_dtype transformers_version")
TOKENIZER = Fields(
    "model_max_length max_len pad_token added_tokens_decoder",
    {"bos_token": ("<|startoftext|>",), "eos_token": ("<|endoftext|>",), "padding_side": ("right",),
     "truncation_side": ("right",), "add_bos_token": (True, None), "add_eos_token": (True, None),
     "tokenizer_class": ("CLIPTokenizer", "CLIPTokenizerFast")},
    {"do_lower_case": (True,), "add_prefix_space": (False,), "split_special_tokens": (False,),
     **dict.fromkeys(("additional_special_tokens", "cls_token", "extra_special_tokens", "mask_token",
                      "model_specific_special_tokens", "sep_token"), (None, [], {}))},
    "backend chat_control_tokens chat_template clean_up_tokenization_spaces "
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output errors files_loaded is_local merges "
    "model_input_names name_or_path processor_class response_schema response_template special_tokens_map_file "
    "tokenizer_file unk_token use_fast verbose vocab")
SCHEDULER = Fields(
    "_class_name beta_start beta_end beta_schedule num_train_timesteps steps_offset set_alpha_to_one timestep_spacing "
    "prediction_type clip_sample",
    {"trained_betas": (None,), "rescale_betas_zero_snr": (False,), "thresholding": (False,),
     "use_flow_sigmas": (False,), "use_dynamic_shifting": (False,), "timestep_type": ("discrete",),
     "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")},
    {"algorithm_type": ("dpmsolver++", "deis", "data_prediction"), "corrector_order": (2,), "disable_corrector": ([],),
     "euler_at_final": (False,), "final_sigmas_type": ("zero",), "interpolation_type": ("linear",),
     "lambda_min_clipped": (-math.inf, "-inf"), "lower_order_final": (True,), "original_inference_steps": (50,),
     "predict_x0": (True,), "predictor_order": (2,), "sigma_max": (None,), "sigma_min": (None,),
     "skip_prk_steps": (True,), "solver_order": (2,), "solver_p": (None,), "solver_type": ("midpoint", "bh2", "logrho"),
     "tau_func": (None,), "timestep_scaling": (10,), "use_beta_sigmas": (False,), "use_exponential_sigmas": (False,),
     "use_karras_sigmas": (False,), "use_lu_lambdas": (False,)},
    # these have an effect only together with values that are refused above
    "clip_sample_range dynamic_thresholding_ratio flow_shift sample_max_value shift_terminal time_shift_type")
# The supported schedulers, and our name of the same solver, if there is one. Our own samplers run the others' models.
SCHEDULERS = {
    "DDIMScheduler": "ddim", "DDIMParallelScheduler": "ddim", "DPMSolverMultistepScheduler": "dpm++2m",
    "EulerDiscreteScheduler": "euler", "EulerAncestralDiscreteScheduler": "euler-a", "HeunDiscreteScheduler": "heun",
    **dict.fromkeys(("DDPMScheduler", "DDPMParallelScheduler", "DEISMultistepScheduler", "DPMSolverSinglestepScheduler",
                     "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler",
                     "PNDMScheduler", "SASolverScheduler", "UniPCMultistepScheduler"))}


def heed(path: Path, data: dict[str, Any], fields: Fields, unused: Unused, reason: str = "") -> None:
    """Refuse what a config file may not say, and add its entries that are not used to `unused`, under this reason."""
    require(path, data, fields.only)
    known = {*fields.obeyed.split(), *fields.inert.split(), *fields.only}
    for name, value in data.items():
        if name not in known and not name.startswith("_") and value not in fields.unused.get(name, ()):
            unused.setdefault(reason or f"{path.parent.name}/{path.name}", []).append(f"{name} {short(value)}")


def require(path: Path, data: dict[str, Any], only: dict[str, tuple]) -> None:
    """InputError if a config asks for something that our modules don't do."""
    for name, legal in only.items():
        if name in data and data[name] not in legal and single(data[name]) not in legal:
            raise InputError(f"{path}: {name} is {short(data[name])}, only {' or '.join(map(repr, legal))} is "
                             f"supported; {ANOTHER}")


def single(value: Any) -> Any:
    """The entry of a list of equal entries (diffusers accepts one per level); any other value unchanged."""
    return value[0] if isinstance(value, list) and value and all(entry == value[0] for entry in value) else value


def hf_config(folder: Path, prediction: str | None, unused: Unused) -> tuple[ModelConfig, str]:
    """Our config from the config files of a Hugging Face folder, and the sampler that its scheduler stands for.

    `with_tokenizers` then sets the pad ids and lengths of texts.
    """
    if not (folder / "unet").is_dir():
        transformer = (folder / "transformer").is_dir()
        has = "a transformer (Stable Diffusion 3, Flux)" if transformer else "no folder unet"
        raise InputError(f"{folder} has {has}; give the Hugging Face folder of an SD 1.x, 2.x or SDXL model")
    unet, latents = hf_unet(folder / "unet" / "config.json", unused)
    family = "sdxl" if unet.add_dim else "sd21" if unet.linear_proj else "sd15"
    usual, second, zeros = FAMILIES[family], None, False
    vae = hf_vae(folder / "vae" / "config.json", usual.vae, unused)
    if family == "sdxl":
        if not (folder / "text_encoder").is_dir() or not (folder / "text_encoder_2").is_dir():
            raise InputError(f"{folder} is the SDXL refiner (one of SDXL's two text encoders isn't there), which "
                             f"isn't supported; give the SDXL base model")
        second = hf_text(folder / "text_encoder_2" / "config.json", usual.text_encoder_2, unused)
        with json_object(folder / "model_index.json") as data:
            zeros = bool(data.get("force_zeros_for_empty_prompt", True))
        if unet.add_dim != second.projection + 6 * unet.add_time_dim:
            raise InputError(f"{folder}: the U-Net's added condition is {unet.add_dim} wide, not SDXL's pooled "
                             f"text and six sizes ({second.projection} + 6 * {unet.add_time_dim})")
    text = hf_text(folder / "text_encoder" / "config.json", usual.text_encoder, unused)
    schedule, stated, sampler = hf_schedule(folder / "scheduler" / "scheduler_config.json", family, unused)
    size = usual.size if latents is None else latents * vae.factor
    model = ModelConfig(family, prediction or stated, size, schedule, unet, vae, text, second, zeros)
    return checked(model, str(folder), ANOTHER), sampler


def hf_unet(path: Path, unused: Unused) -> tuple[UNetConfig, int | None]:
    """Our config from unet/config.json, and the native latent size, which that file states too."""
    with json_object(path) as data:
        heed(path, data, UNET, unused)
        check_inputs(data["in_channels"], path)
        channels, kinds = data["block_out_channels"], data["down_block_types"]
        attends = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
        strange = [kind for kind in kinds if kind not in attends]
        if strange:
            raise InputError(f"{path}: down_block_types holds {short(strange[0])}, only {' and '.join(attends)} are "
                             f"supported; {ANOTHER}")
        wanted = [kind.replace("Down", "Up") for kind in reversed(kinds)]
        require(path, data, {"out_channels": (data["in_channels"],), "addition_embed_type": (None, "text_time"),
                             "up_block_types": (wanted,)})
        # "attention_head_dim" is the number of heads: a misnomer that all published files have kept
        depth, heads = (tuple(value) if isinstance(value, list) else (value,) * len(channels) for value in
                        (data.get("transformer_layers_per_block", 1), data["attention_head_dim"]))
        config = UNetConfig(
            data["in_channels"], tuple(channels), single(data["layers_per_block"]),
            tuple(n if attends[kind] else 0 for n, kind in zip(depth, kinds, strict=True)), depth[-1], heads,
            single(data["cross_attention_dim"]), bool(data.get("use_linear_projection")),
            bool(data.get("upcast_attention")), groups=data.get("norm_num_groups", 32))
        if data.get("addition_embed_type"):
            config = replace(config, add_dim=data["projection_class_embeddings_input_dim"],
                             add_time_dim=data["addition_time_embed_dim"])
        latents = single(data.get("sample_size"))
        if not isinstance(latents, int | None):
            raise InputError(f"{path}: sample_size is {short(latents)}, only one number is supported; {ANOTHER}")
        return checked(config, str(path), ANOTHER), latents


def hf_vae(path: Path, usual: VAEConfig, unused: Unused) -> VAEConfig:
    with json_object(path) as data:
        heed(path, data, AUTOENCODER, unused)
        levels = len(data["block_out_channels"])
        require(path, data, {"down_block_types": (["DownEncoderBlock2D"] * levels,),
                             "up_block_types": (["UpDecoderBlock2D"] * levels,)})
        config = VAEConfig(tuple(data["block_out_channels"]), single(data["layers_per_block"]), data["latent_channels"],
                           data.get("norm_num_groups", 32), data.get("scaling_factor", VAEConfig.scaling),
                           bool(data.get("force_upcast", usual.force_upcast)))
        return checked(config, str(path), ANOTHER)


TEXT_SIZES = ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads",
              "intermediate_size")                   # in the order of TextConfig
IMAGE_SIZES = ("image_size", "patch_size", *TEXT_SIZES[2:])            # in the order of ImageConfig


def hf_text(path: Path, usual: TextConfig, unused: Unused) -> TextConfig:
    """Our config from text_encoder/config.json. Which output the U-Net uses isn't stated there: `usual` decides."""
    with json_object(path) as data:
        heed(path, data, TEXT, unused)
        require(path, data, {"hidden_act": ("quick_gelu", "gelu")})
        if usual.projection:                         # pooled is the first such id; with 2, the first largest one
            require(path, {"eos_token_id": 49407} | data, {"eos_token_id": (2, data["vocab_size"] - 1)})
        config = TextConfig(*(data[name] for name in TEXT_SIZES), data["hidden_act"], usual.output,
                            data["projection_dim"] if usual.projection else None,
                            min(usual.pad, data["vocab_size"] - 1))
        return checked(config, str(path), ANOTHER)


def hf_clip(folder: Path) -> dict[str, TextConfig | ImageConfig]:
    """Our configs from config.json of a CLIP's Hugging Face folder. Missing entries have transformers' defaults."""
    path, both = folder / "config.json", {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    usual_text = both | dict(zip(TEXT_SIZES, (49408, 77, 512, 12, 8, 2048)))
    usual_image = both | dict(zip(IMAGE_SIZES, (224, 32, 768, 12, 12, 3072)))
    with json_object(path) as data:
        require(path, data, {"model_type": ("clip",)})
        text, image = usual_text | data["text_config"], usual_image | data["vision_config"]
        for entries in (text, image):
            require(path, entries, {"layer_norm_eps": (1e-5,), "hidden_act": ("quick_gelu", "gelu"),
                                    "num_channels": (3,)})
        width = data.get("projection_dim", 512)
        # attention is causal: the end token's vector does not depend on the padding after it
        text = TextConfig(*(text[name] for name in TEXT_SIZES), text["hidden_act"], projection=width, pad=0)
        image = ImageConfig(*(image[name] for name in IMAGE_SIZES), image["hidden_act"], width)
    colors = folder / "preprocessor_config.json"
    if colors.is_file():
        with json_object(colors) as data:
            image = replace(image, mean=tuple(data["image_mean"]), std=tuple(data["image_std"]))
    return {"text_encoder": checked(text, str(path), ANOTHER), "image_encoder": checked(image, str(path), ANOTHER)}


def openclip_config(path: Path) -> dict[str, TextConfig | ImageConfig]:
    """Our configs from a Hugging Face model's open_clip_config.json, or from a file of OpenCLIP's model_configs."""
    with json_object(path) as data:
        colors, model = data.get("preprocess_cfg", {}), data.get("model_cfg", data)
        text, image = model["text_cfg"], model["vision_cfg"]
        require(path, colors, {"resize_mode": ("shortest",), "interpolation": ("bicubic",)})
        require(path, model, {"custom_text": (False,)})
        both = dict.fromkeys(("hf_model_name", "timm_model_name", "ls_init_value", "norm_kwargs", "act_kwargs"),
                             (None,))
        require(path, text, both | dict.fromkeys(("no_causal_mask", "embed_cls", "proj_bias"), (False,)) |
                {"pool_type": ("argmax",), "proj_type": ("linear",)})
        require(path, image, both | dict.fromkeys(("attentional_pool", "no_ln_pre", "final_ln_after_pool"), (False,)) |
                {"pool_type": ("tok",), "pos_embed_type": ("learnable",)})
        gelu, width = "quick_gelu" if model.get("quick_gelu") else "gelu", model["embed_dim"]
        text = TextConfig(text["vocab_size"], text["context_length"], text["width"], text["layers"], text["heads"],
                          int(text["width"] * text.get("mlp_ratio", 4)), gelu, projection=width, pad=0)
        image = ImageConfig(image["image_size"], image["patch_size"], image["width"], image["layers"],
                            image["width"] // image.get("head_width", 64),
                            int(image["width"] * image.get("mlp_ratio", 4)), gelu, width,
                            tuple(colors.get("mean", ImageConfig.mean)), tuple(colors.get("std", ImageConfig.std)))
        return {"text_encoder": checked(text, str(path), ANOTHER), "image_encoder": checked(image, str(path), ANOTHER)}


def hf_schedule(path: Path, family: str, unused: Unused) -> tuple[NoiseSchedule, str, str]:
    """Our schedule, what the U-Net predicts, and the sampler that the file stands for.

    Missing entries have the defaults of diffusers' DDIMScheduler. Two entries are set as in its pipelines of SD 1.x and
    2.x, whatever the file says.
    """
    with json_object(path) as data:
        kind = data.get("_class_name")
        if kind not in {None, *SCHEDULERS}:
            few = "is for few-step models, which need a sampler that isn't here"
            reason = next((text for word, text in {
                "EDM": "is for models trained with EDM's noise levels", "Flow": "is for flow matching models",
                "LCM": few, "TCD": few}.items() if word in str(kind)), "is none of the supported schedulers")
            raise InputError(f"{path}: {short(kind)} {reason}; {ANOTHER}")
        forced = {"steps_offset": 1, "clip_sample": False} if family != "sdxl" else {}
        for name, value in forced.items():
            if data.get(name, value) != value:
                unused.setdefault("diffusers' pipelines ignore it too", []).append(f"{name} {short(data[name])}")
        if (data | forced).get("clip_sample", str(kind).startswith("DD")):   # the default of DDIM and DDPM
            absent = "" if "clip_sample" in data else f" (the default of {kind})"
            raise InputError(f"{path}: clip_sample is true{absent}, which would clip the latents and isn't supported; "
                             "set it to false, as the published models do")
        data |= forced
        heed(path, data, SCHEDULER, unused, "--sampler decides")
        require(path, data, {"beta_schedule": ("scaled_linear", "linear"),
                             "prediction_type": ("epsilon", "v_prediction"),
                             "timestep_spacing": (None, "leading", "linspace", "trailing")})
        schedule = NoiseSchedule(
            data.get("beta_start", 0.0001), data.get("beta_end", 0.02), data.get("num_train_timesteps", 1000),
            data.get("steps_offset", 0), data.get("set_alpha_to_one", True), data.get("timestep_spacing"),
            data.get("beta_schedule", "linear"))
        solver = SCHEDULERS.get(kind)
        solver = f"{solver}-karras" if data.get("use_karras_sigmas") and f"{solver}-karras" in SAMPLERS else solver
        sampler = (f"{kind}: --sampler {solver}" if solver else f"{kind}, which isn't here: choose a --sampler" if kind
                   else "an unknown sampler: scheduler_config.json names none")
        stated = data.get("prediction_type", "epsilon").removesuffix("_prediction")
        return checked(schedule, str(path), ANOTHER), stated, sampler


# ---- where each tensor comes from ----

def find(name: str, prefix: str, names: dict[str, str], stored: dict[str, Stored]) -> Origin:
    """The origin of our tensor `name`. prefix: begins the source's names; names: a table from our names to theirs."""
    head, rest = name, ""
    while head and head not in names:                # the longest part of the name that the table knows
        head, _, last = head.rpartition(".")
        rest = f".{last}{rest}"
    key = names[head] + rest if head else name
    old = key                                        # names in autoencoders saved before diffusers 0.18
    for ours, theirs in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        old = old.replace(f".{ours}.", f".{theirs}.")
    bare = key.removeprefix("text_model.")           # names in text encoders saved by transformers 5.6 and later
    key = next((prefix + k for k in (key, old, bare) if prefix + k in stored), prefix + key)
    if ".attn.in_proj_" in key:                      # OpenCLIP holds queries, keys and values in one tensor
        i = "qkv".index(name.split(".self_attn.")[1][0])
        return Origin(key, lambda x: x.tensor_split(3)[i])
    if key.split(".")[-1] in ("text_projection", "proj"):                    # stored transposed
        return Origin(key, torch.t)
    if name.startswith(("encoder.mid_block.attentions.", "decoder.mid_block.attentions.")):
        if key in stored and len(stored[key].shape) > 2:                     # a 1x1 convolution: linear here
            return Origin(key, partial(torch.flatten, start_dim=1))
    return Origin(key)


def single_file_layout(model: ModelConfig) -> dict[str, tuple[str, dict[str, str]]]:
    """By component: the prefix of its names in the original layout, and a table from our modules' names to those."""
    layout = {"unet": ("model.diffusion_model.", unet_names(model.unet)),
              "vae": ("first_stage_model.", vae_names(model.vae))}
    if model.family == "sd15":
        layout["text_encoder"] = ("cond_stage_model.transformer.", {})
    if model.family == "sd21":
        layout["text_encoder"] = ("cond_stage_model.model.", openclip_names(model.text_encoder))
    if model.family == "sdxl":
        layout["text_encoder"] = ("conditioner.embedders.0.transformer.", {})
        layout["text_encoder_2"] = ("conditioner.embedders.1.model.", openclip_names(model.text_encoder_2))
    return layout


def unet_names(config: UNetConfig) -> dict[str, str]:
    """A table from our modules' names to the original code's, which counts all layers of the encoder, or decoder."""
    names = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
             "conv_in": "input_blocks.0.0", "mid_block.attentions.0": "middle_block.1",
             "conv_norm_out": "out.0", "conv_out": "out.2"}
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    row = config.layers + 1
    for i in range(len(config.channels)):
        for j in range(config.layers):
            resnets[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{1 + i * row + j}.0"
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{1 + i * row + j}.1"
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * row}.0.op"
        for j in range(row):
            resnets[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{i * row + j}.0"
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{i * row + j}.1"
        place = 2 if config.depth[-1 - i] else 1     # after the attention, where the level has one
        names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{i * row + config.layers}.{place}.conv"
    inside = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
              "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    return names | {f"{ours}.{a}": f"{theirs}.{b}" for ours, theirs in resnets.items() for a, b in inside.items()}


def vae_names(config: VAEConfig) -> dict[str, str]:
    """A table from our modules' names to the original code's, where the decoder's level 0 is the largest."""
    names, resnets = {}, {}
    for i in range(len(config.channels)):
        down, up = f"encoder.down.{i}", f"decoder.up.{len(config.channels) - 1 - i}"
        for j in range(config.layers + 1):
            resnets |= {f"encoder.down_blocks.{i}.resnets.{j}": f"{down}.block.{j}",
                        f"decoder.up_blocks.{i}.resnets.{j}": f"{up}.block.{j}"}
        names |= {f"encoder.down_blocks.{i}.downsamplers.0": f"{down}.downsample",
                  f"decoder.up_blocks.{i}.upsamplers.0": f"{up}.upsample"}
    for half in ("encoder", "decoder"):
        resnets |= {f"{half}.mid_block.resnets.0": f"{half}.mid.block_1",
                    f"{half}.mid_block.resnets.1": f"{half}.mid.block_2"}
        inside = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
        names |= {f"{half}.mid_block.attentions.0.{a}": f"{half}.mid.attn_1.{b}" for a, b in inside.items()}
        names[f"{half}.conv_norm_out"] = f"{half}.norm_out"
    shortcuts = {f"{ours}.conv_shortcut": f"{theirs}.nin_shortcut" for ours, theirs in resnets.items()}
    return names | resnets | shortcuts


def openclip_names(config: TextConfig | ImageConfig) -> dict[str, str]:
    """A table from our modules' names to OpenCLIP's, for either tower. `find` transforms tensors that also differ."""
    if isinstance(config, TextConfig):
        ours, theirs = "text_model", ""
        names = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final",
                 "embeddings.position_embedding.weight": "positional_embedding"}
        outside = {"text_projection.weight": "text_projection"}
    else:
        ours, theirs = "vision_model", "visual."
        names = {"embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding": "conv1",
                 "embeddings.position_embedding.weight": "positional_embedding",
                 "pre_layrnorm": "ln_pre", "post_layernorm": "ln_post"}
        outside = {"visual_projection.weight": "visual.proj"}
    inside = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
              "self_attn.out_proj": "attn.out_proj"}
    inside |= {f"self_attn.{x}_proj.{kind}": f"attn.in_proj_{kind}" for x in "qkv" for kind in ("weight", "bias")}
    names |= {f"encoder.layers.{n}.{a}": f"transformer.resblocks.{n}.{b}"
              for n in range(config.layers) for a, b in inside.items()}
    return outside | {f"{ours}.{a}": theirs + b for a, b in names.items()}


# ---- the tokenizer ----

def read_vocabulary(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens and merges of a tokenizer folder, or of OpenAI's file, whose merges imply the tokens."""
    if path.is_file():
        vocab, merges = openai_vocabulary(path)
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        with json_object(path / "vocab.json") as data:
            vocab = dict(data)
        lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    elif (path / "tokenizer.json").is_file():
        with json_object(path / "tokenizer.json") as data:
            vocab = dict(data["model"]["vocab"])
            merges = [tuple(m.split() if isinstance(m, str) else m) for m in data["model"]["merges"]]
    else:
        raise InputError(f"there is no tokenizer {path}; pass --tokenizer: a folder with vocab.json and "
                         f"merges.txt (any Stable Diffusion folder has them), or bpe_simple_vocab_16e6.txt.gz")
    fits = all(len(m) == 2 and {*m, "".join(m)} <= vocab.keys() for m in merges)
    if not fits or "<|startoftext|>" not in vocab or vocab.get("<|endoftext|>") != len(vocab) - 1:
        raise InputError(f"{path} is not CLIP's tokenizer (its merges don't fit its vocabulary, or "
                         f"<|endoftext|> isn't its last token); give the model's own")
    return vocab, merges


def openai_vocabulary(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Its tokens: 256 bytes, the same 256 at a word's end, the file's first 48,894 merges and two special tokens."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path} isn't a readable bpe_simple_vocab_16e6.txt.gz ({error}); download it again") from None
    merges = [tuple(line.split()) for line in lines[1:48_895]]               # the first line is a version
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]     # bytes shown as they are; others last
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges),
              "<|startoftext|>", "<|endoftext|>"]
    return {token: id for id, token in enumerate(tokens)}, merges


def build_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """CLIP's tokenizer. "!" is an ordinary token, as in OpenCLIP.

    This differs from transformers where "!" is the pad token (SD 2.x, SDXL's second): it reads any "!" as padding.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE(
        vocab, merges, unk_token="<|endoftext|>", end_of_word_suffix="</w>", fuse_unk=False))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    return tokenizer


def read_word_pieces(path: Path) -> dict[str, int]:
    """BERT's vocabulary from vocab.txt (one word piece per line), tokenizer.json, or a folder with one of these."""
    if path.is_dir():
        path = next((path / name for name in ("vocab.txt", "tokenizer.json") if (path / name).is_file()), path)
    if not path.is_file():
        raise InputError(f"there is no vocab.txt or tokenizer.json at {path}; pass --tokenizer: the vocab.txt of "
                         "bert-base-uncased")
    if path.suffix == ".json":
        with json_object(path) as data:
            vocab = dict(data["model"]["vocab"])
    else:
        try:
            pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
            vocab = {piece: i for i, piece in enumerate(pieces)}
        except (OSError, ValueError) as error:
            raise InputError(f"{path} isn't a text file ({error}); get the vocab.txt of bert-base-uncased") from None
    if not {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} <= vocab.keys():
        raise InputError(f"{path} is not BERT's vocabulary (special tokens such as [CLS] are missing); get the "
                         "vocab.txt of bert-base-uncased")
    return vocab


def build_word_pieces(vocab: dict[str, int]) -> tokenizers.Tokenizer:
    """BERT's uncased tokenizer, with the two tokens that BLIP appended to its vocabulary."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"])
    return tokenizer


def with_tokenizers(model: ModelConfig, vocab: dict[str, int], merges: list[tuple[str, str]], folder: Path,
                    unused: Unused) -> ModelConfig:
    """Set each text encoder's pad id and length. Where SD 2.1's two files differ, special_tokens_map.json wins.

    InputError for a vocabulary of another size, for a second one, and for what our tokenizer can't express.
    """
    for part, place in (("text_encoder", folder / "tokenizer"), ("text_encoder_2", folder / "tokenizer_2")):
        text = getattr(model, part)
        if text is None:
            continue
        if text.vocab != len(vocab):
            raise InputError(f"the tokenizer has {len(vocab)} tokens, but {part} has {text.vocab}; pass the model's "
                             f"own --tokenizer")
        stored = any((place / name).is_file() for name in ("vocab.json", "tokenizer.json"))
        if part == "text_encoder_2" and stored and read_vocabulary(place) != (vocab, merges):
            raise InputError(f"{place} has another vocabulary than the first tokenizer, which isn't supported; "
                             f"{ANOTHER}")
        pad, length = vocab["<|endoftext|>"] if text.pad else 0, text.length
        for path in [place / "tokenizer_config.json", place / "special_tokens_map.json"]:
            if path.is_file():
                with json_object(path) as data:
                    tokens = {name: token["content"] if isinstance(token, dict) else token
                              for name, token in data.items() if name.endswith("_token")}
                    heed(path, data | tokens, TOKENIZER, unused)
                    added = [token["content"] for token in data.get("added_tokens_decoder", {}).values()]
                    for token in [*added, *filter(None, [tokens.get("pad_token")])]:
                        if token not in vocab:
                            raise InputError(f"{path} adds the token {token!r} to the vocabulary, which isn't "
                                             f"supported; {ANOTHER}")
                    pad = vocab[tokens["pad_token"]] if tokens.get("pad_token") else pad
                    length = min(length, data.get("model_max_length", data.get("max_len")) or length)
        model = replace(model, **{part: checked(replace(text, pad=pad, length=length), str(place), ANOTHER)})
    if model.text_encoder_2 is not None and model.text_encoder.length != model.text_encoder_2.length:
        raise InputError(f"{folder}: the tokenizers' model_max_length differ ({model.text_encoder.length} and "
                         f"{model.text_encoder_2.length}), which diffusers can't run either; {ANOTHER}")
    return model


# ---- writing ----

def write_folder(out_dir: Path, given: Checkpoint, origins: Origins, tokenizer: tokenizers.Tokenizer, config: Any,
                 dtype: torch.dtype | None) -> None:
    """Write all files of a model or reward, or none if there is an error."""
    with replacing(out_dir.absolute()) as out:
        out.mkdir(parents=True)
        for part, named in origins.items():
            write_safetensors(out / f"{part}.safetensors", named, given, dtype)
        tokenizer.save(str(out / "tokenizer.json"))
        write_config(out, config)


def write_safetensors(path: Path, origins: dict[str, tuple[Origin, torch.Size]], given: Checkpoint,
                      dtype: torch.dtype | None) -> None:
    """Write one component: the header, which needs only names, shapes and dtypes, then the tensors one by one."""
    dtypes = {name: dtype or given.tensors[origin.key].dtype for name, (origin, _) in origins.items()}
    codes = {dtype: code for code, dtype in FLOATS.items()}
    names = sorted(origins, key=lambda name: (-dtypes[name].itemsize, name))     # widest first keeps all aligned
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        shape = origins[name][1]
        begin, end = end, end + shape.numel() * dtypes[name].itemsize
        header[name] = {"dtype": codes[dtypes[name]], "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in tqdm(names, desc=path.stem, unit=" tensors", disable=None):
            (key, transform), _ = origins[name]
            tensor = given.tensors[key].read()
            tensor = (tensor if transform is None else transform(tensor)).to(dtypes[name]).contiguous()
            file.write(tensor.view(torch.uint8).numpy())


def main() -> None:
    parser = ArgumentParser(formatter_class=HelpFormatter, description=
                            "Convert a Stable Diffusion checkpoint, or with --reward a reward model, to the folder "
                            "that txt2img.py loads.")
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="Hugging Face folder, .safetensors or .ckpt file")
    add("out_dir", type=Path, metavar="OUT_DIR", help="folder to write, new or empty")
    add("--prediction", choices=["epsilon", "v"],
        help="what the U-Net predicts; needed for SD 2.x files (768-pixel models: v, 512-pixel base models: epsilon)")
    add("--ema", action="store_true", help="use a single file's averaged (EMA) U-Net")
    add("--tokenizer", type=Path,
        help="needed for single files: a folder with vocab.json and merges.txt, or bpe_simple_vocab_16e6.txt.gz")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="dtype of the written weights (default: as stored)")
    add("--config", type=Path, help="a Hugging Face folder whose config files replace the source's; with "
                                    "--reward, the open_clip_config.json of an OpenCLIP file")
    add("--reward", choices=["hps", "imagereward", "clip"],
        help="SOURCE is a reward model: HPS_v2.1_compressed.pt, ImageReward.pt, or a CLIP (Hugging Face folder or "
             "OpenCLIP file); for ImageReward, --tokenizer is the vocab.txt of bert-base-uncased")
    args = parser.parse_args()
    common = dict(tokenizer=args.tokenizer, dtype=args.dtype and getattr(torch, args.dtype), config=args.config)
    if args.reward is None:
        print(convert(args.source, args.out_dir, prediction=args.prediction, ema=args.ema, **common))
    elif args.prediction is not None or args.ema:
        raise InputError("--prediction and --ema are for Stable Diffusion models; leave them out with --reward")
    else:
        print(convert_reward(args.source, args.out_dir, args.reward, **common))


if __name__ == "__main__":
    run_command(main)
