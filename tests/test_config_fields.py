"""convert_weights.py: every entry of a config file is obeyed, or refused, or named as not used.

`pytest -s` prints how many entries are treated in each way.
"""
import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA
from test_convert_weights import (
    check_folder,
    narrow,
    random_weights,
    vocabulary,
    write_configs,
    write_hf,
    write_tokenizer,
)

import convert_weights
from clip_text import Tokenizer
from command import InputError
from convert_weights import AUTOENCODER, SCHEDULER, SCHEDULERS, TEXT, TOKENIZER, UNET, convert
from folder import ModelConfig
from sampler import SAMPLERS, plan

# The fields of the config classes of diffusers 0.42.1 and transformers 5.23; of schedulers that are refused, the names.
PEERS = json.loads((DATA / "config_fields.json").read_text())
FILES = {"UNet2DConditionModel": (UNET, "unet/config.json"), "AutoencoderKL": (AUTOENCODER, "vae/config.json"),
         "CLIPTextConfig": (TEXT, "text_encoder_2/config.json"),
         "CLIPTokenizer": (TOKENIZER, "tokenizer/tokenizer_config.json"),
         "schedulers": (SCHEDULER, "scheduler/scheduler_config.json")}
# A legal value that the narrow SDXL of `write_configs` doesn't have, for each entry that is obeyed.
OTHERS = {
    "unet/config.json": {
        "in_channels": 6, "out_channels": 6, "block_out_channels": [16, 16, 64], "layers_per_block": 1,
        "down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3, "attention_head_dim": [1, 2, 2],
        "transformer_layers_per_block": [1, 2, 2], "cross_attention_dim": 48, "use_linear_projection": False,
        "upcast_attention": True, "norm_num_groups": 4, "addition_embed_type": None, "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 60, "sample_size": 96},
    "vae/config.json": {
        "block_out_channels": [16, 16, 32, 64], "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3, "layers_per_block": 1, "latent_channels": 8, "norm_num_groups": 4,
        "scaling_factor": 0.5, "force_upcast": False},
    "text_encoder_2/config.json": {
        "vocab_size": 9, "max_position_embeddings": 60, "hidden_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "intermediate_size": 96, "hidden_act": "quick_gelu", "projection_dim": 24,
        "eos_token_id": 5},
    "tokenizer/tokenizer_config.json": {
        "model_max_length": 40, "max_len": 40, "pad_token": "!", "added_tokens_decoder": {"9": {"content": "<x>"}}},
    "scheduler/scheduler_config.json": {
        "_class_name": "HeunDiscreteScheduler", "beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear",
        "num_train_timesteps": 500, "steps_offset": 0, "set_alpha_to_one": True, "timestep_spacing": "trailing",
        "prediction_type": "v_prediction", "clip_sample": True}}
ENTRIES = [(fields, file, name) for fields, file in FILES.values()
           for name in [*fields.obeyed.split(), *fields.only, *fields.unused, *fields.inert.split()]]


def treated(fields: convert_weights.Fields, name: str) -> str | None:
    kinds = {"obeyed": fields.obeyed.split(), "refused": fields.only, "named": fields.unused,
             "without effect": fields.inert.split()}
    found = [kind for kind, names in kinds.items() if name in names]
    assert len(found) <= 1, f"{name} is treated in {len(found)} ways"
    return found[0] if found else None


def read(folder: Path) -> tuple[ModelConfig, str, dict[str, list[str]]]:
    unused = {}
    model, sampler = convert_weights.hf_config(folder, None, unused)
    vocab, merges = convert_weights.read_vocabulary(folder / "tokenizer")
    return convert_weights.with_tokenizers(model, vocab, merges, folder, unused), sampler, unused


def edit(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    data = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(data | changes))


def test_every_field_of_the_peers_classes_is_treated_in_one_way():
    counts = {}
    for name, (fields, _) in FILES.items():
        kinds = PEERS["schedulers"] if name == "schedulers" else {name: PEERS[name]}
        for field in {field for own in kinds.values() for field in own.split()}:
            way = treated(fields, field)
            assert way is not None, f"{name}: {field} is unknown"
            counts[name, way] = counts.get((name, way), 0) + 1
    assert PEERS["schedulers"].keys() == SCHEDULERS.keys() and not SCHEDULERS.keys() & {*PEERS["refused"].split()}
    print("\n" + "\n".join(f"{name}: {n} {way}" for (name, way), n in sorted(counts.items())))


def test_the_list_of_fields_is_that_of_the_peers_classes():
    diffusers = pytest.importorskip("diffusers", reason="reads the fields of diffusers' own classes")
    transformers = pytest.importorskip("transformers", reason="reads the fields of transformers' own classes")
    base = transformers.tokenization_utils_base.PreTrainedTokenizerBase

    def fields(kind: type) -> set[str]:
        return {*inspect.signature(kind.__init__).parameters} - {"self", "args", "kwargs"}
    theirs = {name: fields(getattr(diffusers, name)) for name in ("UNet2DConditionModel", "AutoencoderKL")}
    theirs["CLIPTextConfig"] = {name for name in transformers.CLIPTextConfig().to_dict() if not name.startswith("_")}
    theirs["CLIPTokenizer"] = {*fields(transformers.CLIPTokenizer), *base.SPECIAL_TOKENS_ATTRIBUTES,
                               *re.findall(r'kwargs\.pop\("(\w+)"', inspect.getsource(base.__init__))}
    found = [getattr(diffusers.schedulers, name, None) for name in dir(diffusers.schedulers)]
    classes = {kind.__name__: fields(kind) for kind in found
               if inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin)}
    assert {name: {*PEERS[name].split()} for name in theirs} == theirs
    absent = {name for name in [*PEERS["schedulers"], *PEERS["refused"].split()]  # these need SciPy or torchsde
              if type(getattr(diffusers, name, None)).__name__ == "DummyObject"}
    assert {name: {*own.split()} for name, own in PEERS["schedulers"].items() if name not in absent} == {
        name: own for name, own in classes.items() if name in SCHEDULERS}
    assert {*PEERS["refused"].split()} - absent == classes.keys() - SCHEDULERS.keys() - {"SchedulerMixin"}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> Path:
    """The config files and the tokenizer of a narrow SDXL; a test that changes a file restores it."""
    folder = write_configs(tmp_path_factory.mktemp("configs") / "sdxl", "sdxl")
    (folder / "tokenizer" / "special_tokens_map.json").unlink()              # it would override tokenizer_config.json
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.mark.parametrize("fields, file, name", ENTRIES, ids=[f"{file}-{name}" for _, file, name in ENTRIES])
def test_an_entry_is_treated_as_its_table_says(sdxl, fields, file, name):
    before, path = read(sdxl), sdxl / file
    was = path.read_text() if path.is_file() else None
    way = treated(fields, name)
    try:
        edit(sdxl, file, **{name: OTHERS[file][name] if way == "obeyed" else "strange"})
        after = read(sdxl)
    except InputError as error:
        assert way in ("obeyed", "refused") and name.removeprefix("model_") in str(error) or way == "obeyed", str(error)
        assert "\n" not in str(error)
        return
    finally:
        path.unlink() if was is None else path.write_text(was)
    assert not before[2] and way != "refused"
    assert (before[:2] != after[:2]) == (way == "obeyed")
    assert any(f"{name} 'strange'" in entries for entries in after[2].values()) == (way == "named")


