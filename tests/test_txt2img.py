"""txt2img.py: the class, the command line, its files, and one clear line for every kind of bad input."""
import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import flags as flags_file
import numpy as np
import pytest
import torch
from conftest import ROOT, make_folder
from flags import parse_arguments, read_image
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

import folder
import txt2img
from cache import DeepCache, TGate
from clip_text import Tokenizer as OurTokenizer
from command import InputError, run_command
from freescale import FreeScale
from maskunet import Masks, RandomMasks
from txt2img import StableDiffusion
from unet import UNet
from vae import VAE


@pytest.fixture()
def command(monkeypatch, capsys):
    """Runs txt2img.py's command line in this process -> exit code, stdout, stderr."""
    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["txt2img.py", *map(str, arguments)])
        code = 0
        try:
            run_command(txt2img.main)
        except SystemExit as stop:
            code = stop.code
        out = capsys.readouterr()
        return code, out.out, out.err
    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# ----------------------------------------------------------------------------------------------------------- the class

def test_image_k_of_a_batch_is_the_image_of_seed_plus_k(narrow):
    sd = StableDiffusion.load(narrow)
    for sampler in ("ddim", "euler-a"):
        batch = sd.sample(["a red circle", "a blue circle"], steps=3, sampler=sampler, seed=5)
        alone = sd.sample("a blue circle", steps=3, sampler=sampler, seed=6)
        assert batch.shape == (2, 4, 8, 8)
        assert torch.allclose(batch[1:], alone, atol=1e-5 * alone.abs().max().item())


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(narrow):
    sd = StableDiffusion.load(narrow)
    a, b, c = (sd.sample("a circle", steps=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.allclose(a, c, atol=1e-2)


def test_noise_embeddings_and_seed_lists_take_the_place_of_texts_and_seeds(narrow):
    sd = StableDiffusion.load(narrow)
    plain = sd.sample(["a circle", "red"], "blue", steps=2, seed=3)
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (3, 4)])
    context, pooled = sd.encode_prompt(["a circle", "red"])
    assert pooled is None and context.shape == (2, 6, 16)
    assert torch.equal(sd.sample(["a circle", "red"], "blue", steps=2, noise=noise, seed=9), plain)
    assert torch.equal(sd.sample(context, sd.encode_prompt(["blue"])[0], steps=2, seed=[3, 4]), plain)


def test_the_callback_sees_every_step_and_guidance_scale_zero_follows_the_negative_prompt(narrow):
    sd, seen = StableDiffusion.load(narrow), []
    latents = sd.sample("red circle", "blue", steps=4, cfg_scale=0, callback=lambda i, x: seen.append((i, x)))
    assert [i for i, _ in seen] == [0, 1, 2, 3] and torch.equal(seen[-1][1], latents)
    assert torch.allclose(latents, sd.sample("blue", steps=4, cfg_scale=1), atol=1e-5)


def test_sdxl_no_negative_prompt_is_zeros_and_not_the_empty_text(narrow_xl):
    sd = StableDiffusion.load(narrow_xl)
    context, pooled = sd.encode_prompt(["a red circle"])
    assert context.shape == (1, 6, 32) and pooled.shape == (1, 12)
    added = sd.size_conditioning(pooled, torch.tensor([[32, 32, 0, 0, 32, 32]]))
    assert added.shape == (1, 36) and torch.equal(added[:, :12], pooled)
    none, empty, zeros = (sd.sample("a circle", negative, steps=2) for negative in
                          (None, "", (torch.zeros(1, 6, 32), torch.zeros(1, 12))))
    assert torch.equal(none, zeros) and not torch.allclose(none, empty, atol=1e-3)


def test_decoding_gives_pictures_and_encoding_takes_them_back_to_latents(narrow):
    sd = StableDiffusion.load(narrow)
    images = sd.decode(torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0)))
    assert images.shape == (2, 3, 32, 24) and 0 <= images.min() and images.max() <= 1
    assert sd.encode(images).shape == (2, 4, 8, 6)


