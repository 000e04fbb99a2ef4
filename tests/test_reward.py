"""CLIP's image tower and the score: shapes and names of the published towers, parity, preprocessing, gradients."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from clip_image import CONFIGS, ImageConfig, ImageEncoder, preprocess
from clip_text import CONFIGS as TEXT_CONFIGS
from clip_text import TextEncoder
from folder import TINY, InputError
from lab import shapes
from lab.evaluate import retrieval
from reward import ClipReward

NARROW = ImageConfig(size=32, patch=8, width=32, layers=2, heads=4, hidden=48, projection=16)


def narrow(config: ImageConfig = NARROW) -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(config).double().eval().requires_grad_(False)


@pytest.mark.parametrize("name, parameters", [("vit-l", 303_966_208), ("vit-h", 632_076_800)])
def test_the_published_towers_have_their_parameter_counts(name, parameters):
    with torch.device("meta"):
        tower = ImageEncoder(CONFIGS[name])
    assert sum(p.numel() for p in tower.parameters()) == parameters


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_tower_equals_that_of_transformers(activation):
    transformers = pytest.importorskip("transformers", reason="parity needs transformers (requirements-dev.txt)")
    config = replace(NARROW, activation=activation)
    tower = narrow(config)
    peer = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
        hidden_size=config.width, intermediate_size=config.hidden, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, image_size=config.size, patch_size=config.patch, hidden_act=activation,
        projection_dim=config.projection)).double().eval()
    assert {name for name, _ in peer.named_parameters()} == tower.state_dict().keys()
    peer.load_state_dict(peer.state_dict() | tower.state_dict())       # it has a buffer besides, the positions' numbers
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        theirs = peer(pixel_values=preprocess(images, config)).image_embeds
    torch.testing.assert_close(tower(images), theirs, rtol=0, atol=1e-10)


def test_preprocessing_resizes_the_short_side_and_cuts_out_the_middle():
    images = torch.zeros(1, 3, 64, 128)
    images[..., 32:96] = 1                                             # the middle square
    middle = preprocess(images, NARROW)
    assert middle.shape == (1, 3, 32, 32)
    mean, std = torch.tensor(NARROW.mean), torch.tensor(NARROW.std)
    torch.testing.assert_close(middle[0, :, 16, 16], (1 - mean) / std)
    torch.testing.assert_close(middle[0, :, 16, 4:-4].mean(dim=-1), (1 - mean) / std)
    same = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(preprocess(same, NARROW)[0], (same[0] - mean[:, None, None]) / std[:, None, None])


def test_the_gradient_of_the_score_by_a_pixel_is_that_of_finite_differences():
    reward = ClipReward.load(TINY / "clip", dtype=torch.float64)
    torch.manual_seed(0)
    images = torch.rand(1, 3, 80, 64, dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(reward(images, ["a red circle"]).sum(), images)
    for index in ((0, 0, 40, 30), (0, 2, 20, 50)):
        step = torch.zeros_like(images)
        step[index] = 1e-5
        with torch.no_grad():
            slope = (reward(images + step, ["a red circle"]) - reward(images - step, ["a red circle"])).item() / 2e-5
        assert abs(slope - gradient[index].item()) <= 1e-6 * max(1, abs(slope)) and slope != 0


def test_towers_of_different_clips_are_refused():
    text = TextEncoder(replace(TEXT_CONFIGS["tiny"], projection=8))
    with pytest.raises(ValueError, match="not of one CLIP"):
        ClipReward(narrow(), text, None)


def test_a_saved_reward_loads_again_as_the_same(tmp_path):
    reward = ClipReward.load(TINY / "clip")
    reward.save(tmp_path / "clip")
    images, prompts = torch.rand(2, 3, 64, 64), ["a red circle", "two blue stars"]
    assert torch.equal(ClipReward.load(tmp_path / "clip")(images, prompts), reward(images, prompts))


@pytest.mark.parametrize("harm, message", [
    (lambda folder: (folder / "config.json").unlink(), "config.json"),
    (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    (lambda folder: (folder / "config.json").write_text('{"text_encoder": {"dept": 1}, "image_encoder": {}}'), "dept"),
    (lambda folder: (folder / "image_encoder.safetensors").write_bytes(b"no"), "image_encoder.safetensors"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json")])
def test_a_damaged_reward_is_one_clear_sentence(tmp_path, harm, message):
    ClipReward.load(TINY / "clip").save(tmp_path)
    harm(tmp_path)
    with pytest.raises(InputError, match=message):
        ClipReward.load(tmp_path)


def test_towers_of_unequal_width_in_one_folder_are_refused(tmp_path):
    ClipReward.load(TINY / "clip").save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["image_encoder"]["projection"] = 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="projection"):
        ClipReward.load(tmp_path)


def test_the_tiny_clip_names_shape_and_color_of_one_object():
    rng, reward = np.random.default_rng(3), ClipReward.load(TINY / "clip")
    captions = [shapes.phrase(request) for request in shapes.all_requests("colors")]
    right = []
    for _ in range(40):
        scene = shapes.random_scene(rng, "colors", "train")
        picture = torch.from_numpy(shapes.draw(scene)).permute(2, 0, 1)[None] / 255
        best = int(torch.cosine_similarity(reward.image(picture), reward.embed_text(captions)).argmax())
        right.append(captions[best] == shapes.caption(scene, rng, "colors"))
    assert np.mean(right) >= 0.9


def test_retrieval_counts_how_often_the_true_caption_comes_first():
    table = retrieval(ClipReward.load(TINY / "clip"), 3, "train", candidates=8)
    assert set(table) == {*shapes.KINDS, "overall"} and table["overall"].n == 18
    assert 0.7 < table["overall"].mean <= 1                         # by chance 0.125