def configs(place: Path, family: str, **changes: dict) -> Path:
    folder = write_configs(place, family, **changes)
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.mark.parametrize("family, changes, words", [
    ("sd15", {"_class_name": "LCMScheduler"}, "'LCMScheduler' is for few-step models"),
    ("sd15", {"_class_name": "TCDScheduler"}, "few-step models"), ("sd15", {"thresholding": True}, "thresholding"),
    ("sd15", {"_class_name": "EDMEulerScheduler"}, "EDM's noise levels"),
    ("sdxl", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching"),
    ("sdxl", {"_class_name": "HomeMadeScheduler"}, "none of the supported schedulers"),
    ("sdxl", {"clip_sample": True}, "clip_sample is true, which would clip"),
    ("sdxl", {"_class_name": "DDIMScheduler"}, "clip_sample is true (the default of DDIMScheduler)"),
    ("sd15", {"prediction_type": "sample"}, "prediction_type is 'sample', only 'epsilon' or 'v_prediction' is"),
    ("sd15", {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"), ("sd15", {"beta_start": -1}, "beta_start is -1"),
    ("sd15", {"num_train_timesteps": 1e30}, "train_steps can't be 1e+30"),
    ("sd15", {"beta_end": None}, "beta_end can't be None")])
def test_a_scheduler_that_we_cannot_follow_is_refused_with_a_reason(tmp_path, family, changes, words):
    with pytest.raises(InputError) as error:
        read(configs(tmp_path, family, scheduler=changes))
    assert words in str(error.value)


def test_what_is_not_used_is_named_and_the_summary_ends_with_the_sampler(tmp_path):
    write_hf(tmp_path / "hf", "sd15", unet={"decay": 0.99}, scheduler={
        "_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++",
        "steps_offset": 0, "clip_sample": True, "solver_order": 2, "made_up": 1})
    lines = str(convert(tmp_path / "hf", tmp_path / "out")).splitlines()
    assert "not used: unet/config.json: decay 0.99" in lines
    assert "not used: --sampler decides: use_karras_sigmas True, algorithm_type 'sde-dpmsolver++', made_up 1" in lines
    assert "not used: diffusers' pipelines ignore it too: steps_offset 0, clip_sample True" in lines
    assert lines[-1] == "made for DPMSolverMultistepScheduler: --sampler dpm++2m-karras"
    check_folder(tmp_path / "out", "sd15", random_weights("sd15"))


def test_absent_entries_have_the_defaults_of_the_peers_classes(tmp_path):
    """Where these matter; a scheduler's are compared with diffusers' below."""
    folder = configs(tmp_path, "sdxl")
    for file, name in (("vae/config.json", "force_upcast"), ("text_encoder_2/config.json", "eos_token_id")):
        data = json.loads((folder / file).read_text())
        del data[name]
        (folder / file).write_text(json.dumps(data))
        if name == "force_upcast":
            assert read(folder)[0].vae.force_upcast
    with pytest.raises(InputError, match="eos_token_id is 49407, only 2 or 537 is supported"):
        read(folder)
    assert not read(configs(tmp_path / "sd15", "sd15"))[0].vae.force_upcast  # its pipelines never upcast


def test_lists_of_equal_values_stand_for_the_value(tmp_path):
    lists = {"only_cross_attention": [False] * 4, "layers_per_block": [2] * 4, "cross_attention_dim": [16] * 4,
             "transformer_layers_per_block": [1] * 4, "sample_size": [64, 64]}
    assert read(configs(tmp_path / "a", "sd15", unet=lists)) == read(configs(tmp_path / "b", "sd15"))
    for changes, words in (({"only_cross_attention": [True, False]}, "only_cross_attention"),
                           ({"layers_per_block": [2, 2, 2, 3]}, "layers can't be"),
                           ({"sample_size": [64, 96]}, "only one number")):
        with pytest.raises(InputError, match=words):
            read(configs(tmp_path / "c", "sd15", unet=changes))


def test_a_tokenizers_model_max_length_is_obeyed(tmp_path):
    weights = write_hf(tmp_path / "hf", "sd15")
    edit(tmp_path / "hf", "tokenizer/tokenizer_config.json", model_max_length=40)
    convert(tmp_path / "hf", tmp_path / "out")
    positions = "text_model.embeddings.position_embedding.weight"
    shorter = weights["text_encoder"] | {positions: weights["text_encoder"][positions][:40]}
    model = narrow("sd15")
    check_folder(tmp_path / "out", replace(model, text_encoder=replace(model.text_encoder, length=40)),
                 weights | {"text_encoder": shorter})
    ids = Tokenizer(tmp_path / "out" / "tokenizer.json")(["cat " * 60], 40, model.text_encoder.pad)[0]
    assert ids.shape == (1, 40) and ids[0, -1] == len(vocabulary()) - 1
    for place, length, words in (("tokenizer", 1, "length is 1, not 3"), ("tokenizer", "many", "can't be read")):
        edit(tmp_path / "hf", f"{place}/tokenizer_config.json", model_max_length=length)
        with pytest.raises(InputError, match=words):
            read(tmp_path / "hf")
    folder = configs(tmp_path / "xl", "sdxl")
    edit(folder, "tokenizer/tokenizer_config.json", model_max_length=40)
    with pytest.raises(InputError, match="model_max_length differ .40 and 77."):
        read(folder)


def test_a_second_vocabulary_is_refused(tmp_path):
    folder = configs(tmp_path / "xl", "sdxl")
    before = read(folder)
    write_tokenizer(folder / "tokenizer_2")
    assert read(folder) == before
    swapped = vocabulary() | {"a": vocabulary()["b"], "b": vocabulary()["a"]}
    (folder / "tokenizer_2" / "vocab.json").write_text(json.dumps(swapped))
    with pytest.raises(InputError, match="tokenizer_2 has another vocabulary"):
        read(folder)


@pytest.mark.parametrize("changes", [
    {"beta_schedule": "linear"}, {"beta_schedule": None}, {"beta_start": None, "beta_end": None}, {"steps_offset": 0},
    {"steps_offset": None}, {"set_alpha_to_one": True}, {"set_alpha_to_one": None}, {"num_train_timesteps": 400},
    {"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}, {"clip_sample": True}, {"clip_sample": None}])
@pytest.mark.parametrize("family, pipeline", [("sd15", "StableDiffusionPipeline"), ("sdxl", None)])
def test_odd_schedules_are_those_of_diffusers_pipelines(tmp_path, family, pipeline, changes):
    """DDIM's times and alphas; None: the entry is absent. SD's pipeline changes two entries, SDXL's none."""
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers' own schedulers")
    entries = {"_class_name": "DDIMScheduler", "clip_sample": False, "steps_offset": 1, "beta_start": 0.00085,
               "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
               "set_alpha_to_one": False}
    entries = {name: value for name, value in (entries | changes).items() if value is not None}
    folder = configs(tmp_path, family)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(entries))
    theirs = diffusers.DDIMScheduler.from_config(entries)
    if pipeline is not None:
        theirs = getattr(diffusers, pipeline)(None, None, None, None, theirs, None, None,
                                              requires_safety_checker=False).scheduler
    elif theirs.config.clip_sample:
        with pytest.raises(InputError, match="clip_sample"):
            read(folder)
        return
    schedule = read(folder)[0].schedule
    assert not theirs.config.clip_sample
    assert torch.equal(schedule.alphas(), theirs.alphas_cumprod)
    theirs.set_timesteps(7)
    ours = plan("ddim", 7, schedule)
    assert list(ours.times) == theirs.timesteps.tolist()
    final = theirs.final_alpha_cumprod.item()
    stride = schedule.train_steps // 7
    assert np.allclose(ours.after, [theirs.alphas_cumprod[int(t) - stride].item() if t >= stride else final
                                    for t in ours.times])


def test_supported_schedulers_name_samplers_that_exist():
    assert {solver for solver in SCHEDULERS.values() if solver} <= {*SAMPLERS}
