"""txt2img.py: the command, its files, and one clear line for every kind of bad input."""
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, PngImagePlugin

import txt2img
from clip_text import Tokenizer
from command import InputError
from folder import read_config, write_config
from freescale import FreeScale, read_mask
from freeu import FreeU
from maskunet import MaskSearch
from pictures import read_image
from stable_diffusion import StableDiffusion
from unet import UNet


@pytest.fixture()
def run(narrow, command):
    """txt2img.py with the narrow model -> exit code, stdout, stderr."""
    return partial(command, txt2img.main, "--model", narrow)


@pytest.fixture()
def drawn(run, tmp_path):
    """The same for one picture: its pixels and its settings. stderr, if anything went wrong."""
    def draw(*arguments, prompt: str = "a circle", out: Path = tmp_path / "p.png") -> tuple[np.ndarray, str]:
        code, _, stderr = run(prompt, "--out", out, *arguments)
        assert code == 0, stderr
        return pixels(out), parameters(out)
    return draw


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def parameters(path: Path) -> str:
    return Image.open(path).text["parameters"]


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return np.abs(a.astype(int) - b).max() <= 1


@pytest.fixture()
def start(tmp_path) -> Path:
    """A picture to start from, of no multiple of 8 pixels."""
    path = tmp_path / "start" / "start.png"
    path.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (35, 50, 3), dtype=np.uint8)).save(path)
    return path


# --------------------------------------------------------------------------------------------------------------- files

def test_one_command_writes_a_png_with_its_settings_inside(run, tmp_path):
    out = tmp_path / "new" / "p.png"
    code, stdout, _ = run("a red circle", "--steps", 2, "--out", out, "--seed", 7, "--negative-prompt", "blue",
                          "--sampler", "dpm++2m-karras", "--width", 40)
    assert code == 0 and pixels(out).shape == (32, 40, 3)
    assert parameters(out).split("\n") == [
        "a red circle", "Negative prompt: blue",
        "Steps: 2, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 7, Size: 40x32, Model: narrow, "
        "RNG: CPU"]
    last = stdout.strip().split("\n")[-1]
    assert str(out) in last and "seed 7" in last and " s " in last and "GB" in last
    assert [p.name for p in out.parent.iterdir()] == ["p.png"]


def test_several_pictures_are_numbered_by_seed_and_drawn_on_a_sheet(run, tmp_path):
    run("a circle", "--steps", 1, "--out", tmp_path / "p.png", "--n", 3, "--grid")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p_0.png", "p_1.png", "p_2.png", "p_grid.png"]
    assert pixels(tmp_path / "p_grid.png").shape == (64, 64, 3)
    assert np.array_equal(pixels(tmp_path / "p_grid.png")[:32, 32:], pixels(tmp_path / "p_1.png"))


