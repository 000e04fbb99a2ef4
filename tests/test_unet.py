"""unet.py: its size and its units, what it may be given, and that nothing is unused or leaks between images."""
import pytest
import torch
from conftest import NARROW, XL, make, randn, seeded
from torch import Tensor

from freescale import FreeScale
from sampler import Condition, generate, plan
from unet import CONFIGS, Attention, Techniques, UNet

SHAPES = {"sd": NARROW, "xl": XL}
RELATIVE = 1e-12                       # of the largest value, in float64: the same arithmetic in another order


def narrow(name: str, dtype: torch.dtype = torch.float64) -> UNet:
    return make(UNet, SHAPES[name]).to(dtype)


def inputs(name: str, batch: int = 2, size: tuple[int, int] = (8, 8), dtype: torch.dtype = torch.float64) -> dict:
    config = SHAPES[name]
    values = {"x": randn(batch, 4, *size), "t": torch.linspace(801, 3.5, batch),
              "context": randn(batch, 5, config.context_dim, seed=1),
              "added": randn(batch, config.add_dim, seed=2) if config.add_dim else None}
    return {key: v if v is None or key == "t" else v.to(dtype) for key, v in values.items()}


def row(values: dict, i: int) -> dict:
    return {key: v if v is None else v[i:i + 1] for key, v in values.items()}


