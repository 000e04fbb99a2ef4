"""convert_weights.py: every layout that people have becomes the same folder, and everything wrong is one clear line."""
import functools
import gzip
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import DATA, ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert_weights
from checkpoint import Checkpoint, Stored
from clip_text import TextConfig, TextEncoder, Tokenizer
from convert_weights import convert
from folder import ModelConfig, build, check_digests, load_weights, read_config
from sampler import NoiseSchedule
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

MODULES = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder, "text_encoder_2": TextEncoder}
BPE = json.loads((DATA / "bpe_narrow_golden.json").read_text())
MERGES = [tuple(merge.split()) for merge in BPE["merges"]]
VOCAB_SIZE = 512 + len(MERGES) + 2


# ---- narrow models, written down once as our configs and once as Hugging Face's files ----

def narrow(family: str) -> ModelConfig:
    """What the converted folder of `write_hf(folder, family)` must say."""
    wide = VOCAB_SIZE
    vae = VAEConfig(channels=(16, 16, 32, 32), groups=8, layers=2)
    text = TextConfig(wide, 77, 16, 2, 2, 32, "quick_gelu", pad=wide - 1)
    if family == "sd15":
        unet = UNetConfig(channels=(16, 16, 32, 32), heads=(2, 2, 2, 2), context_dim=16, groups=8)
        return ModelConfig("sd15", "epsilon", 512, NoiseSchedule(), unet, vae, text)
    if family == "sd21":
        unet = UNetConfig(channels=(16, 16, 32, 32), heads=(1, 2, 4, 4), context_dim=16, groups=8, linear_proj=True,
                          upcast_attention=True)
        return ModelConfig("sd21", "v", 768, NoiseSchedule(), unet, vae,
                           replace(text, layers=3, activation="gelu", pad=0))
    unet = UNetConfig(channels=(16, 16, 32), depth=(0, 1, 2), mid_depth=2, heads=(1, 2, 4), context_dim=40, groups=8,
                      linear_proj=True, add_dim=20 + 6 * 8, add_time_dim=8)
    second = TextConfig(wide, 77, 24, 3, 2, 48, "gelu", "penultimate", projection=20, pad=0)
    return ModelConfig("sdxl", "epsilon", 1024, NoiseSchedule(spacing="leading"), unet,
                       replace(vae, scaling=0.13025, force_upcast=True), replace(text, output="penultimate"),
                       second, True)


def hf_files(family: str) -> dict[str, dict]:
    unet = {"block_out_channels": [16, 16, 32, 32], "attention_head_dim": 2, "cross_attention_dim": 16,
            "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_num_groups": 8, "sample_size": 64,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
    vae = {"block_out_channels": [16, 16, 32, 32], "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 8,
           "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    text = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 77, "hidden_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "intermediate_size": 32, "hidden_act": "quick_gelu", "projection_dim": 16,
            "eos_token_id": 2,
            "architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    scheduler = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
                 "num_train_timesteps": 1000, "set_alpha_to_one": False}
    files = {"unet/config.json": unet, "vae/config.json": vae, "text_encoder/config.json": text, "model_index.json": {},
             "scheduler/scheduler_config.json": scheduler,
             "tokenizer/special_tokens_map.json": {"pad_token": "<|endoftext|>"}}
    if family == "sd21":
        unet |= {"attention_head_dim": [1, 2, 4, 4], "use_linear_projection": True, "upcast_attention": True,
                 "sample_size": 96}
        text |= {"num_hidden_layers": 3, "hidden_act": "gelu"}
        scheduler |= {"prediction_type": "v_prediction"}
        # as published: the two files contradict each other, and "!" is the pad token that the model was trained with
        files["tokenizer/tokenizer_config.json"] = {"pad_token": "<|endoftext|>"}
        files["tokenizer/special_tokens_map.json"] = {"pad_token": "!"}
    if family == "sdxl":
        unet |= {"block_out_channels": [16, 16, 32], "attention_head_dim": [1, 2, 4], "cross_attention_dim": 40,
                 "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2, "use_linear_projection": True,
                 "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"], "upcast_attention": None,
                 "transformer_layers_per_block": [1, 1, 2], "addition_embed_type": "text_time", "sample_size": 128,
                 "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 20 + 6 * 8}
        vae |= {"scaling_factor": 0.13025, "force_upcast": True}
        scheduler |= {"prediction_type": "epsilon", "timestep_spacing": "leading"}
        files["text_encoder_2/config.json"] = text | {
            "hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 48, "hidden_act": "gelu",
            "projection_dim": 20, "architectures": ["CLIPTextModelWithProjection"]}
        files["tokenizer_2/special_tokens_map.json"] = {"pad_token": {"content": "!", "lstrip": False}}
        files["model_index.json"] = {"force_zeros_for_empty_prompt": True}
    return files


@functools.cache
def random_weights(family: str) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {part: {name: torch.randn(tensor.shape, generator=generator)
                   for name, tensor in build(MODULES[part], config).state_dict().items()}
            for part, config in narrow(family).parts.items()}


def vocabulary() -> dict[str, int]:
    """As CLIP's authors build it: bytes in the order that shows printable ones first, with </w>, merges, specials."""
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(68)]
    tokens = letters + [c + "</w>" for c in letters] + [a + b for a, b in MERGES]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}