def test_small_pictures_are_decoded_together_and_large_ones_alone(narrow, monkeypatch):
    sd, rows = StableDiffusion.load(narrow), []
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = VAE.decode
    monkeypatch.setattr(VAE, "decode", lambda self, z, tile: (rows.append(len(z)), plain(self, z, tile))[1])
    together = sd.decode(latents)
    for budget, want in ((64, [1] * 5), (2 * 64 + 1, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr("vae.TOGETHER", budget)
        rows.clear()
        assert torch.allclose(sd.decode(latents), together, atol=1e-5) and rows == want
        for k, image in enumerate(sd.decode(latents, tile=8)):
            assert torch.allclose(image, sd.decode(latents[k:k + 1], tile=8)[0], atol=1e-5)


@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
@pytest.mark.parametrize("negative", [[], ["--negative-prompt", "a blue circle"]], ids=["none", "one"])
def test_each_text_of_a_command_is_encoded_once_for_all_its_batches(sdxl, negative, narrow, narrow_xl, tmp_path,
                                                                    command, monkeypatch):
    plain, seen, prompts = OurTokenizer.__call__, [], tmp_path / "prompts.txt"
    monkeypatch.setattr(OurTokenizer, "__call__", lambda self, texts, *more: (
        seen.extend(texts), plain(self, texts, *more))[1])
    prompts.write_text("a circle\na red circle\na circle\na blue circle\n")
    model = narrow_xl if sdxl else narrow
    out = tmp_path / "out"
    assert command("--from-file", prompts, "--model", model, "--steps", 1, "--n", 2, "--out", out, *negative)[0] == 0
    texts = ["a circle", "a red circle", "a blue circle"] + ([] if negative else [""])
    assert sorted(seen) == sorted(texts * (2 if sdxl else 1)) and len(list(out.iterdir())) == 8
    monkeypatch.setattr(txt2img, "KNOWN", 1)                           # only the last one is kept
    known, sd = {}, StableDiffusion.load(model)
    both, again = sd.encode_prompt(["a circle", "a red circle"], known), sd.encode_prompt("a circle", known)
    assert list(known) == ["a circle"] and torch.allclose(both[0][:1], again[0], atol=1e-5)


def test_compare_clocks_nothing_that_is_drawn_for_the_first_time(narrow, tmp_path, command, monkeypatch):
    plain, drawn = StableDiffusion.sample, []

    def sample(self, prompts, **settings):
        drawn.append((len(prompts), settings["steps"], settings["cache"] is not None))
        return plain(self, prompts, **settings)
    monkeypatch.setattr(StableDiffusion, "sample", sample)
    monkeypatch.setattr(UNet, "compile", lambda self, **options: None)
    flags = ("a circle", "--model", narrow, "--steps", 4, "--out", tmp_path, "--cache", "deepcache", "--compare",
             "--batch-size", 2, "--n", 3)
    assert command(*flags)[0] == 0
    assert drawn == [(2, 1, False), (2, 4, False), (2, 4, True), (1, 4, False), (1, 4, True)]
    drawn.clear()
    assert command(*flags, "--seed", 5, "--compile")[0] == 0            # graphs of both, and of the smaller last batch
    assert drawn == [(n, steps, cached) for n in (2, 1)
                     for steps, cached in ((1, False), (4, True), (4, False), (4, True))]


LOAD = """
import sys
from pathlib import Path

from txt2img import StableDiffusion

def peak():
    return 1024 * int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x).split()[1])

StableDiffusion.load(sys.argv[1])                  # with the first come libraries
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


def test_half_precision_stays_close_to_float32(narrow):
    full, half = (StableDiffusion.load(narrow, dtype=dtype).sample("a circle", steps=3, cfg_scale=2)
                  for dtype in (torch.float32, torch.bfloat16))
    assert half.isfinite().all() and (half - full).abs().max() < 0.1 * full.abs().max()


def test_lost_words_are_reported_by_name(narrow):
    sd = StableDiffusion.load(narrow)
    with pytest.warns(UserWarning, match="'zebra'"):
        sd.encode_prompt(["a zebra"])
    with pytest.warns(UserWarning, match="'blue circle'"):
        sd.encode_prompt(["a red circle a blue circle"])


# ----------------------------------------------------------------------------------------------------- the command line

def test_one_command_writes_a_png_with_its_settings_inside(narrow, tmp_path, command):
    out = tmp_path / "new" / "p.png"
    code, stdout, _ = command("a red circle", "--model", narrow, "--steps", 2, "--out", out, "--seed", 7,
                              "--negative-prompt", "blue", "--sampler", "dpm++2m-karras", "--width", 40)
    assert code == 0 and pixels(out).shape == (32, 40, 3)
    lines = Image.open(out).text["parameters"].split("\n")
    assert lines[:2] == ["a red circle", "Negative prompt: blue"]
    assert lines[2] == ("Steps: 2, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 7, Size: 40x32, "
                        "Model: narrow, RNG: CPU")
    last = stdout.strip().split("\n")[-1]
    assert str(out) in last and "seed 7" in last and " s " in last and "GB" in last
    assert [p.name for p in out.parent.iterdir()] == ["p.png"]


def test_several_pictures_are_numbered_by_seed_and_drawn_on_a_sheet(narrow, tmp_path, command):
    command("a circle", "--model", narrow, "--steps", 1, "--out", tmp_path / "p.png", "--n", 3, "--grid")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p_0.png", "p_1.png", "p_2.png", "p_grid.png"]
    assert pixels(tmp_path / "p_grid.png").shape == (64, 64, 3)
    assert np.array_equal(pixels(tmp_path / "p_grid.png")[:32, 32:], pixels(tmp_path / "p_1.png"))


def test_a_prompt_file_is_resumed_where_it_stopped(narrow, tmp_path, command):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a circle\n\na red circle\n a blue circle\n")
    arguments = ("--from-file", prompts, "--model", narrow, "--steps", 2, "--out", out, "--seed", 4)
    assert command(*arguments)[0] == 0
    assert sorted(p.name for p in out.iterdir()) == ["00000_4.png", "00001_5.png", "00002_6.png"]
    first, kept = (out / "00000_4.png").stat().st_mtime_ns, pixels(out / "00001_5.png")
    (out / "00001_5.png").unlink()
    code, stdout, _ = command(*arguments)
    assert code == 0 and "2 pictures were there already" in stdout
    code, _, stderr = command(*arguments, "--cfg-scale", 3)
    assert code == 2 and "made with another prompt or other settings" in stderr
    assert (out / "00000_4.png").stat().st_mtime_ns == first and np.array_equal(pixels(out / "00001_5.png"), kept)


def test_a_picture_of_another_run_is_known_by_its_settings_and_files(narrow, tmp_path, command):
    start, out = tmp_path / "start.png", tmp_path / "out"
    Image.new("RGB", (16, 16), "red").save(start)
    arguments = ("a circle", "--model", narrow, "--init-image", start, "--steps", 2, "--out", out)
    assert command(*arguments)[0] == 0
    assert "were there already" in command(*arguments)[1]
    for more in (["--vae-tile", 8], ["--negative-prompt", ""]):
        assert "made with another prompt or other settings" in command(*arguments, *more)[2]
    Image.new("RGB", (16, 16), "blue").save(start)
    assert "made with another prompt or other settings" in command(*arguments)[2]


def test_compare_goes_on_where_only_the_picture_is_there(narrow, tmp_path, command):
    arguments = ("a circle", "--model", narrow, "--steps", 6, "--cache", "deepcache", "--out", tmp_path / "out")
    command(*arguments)
    made = pixels(tmp_path / "out" / "00000_0.png")
    assert "times as fast" in command(*arguments, "--compare")[1]
    assert np.array_equal(pixels(tmp_path / "out" / "00000_0.png"), made)
    assert "were there already" in command(*arguments, "--compare")[1]


def test_two_processes_make_the_same_files_as_one(narrow, tmp_path, command):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle\na red circle\na blue circle\n")
    common = ("--from-file", prompts, "--model", narrow, "--steps", 2, "--sampler", "euler-a")
    command(*common, "--out", tmp_path / "one")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                    ROOT / "txt2img.py", *map(str, common), "--out", tmp_path / "two"], check=True, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "two").iterdir()) and len(names) == 3
    assert all(np.array_equal(pixels(tmp_path / "one" / n), pixels(tmp_path / "two" / n)) for n in names)


def test_img2img_starts_from_a_picture_and_strength_zero_returns_it(narrow, tmp_path, command):
    start, out = tmp_path / "start.png", tmp_path / "out.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (35, 50, 3), dtype=np.uint8)).save(start)
    arguments = ("a circle", "--model", narrow, "--init-image", start, "--out", out, "--steps", 4)
    assert command(*arguments, "--strength", 0)[0] == 0
    kept, sd = pixels(out), StableDiffusion.load(narrow)
    x = torch.from_numpy(np.asarray(Image.open(start).resize((48, 32), Image.Resampling.LANCZOS)).copy())
    x = x.permute(2, 0, 1)[None].float() / 255
    assert np.abs(kept - (sd.decode(sd.encode(x))[0] * 255).round().permute(1, 2, 0).numpy()).max() <= 1
    assert command(*arguments, "--strength", 0.75)[0] == 0 and "Denoising strength: 0.75" in \
        Image.open(out).text["parameters"]
    assert not np.array_equal(pixels(out), kept)


def test_start_pictures_of_every_kind_are_read_as_they_look(tmp_path):
    args = argparse.Namespace(init_image=tmp_path / "x.png", width=8, height=8)
    for picture, want in ((Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 1.0), (Image.new("L", (8, 8), 128), 128 / 255),
                          (Image.fromarray(np.full((8, 8), 30000, np.uint16)), 117 / 255)):
        picture.save(args.init_image)
        assert torch.allclose(read_image(args), torch.tensor(want), atol=1e-6)


def test_pictures_whose_metadata_is_damaged_are_named(tmp_path):
    path = tmp_path / "x.png"
    Image.new("L", (8, 8)).save(path, exif=b"no such thing")
    with pytest.raises(InputError, match="can't read the picture"):
        read_image(argparse.Namespace(init_image=path, width=8, height=8))
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)               # more than Pillow unpacks
    Image.new("L", (8, 8)).save(path, pnginfo=info)
    with pytest.raises(InputError, match="can't read the mask"):
        flags_file.read_mask(path)
    with pytest.raises(InputError, match="is there already"):
        txt2img.finished(path, "")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps this record")
def test_peak_memory_is_this_processs_own_and_a_closed_pipe_ends_it_quietly(narrow, tmp_path):
    starter = ("import subprocess, sys; x = bytes(range(250)) * 4_000_000\n"
               "done = subprocess.run(sys.argv[1:], capture_output=True, text=True); print(done.stdout + done.stderr)")
    run = [sys.executable, ROOT / "txt2img.py", "a circle", "--model", narrow, "--steps", 1, "--out", tmp_path]
    told = subprocess.run([sys.executable, "-c", starter, *map(str, run)], capture_output=True, text=True).stdout
    assert float(re.search(r"peak memory (\S+) GB", told)[1]) < 0.9     # the starter's: 1
    many = " ".join(shlex.quote(str(part)) for part in [*run[:-1], tmp_path / "many", "--n", 3])
    done = subprocess.run(f"{many} | true", shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_wrong_shapes_and_counts_are_named(narrow):
    sd = StableDiffusion.load(narrow)
    for settings, words in ((dict(noise=torch.zeros(2, 4, 8, 8)), "noise has shape"), (dict(seed=[1, 2]), "2 seeds"),
                            (dict(init=torch.zeros(1, 4, 4, 4), height=32, width=32), "init has shape"),
                            (dict(negative_prompt=["a", "b"]), "2 negative prompts")):
        with pytest.raises(InputError, match=words):
            sd.sample("a circle", steps=1, **settings)
    with pytest.raises(InputError, match="a prompt is a text"):
        sd.sample([], steps=1)


def test_the_help_shows_every_default(command):
    code, stdout, _ = command("--help")
    assert code == 0
    assert all(text in stdout for text in ("(default: 30)", "(default: 7.5)", "(default: ddim)", "models/tiny"))
    assert "(default: None)" not in stdout


# ----------------------------------------------------------------------------------------------------------- FreeScale

def test_freescale_doubles_up_to_the_factor_and_says_so_in_the_picture(narrow, tmp_path, command):
    out = tmp_path / "p.png"
    arguments = ("a circle", "--model", narrow, "--steps", 3, "--out", out)
    assert command(*arguments, "--freescale", 4, "--width", 40, "--cache", "deepcache", "--freeu")[0] == 0
    assert pixels(out).shape == (128, 160, 3)
    text = Image.open(out).text["parameters"]
    assert "Size: 160x128" in text and "Detail: 2" in text
    assert "FreeScale: 40x32 80x64 160x128 restart 0.3 dilate 0.7 blur spatial upsample rgb" in text
    assert command(*arguments, "--resolutions", "32x32,64x48", "--freescale-fast", "--freescale-upsample", "latent",
                   "--detail", 0.5, "--freescale-blur", "official")[0] == 0
    assert pixels(out).shape == (48, 64, 3)
    kept = pixels(out)
    assert command(*arguments, "--resolutions", "32x32,64x48", "--freescale-fast", "--freescale-upsample", "latent",
                   "--detail", 0.5, "--freescale-blur", "official", "--low-memory")[0] == 0
    assert np.abs(pixels(out).astype(int) - kept).max() <= 1
    assert "32x32 64x48 restart 0.3 dilate 0.7 blur official upsample latent fast" in Image.open(out).text["parameters"]


def test_the_command_line_makes_what_the_class_makes(narrow, tmp_path, command):
    sd = StableDiffusion.load(narrow)
    free = FreeScale(((32, 32), (48, 64)), restart=0.5, detail=0.5)
    want = sd.decode(sd.sample("a circle", None, steps=4, seed=2, freescale=free))[0]
    command("a circle", "--model", narrow, "--steps", 4, "--seed", 2, "--out", tmp_path / "p.png", "--detail", 0.5,
            "--resolutions", "32x32,64x48", "--freescale-restart", 0.5)
    assert np.array_equal(pixels(tmp_path / "p.png"), (want * 255).round().byte().permute(1, 2, 0).numpy())


def test_the_official_defaults_are_set_and_flags_still_count(narrow, tmp_path, command):
    out = tmp_path / "p.png"
    arguments = ("a circle", "--model", narrow, "--out", out, "--freescale-official", "--steps", 3)
    assert command(*arguments)[0] == 0 and pixels(out).shape == (128, 128, 3)
    assert "Negative prompt: blurry, ugly" in Image.open(out).text["parameters"]
    text = Image.open(out).text["parameters"]
    for words in ("Steps: 3, Sampler: Euler, Schedule type: Automatic, CFG scale: 7.5", "Spacing: leading",
                  "32x32 64x64 128x128 restart 0.3 dilate 0.7 blur official upsample rgb", 'FreeU: "preset version 1'):
        assert words in text
    assert command(*arguments, "--resolutions", "32x32,40x32")[0] == 0 and pixels(out).shape == (32, 40, 3)


def test_a_picture_of_ones_own_takes_the_place_of_the_first_stage(narrow, tmp_path, command):
    start, out = tmp_path / "start.png", tmp_path / "p.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (35, 50, 3), dtype=np.uint8)).save(start)
    arguments = ("a circle", "--model", narrow, "--steps", 3, "--init-image", start, "--out", out)
    assert command(*arguments, "--freescale", 2)[0] == 0 and pixels(out).shape == (64, 96, 3)
    assert "Denoising strength" not in Image.open(out).text["parameters"]
    code, _, stderr = command(*arguments, "--resolutions", "40x32,80x64", "--cache", "faster")
    assert code == 0 and pixels(out).shape == (64, 80, 3)


def test_a_detail_map_is_read_and_checked(narrow, tmp_path, command):
    mask, out = tmp_path / "mask.png", tmp_path / "p.png"
    Image.new("L", (64, 64), 3).save(mask)
    arguments = ("a circle", "--model", narrow, "--steps", 3, "--freescale", 2, "--out", out, "--detail-map", mask)
    assert command(*arguments, "--detail", "2,0.5")[0] == 0
    shown = pixels(out)
    command(*arguments[:-2], "--detail", 2)
    assert np.abs(shown.astype(int) - pixels(out)).max() <= 1          # not black anywhere: 2 everywhere
    out.unlink()
    for picture, detail, words in ((Image.new("L", (64, 64)), "2", "two numbers with --detail-map"),
                                   (Image.new("RGB", (64, 64)), "2,1", "mask.png has mode RGB"),
                                   (Image.new("L", (64, 40)), "2,1", "mask.png is 64x40, but must be as large as a "
                                    "stage (32x32, 64x64)"), (None, "2,1", "can't read the mask")):
        mask.write_bytes(b"no picture") if picture is None else picture.save(mask)
        code, _, stderr = command(*arguments, "--detail", detail)
        assert code == 2 and words in stderr and stderr.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize("flags,hints", [
    ([], "--low-memory or --dtype bfloat16 or smaller --resolutions"),
    (["--low-memory", "--dtype", "bfloat16", "--batch-size", 2, "--n", 2], "--batch-size 1 or smaller --resolutions"),
    (["--low-memory", "--dtype", "bfloat16", "--vae-tile", 0], "--vae-tile 64 or smaller --resolutions")])
def test_a_stage_beyond_the_memory_is_refused_before_anything_is_loaded(flags, hints, narrow, tmp_path, command,
                                                                        monkeypatch):
    monkeypatch.setattr("memory.free_memory", lambda device: 1_000_000)
    monkeypatch.setattr(StableDiffusion, "load", None)
    code, _, stderr = command("a circle", "--model", narrow, "--freescale", 4, "--out", tmp_path / "p.png", *flags)
    assert code == 2 and stderr.count("\n") == 1 and stderr.endswith(f"GB free on cpu: use {hints}\n")
    assert "the stage 128x128 needs about" in stderr and list(tmp_path.iterdir()) == []


def test_a_stage_far_beyond_the_memory_is_refused_without_a_plan(narrow, monkeypatch):
    monkeypatch.setattr("memory.plan_stages", None)
    for flags, free, words in ((["--resolutions", "32x32,65536x65536"], 10 ** 11, "1e+02 GB or more"),
                               (["--freescale", "8", "--n", "4"], 6 * 256 * 256 * 4 * 4 - 1, "0.0063 GB or more")):
        monkeypatch.setattr("memory.free_memory", lambda device, free=free: free)
        args = flags_file.parse_arguments(["a circle", "--model", str(narrow), *flags])
        settings = flags_file.sample_settings(args, folder.read_config(narrow))
        with pytest.raises(InputError, match=re.escape(words)):
            flags_file.check_memory(args, folder.read_config(narrow), settings["freescale"], None, 4,
                                    torch.device("cpu"))


def test_planning_a_large_stage_takes_seconds_and_says_so(narrow, monkeypatch, capsys):
    monkeypatch.setattr("memory.free_memory", lambda device: 10 ** 9)
    monkeypatch.setattr("memory.plan_stages", lambda *_, **__: [argparse.Namespace(memory=0)])
    for side, said in ((1024, ""), (1032, "planning the memory of the last stage: up to a minute\n")):
        args = flags_file.parse_arguments(["a circle", "--model", str(narrow), "--resolutions", f"32x32,{side}x{side}"])
        free = FreeScale(args.stages)
        flags_file.check_memory(args, folder.read_config(narrow), free, None, 1, torch.device("cpu"))
        assert capsys.readouterr().err == said


@pytest.mark.parametrize("flags,words", [
    (["--resolutions", "32x32,64x60"], "height 60 is not a multiple of 8; the nearest are 56 and 64"),
    (["--resolutions", "64x64,32x64"], "must not fall, but 64x64 is followed by 32x64"),
    (["--resolutions", "64,64"], "sizes such as 512x512,1024x1024"),
    (["--resolutions", "64x64", "--width", "64"], "leave out --freescale, --width"),
    (["--resolutions", "32x32,64x64", "--freescale", "2"], "leave out --freescale"),
    (["--resolutions", "32x32", "--init-image", "x.png"], "give a second, larger one"),
    (["--freescale", "2", "--strength", "0.5", "--init-image", "x.png"], "--freescale-restart"),
    (["--freescale", "2", "--detail", "2,1"], "one number without --detail-map"),
    (["--freescale", "2", "--detail", "much"], "one number"), (["--freescale", "2", "--detail", "-1"], "0 or more"),
    (["--freescale", "2", "--freescale-blur", "box"], "spatial or official"),
    (["--freescale", "2", "--freescale-upsample", "x"], "rgb or latent"),
    (["--freescale", "2", "--freescale-restart", "1"], "restart is a fraction"),
    (["--freescale", "2", "--freescale-dilate", "2"], "dilate is a fraction"),
    (["--freescale", "8", "--width", "16000"], "the largest is 65536"),
    (["--detail-map", "m.png"], "needs the stages of FreeScale")])
def test_bad_freescale_flags_end_in_one_clear_line(flags, words, narrow, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, stderr = command("a circle", "--model", narrow, *flags)
    assert code == 2 and words in stderr and stderr.count("\n") == 1 and stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------- baselines

@pytest.mark.parametrize("baseline", ["scalecrafter", "hidiffusion", "demofusion"])
def test_a_baseline_draws_a_larger_picture_from_a_seed_and_says_so_in_it(baseline, narrow, tmp_path, command,
                                                                         monkeypatch):
    calls = []
    kind = {"scalecrafter": "scale_crafter", "demofusion": "demo_fusion"}.get(baseline, baseline)
    real = getattr(flags_file, kind)
    monkeypatch.setattr(flags_file, kind, lambda *a, **k: calls.append(k) or real(*a, **k))
    arguments = ("a circle", "--model", narrow, "--steps", 2, "--seed", 3, "-W", 72, "-H", 48, "--freeu")
    made = []
    for name, more in (("plain", []), ("one", ["--baseline", baseline]), ("two", ["--baseline", baseline])):
        code, _, stderr = command(*arguments, *more, "--out", tmp_path / f"{name}.png")
        assert code == 0, stderr
        made.append(pixels(tmp_path / f"{name}.png"))
    assert len(calls) == 2 and made[1].shape == (48, 72, 3)
    assert np.array_equal(made[1], made[2]) and not np.array_equal(made[0], made[1])
    assert f"Baseline: {baseline}" in Image.open(tmp_path / "one.png").text["parameters"]
    assert "Baseline" not in Image.open(tmp_path / "plain.png").text["parameters"]


def test_demo_fusion_goes_up_by_the_models_own_size():
    for size, want in (((768, 1536), ((256, 512), (512, 1024), (768, 1536))), ((768, 768), ((384, 384), (768, 768)))):
        assert flags_file.demo_fusion_stages(*size, 512).resolutions == want


def test_scale_crafter_without_guidance_beyond_three_times_draws_its_strong_pass(narrow, tmp_path, command):
    code, _, stderr = command("a circle", "--model", narrow, "--steps", 2, "-W", 128, "-H", 32, "--cfg-scale", 1,
                              "--baseline", "scalecrafter", "--out", tmp_path / "p.png")
    assert code == 0 and pixels(tmp_path / "p.png").shape == (32, 128, 3), stderr


@pytest.mark.parametrize("more,words", [
    (["-W", 32], "larger than the model's own 32 pixels: give --width and --height"),
    (["--freescale", 2], "combined with --freescale"), (["--resolutions", "64x64"], "combined with --resolutions"),
    (["--cache", "deepcache"], "combined with --cache"), (["--tgate", 5], "combined with --tgate"),
    (["--mask-random", 0.1], "combined with --mask-random"), (["--init-image", "x.png"], "combined with --init-image"),
    (["--low-memory"], "combined with --low-memory"), (["--compile"], "combined with --compile"),
    (["--batch-size", 2], "leave out --batch-size"), (["--mask-reward", "clip"], "combined with --mask-reward")])
def test_what_a_baseline_can_not_be_combined_with_is_named(more, words, narrow, tmp_path, command):
    code, _, stderr = command("a circle", "--model", narrow, "--baseline", "hidiffusion", "--out", tmp_path / "p.png",
                              *more)
    assert code == 2 and words in stderr and stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_model_in_the_unets_place_takes_no_caches_and_masks(narrow):
    sd = StableDiffusion.load(narrow)
    for technique in (dict(cache=DeepCache(2)), dict(tgate=TGate(1)), dict(masks=Masks(RandomMasks(0.1)))):
        with pytest.raises(InputError, match="need the U-Net itself"):
            sd.sample("a circle", steps=2, model=lambda x, *_: x, **technique)


# ----------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("arguments,words", [
    (["a circle", "--width", "36"], "width 36 is not a multiple of 8; the nearest are 32 and 40"),
    (["a circle", "--height", "0"], "height 0 is not a multiple of 8"),
    (["a circle", "--steps", "0"], "steps must be 1 to 1000"),
    (["a circle", "--steps", "1001"], "steps must be 1 to 1000"),
    (["a circle", "--sampler", "plms"], "ddim, dpm++2m, dpm++2m-karras, euler, euler-karras, euler-a"),
    (["a circle", "--spacing", "even"], "leading, linspace, trailing"),
    (["a circle", "--strength", "1.5", "--init-image", "x.png"], "--strength must be between 0 and 1"),
    (["a circle", "--cfg-scale", "nan"], "--cfg-scale must be a finite number"),
    (["a circle", "--eta", "1", "--sampler", "dpm++2m"], "--eta must be 0 with dpm++2m"),
    (["a circle", "--eta", "0.5", "--sampler", "euler-a"], "--eta must be 0 with euler-a"),
    (["caf\udce9"], "the prompt has bytes that are no UTF-8 text"),
    (["a circle", "--negative-prompt", "\udce9"], "--negative-prompt has bytes that are no UTF-8 text"),
    (["a circle", "--out", "f" * 245 + ".png"], "is too long"),
    (["a circle", "--vae-tile", "4"], "--vae-tile must be 0, or 8 or more"),
    (["a circle", "--n", "0"], "--n must be 1 or more"),
    (["a circle", "--seed", "-1"], "--seed must be 0 or more"),
    ([], "give a prompt"),
    (["a circle", "--from-file", "x.txt"], "not both"),
    (["--from-file", "nowhere.txt"], "nowhere.txt"),
    (["--from-file", "nowhere.txt", "--out", "one.png"], "must be a folder"),
    (["a circle", "--init-image", "nowhere.png"], "can't read the picture nowhere.png"),
    (["a circle", "--model", "nowhere"], "convert_weights.py SOURCE nowhere"),
    (["a circle", "--device", "abacus"], "abacus"),
    (["a circle", "--device", "hpu"], "--device hpu can't be used here"),
    (["a circle", "--device", "meta"], "use cpu, cuda, mps or xpu"),
    (["a circle", "--out", "f.jpg"], "only PNG files are written"),
    (["a circle", "--width", "80000000000"], "the largest is 65536"),
])
def test_bad_arguments_end_in_one_clear_line(arguments, words, narrow, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, stderr = command("--model", narrow, *arguments)
    assert code == 2 and words in stderr and stderr.count("\n") == 1 and stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def broken(narrow: Path, tmp_path: Path, damage) -> Path:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in narrow.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    damage(copy)
    return copy


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
    (edit_unet(lambda s: s["conv_out.bias"].fill_(float("nan"))), "not finite"),
])
def test_a_damaged_model_folder_ends_in_one_clear_line(damage, words, narrow, tmp_path, command):
    model = broken(narrow, tmp_path, damage)
    code, _, stderr = command("a circle", "--model", model, "--steps", 1, "--out", tmp_path / "p.png")
    assert code == 2 and words in stderr.split("\r")[-1] and "Traceback" not in stderr
    assert not list(tmp_path.glob("*.png")) and not list(tmp_path.glob(".*"))


def test_pointing_at_a_checkpoint_file_names_the_convert_command(tmp_path, command):
    file = tmp_path / "v1-5.safetensors"
    file.write_bytes(b"x")
    code, _, stderr = command("a circle", "--model", file, "--out", tmp_path / "p.png")
    assert code == 2 and f"python convert_weights.py {file} OUT_DIR" in stderr


def test_an_empty_prompt_file_and_an_unwritable_place_are_named(narrow, tmp_path, command):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    assert "has no prompts" in command("--from-file", empty, "--model", narrow, "--out", tmp_path / "o")[2]
    code, _, stderr = command("a circle", "--model", narrow, "--out", empty / "sub" / "p.png")
    assert code == 2 and "can't write to" in stderr and stderr.count("\n") == 1


def test_running_out_of_memory_names_the_flags_that_help(narrow, tmp_path, command, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(txt2img, "generate", full)
    code, _, stderr = command("a circle", "--model", narrow, "--out", tmp_path / "p.png")
    assert code == 2 and "Traceback" not in stderr
    assert all(flag in stderr for flag in ("--dtype", "--width", "--vae-tile"))


def test_stopping_a_batch_keeps_the_finished_files_and_nothing_half_written(narrow, tmp_path, command, monkeypatch):
    decode, calls = StableDiffusion.decode, []

    def stop_at_the_second(self, *arguments):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(self, *arguments)
    monkeypatch.setattr(StableDiffusion, "decode", stop_at_the_second)
    code, _, stderr = command("a circle", "--model", narrow, "--out", tmp_path, "--n", 3, "--steps", 1)
    assert code == 130 and "stopped" in stderr and [p.name for p in tmp_path.iterdir()] == ["00000_0.png"]


def test_config_json_round_trips(narrow):
    config = folder.read_config(narrow)
    assert asdict(config) == asdict(folder.read_config(narrow)) and config.unet.channels == (8, 16)


# -------------------------------------------------------------------------------------------------- techniques as flags

def test_freeu_flags_change_the_picture_and_are_written_into_it(narrow, tmp_path, command):
    def run(*flags):
        code, _, stderr = command("a circle", "--model", narrow, "--steps", 2, "--out", tmp_path / "p.png", *flags)
        assert code == 0, stderr
        return pixels(tmp_path / "p.png"), Image.open(tmp_path / "p.png").text["parameters"]
    plain, text = run()
    assert "FreeU" not in text and np.array_equal(run("--freeu", "1,1,1,1")[0], plain)
    for flags, words in ((["--freeu"], 'FreeU: "preset version 2 channels 2x2 backbone 0:1 skip 0:1"'),
                         (["--freeu", "2,3,0,0.5", "--freeu-version", "1", "--freeu-backbone", "0:0.6", "--freeu-skip",
                           "0.4:1"], 'FreeU: "2,3,0,0.5 version 1 channels 2x2 backbone 0:0.6 skip 0.4:1"'),
                         (["--skip-tuning", "0.5"], "Skip-Tuning: 0.5"), (["--scale-long", "0.7"], "ScaleLong: 0.7")):
        picture, text = run(*flags)
        assert words in text and not np.array_equal(picture, plain)


@pytest.mark.parametrize("flags,words", [
    (["--freeu", "1,2,3"], "--freeu takes 4 numbers"), (["--freeu", "a red circle"], "the prompt goes before it"),
    (["--freeu", "1,2,-3,1"], "s1"), (["--freeu", "--freeu-version", "3"], "version"),
    (["--freeu", "--freeu-rule", "blocks"], "channels or level"), (["--freeu", "--freeu-backbone", "0.5"], "2 numbers"),
    (["--freeu", "--freeu-skip", "0.5:2"], "0..1"), (["--skip-tuning", "x"], "--skip-tuning takes 1 or 2 numbers"),
    (["--scale-long", "0.9", "--skip-tuning", "0.9"], "give one of them")])
def test_bad_freeu_flags_end_in_one_clear_line(flags, words, narrow, tmp_path, command):
    code, _, stderr = command("a circle", "--model", narrow, "--out", tmp_path / "p.png", *flags)
    assert code == 2 and words in stderr and stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_cache_flags_change_the_picture_and_an_interval_of_one_does_not(narrow, tmp_path, command):
    def run(*flags):
        code, _, stderr = command("a circle", "--model", narrow, "--steps", 6, "--out", tmp_path / "p.png", *flags)
        assert code == 0, stderr
        return pixels(tmp_path / "p.png"), Image.open(tmp_path / "p.png").text["parameters"]
    plain, _ = run()
    assert np.array_equal(run("--cache", "deepcache", "--cache-interval", 1)[0], plain)
    assert np.array_equal(run("--cache", "faster", "--cache-keys", "every:1", "--cache-noise", 0)[0], plain)
    for flags, words in ((["deepcache", "--cache-branch", "1"], "DeepCache: interval 3 branch 1,"),
                         (["deepcache", "--cache-center", "2", "--cache-power", "1.2", "--cache-schedule", "paper"],
                          "DeepCache: interval 3 branch 0 center 2 power 1.2 schedule paper,"),
                         (["faster", "--cache-parallel", "--cache-official-order", "--cache-tau", "900"],
                          "Faster Diffusion: keys paper noise 0.003 below 900 official order,"),
                         (["faster", "--cache-keys", "0,2", "--cache-parallel"], "Faster Diffusion: \"keys 0,2 noise"),
                         (["inherit", "--cache-units", "mid,u0"], "Inheritance: \"units mid,u0 keys every:3")):
        picture, text = run("--cache", *flags, "--freeu")
        assert words in text and "FreeU" in text and not np.array_equal(picture, plain)
    picture, text = run("--tgate", 2, "--tgate-text", "compute")
    assert "T-GATE: step 2 text compute guidance drop" in text and not np.array_equal(picture, plain)


def test_the_run_prints_what_a_cache_saves(narrow, tmp_path, command):
    def said(*flags):
        code, _, stderr = command("a circle", "--model", narrow, "--steps", 20, "--out", tmp_path / "p.png", *flags)
        assert code == 0
        return [line for line in stderr.splitlines() if "note: " in line or "fewer" in line]
    assert said() == []
    (line,) = said("--cache", "deepcache", "--cache-interval", 4)
    units, macs, plain = re.search(r"deepcache: (\d+ of \d+) units and (\S+) of (\S+) billion", line).groups()
    assert units == "75 of 180" and float(macs) < float(plain)         # 5 keys of 9 units, 15 steps of conv_in and u3
    (line,) = said("--tgate", 4, "--tgate-text", "compute")            # 4 steps of two rows, 16 of one
    assert "1.67 times fewer" in line and "units and" not in line
    note, _ = said("--cache", "faster", "--cache-keys", "0,1")
    assert "over 19 of 20 steps" in note
    note, line = said("--cache", "faster", "--cache-keys", "every:1")
    assert "saves nothing" in note and "180 of 180 units" in line and "1.00 times fewer" in line


def test_compare_draws_both_pictures_side_by_side_and_tells_the_speed_up(narrow, tmp_path, command):
    flags = ("a circle", "--model", narrow, "--steps", 4, "--n", 2, "--out", tmp_path / "p.png")
    assert command(*flags)[0] == 0
    plain = [pixels(tmp_path / f"p_{k}.png") for k in (0, 1)]
    code, stdout, _ = command(*flags, "--cache", "deepcache", "--compare", "--batch-size", 2)
    assert code == 0 and "times as fast" in stdout and stdout.count("PSNR") == 2
    for k in (0, 1):
        both = pixels(tmp_path / f"p_{k}_compare.png")
        assert both.shape[1] == 2 * plain[k].shape[1] and np.abs(both[:, :32].astype(int) - plain[k]).max() <= 1
        assert np.array_equal(both[:, 32:], pixels(tmp_path / f"p_{k}.png"))


@pytest.mark.parametrize("flags,words", [
    (["deepcache", "--cache-interval", "0"], "interval"), (["deepcache", "--cache-branch", "9"], "0 to 3"),
    (["faster", "--cache-keys", "often"], "paper, rescaled, square"),
    (["faster", "--cache-keys", "1,2"], "begin with 0"),
    (["faster", "--cache-keys", "0,30"], "beyond the last"), (["faster", "--cache-keys", "every:x"], "x"),
    (["faster", "--cache-noise", "-1"], "between 0 and 1"), (["faster", "--cache-keys", "every:2,3"], "are paper"),
    (["deepcache", "--cache-interval", "31"], "more than the run's 30"), (["inherit"], "needs --cache-units"),
    (["inherit", "--cache-units", "mid,x9"], "'x9' is none"), (["faster", "--cache-keys", ""], "not ''"),
    (["deepcache", "--cache-center", "9", "--cache-power", "nan"], "power must be 0.1 to 10"),
    (["deepcache", "--cache-center", "9", "--cache-power", "0"], "power must be 0.1 to 10"),
    (["deepcache", "--cache-center", "9", "--cache-schedule", "even"], "released or paper"),
    (["deepcache", "--cache-center", "0"], "center 0 is not between"), (["faster", "--cache-noise", "nan"], "alpha"),
    (["faster", "--cache-parallel", "--cache-max-batch", "0"], "1 or more"), (["faster", "--cache-tau", "-1"], "tau"),
    (["inherit", "--cache-units", "mid", "--cache-keys", "0", "--cache-interval", "2"], "give one of them"),
    (["deepcache", "--tgate", "30"], "beyond the last"), (["deepcache", "--tgate", "0"], "1 or more"),
    (["deepcache", "--tgate", "5", "--tgate-text", "forget"], "reuse or compute"),
    (["deepcache", "--tgate", "5", "--tgate-text", "compute", "--tgate-guidance", "keep"], "does nothing")])
def test_bad_cache_flags_end_in_one_clear_line(flags, words, narrow, tmp_path, command):
    code, _, stderr = command("a circle", "--model", narrow, "--out", tmp_path / "p.png", "--cache", *flags)
    assert code == 2 and words in stderr and "Traceback" not in stderr and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags,needed", [
    (["--freescale-upsample", "nonsense"], "--freescale or --resolutions"),
    (["--freescale-restart", 7], "--freescale or --resolutions"),
    (["--detail", "much"], "--freescale or --resolutions"),
    (["--freescale-fast"], "--freescale or --resolutions"), (["--mask-mode", "threshold"], "--masks or --mask-random"),
    (["--mask-fixed", "--mask-reward", "clip"], "--masks or --mask-random"),
    (["--mask-shared", "--mask-random", 0.1], "--masks"), (["--mask-window", "--mask-reward", "clip"], "--mask-random"),
    (["--mask-window", "--masks", "m.safetensors"], "--mask-random"), (["--mask-iterations", 0], "--mask-reward"),
    (["--mask-keep", "best", "--mask-random", 0.1], "--mask-reward"), (["--mask-checkpoint"], "--mask-reward"),
    (["--mask-schedule", "released"], "--mask-reward"), (["--strength", 0.5], "--init-image"),
    (["--freeu-version", 1], "--freeu"), (["--freeu-window", "dc"], "--freeu"),
    (["--freeu-backbone", "0:0.5", "--skip-tuning", "0.8"], "--freeu"),
    (["--freeu-skip", "0:0.5"], "--freeu, --skip-tuning or --scale-long")])
def test_flags_that_would_do_nothing_are_refused(flags, needed, narrow, tmp_path, command):
    code, _, stderr = command("a circle", "--model", narrow, "--out", tmp_path / "p.png", *flags)
    assert code == 2 and stderr == f"error: {flags[0]} does nothing without {needed}\n" and not list(tmp_path.iterdir())


def test_flags_that_need_another_one_say_so(narrow, tmp_path, command):
    code, _, stderr = command("a circle", "--model", narrow, "--out", tmp_path / "p.png", "--compare")
    assert code == 2 and "add --cache or --tgate" in stderr and list(tmp_path.iterdir()) == []


FLAGS = {"--cache-interval": ("2", ("deepcache", "inherit")), "--cache-branch": ("0", ("deepcache",)),
         "--cache-center": ("9", ("deepcache",)), "--cache-power": ("1.4", ("deepcache",)),
         "--cache-schedule": ("paper", ("deepcache",)), "--cache-keys": ("paper", ("faster", "inherit")),
         "--cache-parallel": (None, ("faster",)), "--cache-max-batch": ("4", ("faster",)),
         "--cache-noise": ("0", ("faster",)), "--cache-tau": ("500", ("faster",)),
         "--cache-official-order": (None, ("faster",)), "--cache-units": ("mid", ("inherit",))}


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("cache", [None, "deepcache", "faster", "inherit"])
def test_a_flag_of_another_cache_is_refused_even_with_its_default_value(flag, cache):
    value, owners = FLAGS[flag]
    needed = {"--cache-power": ["--cache-center", "9"], "--cache-schedule": ["--cache-center", "9"],
              "--cache-max-batch": ["--cache-parallel"], "--cache-official-order": ["--cache-parallel"]}.get(flag, [])
    units = ["--cache-units", "mid"] if cache == "inherit" and flag != "--cache-units" else []
    arguments = ["a circle", *(["--cache", cache] if cache else []), flag, *([value] if value else []), *units]
    if cache in owners:
        assert parse_arguments([*arguments, *needed]).cache == cache
        if needed:
            with pytest.raises(InputError, match=f"{flag} does nothing without {needed[0]}"):
                parse_arguments(arguments)
    else:
        with pytest.raises(InputError, match=f"{flag} belongs to --cache {' or '.join(owners)}"):
            parse_arguments(arguments)


@pytest.mark.parametrize("flag,value", [("--tgate-text", "reuse"), ("--tgate-guidance", "drop")])
def test_a_flag_of_tgate_is_refused_without_it(flag, value):
    assert parse_arguments(["a circle", "--tgate", "5", flag, value]).tgate == 5
    with pytest.raises(InputError, match=f"{flag} does nothing without --tgate"):
        parse_arguments(["a circle", flag, value])
