"""convert_weights.py --reward: published layouts become folders that score as their authors' code does.

`pytest -s` prints how far the scores are from those of open_clip and transformers.
"""
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_convert_weights import VOCAB_SIZE, write_tokenizer
from test_reward import NARROW_IMAGEREWARD, PIECES, random_model
from torch import Tensor, nn

import convert_weights
import txt2img
from command import InputError
from convert_weights import REWARDS, convert_reward
from folder import TINY
from reward import ClipReward, ImageReward, add_rewards, load_reward, preprocess

# heads of 20 numbers, as ViT-H has such of 80: the file's shapes don't tell how many there are
OPENCLIP = {"model_cfg": {
    "embed_dim": 24, "text_cfg": {"context_length": 77, "vocab_size": VOCAB_SIZE, "width": 32, "heads": 4, "layers": 3},
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 40, "head_width": 20, "patch_size": 8, "mlp_ratio": 3.0}},
    "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}}
PROMPTS = ["cat red", "", "a dog! 22 cats, many words"]


def openclip_shapes() -> dict[str, tuple[int, ...]]:
    """The names of a file of OpenCLIP, written down here a second time."""
    shapes = {"positional_embedding": (77, 32), "text_projection": (32, 24), "logit_scale": (),
              "token_embedding.weight": (VOCAB_SIZE, 32), "visual.class_embedding": (40,),
              "visual.positional_embedding": (17, 40), "visual.proj": (40, 24), "visual.conv1.weight": (40, 3, 8, 8)}
    norms = {"ln_final": 32, "visual.ln_pre": 40, "visual.ln_post": 40}
    for tower, width, hidden, layers in (("transformer", 32, 128, 3), ("visual.transformer", 40, 120, 2)):
        for n in range(layers):
            block = f"{tower}.resblocks.{n}"
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
            for name, shape in {"attn.in_proj_": (3 * width, width), "attn.out_proj.": (width, width),
                                "mlp.c_fc.": (hidden, width), "mlp.c_proj.": (width, hidden)}.items():
                shapes |= {f"{block}.{name}weight": shape, f"{block}.{name}bias": shape[:1]}
    return shapes | {f"{name}.{kind}": (width,) for name, width in norms.items() for kind in ("weight", "bias")}


def random_openclip() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) + ("ln_" in name and name.endswith("weight"))
            for name, shape in openclip_shapes().items()}