def write_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *BPE["merges"]]) + "\n", encoding="utf-8")
    return folder


def write_configs(folder: Path, family: str, **changes: dict) -> Path:
    """changes: entries to change, by component, as unet={"in_channels": 9}."""
    for name, data in hf_files(family).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(data | changes.get(name.split("/")[0], {})))
    return folder


def write_hf(folder: Path, family: str, **changes: dict) -> dict[str, dict[str, torch.Tensor]]:
    write_configs(folder, family, **changes)
    write_tokenizer(folder / "tokenizer")
    weights = random_weights(family)
    for part, state in weights.items():
        save_file(state, hf_file(folder, part))
    return weights


def hf_file(folder: Path, part: str, ending: str = ".safetensors") -> Path:
    return folder / part / (("model" if part.startswith("text") else "diffusion_pytorch_model") + ending)


# ---- the original layout, made from the diffusers names by rules of this file's own ----

UNET_RULES = [
    (r"time_embedding\.linear_1", "time_embed.0"), (r"time_embedding\.linear_2", "time_embed.2"),
    (r"add_embedding\.linear_1", "label_emb.0.0"), (r"add_embedding\.linear_2", "label_emb.0.2"),
    (r"^conv_in", "input_blocks.0.0"), (r"^conv_norm_out", "out.0"), (r"^conv_out", "out.2"),
    (r"mid_block\.resnets\.0", "middle_block.0"), (r"mid_block\.attentions\.0", "middle_block.1"),
    (r"mid_block\.resnets\.1", "middle_block.2"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{1 + 3 * int(m[1]) + int(m[2])}.0"),
    (r"down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{1 + 3 * int(m[1]) + int(m[2])}.1"),
    (r"down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{3 + 3 * int(m[1])}.0.op"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.0"),
    (r"up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.1"),
    (r"up_blocks\.(\d)\.upsamplers\.0\.conv", lambda m: f"output_blocks.{2 + 3 * int(m[1])}.UP.conv"),
    (r"\.norm1\.", ".in_layers.0."), (r"\.conv1\.", ".in_layers.2."), (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."), (r"\.conv2\.", ".out_layers.3."), ("conv_shortcut", "skip_connection")]
VAE_RULES = [
    (r"encoder\.down_blocks\.(\d)\.resnets", r"encoder.down.\1.block"),
    (r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"decoder\.up_blocks\.(\d)\.resnets", lambda m: f"decoder.up.{3 - int(m[1])}.block"),
    (r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.up.{3 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"), ("group_norm", "norm"), (r"to_(\w)\.", r"\1."),
    (r"to_out\.0", "proj_out"), ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out")]
OPENCLIP_RULES = [
    (r"text_model\.embeddings\.token_embedding", "token_embedding"), (r"text_projection\.weight", "text_projection"),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm", "ln_final"), (r"text_model\.encoder\.layers", "transformer.resblocks"),
    ("layer_norm", "ln_"), ("fc1", "c_fc"), ("fc2", "c_proj"), ("self_attn", "attn")]


def renamed(name: str, rules: list) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def to_original(weights: dict[str, dict], family: str) -> dict[str, torch.Tensor]:
    """The tensors of a single-file checkpoint, with all that the published ones carry beside them."""
    result = {}
    for name, tensor in weights["unet"].items():
        key = renamed(name, UNET_RULES if ".transformer_blocks." not in name else UNET_RULES[:16])
        if ".UP." in key:
            block = name.split(".upsamplers")[0]
            attends = any(other.startswith(f"{block}.attentions") for other in weights["unet"])
            key = key.replace(".UP.", ".2." if attends else ".1.")
        result[f"model.diffusion_model.{key}"] = tensor
    for name, tensor in weights["vae"].items():
        conv = "attentions" in name and tensor.dim() == 2
        result["first_stage_model." + renamed(name, VAE_RULES)] = tensor[:, :, None, None] if conv else tensor
    texts = {"sd15": [("text_encoder", "cond_stage_model.transformer.", False)],
             "sd21": [("text_encoder", "cond_stage_model.model.", True)],
             "sdxl": [("text_encoder", "conditioner.embedders.0.transformer.", False),
                      ("text_encoder_2", "conditioner.embedders.1.model.", True)]}[family]
    for part, prefix, openclip in texts:
        state = weights[part]
        if not openclip:
            result |= {prefix + name: tensor for name, tensor in state.items()}
            result[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77)[None]
            continue
        for name, tensor in state.items():
            if "k_proj" in name or "v_proj" in name:
                continue
            key = renamed(name, OPENCLIP_RULES)
            if "q_proj" in name:
                key = key.replace("q_proj.", "in_proj_")
                tensor = torch.cat([state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            result[prefix + key] = tensor.t().contiguous() if name.startswith("text_projection") else tensor
        result[f"{prefix}logit_scale"] = torch.tensor(4.6)
        if family == "sd21":                         # the layer that SD 2.x doesn't run, and a projection nobody reads
            result |= {key.replace("resblocks.2.", "resblocks.3."): tensor + 1 for key, tensor in result.items()
                       if "resblocks.2." in key}
            result[f"{prefix}text_projection"] = torch.zeros(16, 16)
    return result


def write_single(folder: Path, family: str, changes: dict | None = None, drop: str = "") -> dict[str, str | Path]:
    """A single file with its configs and tokenizer: the arguments for `convert`."""
    state = to_original(random_weights(family), family) | (changes or {})
    save_file({name: tensor for name, tensor in state.items() if name != drop}, folder / "model.safetensors")
    return {"source": folder / "model.safetensors", "out_dir": folder / "out",
            "config": write_configs(folder / "configs", family), "tokenizer": write_tokenizer(folder / "tokens")}


def check_folder(out: Path, family: str | ModelConfig, weights: dict[str, dict[str, torch.Tensor]]) -> None:
    """The folder loads as `txt2img.py` loads it, and holds these very tensors."""
    model = read_config(out)
    assert model == (narrow(family) if isinstance(family, str) else family)
    for part, state in weights.items():
        module = build(MODULES[part], getattr(model, part))
        loaded = load_weights(module, out / f"{part}.safetensors", "cpu", torch.float32).state_dict()
        assert loaded.keys() == state.keys()
        for name, tensor in state.items():
            assert torch.equal(loaded[name], tensor.float()), (part, name)
    Tokenizer(out / "tokenizer.json")
    check_digests(out)
    files = {"config.json", "tokenizer.json", *(f"{part}.safetensors" for part in weights)}
    assert {path.name for path in out.iterdir()} == files
    assert not [path.name for path in out.parent.iterdir() if path.name.endswith(".part")]


# ---- the published models ----

def manifest(family: str, part: str) -> dict:
    """"diffusers" and "original": shape by name in either layout. "configs": the config files of the folder."""
    return json.loads(gzip.decompress((DATA / f"manifest_{family}.json.gz").read_bytes()))[part]


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_modules_have_exactly_the_published_names_and_shapes(family):
    ours = {f"{part}/{name}": list(tensor.shape) for part, config in convert_weights.FAMILIES[family].parts.items()
            for name, tensor in build(MODULES[part], config).state_dict().items()}
    assert ours == manifest(family, "diffusers")


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_every_name_of_a_published_single_file_is_used_or_dropped_for_a_reason(family):
    published = manifest(family, "original")
    given = Checkpoint(Path("file"), {name: Stored(tuple(shape), torch.float32, None)
                                      for name, shape in published.items()}, [])
    assert convert_weights.detect(given) == family
    model = convert_weights.FAMILIES[family]
    layout = convert_weights.single_file_layout(model)
    origins, dropped = convert_weights.match(model.parts, layout, given, convert_weights.ignored_by(model), "")
    used = [origin.key for named in origins.values() for origin, _ in named.values() if "in_proj" not in origin.key]
    assert len(used) == len(set(used))               # each for one of our tensors, but for q, k and v in one
    expected = {"sd15": {"position_ids"}, "sdxl": {"position_ids", "logit_scale"},
                "sd21": {"logit_scale", "text_projection", "resblocks.23."}}[family]
    assert all(any(part in name for part in expected) for name in dropped)
    assert len(dropped) == {"sd15": 1, "sd21": 14, "sdxl": 2}[family]
    assert set(published) == {o.key for named in origins.values() for o, _ in named.values()} | set(dropped)


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_rules_agree_with_an_independent_set_of_rules(family):
    model = convert_weights.FAMILIES[family]
    names = convert_weights.single_file_layout(model)["unet"][1]
    unet = {name.removeprefix("unet/"): name for name in manifest(family, "diffusers") if name.startswith("unet/")}
    weights = {"unet": {name: torch.empty(0) for name in unet}, "vae": {}, "text_encoder": {}, "text_encoder_2": {}}
    theirs = to_original(weights, "sd15" if family == "sd21" else family)
    ours = [convert_weights.find(name, "model.diffusion_model.", names, {}).key for name in unet]
    assert ours == list(theirs)[:len(unet)]


# ---- narrow models through every layout ----

@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_a_hugging_face_folder_arrives_bit_for_bit(tmp_path, family):
    weights = write_hf(tmp_path / "hf", family)
    (tmp_path / "out").mkdir()                       # an empty folder is used
    summary = convert(tmp_path / "hf", tmp_path / "out")
    check_folder(tmp_path / "out", family, weights)
    assert "left 0" in str(summary) and not summary.dropped
    convert(tmp_path / "hf", tmp_path / "again")
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_a_single_file_arrives_bit_for_bit(tmp_path, family):
    summary = convert(**write_single(tmp_path, family))
    check_folder(tmp_path / "out", family, random_weights(family))
    assert summary.counts("vae")["transformed"] == 8
    assert summary.counts("unet")["renamed"] == summary.counts("unet")["tensors"]
    dropped = {"sd15": "dropped 1: cond_stage_model.transformer.text_model.embeddings.position_ids",
               "sd21": "cond_stage_model.model.transformer.resblocks.3.* (12)",
               "sdxl": "conditioner.embedders.1.model.logit_scale"}
    assert dropped[family] in str(summary)


@pytest.mark.parametrize("dims", [2, 3, 4])
def test_old_autoencoder_names_and_shapes_are_accepted(tmp_path, dims):
    weights = write_hf(tmp_path / "hf", "sd15")
    old = {}
    for name, tensor in weights["vae"].items():
        for new, was in {".to_q": ".query", ".to_k": ".key", ".to_v": ".value", ".to_out.0": ".proj_attn"}.items():
            name = name.replace(new, was)
        attends = "attentions" in name and tensor.dim() == 2
        old[name] = tensor.reshape(*tensor.shape, *[1] * (dims - 2)) if attends else tensor
    save_file(old, hf_file(tmp_path / "hf", "vae"))
    summary = convert(tmp_path / "hf", tmp_path / "out")
    check_folder(tmp_path / "out", "sd15", weights)
    assert summary.counts("vae")["renamed"] == 16 and summary.counts("vae")["transformed"] == (0 if dims == 2 else 8)


def test_text_encoder_names_without_text_model_are_accepted(tmp_path):
    weights = write_hf(tmp_path / "hf", "sd15")
    bare = {name.removeprefix("text_model."): tensor for name, tensor in weights["text_encoder"].items()}
    save_file(bare | {"embeddings.position_ids": torch.arange(77)[None]}, hf_file(tmp_path / "hf", "text_encoder"))
    assert list(convert(tmp_path / "hf", tmp_path / "out").dropped) == ["text_encoder/embeddings.position_ids"]
    check_folder(tmp_path / "out", "sd15", weights)

    arguments = write_single(tmp_path, "sd15") | {"out_dir": tmp_path / "single"}
    bare = {name.replace("transformer.text_model.", "transformer."): tensor
            for name, tensor in load_file(arguments["source"]).items()}
    save_file(bare, arguments["source"])
    convert(**arguments)
    check_folder(tmp_path / "single", "sd15", weights)


@pytest.mark.parametrize("nested", [True, False])
def test_a_safe_ckpt_arrives_bit_for_bit(tmp_path, nested):
    arguments = write_single(tmp_path, "sd15")
    state = load_file(arguments["source"]) | {"betas": torch.zeros(1000)}
    data = {"state_dict": state, "epoch": 3, "optimizer_states": [torch.zeros(2)]} if nested else state
    torch.save(data, tmp_path / "model.ckpt", _use_new_zipfile_serialization=nested)
    summary = convert(**arguments | {"source": tmp_path / "model.ckpt"})
    check_folder(tmp_path / "out", "sd15", random_weights("sd15"))
    assert "betas" in summary.dropped and ("epoch" in summary.dropped) == nested


def test_averaged_weights_are_taken_on_request_only(tmp_path):
    averaged = {name: tensor + 1 for name, tensor in random_weights("sd15")["unet"].items()}
    plain = to_original({"unet": averaged, "vae": {}, "text_encoder": {}}, "sd15")
    extra = {"model_ema." + name.removeprefix("model.").replace(".", ""): tensor for name, tensor in plain.items()
             if name.startswith("model.")}
    extra |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    assert "model_ema.diffusion_modelinput_blocks00weight" in extra
    arguments = write_single(tmp_path, "sd15", extra)
    summary = convert(**arguments)
    check_folder(tmp_path / "out", "sd15", random_weights("sd15"))
    assert f"model_ema.* ({len(extra)})" in str(summary) and "--ema" in str(summary)

    summary = convert(**arguments | {"out_dir": tmp_path / "out2"}, ema=True)
    check_folder(tmp_path / "out2", "sd15", random_weights("sd15") | {"unet": averaged})
    assert f"model.diffusion_model.* ({len(averaged)})" in str(summary) and "--ema" not in str(summary)


def test_dtypes_stay_mixed_unless_one_is_asked_for(tmp_path):
    weights = write_hf(tmp_path / "hf", "sd15")
    mixed = {name: tensor.half() if i % 3 else tensor for i, (name, tensor) in enumerate(weights["unet"].items())}
    save_file(mixed, hf_file(tmp_path / "hf", "unet"))
    convert(tmp_path / "hf", tmp_path / "out")
    with safe_open(tmp_path / "out" / "unet.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"} and set(file.keys()) == mixed.keys()
        for name, tensor in mixed.items():
            assert file.get_tensor(name).dtype == tensor.dtype and torch.equal(file.get_tensor(name), tensor)
    for dtype in (torch.float16, torch.bfloat16):
        convert(tmp_path / "hf", tmp_path / str(dtype), dtype=dtype)
        check_folder(tmp_path / str(dtype), "sd15", {
            part: {name: tensor.to(dtype) for name, tensor in (mixed if part == "unet" else state).items()}
            for part, state in weights.items()})
        assert {t.dtype for t in load_file(tmp_path / str(dtype) / "vae.safetensors").values()} == {dtype}


def test_prediction_overrides_the_scheduler_file(tmp_path):
    write_hf(tmp_path / "hf", "sd21")
    convert(tmp_path / "hf", tmp_path / "out", prediction="epsilon")
    assert read_config(tmp_path / "out").prediction == "epsilon"


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_single_files_get_what_the_published_config_files_say(tmp_path, family):
    for name, data in manifest(family, "configs").items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(data))
    unused = {}
    model, sampler = convert_weights.hf_config(tmp_path, None, unused)
    assert sampler == {"sd15": "PNDMScheduler, which isn't here: choose a --sampler",
                       "sd21": "DDIMScheduler: --sampler ddim",
                       "sdxl": "EulerDiscreteScheduler: --sampler euler"}[family]
    assert model == convert_weights.family_config(family, model.prediction, Path("file"))
    vocab = {"!": 0} | {str(i): i for i in range(1, 49407)} | {"<|endoftext|>": 49407}
    assert convert_weights.with_tokenizers(model, vocab, [], tmp_path, unused) == model and not unused


def test_the_512_pixel_sd2_models_are_the_epsilon_ones():
    assert convert_weights.family_config("sd21", "epsilon", Path("file")).size == 512


def test_diffusers_own_folder_is_understood(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="compares with what diffusers itself saves")
    transformers = pytest.importorskip("transformers", reason="compares with what transformers itself saves")
    files = hf_files("sdxl")

    def text_config(part):
        data = files[f"{part}/config.json"]
        del data["architectures"], data["model_type"]                        # the classes write these themselves
        return transformers.CLIPTextConfig(**data)
    parts = {"unet": diffusers.UNet2DConditionModel(**files["unet/config.json"]),
             "vae": diffusers.AutoencoderKL(**files["vae/config.json"]),
             "text_encoder": transformers.CLIPTextModel(text_config("text_encoder")),
             "text_encoder_2": transformers.CLIPTextModelWithProjection(text_config("text_encoder_2"))}
    for part, module in parts.items():
        module.save_pretrained(tmp_path / "hf" / part)
    del files["scheduler/scheduler_config.json"]["set_alpha_to_one"]         # Euler's class doesn't know it
    scheduler = diffusers.EulerDiscreteScheduler(**files["scheduler/scheduler_config.json"])
    scheduler.save_pretrained(tmp_path / "hf" / "scheduler")
    for place, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        tokenizer = transformers.CLIPTokenizer(vocab=vocabulary(), merges=MERGES, pad_token=pad)
        tokenizer.save_pretrained(tmp_path / "hf" / place)
    (tmp_path / "hf/model_index.json").write_text("{}")
    convert(tmp_path / "hf", tmp_path / "out")
    weights = {part: {("text_model." if part.startswith("text") and not name.startswith("text_") else "") + name: tensor
                      for name, tensor in module.state_dict().items() if "position_ids" not in name}
               for part, module in parts.items()}
    check_folder(tmp_path / "out", replace(narrow("sdxl"), schedule=NoiseSchedule(
        spacing="leading", set_alpha_to_one=True)), weights)


# ---- bad input: one line, exit code 2, nothing left behind ----

def options(arguments: dict) -> list:
    return ["--config", arguments["config"], "--tokenizer", arguments["tokenizer"]]


def conv_in(channels: int) -> dict[str, torch.Tensor]:
    return {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, channels, 3, 3)}


@pytest.mark.parametrize("changes, words", [
    ({"model.diffusion_model.surprise.weight": torch.zeros(2)}, "surprise.weight"),
    ({"cond_stage_model.transformer.text_model.encoder.layers.7.mlp.fc1.bias": torch.zeros(2)}, "layers.7.mlp"),
    ({"model.diffusion_model.out.2.bias": torch.zeros(5)}, "shape (5,)"),
    ({"model.diffusion_model.out.2.bias": torch.zeros(4, dtype=torch.int8)}, "is quantised (int8, not floating point)"),
    ({"model.diffusion_model.out.2.weight.absmax": torch.zeros(4)}, "is quantised (bitsandbytes, 4 bits: it holds"),
    ({"model.diffusion_model.out.2.SCB": torch.zeros(4)}, "is quantised (bitsandbytes, 8 bits"),
    ({"scaled_fp8": torch.zeros(2)}, "is quantised (scaled float8"),
    (conv_in(9), "inpainting"), (conv_in(8), "InstructPix2Pix"), (conv_in(7), "shape (16, 7, 3, 3)"),
    ("first_stage_model.quant_conv.weight", "lacks 1 tensors of this model, the first is first_stage_model.quant_conv"),
])
def test_a_misfit_in_a_single_file_is_named(refused, tmp_path, changes, words):
    arguments = write_single(tmp_path, "sd15", *(({}, changes) if isinstance(changes, str) else (changes,)))
    message = refused(arguments["source"], *options(arguments))
    assert words in message and "model.safetensors" in message


@pytest.mark.parametrize("names, words", [
    (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "LoRA"),
    (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
    (["double_blocks.0.img_attn.qkv.weight"], "Flux"),
    (["control_model.input_blocks.0.0.weight"], "ControlNet"),
    (["down_blocks.0.resnets.0.conv1.weight"], "give the folder"),
    (["encoder.conv_in.weight", "decoder.conv_in.weight"], "autoencoder alone"),
    (["something"], "something"), (["blip.visual_encoder.cls_token"], "--reward imagereward"),
    (["model.diffusion_model.input_blocks.0.0.weight"], "no text encoder"),
    (["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.model.ln_final.weight"], "refiner"),
])
def test_a_file_of_another_kind_is_recognised(refused, tmp_path, names, words):
    save_file({name: torch.zeros(4, 4, 3, 3) for name in names}, tmp_path / "file.safetensors")
    assert words in refused(tmp_path / "file.safetensors")


def test_what_a_file_does_not_tell_must_be_given(refused, tmp_path):
    arguments = write_single(tmp_path, "sd21")
    message = refused(arguments["source"], "--tokenizer", arguments["tokenizer"])
    assert "--prediction v" in message and "--prediction epsilon" in message
    message = refused(arguments["source"], "--config", arguments["config"])
    assert "--tokenizer" in message and "bpe_simple_vocab_16e6.txt.gz" in message
    message = refused(arguments["source"], "--tokenizer", arguments["tokenizer"], "--prediction", "v")
    assert "shape" in message and "--config" in message                      # other widths than the published
    assert "--ema" in refused(arguments["source"], "--ema", *options(arguments))


def test_a_wrong_tokenizer_is_refused(refused, tmp_path):
    arguments = write_single(tmp_path, "sd15")
    run = [arguments["source"], "--config", arguments["config"], "--tokenizer"]
    (tmp_path / "vocab.gz").write_bytes(b"no gzip")
    assert "bpe_simple_vocab" in refused(*run, tmp_path / "vocab.gz")
    (tmp_path / "short.gz").write_bytes(gzip.compress(b"version\na b"))
    assert "has 515 tokens" in refused(*run, tmp_path / "short.gz")
    (tmp_path / "tokens" / "merges.txt").write_text("not fitting\n")
    assert "not CLIP's tokenizer" in refused(*run, tmp_path / "tokens")
    assert "there is no tokenizer" in refused(*run, tmp_path / "nothing")


@pytest.mark.parametrize("family, changes, words", [
    ("sd15", {"unet": {"in_channels": 9}}, "inpainting"), ("sd15", {"unet": {"in_channels": 8}}, "InstructPix2Pix"),
    ("sd15", {"unet": {"class_embed_type": "projection"}}, "class_embed_type"),
    ("sd15", {"unet": {"time_cond_proj_dim": 256}}, "time_cond_proj_dim"),
    ("sd15", {"unet": {"down_block_types": ["AttnDownBlock2D"] * 4}}, "holds 'AttnDownBlock2D', only CrossAttnDown"),
    ("sd15", {"unet": {"up_block_types": ["UpBlock2D"] * 4}}, "up_block_types"),
    ("sd15", {"unet": {"block_out_channels": [10, 10, 20, 20]}}, "can be built"),
    ("sd15", {"unet": {"block_out_channels": 16}}, "config file"),
    ("sd15", {"vae": {"latents_mean": [0, 0, 0, 0]}}, "latents_mean"),
    ("sd15", {"text_encoder": {"hidden_act": "relu"}}, "hidden_act"),
    ("sd15", {"text_encoder": {"vocab_size": 99}}, "shape"),
    ("sd15", {"scheduler": {"prediction_type": "sample"}}, "prediction_type"),
    ("sd15", {"scheduler": {"rescale_betas_zero_snr": True}}, "rescale_betas_zero_snr"),
    ("sd15", {"tokenizer": {"pad_token": "unheard of"}}, "unheard of"),
    ("sdxl", {"unet": {"projection_class_embeddings_input_dim": 20 + 5 * 8}}, "added condition"),
])
def test_an_unsupported_config_is_named(refused, tmp_path, family, changes, words):
    write_hf(tmp_path / "hf", family, **changes)
    assert words in refused(tmp_path / "hf")


def test_an_incomplete_folder_says_what_is_missing(refused, tmp_path):
    write_hf(tmp_path / "hf", "sdxl")
    for gone, words in {"unet/config.json": "unet/config.json", "tokenizer/vocab.json": "--tokenizer",
                        "scheduler/scheduler_config.json": "scheduler_config.json", "text_encoder": "refiner",
                        "vae/diffusion_pytorch_model.safetensors": "vae has no weights", "unet": "no folder unet",
                        }.items():
        (tmp_path / "hf" / gone).rename(tmp_path / "gone")
        assert words in refused(tmp_path / "hf")
        (tmp_path / "gone").rename(tmp_path / "hf" / gone)
    (tmp_path / "sd3" / "transformer").mkdir(parents=True)
    assert "Stable Diffusion 3" in refused(tmp_path / "sd3")
    assert "--ema" in refused(tmp_path / "hf", "--ema")
    for text, words in (("{", "vae/config.json"), ("{}", "block_out_channels")):
        (tmp_path / "hf/vae/config.json").write_text(text)
        assert words in refused(tmp_path / "hf")


def test_out_dir_that_holds_something_or_cannot_be_made_is_refused(refused, tmp_path):
    write_hf(tmp_path / "hf", "sd15")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("keep me")
    assert "isn't empty" in refused(tmp_path / "hf", out=tmp_path / "full")
    assert "isn't empty" in refused(tmp_path / "hf", out=tmp_path / "full" / "precious")
    assert "can't write" in refused(tmp_path / "hf", out=tmp_path / "full" / "precious" / "out")


def test_an_error_while_writing_leaves_nothing(refused, monkeypatch, tmp_path):
    write_hf(tmp_path / "hf", "sd15")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(convert_weights, "write_config", full)
    assert "No space left" in refused(tmp_path / "hf")


# ---- tokenizer ----

def test_tokenizer_gives_the_ids_of_transformers(tmp_path):
    vocab, merges = convert_weights.read_vocabulary(write_tokenizer(tmp_path / "tokens"))
    tokenizer = convert_weights.build_tokenizer(vocab, merges)
    for row in BPE["golden"]:
        assert tokenizer.encode(row["prompt"], add_special_tokens=False).ids == row["ids"], row["prompt"]
    (tmp_path / "one").mkdir()
    tokenizer.save(str(tmp_path / "one" / "tokenizer.json"))
    assert convert_weights.read_vocabulary(tmp_path / "one") == (vocab, merges)


def test_openai_file_implies_the_vocabulary(tmp_path):
    """With 48,894 made-up merges in place of the real ones, and more after them, as in the published file."""
    letters = [token for token, i in vocabulary().items() if i < 256]
    merges = [f"{a} {b}{end}" for end in ("", "</w>") for a in letters for b in letters]
    path = tmp_path / "bpe.txt.gz"
    path.write_bytes(gzip.compress("\n".join(["version", *merges]).encode()))
    vocab, used = convert_weights.read_vocabulary(path)
    assert len(vocab) == 49408 and len(used) == 48894 and vocab["<|endoftext|>"] == 49407
    assert list(vocab)[:512] == list(vocabulary())[:512]
    assert vocab["!"] == 0 and vocab["!</w>"] == 256 and vocab["!!"] == 512


def test_full_vocabulary_gives_the_published_ids():
    spec = importlib.util.find_spec("open_clip")
    file = spec and spec.origin and Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    if not file or not file.is_file():
        pytest.skip("the full vocabulary comes with open_clip, which is not installed")
    tokenizer = convert_weights.build_tokenizer(*convert_weights.read_vocabulary(file))
    for row in BPE["golden_full"]:
        assert tokenizer.encode(row["prompt"], add_special_tokens=False).ids == row["ids"], row["prompt"]


# ---- the command itself, and its memory ----

MEASURE = """
import re, sys, convert_weights
def peak():     # of this process alone, in MiB: getrusage's figure begins at the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
narrow, *sources, configs, tokens = sys.argv[1:]
convert_weights.convert(narrow, narrow + "-out")     # so that all code is loaded
before = peak()
for source in sources:
    sys.argv[1:] = source, source + "-out", "--config", configs, "--tokenizer", tokens
    convert_weights.main()
    print("MiB", peak() - before)
"""


def test_the_command_takes_far_less_memory_than_twice_the_largest_component(tmp_path):
    if not Path("/proc/self/status").is_file():
        pytest.skip("reads the peak memory as Linux reports it")
    unet = UNetConfig(channels=(16, 16, 208, 208), heads=(2, 2, 2, 2), context_dim=16, groups=8)
    write_configs(tmp_path / "big", "sd15", unet={"block_out_channels": unet.channels})
    big = {name: torch.zeros(tensor.shape) for name, tensor in build(UNet, unet).state_dict().items()}
    state = to_original(random_weights("sd15") | {"unet": big}, "sd15")
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "model.ckpt")
    write_hf(tmp_path / "narrow", "sd15")
    places = ["narrow", "model.safetensors", "model.ckpt", "big", "narrow/tokenizer"]
    done = subprocess.run([sys.executable, "-c", MEASURE, *(tmp_path / place for place in places)],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "left 0" in done.stdout, done.stderr
    safe, pickled = (float(x) for x in re.findall(r"MiB (.*)", done.stdout))
    largest = (tmp_path / "model.ckpt-out" / "unet.safetensors").stat().st_size / 2**20
    print(f"component {largest:.0f} MiB, additional peak {safe:.0f} MiB, from a pickle {pickled:.0f} MiB")
    # a pickle is mapped, and touched pages of the map count; from safetensors one tensor is in memory at a time
    assert largest > 60 and 0 < safe < 0.3 * largest and pickled < 1.2 * largest
