"""What judges pictures: sizes of the published towers, parity, preprocessing, tokens, gradients, damaged folders."""
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from command import InputError
from convert_weights import build_word_pieces
from folder import TINY
from lab import shapes
from lab.evaluate import retrieval
from reward import (
    CONFIGS,
    ImageConfig,
    ImageEncoder,
    ImageReward,
    ImageRewardConfig,
    RewardModel,
    WordPieces,
    add_rewards,
    load_reward,
    preprocess,
)

# ---- CLIP ----

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
    reward = load_reward(TINY / "clip", dtype=torch.float64)
    torch.manual_seed(0)
    images = torch.rand(1, 3, 80, 64, dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(reward(images, ["a red circle"]).sum(), images)
    for index in ((0, 0, 40, 30), (0, 2, 20, 50)):
        step = torch.zeros_like(images)
        step[index] = 1e-5
        with torch.no_grad():
            slope = (reward(images + step, ["a red circle"]) - reward(images - step, ["a red circle"])).item() / 2e-5
        assert abs(slope - gradient[index].item()) <= 1e-6 * max(1, abs(slope)) and slope != 0


def test_a_saved_reward_loads_again_as_the_same(tmp_path):
    reward = load_reward(TINY / "clip")
    reward.save(tmp_path / "clip")
    images, prompts = torch.rand(2, 3, 64, 64), ["a red circle", "two blue stars"]
    assert torch.equal(load_reward(tmp_path / "clip")(images, prompts), reward(images, prompts))
    assert {p.dtype for p in load_file(tmp_path / "clip/image_encoder.safetensors").values()} == {torch.float16}
    reward.text.requires_grad_()
    assert not reward.embed_text(prompts).requires_grad                # gradients are for pictures alone


def other_width(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["image_encoder"]["projection"] = 32
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "image_encoder.safetensors")
    save_file(state | {"visual_projection.weight": torch.zeros(32, 128)}, folder / "image_encoder.safetensors")


@pytest.mark.parametrize("harm, message", [
    (lambda folder: (folder / "config.json").unlink(), "config.json"),
    (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    (lambda folder: (folder / "config.json").write_text('{"text_encoder": {"dept": 1}, "image_encoder": {}}'), "dept"),
    (lambda folder: (folder / "image_encoder.safetensors").write_bytes(b"no"), "image_encoder.safetensors"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    (other_width, "ends in 32 numbers and the text tower in 64: they are not of one CLIP")])
def test_a_damaged_reward_is_one_clear_sentence(tmp_path, harm, message):
    load_reward(TINY / "clip").save(tmp_path)
    harm(tmp_path)
    with pytest.raises(InputError, match=message):
        load_reward(tmp_path)


def test_the_tiny_clip_names_shape_and_color_of_one_object():
    rng, reward = np.random.default_rng(3), load_reward(TINY / "clip")
    captions = [shapes.phrase(request) for request in shapes.all_requests("colors")]
    right = []
    for _ in range(20):
        scene = shapes.random_scene(rng, "colors", "train")
        picture = torch.from_numpy(shapes.draw(scene)).permute(2, 0, 1)[None] / 255
        best = int(torch.cosine_similarity(reward.image(picture), reward.embed_text(captions)).argmax())
        right.append(captions[best] == shapes.caption(scene, rng, "colors"))
    assert np.mean(right) >= 0.9


def test_retrieval_counts_how_often_the_true_caption_comes_first():
    table = retrieval(load_reward(TINY / "clip"), 3, "train", candidates=8)
    assert set(table) == {*shapes.KINDS, "overall"} and table["overall"].n == 18
    assert 0.7 < table["overall"].mean <= 1                         # by chance 0.125


# ---- ImageReward ----

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cafe", "circle", "un", "##believ", "##able", ",",
          "!", "2", "##2", "中", "blue"]
NARROW_IMAGEREWARD = ImageRewardConfig(
    size=32, patch=8, width=24, layers=2, heads=3, hidden=48, vocab=len(PIECES) + 2, length=9, positions=16,
    text_width=32, text_layers=2, text_heads=4, text_hidden=40, head=(12, 10, 8, 6))


def random_model(config: ImageRewardConfig = NARROW_IMAGEREWARD) -> RewardModel:
    torch.manual_seed(0)
    model = RewardModel(config)
    model = model.double().eval().requires_grad_(False)
    for p in model.parameters():                     # norms and biases too
        p += 0.3 * torch.randn_like(p)
    return model


def tokenizer(tmp_path) -> WordPieces:
    built = build_word_pieces({piece: i for i, piece in enumerate(PIECES)})
    built.save(str(tmp_path / "tokenizer.json"))
    return WordPieces(tmp_path / "tokenizer.json")


def test_the_published_model_has_446_million_parameters():
    with torch.device("meta"):
        model = RewardModel()
    towers = (model.blip.visual_encoder, model.blip.text_encoder, model.mlp)
    assert [sum(p.numel() for p in tower.parameters()) for tower in towers] == [303_301_632, 141_977_088, 927_969]
    # 446,204,641 is a count met elsewhere: without 2,048, one LayerNorm of width 1024. Outside the blocks that is the
    # image tower's last one, which is in use: the text tower looks at its output
    assert sum(p.numel() for p in model.parameters()) == 446_206_689
    assert sum(p.numel() for p in model.blip.visual_encoder.norm.parameters()) == 446_206_689 - 446_204_641
    assert [name for name in model.state_dict() if name.startswith("mlp")] == [
        f"mlp.layers.{i}.{kind}" for i in (0, 2, 4, 6, 7) for kind in ("weight", "bias")]


@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_towers_and_score_equal_those_of_transformers(dtype, most):
    transformers = pytest.importorskip("transformers", reason="parity needs transformers (requirements-dev.txt)")
    from transformers.models.blip.modeling_blip_text import BlipTextModel
    model, c = random_model().to(dtype), NARROW_IMAGEREWARD
    image = transformers.BlipVisionModel(transformers.BlipVisionConfig(
        hidden_size=c.width, intermediate_size=c.hidden, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        image_size=c.size, patch_size=c.patch, hidden_act="gelu", layer_norm_eps=1e-6)).eval()
    text = BlipTextModel(transformers.BlipTextConfig(
        vocab_size=c.vocab, hidden_size=c.text_width, encoder_hidden_size=c.width, intermediate_size=c.text_hidden,
        num_hidden_layers=c.text_layers, num_attention_heads=c.text_heads, max_position_embeddings=c.positions,
        hidden_act="gelu", is_decoder=True), add_pooling_layer=False).eval()     # else it has no cross-attention
    renamed = {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
               "patch_embed.proj": "embeddings.patch_embedding", "blocks.": "encoder.layers.", "norm1": "layer_norm1",
               "norm2": "layer_norm2", "attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection"}
    state = {}
    for name, tensor in model.blip.visual_encoder.state_dict().items():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        state[f"post_layer{name}" if name.startswith("norm.") else name] = tensor
    image.to(dtype).load_state_dict(state)
    text.to(dtype).load_state_dict(model.blip.text_encoder.state_dict())

    images = torch.rand(2, 3, 32, 32, dtype=dtype)
    ids = torch.tensor([[2, 5, 6, 8, 3, 0, 0, 0, 0], [2, 5, 17, 9, 10, 11, 12, 8, 3]])
    mask = ids != 0
    with torch.no_grad():
        seen = image(pixel_values=preprocess(images, c)).last_hidden_state
        tokens = text(ids, attention_mask=mask.long(), encoder_hidden_states=seen,
                      encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long)).last_hidden_state
        matrix, bias = torch.eye(c.text_width, dtype=dtype), torch.zeros(c.text_width, dtype=dtype)
        for linear in model.mlp.layers:              # linear layers in a row are one
            if isinstance(linear, nn.Linear):
                matrix, bias = matrix @ linear.weight.T, bias @ linear.weight.T + linear.bias
        theirs = ((tokens[:, 0] @ matrix + bias)[:, 0] - 0.16717362830052426) / 1.0333394966054072
    ours = model(images, ids, mask)
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=most)