def write_hps(folder: Path, state: dict[str, Tensor] | None = None, config: dict = OPENCLIP) -> dict[str, Path]:
    """The arguments of `convert_reward` for a narrow HPSv2, in the form of the published file."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": 1, "state_dict": random_openclip() if state is None else state}, folder / "hps.pt")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return {"source": folder / "hps.pt", "out_dir": folder / "hps", "kind": "hps",
            "config": folder / "open_clip_config.json", "tokenizer": write_tokenizer(folder / "tokens")}


def write_imagereward(folder: Path, changes: dict[str, Tensor] | None = None) -> dict[str, Path]:
    """The same for ImageReward, with what the published file has beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.float() for name, tensor in random_model().state_dict().items()}
    state |= {"blip.text_encoder.embeddings.position_ids": torch.arange(16)[None]}
    state |= {f"blip.{name}_proj.{kind}": torch.zeros(3) for name in ("vision", "text") for kind in ("weight", "bias")}
    torch.save(state | (changes or {}), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return {"source": folder / "ImageReward.pt", "out_dir": folder / "imagereward", "kind": "imagereward",
            "tokenizer": folder / "vocab.txt"}


@pytest.fixture()
def narrow(monkeypatch) -> None:
    """ImageReward is of one size only; here it is a narrow one."""
    monkeypatch.setitem(convert_weights.REWARDS, "imagereward", {"image_reward": NARROW_IMAGEREWARD})


# ---- the published models ----

def test_the_published_hpsv2_has_986_million_parameters_in_686_tensors():
    with torch.device("meta"):
        parts = {part: convert_weights.MODULES[part](c) for part, c in REWARDS["hps"].items()}
    assert sum(p.numel() for part in parts.values() for p in part.parameters()) == 986_109_441 - 1    # logit_scale
    layout = {"text_encoder": convert_weights.openclip_names(REWARDS["hps"]["text_encoder"]),
              "image_encoder": convert_weights.openclip_names(REWARDS["hps"]["image_encoder"])}
    keys = {convert_weights.find(name, "", layout[part], {}).key for part in parts for name in parts[part].state_dict()}
    assert len(keys | {"logit_scale"}) == 686


def test_openclips_own_config_of_vit_h_is_that_of_hpsv2(tmp_path):
    (tmp_path / "ViT-H-14.json").write_text(json.dumps({            # as in open_clip's model_configs
        "embed_dim": 1024, "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80,
                                          "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}}))
    assert convert_weights.openclip_config(tmp_path / "ViT-H-14.json") == REWARDS["hps"]


# ---- narrow models through every layout ----

def test_hpsv2_arrives_bit_for_bit(tmp_path):
    arguments = write_hps(tmp_path)
    summary, state = convert_reward(**arguments), random_openclip()
    reward = load_reward(tmp_path / "hps")
    text, image = reward.text.state_dict(), reward.image.state_dict()
    assert isinstance(reward, ClipReward) and reward.text.config.activation == "gelu" and reward.text.config.pad == 0
    assert torch.equal(image["visual_projection.weight"], state["visual.proj"].T)
    assert torch.equal(text["text_projection.weight"], state["text_projection"].T)
    for tower, ours, theirs in ((text, "text_model.encoder.layers.2", "transformer.resblocks.2"),
                                (image, "vision_model.encoder.layers.1", "visual.transformer.resblocks.1")):
        for kind in ("weight", "bias"):
            packed = [tower[f"{ours}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            assert torch.equal(torch.cat(packed), state[f"{theirs}.attn.in_proj_{kind}"])
            assert torch.equal(tower[f"{ours}.mlp.fc2.{kind}"], state[f"{theirs}.mlp.c_proj.{kind}"])
    total = sum(p.numel() for tower in (text, image) for p in tower.values())
    assert total == sum(tensor.numel() for tensor in state.values()) - 1     # each number once, but logit_scale
    assert summary.dropped.keys() == {"logit_scale", "epoch"} and f"hps, {total:,} parameters" in str(summary)


def run_openclip(state: dict[str, Tensor], images: Tensor, ids: Tensor) -> Tensor:
    """The cosines of a narrow OpenCLIP by PyTorch's own layers, whose attention keeps q, k, v in one tensor too."""
    def tower(x: Tensor, prefix: str, layers: int, heads: int, causal: bool) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype) if causal else None
        for n in range(layers):
            own = {name.removeprefix(f"{prefix}resblocks.{n}."): p for name, p in state.items()
                   if name.startswith(f"{prefix}resblocks.{n}.")}
            layer = nn.TransformerEncoderLayer(x.shape[2], heads, len(own["mlp.c_fc.bias"]), 0.0, "gelu",
                                               batch_first=True, norm_first=True).eval()
            for new, old in {"self_attn.": "attn.", "norm1.": "ln_1.", "norm2.": "ln_2.", "linear1.": "mlp.c_fc.",
                             "linear2.": "mlp.c_proj."}.items():
                own = {name.replace(old, new): p for name, p in own.items()}
            layer.load_state_dict(own)
            x = layer(x, src_mask=mask)
        return x

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.conv2d(images, state["visual.conv1.weight"], stride=8).flatten(2).mT
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = tower(norm(x + state["visual.positional_embedding"], "visual.ln_pre"), "visual.transformer.", 2, 2, False)
    image = norm(x[:, 0], "visual.ln_post") @ state["visual.proj"]
    x = tower(state["token_embedding.weight"][ids] + state["positional_embedding"], "transformer.", 3, 4, True)
    text = norm(x, "ln_final")[torch.arange(len(ids)), ids.argmax(dim=1)] @ state["text_projection"]
    return (F.normalize(image, dim=-1) * F.normalize(text, dim=-1)).sum(dim=-1)


@torch.no_grad()
def check_scores(reward: ClipReward, towers: Callable[[Tensor, Tensor], Tensor], pad: int, name: str) -> None:
    """The reward agrees with towers: preprocessed pictures and padded ids -> cosines."""
    images, ids = torch.rand(3, 3, 32, 32), reward.tokenizer(PROMPTS, 77, pad)[0]
    assert ids[0, -1] == pad
    ours, theirs = reward(images, PROMPTS), towers(preprocess(images, reward.image.config), ids)
    print(f"{name}: {(ours - theirs).abs().max():.1e}")
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_hpsv2_scores_by_the_cosine_of_its_layout_run_by_pytorchs_layers(tmp_path):
    convert_reward(**write_hps(tmp_path))
    check_scores(load_reward(tmp_path / "hps"), partial(run_openclip, random_openclip()), 0, "PyTorch's layers")


def open_clip():
    """The package, whose towers don't need torchvision: where that is absent or doesn't load, something stands in."""
    pytest.importorskip("transformers", reason="open_clip imports it")       # and it must not see the stand-ins
    absent = ["ftfy", "torchvision", "torchvision.ops", "torchvision.ops.misc", "torchvision.transforms",
              "torchvision.transforms.functional"]
    try:
        import torchvision.transforms  # noqa: F401
        absent = ["ftfy"]
    except (ImportError, RuntimeError):
        pass
    known = {name: sys.modules.get(name) for name in absent}
    sys.modules.update({name: mock.MagicMock() for name in absent})
    try:
        return pytest.importorskip("open_clip", reason="parity needs open_clip_torch (.ci/run)", exc_type=ImportError)
    finally:
        for name in absent:
            sys.modules.pop(name)
            if known[name] is not None:
                sys.modules[name] = known[name]


@torch.no_grad()
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_an_openclip_scores_as_open_clip_itself(tmp_path, quick_gelu):
    config = {"model_cfg": OPENCLIP["model_cfg"] | {"quick_gelu": quick_gelu}}
    peer = open_clip().model.CLIP(**config["model_cfg"]).eval()
    generator = torch.Generator().manual_seed(0)
    for p in peer.parameters():
        p += 0.2 * torch.randn(p.shape, generator=generator)
    save_file(peer.state_dict(), tmp_path / "open_clip_model.safetensors")
    arguments = write_hps(tmp_path, config=config) | {"source": tmp_path / "open_clip_model.safetensors"}
    convert_reward(**arguments | {"kind": "clip"})

    def towers(images: Tensor, ids: Tensor) -> Tensor:
        return (peer.encode_image(images, normalize=True) * peer.encode_text(ids, normalize=True)).sum(dim=-1)
    check_scores(load_reward(tmp_path / "hps"), towers, 0, f"open_clip, quick_gelu {quick_gelu}")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_a_clip_of_transformers_scores_as_there(tmp_path, kind):
    transformers = pytest.importorskip("transformers", reason="parity needs transformers (requirements-dev.txt)")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "projection_dim": 16}
    peer = transformers.CLIPModel(transformers.CLIPConfig(
        text_config={"hidden_size": 16, "vocab_size": VOCAB_SIZE, "eos_token_id": VOCAB_SIZE - 1,
                     "bos_token_id": VOCAB_SIZE - 2, **sizes},
        vision_config={"hidden_size": 32, "image_size": 32, "patch_size": 8, **sizes}, projection_dim=16)).eval()
    for p in peer.parameters():
        p += 0.2 * torch.randn_like(p)
    peer.save_pretrained(tmp_path / "clip")
    write_tokenizer(tmp_path / "clip")
    (tmp_path / "clip/preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3],
                                                                        "image_std": [0.2, 0.3, 0.4]}))
    if kind.endswith(".bin"):
        state = load_file(tmp_path / "clip/model.safetensors")
        torch.save(state | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, tmp_path / "clip" / kind)
        (tmp_path / "clip/model.safetensors").unlink()
    summary = convert_reward(tmp_path / "clip", tmp_path / "out", "clip")
    assert "logit_scale" in summary.dropped
    reward = load_reward(tmp_path / "out")
    assert reward.image.config.mean == (0.5, 0.4, 0.3) and reward.text.config.activation == "quick_gelu"

    def towers(images: Tensor, ids: Tensor) -> Tensor:
        out = peer(input_ids=ids, pixel_values=images)
        return (out.image_embeds * out.text_embeds).sum(dim=-1)
    check_scores(reward, towers, VOCAB_SIZE - 1, f"transformers, {kind}")    # padded as OpenAI pads


def test_imagereward_arrives_unchanged(tmp_path, narrow):
    summary = convert_reward(**write_imagereward(tmp_path))
    reward, model = load_reward(tmp_path / "imagereward"), random_model().float()
    assert isinstance(reward, ImageReward) and reward.model.config == NARROW_IMAGEREWARD
    assert reward.model.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, reward.model.state_dict()[name]) for name, tensor in model.state_dict().items())
    images, ids = torch.rand(1, 3, 32, 32), torch.tensor([[2, 6, 8, 3, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(reward(images, ["Red circle"]), model(images, ids, ids != 0))
    assert set(summary.dropped.values()) == {"*position_ids", "blip.vision_proj.*", "blip.text_proj.*"}
    assert summary.counts("image_reward")["renamed"] == summary.counts("image_reward")["transformed"] == 0


def test_berts_tokenizer_json_serves_like_its_vocab_txt(tmp_path, narrow):
    arguments = write_imagereward(tmp_path)
    convert_reward(**arguments)
    (tmp_path / "bert").mkdir()
    shutil.copy(tmp_path / "imagereward/tokenizer.json", tmp_path / "bert")
    convert_reward(**arguments | {"tokenizer": tmp_path / "bert", "out_dir": tmp_path / "again"})
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "imagereward/tokenizer.json").read_bytes()


def test_half_precision_is_written_on_request(tmp_path, narrow):
    for arguments in (write_hps(tmp_path), write_imagereward(tmp_path)):
        convert_reward(**arguments, dtype=torch.float16)
        for path in arguments["out_dir"].glob("*.safetensors"):
            assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
        assert load_reward(arguments["out_dir"])(torch.rand(1, 3, 32, 32), ["red"]).isfinite().all()


# ---- the rewards that come out ----

@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A narrow folder of each kind."""
    place = tmp_path_factory.mktemp("rewards")
    with mock.patch.dict(convert_weights.REWARDS, {"imagereward": {"image_reward": NARROW_IMAGEREWARD}}):
        both = [write_hps(place), write_imagereward(place)]
        for arguments in both:
            convert_reward(**arguments)
    return {arguments["kind"]: arguments["out_dir"] for arguments in both} | {"tiny": TINY / "clip"}


@pytest.mark.parametrize("kind", ["hps", "imagereward"])
def test_the_gradient_of_the_score_by_a_pixel_is_that_of_finite_differences(folders, kind):
    reward = load_reward(folders[kind], dtype=torch.float64)
    torch.manual_seed(0)
    images = torch.rand(2, 3, 40, 52, dtype=torch.float64, requires_grad=True)
    prompts = ["a red circle", "cat"]
    gradient, = torch.autograd.grad(reward(images, prompts).sum(), images)
    for index in ((0, 0, 20, 30), (1, 2, 35, 9), (0, 1, 3, 24)):
        step = torch.zeros_like(images)
        step[index] = 1e-5
        with torch.no_grad():
            slope = (reward(images + step, prompts) - reward(images - step, prompts)).sum().item() / 2e-5
        assert slope == pytest.approx(gradient[index].item(), rel=1e-4, abs=0) and abs(slope) > 1e-6


@torch.no_grad()
def test_several_rewards_add_up_to_minus_the_released_loss(folders):
    hps, imagereward = load_reward(folders["hps"]), load_reward(folders["imagereward"])
    images, prompts = torch.rand(3, 3, 32, 32), ["a red circle", "cat", "blue"]
    theirs = -(F.relu(2 - imagereward(images, prompts)) + 5 * (1 - hps(images, prompts)))
    assert torch.allclose(add_rewards([imagereward, hps])(images, prompts), theirs, rtol=0, atol=1e-6)
    assert add_rewards([hps]) is hps
    imagereward.model.mlp.layers[-1].bias += 1e3                             # a score above 2 is good enough
    assert torch.allclose(add_rewards([imagereward, hps])(images, prompts), -5 * (1 - hps(images, prompts)), atol=1e-6)


@pytest.mark.parametrize("make, words", [
    (lambda place: place / "nowhere", "holds no reward"), (lambda place: TINY, "makes pictures"),
    (lambda place: write_hps(place)["source"], "convert it first: python convert_weights.py"),
    (lambda place: write_hps(place)["tokenizer"], "holds no reward")])
def test_what_is_no_reward_is_named(tmp_path, make, words):
    with pytest.raises(InputError, match=words):
        load_reward(make(tmp_path))


@pytest.mark.parametrize("kinds", [["imagereward"], ["imagereward", "hps"], ["clip", "hps"]])
def test_masks_are_looked_for_by_rewards_from_the_command_line(tmp_path, command, folders, kinds):
    named = ":".join("clip" if kind == "clip" else str(folders[kind]) for kind in kinds)
    code, _, stderr = command(txt2img.main, "a red circle", "--steps", 1, "--device", "cpu", "--masks",
                              f"search,{named},iterations=1", "--out", tmp_path / "o.png")
    assert code == 0 and (tmp_path / "o.png").is_file(), stderr


# ---- bad input: one line, exit code 2, nothing left behind ----

def flags(arguments: dict) -> list:
    """The command line of `convert_reward(**arguments)`, after OUT_DIR."""
    names = {"reward": "kind", "config": "config", "tokenizer": "tokenizer"}
    return [part for flag, name in names.items() if name in arguments for part in (f"--{flag}", arguments[name])]


def openclip_with(**changes: Tensor | None) -> dict[str, Tensor]:
    state = random_openclip() | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize("changes, words", [
    ({"visual__surprise": torch.zeros(2)}, "visual.surprise"), ({"visual__proj": None}, "lacks 1 tensors"),
    ({"visual__transformer__resblocks__1__attn__in_proj_weight": torch.zeros(121, 40)}, "shape (121, 40)"),
    ({"text_projection": torch.zeros(32, 23)}, "shape (32, 23)"),
    ({"visual__transformer__resblocks__7__ln_1__bias": torch.zeros(40)}, "resblocks.7.ln_1.bias"),
    ({"visual__conv1__weight": torch.zeros(40, 3, 8, 8, dtype=torch.int8)}, "floating point")])
def test_a_misfit_in_hpsv2_is_named(refused, tmp_path, changes, words):
    arguments = write_hps(tmp_path, openclip_with(**changes))
    message = refused(arguments["source"], *flags(arguments))
    assert words in message and "hps.pt" in message


@pytest.mark.parametrize("changes, words", [
    ({"blip.surprise": torch.zeros(2)}, "blip.surprise"), ({"mlp.layers.7.bias": torch.zeros(2)}, "shape (2,)"),
    ({"blip.visual_encoder.pos_embed": torch.zeros(1, 5, 24)}, "shape (1, 5, 24)")])
def test_a_misfit_in_imagereward_is_named(refused, tmp_path, narrow, changes, words):
    arguments = write_imagereward(tmp_path, changes)
    message = refused(arguments["source"], *flags(arguments))
    assert words in message and "ImageReward.pt" in message and "--config" not in message


@pytest.mark.parametrize("name, kind, words", [
    ("ln_final.weight", "imagereward", "--reward clip, or hps"),
    ("blip.visual_encoder.cls_token", "hps", "--reward imagereward"),
    ("vision_model.post_layernorm.weight", "clip", "give its folder"),
    ("model.diffusion_model.input_blocks.0.0.weight", "hps", "leave out --reward"), ("something", "clip", "something")])
def test_a_file_of_another_kind_is_recognised(refused, tmp_path, name, kind, words):
    save_file({name: torch.zeros(4, 4)}, tmp_path / "file.safetensors")
    message = refused(tmp_path / "file.safetensors", "--reward", kind)
    assert words in message and "is not" in message


def test_what_a_file_does_not_tell_must_be_given_and_nothing_more(refused, tmp_path, narrow):
    hps, imagereward = write_hps(tmp_path), write_imagereward(tmp_path)
    hps, config, tokenizer = hps["source"], ("--config", hps["config"]), ("--tokenizer", hps["tokenizer"])
    message = refused(hps, "--reward", "hps", *config)
    assert "--tokenizer" in message and "bpe_simple_vocab_16e6.txt.gz" in message
    message = refused(hps, "--reward", "clip", *tokenizer)
    assert "open_clip_config.json" in message and "heads" in message
    message = refused(hps, "--reward", "hps", *tokenizer)
    assert "shape" in message and "--config" in message                      # ViT-H unless a config says otherwise
    run = [imagereward["source"], "--reward", "imagereward"]
    message = refused(*run)
    assert "--tokenizer" in message and "bert-base-uncased" in message
    assert "--prediction and --ema" in refused(*run, "--ema")
    assert "--prediction and --ema" in refused(*run, "--prediction", "v")
    assert "--config" in refused(*run, *config)


def test_a_wrong_tokenizer_is_refused(refused, tmp_path, narrow):
    hps, imagereward = write_hps(tmp_path), write_imagereward(tmp_path)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "short.txt").write_text("\n".join(PIECES[:-1]), encoding="utf-8")
    for tokenizer, words in ((hps["tokenizer"], "no vocab.txt or tokenizer.json"),
                             (hps["tokenizer"] / "merges.txt", "not BERT's vocabulary"),
                             (tmp_path / "binary.txt", "isn't a text file"),
                             (tmp_path / "short.txt", "has 19 tokens, but the text tower has 20")):
        assert words in refused(imagereward["source"], *flags(imagereward | {"tokenizer": tokenizer}))
    assert "bpe_simple_vocab" in refused(hps["source"], *flags(hps | {"tokenizer": imagereward["tokenizer"]}))


@pytest.mark.parametrize("place, changes, words", [
    ("model_cfg", {"custom_text": True}, "custom_text"), ("text_cfg", {"hf_model_name": "roberta"}, "hf_model_name"),
    ("vision_cfg", {"timm_model_name": "convnext"}, "timm_model_name"), ("vision_cfg", {"layers": [3, 4]}, "layers"),
    ("vision_cfg", {"width": "wide"}, "config file"), ("vision_cfg", {"head_width": 64}, "heads is 0"),
    ("preprocess_cfg", {"resize_mode": "squash"}, "resize_mode"),
    ("vision_cfg", {"head_width": 12}, "can't be split into 3 heads"), ("text_cfg", {"heads": 0}, "heads is 0")])
def test_an_openclip_that_is_not_made_of_these_towers_is_named(refused, tmp_path, place, changes, words):
    config = json.loads(json.dumps(OPENCLIP))
    (config if place in config else config["model_cfg"])[place].update(changes)
    arguments = write_hps(tmp_path, config=config) | {"kind": "clip"}
    assert words in refused(arguments["source"], *flags(arguments))


def test_a_clip_folder_that_is_none_is_named(refused, tmp_path):
    (tmp_path / "clip").mkdir()
    run = [tmp_path / "clip", "--reward"]
    assert "there is no" in refused(*run, "clip") and "config.json" in refused(*run, "clip")
    for entries, words in (({"model_type": "siglip"}, "siglip"), ({"model_type": "clip"}, "text_config"),
                           ({"model_type": "clip", "text_config": {}, "vision_config": {}}, "has no weights")):
        (tmp_path / "clip/config.json").write_text(json.dumps(entries))
        assert words in refused(*run, "clip")
    assert "HPS_v2.1_compressed.pt" in refused(*run, "hps") and "ImageReward.pt" in refused(*run, "imagereward")


def test_the_command_converts_and_says_what_it_dropped(command, tmp_path):
    arguments = write_hps(tmp_path)
    code, out, _ = command(convert_weights.main, arguments["source"], arguments["out_dir"], *flags(arguments),
                           "--dtype", "float16")
    assert code == 0 and "dropped 2: epoch, logit_scale" in out
    files = {path.name for path in arguments["out_dir"].iterdir()}
    assert files == {"config.json", "tokenizer.json", "text_encoder.safetensors", "image_encoder.safetensors"}
