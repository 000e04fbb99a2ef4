"""folder.py: a config.json with illegal values is refused, and damaged files are found."""
import json
import random
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from conftest import make_folder

from clip_text import TextConfig
from command import InputError
from folder import RANGES, TINY, WORDS, ModelConfig, check_digests, read_config, write_config
from reward import ImageConfig, ImageRewardConfig, load_reward
from sampler import NoiseSchedule
from stable_diffusion import StableDiffusion
from unet import UNetConfig
from vae import VAEConfig

CONFIGS = (ModelConfig, NoiseSchedule, UNetConfig, VAEConfig, TextConfig, ImageConfig, ImageRewardConfig)


def test_every_number_and_word_of_a_config_has_legal_values():
    for kind in CONFIGS:
        for field in fields(kind):
            limited = field.name in RANGES or field.name in WORDS
            free = field.type in (bool, dict[str, str]) or is_dataclass(field.type) or field.type == TextConfig | None
            assert limited != free, f"{kind.__name__}.{field.name}"


@pytest.mark.parametrize("place, value, words", [
    ("schedule.train_steps", -1, "train_steps is -1, not 1 to 100000"), ("schedule.train_steps", 0, "train_steps is 0"),
    ("schedule.train_steps", 1e30, "train_steps can't be 1e+30"), ("schedule.steps_offset", 1e30, "steps_offset can't"),
    ("schedule.steps_offset", -50, "steps_offset is -50, not 0 to 999"), ("schedule.beta_start", -1, "beta_start is"),
    ("schedule.beta_end", 0, "beta_end is 0"), ("schedule.beta_end", float("nan"), "beta_end is nan"),
    ("schedule.betas", "cosine", "betas is 'cosine', not one of scaled_linear, linear"),
    ("vae.scaling", -1, "scaling is -1"), ("vae.scaling", None, "scaling can't be None"),
    ("vae.scaling", float("inf"), "scaling is inf"), ("text_encoder.pad", -1, "pad is -1"),
    ("text_encoder.pad", 10**6, "pad is 1000000, but the vocabulary ends at 7"), ("text_encoder.pad", 8, "pad is 8"),
    ("unet.heads", [-4, 2], "heads is (-4, 2), not 1 to 1024, 1 to 8 of them"), ("unet.groups", -8, "groups is -8"),
    ("unet.layers", 2**31, "layers is 2147483648, not 1 to 64"), ("text_encoder.layers", 2**31, "layers is 2147483648"),
    ("unet.channels", [8] * 9, "1 to 8 of them"), ("unet.channels", [], "1 to 8 of them"), ("size", 0, "size is 0"),
    ("unet.depth", [1] * 1000, "..."), ("schedule", 5, "not a JSON object"), ("digests", {"a": 1}, "digests can't be")])
def test_an_illegal_value_is_named_with_the_legal_ones(tmp_path, place, value, words):
    make_folder(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    data = json.loads(path.read_text())
    *outer, name = place.split(".")
    (data[outer[0]] if outer else data)[name] = value
    path.write_text(json.dumps(data))
    with pytest.raises(InputError) as error:
        StableDiffusion.load(tmp_path / "model")
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_json_that_is_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"family": ' + "[" * 100_000)
    with pytest.raises(InputError, match="config.json is not valid JSON"):
        read_config(tmp_path)
    with pytest.raises(InputError, match="config.json can't be read"):
        load_reward(tmp_path)


# ------------------------------------------------------------------------------------------------------------- digests

def test_the_embedded_model_has_digests_and_fits_them():
    assert read_config(TINY).digests.keys() == {"config.json", "tokenizer.json", "unet.safetensors", "vae.safetensors",
                                                "text_encoder.safetensors"}
    check_digests(TINY)


@pytest.mark.parametrize("sdxl", [False, True])
def test_every_file_has_a_digest_and_any_damage_is_found(tmp_path, sdxl):
    folder = make_folder(tmp_path / "model", sdxl)
    check_digests(folder)
    files = [path for path in folder.iterdir() if path.name != "config.json"]
    assert {path.name for path in files} | {"config.json"} == read_config(folder).digests.keys()
    chance = random.Random(0)
    for path in files:
        whole = path.read_bytes()
        for place in (0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(3))):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:])
            with pytest.raises(InputError, match=path.name) as error:
                check_digests(folder)
            assert "\n" not in str(error.value)
        path.write_bytes(whole)
    (folder / "vae.safetensors").unlink()
    with pytest.raises(InputError, match="vae.safetensors is not the file that was written with this model"):
        check_digests(folder)


def test_a_changed_setting_is_found_and_a_changed_layout_is_none(tmp_path):
    folder = make_folder(tmp_path / "model")
    path = folder / "config.json"
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text)).replace("\n", "\r\n"))
    check_digests(folder)
    path.write_text(text.replace("0.012", "0.011"))
    with pytest.raises(InputError, match="config.json is not the file"):
        check_digests(folder)
    write_config(folder, read_config(folder))                                # now this is the model
    check_digests(folder)
    data = json.loads(text)
    del data["digests"]
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="has no digests"):
        check_digests(folder)
    assert StableDiffusion.load(folder).config.digests == {}                 # older models still load


def flip(path: Path) -> None:
    """Change the last number of a weight file, which stays complete."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def test_loading_verifies_tiny_models_always_and_others_on_request(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "tiny")
    StableDiffusion.load(folder)
    flip(folder / "clip" / "image_encoder.safetensors")
    with pytest.raises(InputError, match="clip/image_encoder.safetensors is not the file"):
        StableDiffusion.load(folder)
    folder = make_folder(tmp_path / "sdxl", sdxl=True)
    flip(folder / "unet.safetensors")
    StableDiffusion.load(folder)
    with pytest.raises(InputError, match="unet.safetensors is not the file"):
        StableDiffusion.load(folder, verify=True)
