"""stable_diffusion.py: load a model folder, encode prompts, sample, encode and decode pictures."""
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_folder, randn
from safetensors.torch import load_file, save_file

from cache import DeepCache
from clip_text import Tokenizer
from command import InputError
from folder import TINY, read_config, write_config
from freescale import FreeScale
from freeu import FreeU
from stable_diffusion import StableDiffusion
from vae import VAE


@pytest.fixture(scope="module")
def sd(narrow) -> StableDiffusion:
    return StableDiffusion.load(narrow)


@pytest.fixture(scope="module")
def xl(narrow_xl) -> StableDiffusion:
    return StableDiffusion.load(narrow_xl)


# ---------------------------------------------------------------------------------------------------------------- load

LOAD = """
import sys
from pathlib import Path

from stable_diffusion import StableDiffusion

def peak():
    return 1024 * int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x).split()[1])

StableDiffusion.load(sys.argv[1])                  # libraries are loaded with the first model
before = peak()
sd = StableDiffusion.load(sys.argv[2])
sum(float(p.flatten()[::1024].sum()) for p in sd.unet.parameters())        # every page is read
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux says how much memory a process had")
def test_loading_never_holds_two_copies_of_the_weights(narrow, tmp_path):
    model = make_folder(tmp_path / "large", channels=(256, 768))
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    done = subprocess.run([sys.executable, "-c", LOAD, narrow, model], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert size > 200e6 and 0.9 * size < int(done.stdout) < 1.2 * size


def test_the_sdxl_autoencoder_stays_in_float32_when_the_rest_is_float16(narrow_xl, narrow):
    sd = StableDiffusion.load(narrow_xl, dtype=torch.float16)
    assert sd.unet.conv_in.weight.dtype == torch.float16 and sd.vae.quant_conv.weight.dtype == torch.float32
    assert StableDiffusion.load(narrow, dtype=torch.float16).vae.quant_conv.weight.dtype == torch.float16


def test_half_precision_stays_close_to_float32(narrow, sd):
    full, half = (model.sample("a circle", steps=3, cfg_scale=2)
                  for model in (sd, StableDiffusion.load(narrow, dtype=torch.bfloat16)))
    assert half.isfinite().all() and (half - full).abs().max() < 0.1 * full.abs().max()


def test_config_json_round_trips(narrow, tmp_path):
    config = read_config(narrow)
    write_config(tmp_path, config)
    assert read_config(tmp_path) == config and config.unet.channels == (8, 16)


def edit_config(change):
    def damage(path: Path) -> None:
        data = json.loads((path / "config.json").read_text())
        change(data)
        (path / "config.json").write_text(json.dumps(data))
    return damage


def edit_unet(change):
    def damage(path: Path) -> None:
        state = load_file(path / "unet.safetensors")
        change(state)
        save_file(state, path / "unet.safetensors")
    return damage


def cut(path: Path) -> None:
    data = (path / "unet.safetensors").read_bytes()
    (path / "unet.safetensors").write_bytes(data[:len(data) // 2])


@pytest.mark.parametrize("damage,words", [
    (shutil.rmtree, "convert_weights.py SOURCE"),
    (lambda p: (p / "config.json").unlink(), "python convert_weights.py"),
    (lambda p: (p / "config.json").write_text("{"), "not valid JSON"),
    (lambda p: (p / "config.json").write_text("[]"), "converted model"),
    (lambda p: (p / "vae.safetensors").unlink(), "there is no file"),
    (lambda p: (p / "tokenizer.json").write_text("{}"), "not a CLIP tokenizer"),
    (cut, "not a complete safetensors file"),
    (lambda p: (p / "unet.safetensors").write_bytes(b"\x80\x04pickle"), "not a complete safetensors file"),
    (edit_config(lambda c: c["unet"].update(chanels=[8])), "did you mean channels?"),
    (edit_config(lambda c: c.pop("size")), "incomplete"),
    (edit_config(lambda c: c.update(size="64")), "size can't be '64'"),
    (edit_config(lambda c: c["schedule"].update(train_steps="1000")), "train_steps can't be '1000'"),
    (edit_config(lambda c: c["schedule"].update(steps_offset=None)), "steps_offset can't be None"),
    (edit_config(lambda c: c["unet"].update(linear_proj=1)), "linear_proj can't be 1"),
    (edit_config(lambda c: c["unet"].update(channels=["a"])), "channels can't be ('a',)"),
    (edit_config(lambda c: c["unet"].update(heads=[3, 3])), "can't be split into 3 heads"),
    (edit_config(lambda c: c["text_encoder"].update(heads=3)), "can't be split into 3 heads"),
    (edit_config(lambda c: c["text_encoder"].update(activation="gelluu")), "quick_gelu, gelu"),
    (edit_config(lambda c: c["text_encoder"].update(output="last")), "final, penultimate"),
    (edit_config(lambda c: c.update(zero_negative=True)), "zero_negative is True"),
    (edit_config(lambda c: c.update(family="foo")), "sd15, sd21, sdxl, tiny"),
    (edit_config(lambda c: c.update(prediction="sample")), "epsilon, v"),
    (edit_config(lambda c: c.update(schedule=None)), "not a JSON object"),
    (edit_config(lambda c: c["schedule"].update(spacing="foo")), "trailing"),
    (edit_config(lambda c: c["unet"].update(groups=7)), "can be built"),
    (edit_config(lambda c: c["unet"].update(channels=[8, 24])), "has shape"),
    (edit_config(lambda c: c["text_encoder"].update(vocab=5)), "the text encoder knows 5"),
    (edit_unet(lambda s: s.pop("conv_in.bias")), "lacks 1 tensors"),
    (edit_unet(lambda s: s.update({"conv_inn.bias": s.pop("conv_in.bias")})), "did you mean conv_in.bias?"),
])
def test_what_is_damaged_in_a_model_folder_is_named_in_one_line(damage, words, narrow, tmp_path):
    damage(shutil.copytree(narrow, tmp_path / "model"))
    with pytest.raises(InputError) as error:
        StableDiffusion.load(tmp_path / "model")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_named_with_what_helps(narrow, tmp_path):
    damage = edit_unet(lambda s: s["conv_out.bias"].fill_(float("nan")))
    damage(shutil.copytree(narrow, tmp_path / "model"))
    write_config(tmp_path / "model", read_config(tmp_path / "model"))        # else its digest would tell
    with pytest.raises(InputError, match="latents are not finite .NaN. in torch.float32: lower --cfg-scale"):
        StableDiffusion.load(tmp_path / "model").sample("a circle", steps=1)


# ---------------------------------------------------------------------------------------- encode_prompt and conditions

def test_lost_words_are_reported_by_name(sd):
    with pytest.warns(UserWarning, match="'zebra'"):
        sd.encode_prompt(["a zebra"])
    with pytest.warns(UserWarning, match="'blue circle'"):
        sd.encode_prompt(["a red circle a blue circle"])


def test_the_tiny_model_says_what_it_knows_where_a_word_is_not_among_it(sd):
    with pytest.warns(UserWarning, match="horse'; this tiny model knows drawn shapes only, .*: --model takes another"):
        sd.encode_prompt(["a horse"])
    with pytest.warns(UserWarning) as told:
        sd.encode_prompt(["a red circle a blue circle"])
    assert "drawn shapes" not in str(told[0].message)


def test_known_texts_are_encoded_once_and_only_the_last_are_kept(narrow, monkeypatch):
    plain, seen = Tokenizer.__call__, []
    monkeypatch.setattr(Tokenizer, "__call__", lambda self, texts, *more: (
        seen.extend(texts), plain(self, texts, *more))[1])
    monkeypatch.setattr("stable_diffusion.KNOWN", 1)
    sd = StableDiffusion.load(narrow)
    sd.encode_prompt("a circle")
    sd.encode_prompt("a circle")                                       # nothing is kept unless it is asked for
    assert seen == ["a circle"] * 2
    sd.known = {}
    both, again = sd.encode_prompt(["a red circle", "a circle"]), sd.encode_prompt("a circle")
    assert seen[2:] == ["a red circle", "a circle"] and list(sd.known) == ["a circle"]
    assert torch.allclose(both[0][1:], again[0], atol=1e-5)


def test_conditions_hold_the_texts_once_per_image(sd, xl):
    assert sd.conditions(["a circle", "red"], None, 32, 32).words == ("a circle", "red")
    assert sd.conditions("red", 3, 32, 32).words == ("red",) * 3 and sd.conditions(None, 2, 32, 32).words == ("", "")
    assert len(sd.conditions("red", 3, 32, 32).context) == 3 and sd.conditions("red", 3, 32, 32).added is None
    assert xl.conditions("red", 3, 32, 48).added.shape == (3, 36)
    with pytest.raises(InputError, match="needs the pooled text too"):
        xl.conditions(torch.zeros(1, 6, 32), None, 32, 32)


def test_sdxl_no_negative_prompt_is_zeros_and_not_the_empty_text(xl):
    context, pooled = xl.encode_prompt(["a red circle"])
    assert context.shape == (1, 6, 32) and pooled.shape == (1, 12)
    added = xl.size_conditioning(pooled, torch.tensor([[32, 32, 0, 0, 32, 32]]))
    assert added.shape == (1, 36) and torch.equal(added[:, :12], pooled)
    none, empty, zeros = (xl.sample("a circle", negative, steps=2) for negative in
                          (None, "", (torch.zeros(1, 6, 32), torch.zeros(1, 12))))
    assert torch.equal(none, zeros) and not torch.allclose(none, empty, atol=1e-3)


# -------------------------------------------------------------------------------------------------------------- sample

def test_image_k_of_a_batch_is_the_image_of_seed_plus_k(sd):
    for sampler in ("ddim", "euler-a"):
        batch = sd.sample(["a red circle", "a blue circle"], steps=3, sampler=sampler, seed=5)
        alone = sd.sample("a blue circle", steps=3, sampler=sampler, seed=6)
        assert batch.shape == (2, 4, 8, 8)
        assert torch.allclose(batch[1:], alone, atol=1e-5 * alone.abs().max().item())


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(sd):
    a, b, c = (sd.sample("a circle", steps=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.allclose(a, c, atol=1e-2)


def test_noise_embeddings_and_seed_lists_take_the_place_of_texts_and_seeds(sd):
    plain = sd.sample(["a circle", "red"], "blue", steps=2, seed=3)
    noise = torch.cat([randn(1, 4, 8, 8, seed=seed) for seed in (3, 4)])
    context, pooled = sd.encode_prompt(["a circle", "red"])
    assert pooled is None and context.shape == (2, 6, 16)
    assert torch.equal(sd.sample(["a circle", "red"], "blue", steps=2, noise=noise, seed=9), plain)
    assert torch.equal(sd.sample(context, sd.encode_prompt(["blue"])[0], steps=2, seed=[3, 4]), plain)


def test_the_callback_sees_every_call_of_the_unet_and_stages_count_on(sd):
    def seen(**settings) -> list[int]:
        calls = []
        latents = sd.sample("a circle", steps=3, callback=lambda i, x: calls.append((i, x)), **settings)
        assert torch.equal(calls[-1][1], latents)
        return [i for i, _ in calls]
    assert seen() == [0, 1, 2] and seen(sampler="heun") == [0, 1, 2, 3, 4]
    assert seen(freescale=FreeScale(2, restart=0.4)) == [0, 1, 2, 4, 5]


def test_guidance_scale_zero_follows_the_negative_prompt(sd):
    latents = sd.sample("red circle", "blue", steps=4, cfg_scale=0)
    assert torch.allclose(latents, sd.sample("blue", steps=4, cfg_scale=1), atol=1e-5)


@pytest.mark.parametrize("settings,words", [
    (dict(cfg_scale=0), "follows only the negative prompt, and there is none: for no guidance use 1"),
    (dict(cfg_scale=1, negative_prompt="blue"), "a negative prompt does nothing without guidance"),
    (dict(sampler="dpm++2m-karras", spacing="leading"), "spacing does nothing with dpm.*2m-karras"),
    (dict(sampler="euler-a", eta=0.5), "eta does nothing with euler-a"),
    (dict(steps=5, init=torch.zeros(1, 4, 8, 8), strength=0.1), "0.1 redraws none of 5 steps: use 0.2 or more"),
    (dict(steps=2000), "steps must be 1 to 1000"), (dict(sampler="plms"), "unknown sampler")])
def test_what_would_have_no_effect_is_refused(sd, settings, words):
    with pytest.raises(InputError, match=words):
        sd.sample("a circle", **settings)


def test_a_models_config_gives_the_sampler_and_guidance_that_are_used_where_none_is_given(narrow, sd, tmp_path):
    shutil.copytree(narrow, tmp_path / "model")
    write_config(tmp_path / "model", replace(read_config(narrow), cfg_scale=2.0, sampler="euler"))
    own = StableDiffusion.load(tmp_path / "model")
    assert torch.equal(own.sample("a circle", steps=2), sd.sample("a circle", steps=2, cfg_scale=2.0, sampler="euler"))
    assert torch.equal(own.sample("a circle", steps=2, cfg_scale=7.5, sampler="ddim"), sd.sample("a circle", steps=2))
    assert read_config(TINY).cfg_scale == 3


def test_techniques_come_by_name_and_none_is_none(sd):
    plain = sd.sample("a circle", steps=3)
    assert torch.equal(sd.sample("a circle", steps=3, freeu=None, cache=DeepCache(1)), plain)
    assert not torch.equal(sd.sample("a circle", steps=3, freeu=FreeU()), plain)      # the family's published factors
    with pytest.raises(TypeError, match="there is no technique 'freeyou'"):
        sd.sample("a circle", steps=3, freeyou=FreeU())


def test_freescale_by_a_factor_is_freescale_by_the_sizes(sd):
    sizes = sd.sample("a circle", steps=3, freescale=FreeScale(((32, 48), (64, 96))))
    assert sizes.shape == (1, 4, 16, 24)
    assert torch.equal(sd.sample("a circle", steps=3, height=32, width=48, freescale=FreeScale(2)), sizes)
    assert torch.equal(sd.sample("a circle", steps=3, height=64, width=96, freescale=FreeScale(((32, 48), (64, 96)))),
                       sizes)


def test_wrong_shapes_and_counts_are_named(sd):
    for settings, words in ((dict(noise=torch.zeros(2, 4, 8, 8)), "noise has shape"), (dict(seed=[1, 2]), "2 seeds"),
                            (dict(init=torch.zeros(1, 4, 4, 4), height=32, width=32), "init has shape"),
                            (dict(negative_prompt=["a", "b"]), "2 negative prompts"),
                            (dict(height=32, freescale=FreeScale(((32, 32), (64, 64)))), "FreeScale ends with 64x64"),
                            (dict(init=torch.zeros(1, 4, 8, 8), freescale=FreeScale(((32, 32),))), "second, larger")):
        with pytest.raises(InputError, match=words):
            sd.sample("a circle", steps=2, **settings)
    with pytest.raises(InputError, match="a prompt is a text"):
        sd.sample([], steps=1)


# --------------------------------------------------------------------------------------------------- encode and decode

def test_decoding_gives_pictures_and_encoding_takes_them_back_to_latents(sd):
    images = sd.decode(randn(2, 4, 8, 6))
    assert images.shape == (2, 3, 32, 24) and 0 <= images.min() and images.max() <= 1
    assert sd.encode(images).shape == (2, 4, 8, 6)


def test_small_pictures_are_decoded_together_and_large_ones_alone(sd, monkeypatch):
    latents, rows, plain = randn(5, 4, 8, 8), [], VAE.decode
    monkeypatch.setattr(VAE, "decode", lambda self, z, tile: (rows.append(len(z)), plain(self, z, tile))[1])
    together = sd.decode(latents)
    for budget, want in ((64, [1] * 5), (2 * 64 + 1, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr("vae.TOGETHER", budget)
        rows.clear()
        assert torch.allclose(sd.decode(latents), together, atol=1e-5) and rows == want
        for k, image in enumerate(sd.decode(latents, tile=8)):
            assert torch.allclose(image, sd.decode(latents[k:k + 1], tile=8)[0], atol=1e-5)


def test_the_objects_tile_is_that_of_every_call_without_one(narrow):
    sd, latents = StableDiffusion.load(narrow), randn(1, 4, 16, 16)
    tiled = sd.decode(latents, tile=8)
    assert not torch.equal(sd.decode(latents), tiled)
    sd.tile = 8
    assert torch.equal(sd.decode(latents), tiled)