def assert_close(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() <= RELATIVE * b.abs().max()


@pytest.mark.parametrize("name,parameters,up", [
    ("sd15", 859_520_964, 12), ("sd21", 865_910_724, 12), ("sdxl", 2_567_463_684, 9)])
def test_published_models_have_this_many_parameters_and_units(name, parameters, up):
    with torch.device("meta"):
        unet = UNet(CONFIGS[name])
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert (unet.middle, len(unet.units())) == (up, 2 * up + 1)       # as many units before the middle as after it


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_computed_before_the_loop_changes_nothing(name):
    unet, values = narrow(name), inputs(name)
    x, context, added = values["x"], values["context"], values["added"]
    times = torch.tensor([999.0, 500.25, 1.0, 0.0])
    text, schedule = unet.embed_text(context), unet.embed_schedule(times, added)
    assert len(schedule) == len(times)
    for t, shifts in zip(times, schedule):
        plain = unet(x, t, context, added)
        assert torch.equal(unet(x, unet.embed_time(t, added), context), plain)
        assert torch.equal(unet(x, t, text, added), plain)
        assert_close(unet(x, shifts, text), plain)


@pytest.mark.parametrize("name", SHAPES)
def test_encode_then_decode_is_forward(name):
    unet, values = narrow(name), inputs(name)
    shifts, text = unet.embed_time(values["t"], values["added"]), unet.embed_text(values["context"])
    h, skips = unet.encode(values["x"], shifts, text)
    assert len(skips) == unet.middle == len(unet.units()) - unet.middle - 1
    assert torch.equal(unet.decode(h, skips, shifts, text), unet(**values))


@pytest.mark.parametrize("name", SHAPES)
def test_a_scalar_time_is_the_same_time_for_every_image(name):
    unet, values = narrow(name), inputs(name)
    many = unet(**values | {"t": torch.full((2,), 37)})
    for t in (37, torch.tensor(37), torch.tensor([37.0])):
        assert_close(unet(**values | {"t": t}), many)


@pytest.mark.parametrize("name", SHAPES)
def test_every_image_has_its_own_time_text_and_sizes_and_nothing_of_its_batch_mates(name):
    unet, values = narrow(name), inputs(name, batch=3)
    together = unet(**values)
    for i in range(3):
        assert_close(together[i:i + 1], unet(**row(values, i)))
    for key in ("x", "t", "context", "added"):                         # and each of the four matters
        if values[key] is not None:
            other = unet(**values | {key: values[key].roll(1, dims=0)})
            assert (other - together).abs().amax(dim=(1, 2, 3)).min() > 1e-4 * together.abs().max()


@pytest.mark.parametrize("size", [(7, 5), (9, 16), (1, 1), (10, 6)])
@pytest.mark.parametrize("name", SHAPES)
def test_any_size_of_latent_works(name, size):
    out = narrow(name)(**inputs(name, size=size))
    assert out.shape == (2, 4, *size) and out.isfinite().all()


@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16_is_finite_and_near_float32(name):
    exact = narrow(name, torch.float32)(**inputs(name, dtype=torch.float32))
    out = narrow(name, torch.bfloat16)(**inputs(name, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    assert (out - exact).abs().max() < 0.1 * exact.abs().max()


def test_sdxl_without_its_added_condition_is_refused():
    values = inputs("xl")
    with pytest.raises(ValueError, match="pass added"):
        narrow("xl")(**values | {"added": None})
    with pytest.raises(ValueError, match="pass added"):
        narrow("xl").embed_schedule(torch.tensor([1.0]))


@pytest.mark.parametrize("name", SHAPES)
def test_forward_writes_on_none_of_its_inputs(name):
    def tensors(value) -> list[Tensor]:
        return [value] if isinstance(value, Tensor) else [t for v in value or () for t in tensors(v)]

    unet, values = narrow(name), inputs(name)
    shifts, text = unet.embed_time(values["t"], values["added"]), unet.embed_text(values["context"])
    given = [*tensors(values.values()), *tensors(shifts), *tensors(text), *unet.parameters()]
    before = [t.clone() for t in given]
    unet(**values)
    unet(values["x"], shifts, text)
    assert all(torch.equal(a, b) for a, b in zip(given, before))

    h, skips = unet.encode(values["x"], shifts, text)
    kept = [t.clone() for t in (h, *skips)]
    unet.decode(h, skips, shifts, text)                                # a cache may hold what the encoder gave
    assert all(torch.equal(a, b) for a, b in zip((h, *skips), kept))


@pytest.mark.parametrize("name", SHAPES)
def test_gradient_reaches_every_parameter(name):
    unet = narrow(name).requires_grad_(True)
    unet(**inputs(name, size=(16, 16))).square().sum().backward()     # of one token, softmax has no gradient
    unused = [key for key, p in unet.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not unused


# ---------------------------------------------------------------------------------------------- editors of attention

class Editing:
    """An editor as a setting: `edit` stands in for every attention, and `seen` has what each call was given."""

    def __init__(self, edit=lambda attention, q, k, v: None):
        self.edit, self.seen = edit, []

    def start(self, run) -> "Editing":
        return self

    def at(self, calls: tuple[int, ...], halves: tuple[int, ...]) -> "Editing":
        return self

    def __call__(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        self.seen.append((attention, q, k, v))
        return self.edit(attention, q, k, v)


def mean_of_v(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.mean(dim=2, keepdim=True).expand_as(q)


@pytest.mark.parametrize("name", SHAPES)
def test_an_editor_that_returns_none_changes_no_bit_and_one_that_returns_vs_mean_changes_the_result(name):
    unet, values = narrow(name), inputs(name)
    plain = unet(**values)
    assert torch.equal(unet(**values, on=Techniques(attend=Editing())), plain)
    other = unet(**values, on=Techniques(attend=Editing(mean_of_v)))
    assert other.isfinite().all() and (other - plain).abs().max() > 1e-4 * plain.abs().max()


@pytest.mark.parametrize("name", SHAPES)
def test_an_editor_sees_the_queries_keys_and_values_of_every_attention_in_their_order(name):
    unet, values, editor = narrow(name), inputs(name), Editing()
    unet(**values, on=Techniques(attend=editor))
    blocks = [block for unit in unet.units() if unit.attention for block in unit.attention.transformer_blocks]
    assert [attention for attention, *_ in editor.seen] == [a for block in blocks for a in (block.attn1, block.attn2)]
    for place, (attention, q, k, v) in enumerate(editor.seen):
        (rows, heads, tokens, width), of_text = q.shape, place % 2
        assert (rows, heads, heads * width) == (2, attention.heads, attention.to_q.out_features)
        assert k.shape == v.shape == (rows, heads, 5 if of_text else tokens, width)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("upcast", [True, False])
def test_with_upcast_half_precision_attends_in_float32(dtype, upcast):
    attention, x, editor = make(Attention, 8, 8, 2, upcast).to(dtype), randn(1, 3, 8).to(dtype), Editing()
    out = attention(x, attention.keys_values(x), Techniques(attend=editor))
    assert out.dtype == dtype and {part.dtype for part in editor.seen[0][1:]} == {torch.float32 if upcast else dtype}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("blur,fast", [("spatial", False), ("official", True)])
def test_in_the_loop_an_editor_acts_with_freescale_too(name, blur, fast):
    unet, values = narrow(name, torch.float32), inputs(name, dtype=torch.float32)
    said = Condition(values["context"], values["added"])

    def run(**techniques) -> Tensor:
        *_, (_, x) = generate(unet, values["x"], said, None, plan("ddim", 2), init=values["x"],
                              generators=seeded(0, 1), freescale=FreeScale(2, native=4, restart=0, blur=blur,
                                                                           fast=fast), **techniques)
        return x
    silent, loud = Editing(), Editing(mean_of_v)
    assert torch.equal(run(attend=silent), run())
    assert (run(attend=loud) - run()).abs().max() > 1e-4
    attentions = {m for m in unet.modules() if isinstance(m, Attention)}
    assert {attention for attention, *_ in silent.seen} == {attention for attention, *_ in loud.seen} == attentions
