"""clip_text.py: what a token may see, where the pooled vector stands, and what of a prompt is lost."""
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer as Vocabulary
from tokenizers import models, normalizers, pre_tokenizers

from clip_text import CONFIGS, TextConfig, TextEncoder, Tokenizer

NARROW = TextConfig(vocab=50, length=12, width=16, layers=3, heads=4, hidden=32, projection=6, pad=0)
START, END = 48, 49
WORDS = ("red", "blue", "circle", "square", "a", "above", "!")


def narrow(**changes) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(replace(NARROW, **changes)).double().eval().requires_grad_(False)


def ids(*prompts: list[int]) -> torch.Tensor:
    return torch.tensor([[START, *p, END, *[0] * (10 - len(p))] for p in prompts])


@pytest.mark.parametrize("name,parameters", [("vit-l", 123_060_480), ("vit-l-penultimate", 123_060_480),
                                             ("vit-h", 340_387_840), ("bigg", 694_659_840)])
def test_the_published_towers_have_this_many_parameters(name, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in TextEncoder(CONFIGS[name]).parameters()) == parameters


@pytest.mark.parametrize("output", ["final", "penultimate"])
def test_a_later_token_never_changes_an_earlier_embedding(output):
    a, _ = narrow(output=output)(ids([5, 6, 7]))
    b, _ = narrow(output=output)(ids([5, 6, 8]))
    assert torch.equal(a[:, :3], b[:, :3])                             # start, 5, 6
    assert ((a - b).abs().amax(dim=(0, 2)) > 1e-6)[3:].all()           # the changed one, and all that see it


def test_prompts_of_a_batch_do_not_influence_each_other():
    together, pooled = narrow()(ids([5, 6, 7], [8]))
    alone, pooled_alone = narrow()(ids([8]))
    assert torch.allclose(together[1:], alone, rtol=0, atol=1e-12)
    assert torch.allclose(pooled[1:], pooled_alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pad", [0, END])
def test_the_pooled_vector_is_the_projected_final_norm_at_the_first_end_token(pad):
    encoder, tokens = narrow(pad=pad), ids([5, 6, 7], [8])
    tokens = torch.where(tokens == 0, pad, tokens)
    final, pooled = encoder(tokens)
    assert torch.allclose(pooled, encoder.text_projection(final[[0, 1], [4, 2]]), rtol=0, atol=1e-12)


def test_without_projection_there_is_no_pooled_vector():
    assert narrow(projection=None)(ids([5]))[1] is None


def test_final_is_the_norm_of_the_last_layer_and_penultimate_what_entered_that():
    tokens = ids([5, 6, 7])
    (final, pooled), (before, pooled_2) = narrow()(tokens), narrow(output="penultimate")(tokens)
    model = narrow().text_model
    assert torch.equal(model.final_layer_norm(model.encoder.layers[-1](before)), final)
    assert torch.equal(pooled, pooled_2)                               # pooling always reads the final norm
    assert not torch.allclose(model.final_layer_norm(before), before)


def test_the_two_activations_differ():
    gelu, quick = narrow(activation="gelu")(ids([5]))[0], narrow(activation="quick_gelu")(ids([5]))[0]
    assert 1e-5 < (gelu - quick).abs().max() < 0.1


def test_fewer_tokens_than_the_length_are_fine():
    full, short = narrow()(ids([5, 6]))[0], narrow()(ids([5, 6])[:, :4])[0]
    assert torch.allclose(full[:, :4], short, rtol=0, atol=1e-12)


def test_gradient_reaches_every_parameter():
    encoder = narrow().requires_grad_(True)
    tokens = torch.arange(50).reshape(5, 10)
    embeddings, pooled = encoder(torch.cat([tokens, tokens[:, :2]], dim=1))
    (embeddings.square() * torch.arange(12)[:, None]).sum().backward(retain_graph=True)
    pooled.square().sum().backward()
    assert not [key for key, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    words = ["<|pad|>", *WORDS, "<|unknown|>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = Vocabulary(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<|unknown|>"))
    vocabulary.normalizer, vocabulary.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    vocabulary.save(str(path))
    return Tokenizer(path)


@pytest.mark.parametrize("pad", [0, 10])
def test_ids_are_start_words_end_and_padding(tokenizer, pad):
    rows, lost = tokenizer(["a Red circle", ""], 8, pad)
    assert rows.tolist() == [[9, 5, 1, 3, 10, pad, pad, pad], [9, 10] + [pad] * 6]
    assert rows.dtype == torch.int64 and lost == ["", ""]


def test_a_prompt_that_just_fits_loses_nothing(tokenizer):
    rows, lost = tokenizer(["a " * 75], 77, 0)
    assert rows.shape == (1, 77) and rows[0, -1] == tokenizer.end and lost == [""]


def test_a_prompt_too_long_keeps_its_end_token_and_the_words_cut_off_are_told(tokenizer):
    rows, lost = tokenizer(["a " * 75 + " Blue square,  red! ", "a"], 77, 0)
    assert rows.shape == (2, 77) and rows[0, 0] == tokenizer.start and rows[0, -1] == tokenizer.end
    assert (rows[0, 1:-1] == 5).all()
    assert lost == ["Blue square,  red!", ""]


def test_words_that_the_vocabulary_lacks_are_told(tokenizer):
    rows, lost = tokenizer(["a mauve circle above a Cube", "red square"], 10, 0)
    assert lost == ["mauve Cube", ""]
    assert (rows == tokenizer.unknown).sum() == 2


def test_words_both_unknown_and_cut_off_are_told_once(tokenizer):
    assert tokenizer(["mauve circle cube sphere"], 4, 0)[1] == ["mauve cube sphere"]


def test_a_file_that_is_no_clip_tokenizer_is_refused(tmp_path):
    Vocabulary(models.WordLevel({"a": 0})).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="isn't a CLIP tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")