def test_a_prompt_file_is_resumed_where_it_stopped(run, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a circle\n\na red circle\n a blue circle\n")
    arguments = ("--from-file", prompts, "--steps", 2, "--out", out, "--seed", 4)
    assert run(*arguments)[0] == 0
    assert sorted(p.name for p in out.iterdir()) == ["00000_4.png", "00001_5.png", "00002_6.png"]
    first, kept = (out / "00000_4.png").stat().st_mtime_ns, pixels(out / "00001_5.png")
    (out / "00001_5.png").unlink()
    code, stdout, _ = run(*arguments)
    assert code == 0 and "2 of 3 were there already" in stdout
    code, _, stderr = run(*arguments, "--cfg-scale", 3)
    assert code == 2 and "made with another prompt or other settings" in stderr
    assert (out / "00000_4.png").stat().st_mtime_ns == first and np.array_equal(pixels(out / "00001_5.png"), kept)


def test_a_picture_of_another_run_is_known_by_its_settings_and_files(run, start, tmp_path):
    arguments = ("a circle", "--init-image", start, "--steps", 2, "--out", tmp_path / "out")
    assert run(*arguments)[0] == 0
    assert "were there already" in run(*arguments)[1]
    for more in (["--vae-tile", 8], ["--negative-prompt", ""], ["--freeu"], ["--tgate", 1]):
        assert "made with another prompt or other settings" in run(*arguments, *more)[2]
    Image.new("RGB", (16, 16), "blue").save(start)
    assert "made with another prompt or other settings" in run(*arguments)[2]


def test_what_changes_no_picture_is_not_in_its_metadata(run, tmp_path):
    arguments = ("a circle", "--steps", 4, "--out", tmp_path)
    assert run(*arguments, "--cache", "faster,0:2,parallel")[0] == 0
    for text in ("faster,0:2", "faster,0:2,parallel,max_batch=2"):
        assert "1 of 1 were there already" in run(*arguments, "--cache", text)[1]
    assert "made with another prompt" in run(*arguments, "--cache", "faster,0:2,parallel,official_order")[2]
    assert MaskSearch(checkpoint=True).canonical() == MaskSearch()


def test_only_line_ends_part_the_prompts_of_a_file_which_has_an_end(run, tmp_path, monkeypatch):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_bytes("\ufeffa circle\r\n\n a\u2028red\x0ccircle \ra blue circle\n".encode())
    assert run("--from-file", prompts, "--steps", 1, "--out", out)[0] == 0
    made = [parameters(path).rsplit("\n", 1)[0] for path in sorted(out.iterdir())]
    assert made == ["a circle", "a\u2028red\x0ccircle", "a blue circle"]
    monkeypatch.setattr(StableDiffusion, "load", None)
    code, _, stderr = run("--from-file", prompts, "--n", 50_000)
    assert code == 2 and one_line(stderr, "150000 pictures are too many; at most 100000 per command")
    for data, words in ((b"a\0b", "it has a NUL"), (b"a" * (10 ** 7 + 1), "more than 10 MB"), (b"\xff", "codec")):
        prompts.write_bytes(data)
        code, _, stderr = run("--from-file", prompts, "--out", tmp_path / "more")
        assert code == 2 and one_line(stderr, words) and "must be a text file" in stderr
    if Path("/dev/full").exists():
        assert "it has a NUL" in run("--from-file", "/dev/full")[2]


def test_a_link_is_followed_a_pipe_is_left_alone_and_a_folder_may_have_an_ending(run, tmp_path, monkeypatch):
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    assert run("a circle", "--steps", 1, "--out", tmp_path / "link.png")[0] == 0
    assert (tmp_path / "link.png").is_symlink() and pixels(tmp_path / "real.png").shape == (32, 32, 3)
    (tmp_path / "old.txt").mkdir()
    for out in ("old.txt", "v1.5"):
        assert run("a circle", "--steps", 1, "--out", tmp_path / out)[0] == 0
        assert [path.name for path in (tmp_path / out).iterdir()] == ["00000_0.png"]
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.setattr(StableDiffusion, "load", None)
    code, _, stderr = run("a circle", "--out", tmp_path / "pipe.png")
    assert code == 2 and one_line(stderr, "pipe.png is a pipe or a device") and (tmp_path / "pipe.png").is_fifo()


def test_names_that_are_no_utf8_are_written_and_printed(run, start, tmp_path):
    init, out = start.rename(tmp_path / "mod\udce9l.png"), tmp_path / "caf\udce9.png"
    code, stdout, stderr = run("a circle", "--init-image", init, "--steps", 2, "--out", out)
    assert code == 0 and "caf\\udce9.png" in stdout and "Init image: mod\\udce9l.png" in parameters(out), stderr


def test_seed_minus_one_draws_a_seed_and_prints_it(run, tmp_path):
    seeds = [re.search(r"seed (\d+)", run("a circle", "--steps", 1, "--seed", -1, "--out", tmp_path / "p.png")[1])[1]
             for _ in range(2)]
    assert seeds[0] != seeds[1] and f"Seed: {seeds[1]}," in parameters(tmp_path / "p.png")


def test_the_processes_of_torchrun_make_the_files_of_one_process(run, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle\na red circle\na blue circle\n")
    common = ("--from-file", prompts, "--steps", 2, "--sampler", "euler-a", "--out")
    run(*common, tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "2")                              # as torchrun does
    for rank, count in ((1, 1), (0, 3)):
        monkeypatch.setenv("RANK", str(rank))
        assert run(*common, tmp_path / "two")[0] == 0 and len(list((tmp_path / "two").iterdir())) == count
    for made in (tmp_path / "one").iterdir():
        assert np.array_equal(pixels(made), pixels(tmp_path / "two" / made.name))
    for flag in (["--grid"], ["--seed", -1]):
        code, _, stderr = run(*common, tmp_path / "three", *flag)
        assert code == 2 and "torchrun" in stderr


def test_stopping_a_batch_keeps_the_finished_files_and_nothing_half_written(run, tmp_path, monkeypatch):
    decode, calls = StableDiffusion.decode, []

    def stop_at_the_second(self, *arguments):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(self, *arguments)
    monkeypatch.setattr(StableDiffusion, "decode", stop_at_the_second)
    code, _, stderr = run("a circle", "--out", tmp_path, "--n", 3, "--steps", 1)
    assert code == 130 and "stopped" in stderr and [p.name for p in tmp_path.iterdir()] == ["00000_0.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps this record")
def test_peak_memory_is_this_processs_own_and_a_closed_pipe_ends_it_quietly(narrow, tmp_path):
    starter = ("import subprocess, sys; x = bytes(range(250)) * 4_000_000\n"
               "done = subprocess.run(sys.argv[1:], capture_output=True, text=True); print(done.stdout + done.stderr)")
    command = [sys.executable, ROOT / "txt2img.py", "a circle", "--model", narrow, "--steps", 1, "--out", tmp_path]
    told = subprocess.run([sys.executable, "-c", starter, *map(str, command)], capture_output=True, text=True).stdout
    assert float(re.search(r"peak memory (\S+) GB", told)[1]) < 0.9     # the starter's: 1
    many = " ".join(shlex.quote(str(part)) for part in [*command[:-1], tmp_path / "many", "--n", 3])
    done = subprocess.run(f"{many} | true", shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.parametrize("model", ["narrow", "narrow_xl"])
@pytest.mark.parametrize("negative", [[], ["--negative-prompt", "a blue circle"]], ids=["none", "one"])
def test_each_text_of_a_command_is_encoded_once_for_all_its_batches(model, negative, request, tmp_path, run,
                                                                    monkeypatch):
    plain, seen, prompts, out = Tokenizer.__call__, [], tmp_path / "prompts.txt", tmp_path / "out"
    monkeypatch.setattr(Tokenizer, "__call__", lambda self, texts, *more: (
        seen.extend(texts), plain(self, texts, *more))[1])
    prompts.write_text("a circle\na red circle\na circle\na blue circle\n")
    assert run("--from-file", prompts, "--model", request.getfixturevalue(model), "--steps", 1, "--n", 2, "--out", out,
               *negative)[0] == 0
    texts = ["a circle", "a red circle", "a blue circle"] + ([] if negative else [""])
    assert sorted(seen) == sorted(texts * (2 if model == "narrow_xl" else 1)) and len(list(out.iterdir())) == 8


# ---------------------------------------------------------------------------------------------------- names and prompts

@pytest.mark.parametrize("flags,wanted", [
    ("--sampler k_euler_ancestral", ("sampler", "euler-a")), ("--sampler dpmpp_2m", ("sampler", "dpm++2m")),
    ("--sampler 'DPM++ 2M Karras'", ("sampler", "dpm++2m-karras")), ("--sampler k_heun", ("sampler", "heun")),
    ("--sampler 'Euler a'", ("sampler", "euler-a")), ("-s 7", ("steps", 7)), ("--scale 4", ("cfg_scale", 4)),
    ("--num_inference_steps 7", ("steps", 7)), ("--guidance_scale=4", ("cfg_scale", 4)),
    ("--negative_prompt a_b", ("negative_prompt", "a_b"))])
def test_names_of_other_programs_are_understood(flags, wanted, narrow):
    args = txt2img.parse_arguments(["a circle", "--model", str(narrow), *shlex.split(flags)])
    assert getattr(args, wanted[0]) == wanted[1]


@pytest.mark.parametrize("line", ["'a circle' --steps 3 --freeu", "--steps 3 'a circle' --freeu", "--freeu 'a circle'",
                                  "--freeu --steps 3 'a circle'", "--steps 3 --freeu -- 'a circle'"])
def test_the_prompt_may_stand_anywhere(line):
    args = txt2img.parse_arguments(shlex.split(line))
    assert args.prompt == "a circle" and args.freeu == FreeU()
    assert txt2img.parse_arguments(["--freeu", "star"]).prompt == "star"
    assert txt2img.parse_arguments(["--freeu", "none,1,1,1", "--", "-5"]).prompt == "-5"


def test_what_other_programs_read_in_a_prompt_is_named_where_it_is_not_read(run, tmp_path):
    out = ("--steps", 1, "--out", tmp_path / "p.png")
    code, _, stderr = run("a (red:1.4) circle <lora:x:0.8>", "--negative-prompt", "embedding:bad", *out)
    assert code == 0 and "note: read as plain words: (red:1.4), <lora:x:0.8>, embedding:bad; prompt weights," in stderr
    assert "read as plain words" not in run("a circle (red)", *out)[2]


def test_the_tiny_model_draws_with_its_own_guidance(tmp_path, command):
    assert command(txt2img.main, "a red circle", "--steps", 1, "--out", tmp_path / "p.png")[0] == 0
    assert "CFG scale: 3," in parameters(tmp_path / "p.png")


def test_a_model_of_fewer_training_steps_takes_no_more(narrow, run, tmp_path):
    shutil.copytree(narrow, tmp_path / "model")
    config = read_config(narrow)
    write_config(tmp_path / "model", replace(config, schedule=replace(config.schedule, train_steps=500)))
    code, _, stderr = run("a circle", "--model", tmp_path / "model", "--steps", 600, "--out", tmp_path / "p.png")
    assert code == 2 and one_line(stderr, "steps must be 1 to 500, not 600")


def test_verify_compares_every_file_with_its_digest(narrow_xl, run, tmp_path):
    file = shutil.copytree(narrow_xl, tmp_path / "model") / "unet.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    flags = ("a circle", "--model", tmp_path / "model", "--steps", 1, "--out", tmp_path / "p.png")
    assert run(*flags)[0] == 0
    code, _, stderr = run(*flags, "--verify")
    assert code == 2 and one_line(stderr, "unet.safetensors is not the file that was written with this model")


@pytest.mark.parametrize("loadavg,threads,free", [("1.9 1 1 3/250 99", 4, 2), ("9.0 1 1 10/250 99", 4, 1),
                                                  ("0.1 1 1 9/250 99", 4, None), ("9 1 1 2/250 99", 2, None)])
def test_a_busy_machine_is_told_what_helps(loadavg, threads, free, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(Path, "read_text", lambda path: loadavg)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        txt2img.note_busy_cores()
    assert [f"OMP_NUM_THREADS={free} " in str(w.message) for w in told] == ([] if free is None else [True])


# ----------------------------------------------------------------------------------------------- pictures to start from

def test_img2img_starts_from_a_picture_and_strength_zero_returns_it(narrow, start, drawn):
    kept, _ = drawn("--init-image", start, "--steps", 4, "--strength", 0)
    sd, x = StableDiffusion.load(narrow), read_image(start)
    assert x.shape == (1, 3, 32, 48)
    assert close(kept, (sd.decode(sd.encode(x))[0] * 255).round().permute(1, 2, 0).numpy())
    redrawn, text = drawn("--init-image", start, "--steps", 4, "--strength", 0.75)
    assert "Denoising strength: 0.75" in text and not np.array_equal(redrawn, kept)


def test_start_pictures_of_every_kind_are_read_as_they_look(tmp_path):
    for picture, want in ((Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 1.0), (Image.new("L", (8, 8), 128), 128 / 255),
                          (Image.fromarray(np.full((8, 8), 30000, np.uint16)), 117 / 255)):
        picture.save(tmp_path / "x.png")
        assert torch.allclose(read_image(tmp_path / "x.png", 8, 8), torch.tensor(want), atol=1e-6)


def test_pictures_whose_metadata_is_damaged_are_named(tmp_path):
    path = tmp_path / "x.png"
    Image.new("L", (8, 8)).save(path, exif=b"no such thing")
    with pytest.raises(InputError, match="can't read the picture"):
        read_image(path)
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)               # more than Pillow unpacks
    Image.new("L", (8, 8)).save(path, pnginfo=info)
    with pytest.raises(ValueError, match="can't read the mask"):
        read_mask(path)
    with pytest.raises(InputError, match="is there already"):
        txt2img.finished(path, "")


# ---------------------------------------------------------------------------------------------------- caches and T-GATE

def test_the_run_prints_what_a_cache_saves(run, tmp_path):
    def said(*flags):
        code, _, stderr = run("a circle", "--steps", 20, "--out", tmp_path / "p.png", *flags)
        assert code == 0
        return [line for line in stderr.splitlines() if "note: " in line or "fewer" in line]
    assert said() == []
    (line,) = said("--cache", "deepcache,4")
    units, macs, plain = re.search(r"Cache: (\d+ of \d+) units and (\S+) of (\S+) billion", line).groups()
    assert units == "75 of 180" and float(macs) < float(plain)         # 5 keys of 9 units, 15 steps of conv_in and u3
    (line,) = said("--tgate", "4,compute")                             # 4 steps of two rows, 16 of one
    assert "T-GATE: " in line and "1.67 times fewer" in line and "units and" not in line
    note, line = said("--cache", "faster,keys=0:1", "--tgate", 5)
    assert "over 15 of 20 steps" in note and "Cache and T-GATE: " in line
    note, line = said("--cache", "faster,keys=1")
    assert "saves nothing" in note and "180 of 180 units" in line and "1.00 times fewer" in line


def test_compare_draws_both_pictures_side_by_side_and_tells_the_speed_up(run, tmp_path):
    flags = ("a circle", "--steps", 4, "--n", 2, "--out", tmp_path / "p.png")
    assert run(*flags)[0] == 0
    plain = [pixels(tmp_path / f"p_{k}.png") for k in (0, 1)]
    code, stdout, _ = run(*flags, "--cache", "deepcache", "--compare", "--batch-size", 2)
    assert code == 0 and "times as fast" in stdout and stdout.count("PSNR") == 2
    for k in (0, 1):
        both = pixels(tmp_path / f"p_{k}_compare.png")
        assert both.shape[1] == 2 * plain[k].shape[1] and close(both[:, :32], plain[k])
        assert np.array_equal(both[:, 32:], pixels(tmp_path / f"p_{k}.png"))


def test_compare_goes_on_where_only_the_picture_is_there(run, tmp_path):
    arguments = ("a circle", "--steps", 6, "--cache", "deepcache", "--out", tmp_path / "out")
    run(*arguments)
    made = pixels(tmp_path / "out" / "00000_0.png")
    assert "times as fast" in run(*arguments, "--compare")[1]
    assert np.array_equal(pixels(tmp_path / "out" / "00000_0.png"), made)
    assert "were there already" in run(*arguments, "--compare")[1]


def test_compare_clocks_nothing_that_is_drawn_for_the_first_time(run, tmp_path, monkeypatch):
    plain, drawn = StableDiffusion.sample, []

    def sample(self, prompts, negative, steps, *rest, **settings):
        drawn.append((len(prompts), steps, "cache" in settings))
        return plain(self, prompts, negative, steps, *rest, **settings)
    monkeypatch.setattr(StableDiffusion, "sample", sample)
    monkeypatch.setattr(UNet, "compile", lambda self, **options: None)
    flags = ("a circle", "--steps", 4, "--out", tmp_path, "--cache", "deepcache", "--compare", "--batch-size", 2,
             "--n", 3)
    assert run(*flags)[0] == 0
    assert drawn == [(2, 1, False), (2, 4, False), (2, 4, True), (1, 4, False), (1, 4, True)]
    drawn.clear()
    assert run(*flags, "--seed", 5, "--compile")[0] == 0               # graphs of both, and of the smaller last batch
    assert drawn == [(n, 4, cached) for n in (2, 1) for cached in (False, True) * 2]


# ------------------------------------------------------------------------------------------------------- large pictures

def test_freescale_doubles_up_to_the_factor(drawn):
    shown, text = drawn("--steps", 3, "--freescale", 4, "-W", 24, "-H", 16, "--cache", "deepcache", "--freeu")
    assert shown.shape == (64, 96, 3) and "Size: 96x64" in text
    assert 'FreeScale: "resolutions=24x16:48x32:96x64,native=8"' in text


def test_low_memory_draws_the_same_picture(drawn):
    flags = ("--steps", 3, "--freescale", "32x32:64x48,0.5,blur=official,upsample=latent,fast")
    kept, text = drawn(*flags)
    assert kept.shape == (48, 64, 3) and close(drawn(*flags, "--low-memory")[0], kept)
    assert 'FreeScale: "resolutions=32x32:64x48,detail=0.5,upsample=latent,blur=official,fast,native=8"' in text


def test_the_command_line_makes_what_the_class_makes(narrow, drawn):
    sd = StableDiffusion.load(narrow)
    free = FreeScale(((32, 32), (48, 64)), restart=0.5, detail=0.5)
    want = sd.decode(sd.sample("a circle", None, steps=4, seed=2, freescale=free))[0]
    shown, _ = drawn("--steps", 4, "--seed", 2, "--freescale", "32x32:64x48,0.5,restart=0.5")
    assert np.array_equal(shown, (want * 255).round().byte().permute(1, 2, 0).numpy())


def test_a_picture_of_ones_own_takes_the_place_of_the_first_stage(start, drawn):
    shown, text = drawn("--steps", 3, "--init-image", start, "--freescale", 2)
    assert shown.shape == (64, 96, 3) and "Denoising strength" not in text
    shown, _ = drawn("--steps", 3, "--init-image", start, "--freescale", "40x32:80x64", "--cache", "faster")
    assert shown.shape == (64, 80, 3)


def test_a_detail_map_is_read_and_checked(run, drawn, tmp_path):
    mask, out = tmp_path / "mask.png", tmp_path / "none" / "p.png"
    Image.new("L", (64, 64), 3).save(mask)
    flags = ("--steps", 3, "--freescale", f"2,outside=0.1,detail_map={mask}")
    assert close(drawn(*flags)[0], drawn("--steps", 3, "--freescale", 2)[0])             # not black anywhere
    for picture, words in ((Image.new("RGB", (64, 64)), "mask.png has mode RGB"),
                           (Image.new("L", (64, 40)), "mask.png is 64x40, but must be as large as a stage (32x32, "
                            "64x64)"), (None, "can't read the mask")):
        mask.write_bytes(b"no picture") if picture is None else picture.save(mask)
        code, _, stderr = run("a circle", *flags, "--out", out)
        assert code == 2 and words in stderr and stderr.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize("flags,hints", [
    ([], "--low-memory or --dtype bfloat16 or "),
    (["--low-memory", "--dtype", "bfloat16", "--batch-size", 2, "--n", 2], "--batch-size 1 or "),
    (["--low-memory", "--dtype", "bfloat16", "--vae-tile", 0], "--vae-tile 64 or ")])
def test_a_size_beyond_the_memory_is_refused_before_anything_is_loaded(flags, hints, run, tmp_path, monkeypatch):
    monkeypatch.setattr("txt2img.free_memory", lambda device: 1_000_000)
    monkeypatch.setattr(StableDiffusion, "load", None)
    for size, smaller in ((["--freescale", 4], "a smaller --freescale"),
                          (["-W", 128, "-H", 128], "smaller --width and --height")):
        code, _, stderr = run("a circle", *size, "--out", tmp_path / "out", *flags)
        assert code == 2 and one_line(stderr, f"GB free on cpu: use {hints}{smaller}\n")
        assert "128x128 pixels" in stderr and "need about" in stderr and list(tmp_path.iterdir()) == []


def check_memory(narrow: Path, *flags: str, size: tuple[int, int], images: int = 1) -> None:
    args = txt2img.parse_arguments(["a circle", "--model", str(narrow), *flags])
    techniques = txt2img.bind_techniques(args, args.config, 32, 32)
    txt2img.check_memory(args, techniques, *size, images, torch.device("cpu"))


def test_rough_bounds_of_memory_need_no_plan(narrow, monkeypatch):
    monkeypatch.setattr("txt2img.plan_stages", None)
    for flags, size, free, words in ((["--freescale", "32x32:65536x65536"], (65536, 65536), 10 ** 11, "1e+02 GB or"),
                                     (["--freescale", "8"], (256, 256), 6 * 256 * 256 * 4 * 4 - 1, "0.0063 GB or more"),
                                     (["-W", "65536"], (32, 65536), 6 * 32 * 65536 * 4 * 4 - 1, "0.2 GB or more")):
        monkeypatch.setattr("txt2img.free_memory", lambda device, free=free: free)
        with pytest.raises(InputError, match=re.escape(words)):
            check_memory(narrow, *flags, size=size, images=4)
    monkeypatch.setattr("txt2img.free_memory", lambda device: 10 ** 9)
    check_memory(narrow, size=(64, 64))


def test_planning_a_large_picture_says_so(narrow, monkeypatch, capsys):
    monkeypatch.setattr("txt2img.free_memory", lambda device: 10 ** 9)
    monkeypatch.setattr("txt2img.plan_stages", lambda *_, **__: [Namespace(memory=0)])
    for side, said in ((2048, ""), (2056, "planning the memory: some seconds\n")):
        check_memory(narrow, "--freescale", f"32x32:{side}x{side}", size=(side, side))
        assert capsys.readouterr().err == said


def test_rewards_of_a_search_need_memory_too(narrow, tmp_path, monkeypatch):
    (tmp_path / "reward").mkdir()
    monkeypatch.setattr("txt2img.free_memory", lambda device: 10 ** 7)
    for size in (10 ** 6, 10 ** 7):
        (tmp_path / "reward" / "image_encoder.safetensors").write_bytes(bytes(size))
        if size == 10 ** 6:
            check_memory(narrow, "--masks", f"search,{tmp_path}/reward", size=(32, 32))
    with pytest.raises(InputError, match="32x32 pixels need about 0.01 GB or more"):
        check_memory(narrow, "--masks", f"search,{tmp_path}/reward", size=(32, 32))


@pytest.mark.parametrize("kind", ["scalecrafter", "hidiffusion", "demofusion"])
def test_other_ways_to_large_pictures_draw_them_from_a_seed(kind, drawn):
    flags = ("--steps", 2, "--seed", 3, "-W", 72, "-H", 48, "--freeu")
    (plain, without), (one, text), (two, _) = drawn(*flags), drawn(*flags, "--highres", kind), drawn(
        *flags, "--highres", kind)
    assert one.shape == (48, 72, 3) and np.array_equal(one, two) and not np.array_equal(one, plain)
    assert f'Highres: "{kind},' in text and "Highres" not in without


def test_scale_crafter_without_guidance_beyond_three_times_draws_its_strong_pass(drawn):
    flags = ("--steps", 2, "-W", 128, "-H", 32, "--cfg-scale", 1, "--highres", "scalecrafter")
    assert drawn(*flags)[0].shape == (32, 128, 3)


# ----------------------------------------------------------------------------------------------------------- bad input

def one_line(stderr: str, words: str) -> bool:
    return words in stderr and stderr.count("\n") == 1 and stderr.startswith("error: ")


@pytest.mark.parametrize("arguments,words", [
    (["a circle", "--width", "36"], "width 36 is not a multiple of 8; the nearest are 32 and 40"),
    (["a circle", "--height", "0"], "height 0 is not a multiple of 8"),
    (["a circle", "--steps", "0"], "steps must be 1 to 1000"),
    (["a circle", "--steps", "1001"], "steps must be 1 to 1000"),
    (["a circle", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (["a circle", "--sampler", "plms"], "ddim, dpm++2m, dpm++2m-karras, euler, euler-karras, euler-a"),
    (["a circle", "--spacing", "even"], "leading, linspace, trailing"),
    (["a circle", "--strength", "1.5", "--init-image", "x.png"], "--strength must be between 0 and 1"),
    (["a circle", "--strength", "0.5"], "--strength does nothing without --init-image"),
    (["a circle", "--cfg-scale", "nan"], "--cfg-scale must be a finite number"),
    (["a circle", "--eta", "2"], "eta must be between 0 and 1"),
    (["a circle", "--eta", "1", "--sampler", "dpm++2m"], "dpm++2m is deterministic: leave eta at 0"),
    (["a circle", "--eta", "0.5", "--sampler", "heun"], "heun is deterministic: leave eta at 0"),
    (["caf\udce9"], "the prompt has a NUL or bytes that are no UTF-8"),
    (["a circle", "--negative-prompt", "\udce9"], "--negative-prompt has a NUL or bytes that are no UTF-8"),
    (["a circle", "--out", "f" * 245 + ".png"], "is too long"),
    (["a circle", "--vae-tile", "4"], "--vae-tile must be 0, or 8 or more"),
    (["a circle", "--n", "0"], "--n must be 1 to 100000"),
    (["a circle", "--n", "100000000"], "--n must be 1 to 100000"),
    (["a circle", "--batch-size", "0"], "--batch-size must be 1 or more"),
    (["a circle", "--seed", "-2"], "--seed must be 0 to 9223372036854775807, or -1 for a random one"),
    (["a circle", "--seed", str(2 ** 63 - 1), "--n", "2"], "--seed must be 0 to 9223372036854775806"),
    ([], "give one prompt, in quotation marks, or a file of prompts with --from-file\n"),
    (["a", "circle"], "in quotation marks, or a file of prompts with --from-file, not 'a' and 'circle'\n"),
    (["a circle", "--stepps", "3"], "there is no flag --stepps (did you mean --steps?)"),
    (["a circle", "-q"], "there is no flag -q\n"),
    (["a circle", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    (["a circle", "--compare"], "add --cache or --tgate"),
    (["a circle", "--from-file", "x.txt"], "not 'a circle' and --from-file x.txt"),
    (["--from-file", "nowhere.txt"], "nowhere.txt"),
    (["--from-file", "nowhere.txt", "--out", "one.png"], "must be a folder"),
    (["a circle", "--init-image", "nowhere.png"], "can't read the picture nowhere.png"),
    (["a circle", "--model", "nowhere"], "convert_weights.py SOURCE nowhere"),
    (["a circle", "--device", "abacus"], "abacus"),
    (["a circle", "--device", "hpu"], "--device hpu can't be used here"),
    (["a circle", "--device", "meta"], "use cpu, cuda, mps or xpu"),
    *((["a circle", "--out", name], f"only PNG files are written: --out can't be {name} (for a folder of this name,")
      for name in ("f.jpg", "o.pgn", "a.txt", "x/b.mp4")),
    *(([*prompt, flag, "f" * 300], f"argument {flag}: '{'f' * 40}'... can't be a file's name: it is too long") for
      prompt, flag in ((["a circle"], "--out"), ([], "--from-file"), (["a circle"], "--init-image"),
                       (["a circle"], "--model"))),
    (["a circle", "--out", "a\0b"], "argument --out: 'a\\x00b' can't be a file's name: it is empty or has a NUL"),
    (["a circle", "--out", ""], "it is empty or has a NUL"),
    (["a\0circle"], "the prompt has a NUL"),
    (["a circle", "--masks", "f" * 300], "File name too long: 'ffff"),
    (["a circle", "--masks", "search," + "f" * 300], "File name too long: 'ffff"),
    (["a circle", "--cfg-scale", "0"], "and there is none: for no guidance use 1 (where diffusers takes 0)"),
    (["a circle", "--cfg-scale", "1", "--negative-prompt", "red"], "negative prompt does nothing without guidance"),
    (["a circle", "--sampler", "dpm++2m-karras", "--spacing", "leading"], "spacing does nothing with dpm++2m-karras"),
    (["a circle", "--sampler", "euler-a", "--eta", "0.5"], "eta does nothing with euler-a"),
    (["a circle", "--steps", "5", "--strength", "0.1", "--init-image", "x.png"], "redraws none of 5 steps: use 0.2"),
    (["a circle", "-W", "65536", "-H", "65536"], "65536x65536 pixels need about 1e+02 GB or more"),
    (["a circle", "--width", "80000000000"], "the largest is 65536"),
])
def test_bad_arguments_end_in_one_clear_line(arguments, words, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, stderr = run(*arguments)
    assert code == 2 and one_line(stderr, words) and list(tmp_path.iterdir()) == []


SETTINGS = {
    "--freeu": [("a red circle", "give one prompt"),
                ("1,2,-3,1", "FreeU's s1 must be a number from 0 to 10"), ("version=3", "version must be 2 or 1"),
                ("rule=blocks", "channels or level"), ("backbone=0.5", "backbone must be a number:a number"),
                ("skip=0.5:2", "0..1")],
    "--skips": [("tuning,x", "bottom must be a number"), ("tuning", "needs bottom, such as bottom=..."),
                ("0.9", "begins with tuning or scalelong, not '0.9'")],
    "--cache": [("deepcache,0", "interval must be 1 or more"), ("deepcache,branch=9", "0 to 3"),
                ("deepcache,31", "more than the run's 30"), ("deepcache,keys=5", "'keys=5' is none of its settings"),
                ("deepcache,center=9,power=nan", "power must be"),
                ("deepcache,center=9,power=0", "power must be"),
                ("deepcache,power=1.2", "power does nothing without center"),
                ("deepcache,schedule=paper", "schedule does nothing without center"),
                ("deepcache,center=9,schedule=even", "released or paper"),
                ("deepcache,center=0", "center 0 is not between"), ("faster,often", "paper or rescaled or square or"),
                ("faster,1:2", "begin with 0"), ("faster,0:30", "beyond the last"), ("faster,keys=", "not ''"),
                ("faster,alpha=-1", "between 0 and 1"), ("faster,alpha=nan", "alpha"), ("faster,tau=-1", "tau"),
                ("faster,parallel,max_batch=0", "1 or more"), ("faster,max_batch=4", "does nothing without parallel"),
                ("faster,official_order", "does nothing without parallel"), ("inherit", "needs units"),
                ("inherit,mid:x9", "'x9' is none"), ("inherit,mid,interval=2", "'interval=2' is none of its")],
    "--tgate": [("30", "beyond the last"), ("0", "1 or more"), ("5,forget", "text must be reuse or compute"),
                ("5,compute,keep", "does nothing"), ("text=reuse", "needs step")],
    "--masks": [("nowhere.safetensors", "there is no file nowhere.safetensors; make one: python train.py masks"),
                ("m.safetensors,threshold,fixed", "fixed does nothing with threshold"), ("random,1.5", "between 0 and"),
                ("random,0.1,mode=threshold", "mode must be sample or expected"),
                ("random,0.1,shared=yes", "'shared=yes' is none of its settings"), ("mode=threshold", "needs file"),
                ("search,clip,-1", "0 or more"), ("search,clip,window", "iterations must be a whole number or none"),
                ("search,clip,3,released", "released schedule has its own iterations"),
                ("search,nowhere", "there is no folder nowhere with a reward; make one: python convert_weights.py")],
    "--freescale": [("32x32:64x60", "64x60 is not of multiples of 8; the nearest is 64x64"),
                    ("64x64:32x64", "must not fall, but 64x64 is followed by 32x64"), ("3", "2, 4 or 8 times, not 3"),
                    ("64:64", "resolutions must be a whole number or a size, or several with colons"),
                    ("32x32:64x64,native=0", "native"), ("2,outside=1", "outside does nothing without detail_map"),
                    ("2,much", "detail must be a number"), ("2,-1", "0 or more"), ("2,blur=box", "spatial or official"),
                    ("2,upsample=x", "rgb or latent"), ("2,restart=1", "restart is a fraction"),
                    ("2,dilate=2", "dilate is a fraction"), ("2,detail_map=nowhere.png", "can't read the mask")],
    "--highres": [("hidiffusion", "larger than the model's own 32 pixels: give --width and --height"),
                  ("direct", "begins with scalecrafter or hidiffusion or demofusion, not 'direct'"),
                  ("demofusion,sigma=x", "sigma must be a number")],
}


@pytest.mark.parametrize("flag", SETTINGS)
def test_bad_settings_end_in_one_clear_line_before_anything_is_loaded(flag, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StableDiffusion, "load", None)
    for text, words in SETTINGS[flag]:
        code, _, stderr = run("a circle", flag, text)
        assert code == 2 and one_line(stderr, words), (text, stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags,words", [
    ("--freescale 64x64 --width 64", "--freescale gives all sizes: leave out --width and --height"),
    ("--freescale 32x32 --init-image x.png", "give a second, larger one"),
    ("--freescale 2 --strength 0.5 --init-image x.png", "FreeScale's stages take restart instead"),
    ("--freescale 8 --width 16000", "the largest is 65536"),
    ("--highres hidiffusion --freescale 2", "give one of them"),
    ("--highres demofusion -W 64 --cache deepcache", "demofusion can't be combined with --cache"),
    ("--highres demofusion -W 64 --tgate 5", "demofusion can't be combined with --tgate"),
    ("--highres demofusion --init-image x.png", "demofusion can't be combined with --init-image"),
    ("--masks search --cache faster,parallel", "needs every step's latents: leave out the parallel of --cache")])
def test_what_can_not_be_combined_is_named_before_anything_is_loaded(flags, words, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StableDiffusion, "load", None)
    code, _, stderr = run("a circle", *flags.split())
    assert code == 2 and one_line(stderr, words) and list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_leave_no_picture(run, tmp_path, monkeypatch):
    monkeypatch.setattr("stable_diffusion.generate", lambda unet, noise, *_, **__: [(0, noise * torch.nan)])
    code, _, stderr = run("a circle", "--steps", 1, "--out", tmp_path / "p.png")
    assert code == 2 and one_line(stderr.split("\r")[-1], "not finite") and list(tmp_path.iterdir()) == []


def test_pointing_at_a_checkpoint_file_names_the_convert_command(run, tmp_path):
    file = tmp_path / "v1-5.safetensors"
    file.write_bytes(b"x")
    code, _, stderr = run("a circle", "--model", file, "--out", tmp_path / "p.png")
    assert code == 2 and one_line(stderr, f"python convert_weights.py {file} OUT_DIR")


def test_an_empty_prompt_file_and_an_unwritable_place_are_named(run, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    assert "has no prompts" in run("--from-file", empty, "--out", tmp_path / "o")[2]
    code, _, stderr = run("a circle", "--out", empty / "sub" / "p.png")
    assert code == 2 and one_line(stderr, "can't write to")


def test_running_out_of_memory_names_the_flags_that_help(run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr("stable_diffusion.generate", full)
    code, _, stderr = run("a circle", "--out", tmp_path / "p.png")
    assert code == 2 and "Traceback" not in stderr
    assert all(flag in stderr for flag in ("--dtype", "--width", "--vae-tile"))
