"""unet.py: its size and its units, what it may be given, and that nothing is unused or leaks between images."""
import pytest
import torch

from unet import CONFIGS, UNet, UNetConfig

SD = UNetConfig(channels=(32, 64, 64, 64), heads=(2, 4, 4, 4), context_dim=24, groups=8)
XL = UNetConfig(channels=(32, 64, 64), depth=(0, 2, 3), mid_depth=3, heads=(2, 4, 4), context_dim=24, add_dim=20,
                linear_proj=True, groups=8)
NARROW = {"sd": SD, "xl": XL}
RELATIVE = 1e-12                       # of the largest value, in float64: the same arithmetic in another order


def narrow(name: str, dtype: torch.dtype = torch.float64) -> UNet:
    torch.manual_seed(0)
    return UNet(NARROW[name]).to(dtype).eval().requires_grad_(False)


def inputs(name: str, batch: int = 2, size: tuple[int, int] = (8, 8), dtype: torch.dtype = torch.float64) -> dict:
    g = torch.Generator().manual_seed(1)
    values = {"x": torch.randn(batch, 4, *size, generator=g), "t": torch.linspace(801, 3.5, batch),
              "context": torch.randn(batch, 5, 24, generator=g),
              "added": torch.randn(batch, 20, generator=g) if NARROW[name].add_dim else None}
    return {key: v if v is None or key == "t" else v.to(dtype) for key, v in values.items()}


def row(values: dict, i: int) -> dict:
    return {key: v if v is None else v[i:i + 1] for key, v in values.items()}


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() <= RELATIVE * b.abs().max()


@pytest.mark.parametrize("name,parameters,down,up", [
    ("sd15", 859_520_964, 11, 12), ("sd21", 865_910_724, 11, 12), ("sdxl", 2_567_463_684, 8, 9)])
def test_published_models_have_this_many_parameters_and_units(name, parameters, down, up):
    with torch.device("meta"):
        unet = UNet(CONFIGS[name])
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert (len(unet.down_units()), len(unet.up_units())) == (down, up)


@pytest.mark.parametrize("name", NARROW)
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


@pytest.mark.parametrize("name", NARROW)
def test_encode_then_decode_is_forward(name):
    unet, values = narrow(name), inputs(name)
    shifts, text = unet.embed_time(values["t"], values["added"]), unet.embed_text(values["context"])
    h, skips = unet.encode(values["x"], shifts, text)
    assert len(skips) == 1 + len(unet.down_units()) == len(unet.up_units())
    assert torch.equal(unet.decode(h, skips, shifts, text), unet(**values))


@pytest.mark.parametrize("name", NARROW)
def test_a_scalar_time_is_the_same_time_for_every_image(name):
    unet, values = narrow(name), inputs(name)
    many = unet(**values | {"t": torch.full((2,), 37)})
    for t in (37, torch.tensor(37), torch.tensor([37.0])):
        assert_close(unet(**values | {"t": t}), many)


@pytest.mark.parametrize("name", NARROW)
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
@pytest.mark.parametrize("name", NARROW)
def test_any_size_of_latent_works(name, size):
    out = narrow(name)(**inputs(name, size=size))
    assert out.shape == (2, 4, *size) and out.isfinite().all()


@pytest.mark.parametrize("name", NARROW)
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


@pytest.mark.parametrize("name", NARROW)
def test_forward_writes_on_none_of_its_inputs(name):
    def tensors(value) -> list[torch.Tensor]:
        return [value] if isinstance(value, torch.Tensor) else [t for v in value or () for t in tensors(v)]

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


@pytest.mark.parametrize("name", NARROW)
def test_gradient_reaches_every_parameter(name):
    unet = narrow(name).requires_grad_(True)
    unet(**inputs(name)).square().sum().backward()
    unused = [key for key, p in unet.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not unused