@pytest.mark.parametrize("height, width", [(512, 512), (300, 420), (224, 224)])
def test_pictures_are_prepared_as_by_pillow_but_for_its_rounding_to_bytes(height, width):
    waves = [np.add.outer(np.sin(np.arange(height) / 20), np.cos(np.arange(width) / (5 * k))) for k in (1, 2, 3)]
    pixels = np.uint8(128 + 60 * np.stack(waves, axis=2))
    side, c = min(height, width), ImageRewardConfig()
    picture = Image.fromarray(pixels).resize((width * 224 // side, height * 224 // side), Image.Resampling.BICUBIC)
    top, left = (picture.height - 224) // 2, (picture.width - 224) // 2
    theirs = torch.from_numpy(np.asarray(picture.crop((left, top, left + 224, top + 224))) / 255).permute(2, 0, 1)
    images = torch.from_numpy(pixels / 255).permute(2, 0, 1)[None]
    ours = preprocess(images, c)[0] * torch.tensor(c.std)[:, None, None] + torch.tensor(c.mean)[:, None, None]
    assert (ours.clamp(0, 1) - theirs).abs().max() < 1.5 / 255


def test_padding_changes_no_score(tmp_path):
    reward = ImageReward(random_model(), tokenizer(tmp_path))
    images, prompts = torch.rand(2, 3, 40, 32, dtype=torch.float64), ["a red", "a blue circle, unbelievable!"]
    together = reward(images, prompts)
    alone = torch.cat([reward(images[k:k + 1], prompts[k:k + 1]) for k in range(2)])
    longer = ImageReward(random_model(replace(NARROW_IMAGEREWARD, length=14)), reward.tokenizer)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(together[:1], longer(images[:1], prompts[:1]), rtol=0, atol=1e-12)
    assert together[0] != together[1]


def test_tokens_are_those_of_berts_tokenizer_with_blips_two_words(tmp_path):
    transformers = pytest.importorskip("transformers", reason="parity needs transformers (requirements-dev.txt)")
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    peer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    peer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    prompts = ["", "A red   CIRCLE", "Café, unbelievable!", "22 unknownword", "中a", "a [ENC] red [SEP] circle",
               "red " * 20]
    ids, mask = tokenizer(tmp_path)(prompts, 9)
    theirs = peer(prompts, padding="max_length", truncation=True, max_length=9)
    assert ids.tolist() == theirs["input_ids"] and mask.long().tolist() == theirs["attention_mask"]


def test_tokens_are_pieces_of_words_between_start_and_end(tmp_path):
    ids, mask = tokenizer(tmp_path)(["Unbelievable, 22 xyz", "red " * 20], 9)
    assert [PIECES[i] for i in ids[0]] == ["[CLS]", "un", "##believ", "##able", ",", "2", "##2", "[UNK]", "[SEP]"]
    assert [PIECES[i] for i in ids[1]] == ["[CLS]"] + ["red"] * 7 + ["[SEP]"] and mask.all()


def write_folder(folder) -> None:
    tokenizer(folder)
    save_file(random_model().state_dict(), folder / "image_reward.safetensors")
    (folder / "config.json").write_text(json.dumps({"image_reward": asdict(NARROW_IMAGEREWARD)}))


def other_tokens(folder) -> None:
    build_word_pieces({piece: i for i, piece in enumerate([*PIECES, "one", "two", "many"])}).save(
        str(folder / "tokenizer.json"))


@pytest.mark.parametrize("harm, message", [
    (lambda folder: (folder / "config.json").unlink(), "holds no reward"),
    (lambda folder: (folder / "config.json").write_text('{"text_encoder": {}}'), "holds no reward"),
    (lambda folder: (folder / "config.json").write_text('{"image_reward": {"widht": 1}}'), "did you mean width"),
    (lambda folder: (folder / "config.json").write_text('{"image_reward": {"heads": 7, "width": 24}}'), "shape|lacks"),
    (lambda folder: (folder / "image_reward.safetensors").write_bytes(b"no"), "image_reward.safetensors"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "no file .*tokenizer.json"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "not BERT's tokenizer"),
    (other_tokens, "23 tokens, but the text encoder knows 20")])
def test_a_damaged_imagereward_is_one_clear_sentence(tmp_path, harm, message):
    write_folder(tmp_path)
    assert load_reward(tmp_path)(torch.rand(1, 3, 32, 32), ["a red circle"]).shape == (1,)
    harm(tmp_path)
    with pytest.raises(InputError, match=message):
        load_reward(tmp_path)


# ---- several ----

def test_several_rewards_add_up_to_minus_the_released_loss_and_one_is_left_alone():
    class Scores(ImageReward):
        def __init__(self):
            """Without a model."""

        def __call__(self, images, prompts):
            return torch.tensor([-1.0, 1.5, 2.5])

    def cosines(images, prompts) -> torch.Tensor:
        return torch.tensor([0.1, 0.2, 0.3])
    total = add_rewards([Scores(), cosines])(torch.zeros(3, 3, 8, 8), [""] * 3)
    torch.testing.assert_close(total, torch.tensor([-3 - 4.5, -0.5 - 4, -3.5]))
    assert add_rewards([cosines]) is cosines
