"""What a run will need: its peak memory and arithmetic, computed from shapes before it runs.

Start at `plan_stages`: it makes the first call of the real loop, and the VAE's, on PyTorch's meta device, where tensors
have shapes but no memory. A `Meter` adds up the tensors alive, so the plan can't differ from the code. It leaves out
weight masks, what caches and T-GATE keep, the workspaces of convolution libraries and an allocator's reserve. (In one
call of the tiny model's U-Net at 512 pixels, a process on a CPU grew by 0.139 to 0.150 GB; the plan says 0.089.)
Attention counts as fused, as in PyTorch's kernels for NVIDIA GPUs and CPUs: no matrix of scores is formed. Devices
without such kernels form it, heads x N x N numbers per row, and there the plan is far too low. For runs with caches,
`run_macs` adds up the arithmetic of the units that run.
"""
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from clip_text import TextEncoder
from folder import ModelConfig, build
from freescale import FreeScale, enlarge
from sampler import Condition, Run, begin, generate, plan
from unet import UNet, Unit
from vae import VAE, together


class Meter(TorchDispatchMode):
    """Counts what the block inside it does: bytes of new tensors alive, their peak, and operations of products."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak, self.flops = 0, 0, 0
        self.sizes: dict[int, int] = {}                                # bytes of every living storage, by id

    def ignore(self, *tensors: Tensor) -> None:
        """These tensors, which existed before, don't count; nor do views of them."""
        self.sizes.update({id(x.untyped_storage()): 0 for x in tensors})

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):                                     # one tensor, or several
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in self.sizes:
                storage = x.untyped_storage()                          # the same object while its memory lives
                self.sizes[id(storage)] = storage.nbytes()
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self.free, id(storage))
        if function._overloadpacket in flop_registry:
            self.flops += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

    def free(self, storage: int) -> None:
        self.alive -= self.sizes.pop(storage)

    def once_per_shape(self, module: nn.Module) -> None:
        """From now on, only the first input of each shape is run; others of that shape count the same.

        A large picture has hundreds of tiles of one shape.
        """
        run, known = module.forward, {}

        def forward(x: Tensor, *more: Any) -> Tensor:
            if x.shape in known:
                shape, peak, flops = known[x.shape]
                self.peak, self.flops = max(self.peak, self.alive + peak), self.flops + flops
                return x.new_empty(shape)
            start, flops, highest = self.alive, self.flops, self.peak
            self.peak = start
            out = run(x, *more)
            known[x.shape] = out.shape, self.peak - start, self.flops - flops
            self.peak = max(self.peak, highest)
            return out
        module.forward = forward


class FusedAttention(TorchFunctionMode):
    """On the meta device, attention allocates what a fused kernel does: only the result, laid out like the queries."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is not F.scaled_dot_product_attention or args[0].device.type != "meta":
            return function(*args, **(kwargs or {}))
        q, k, v = args
        self.meter.flops += 2 * q.numel() * k.shape[2] + 2 * q.shape[:-1].numel() * k.shape[2] * v.shape[3]
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


class Cost(NamedTuple):
    """The cost of one call: its peak in bytes, above those in use before it, and its floating-point operations."""
    peak: int
    flops: int


def measure(run: Callable[[], Any], *modules: nn.Module, tiled: tuple[nn.Module, ...] = ()) -> Cost:
    """The cost of run(). The modules' weights exist already and don't count. tiled: see `Meter.once_per_shape`."""
    meter = Meter()
    meter.ignore(*(p for module in modules for p in module.parameters()))
    for module in tiled:
        meter.once_per_shape(module)
    with torch.no_grad(), FusedAttention(meter), meter:
        run()
    for module in tiled:
        del module.forward                                             # the class's own again
    return Cost(meter.peak, meter.flops)


class StagePlan(NamedTuple):
    """One stage: size in pixels, the cost of one call and of the VAE before it (and after the last), bytes in all."""
    height: int
    width: int
    unet: Cost
    vae: Cost
    memory: int


def plan_stages(config: ModelConfig, freescale: FreeScale, images: int = 1, guided: bool = True,
                dtype: torch.dtype = torch.float16, low_memory: bool = False,
                tile: Callable[[Tensor], int | None] = lambda latents: None,
                stages: list[int] | None = None, **techniques: Any) -> list[StagePlan]:
    """Memory and operations of these stages of a cascade (None: all). tile: the VAE's `tile` for given latents.

    freescale: with the sizes of all stages, see `FreeScale.fit`; a plain picture is one stage. low_memory: as in
    `StableDiffusion.load`.
    """
    unet, vae = build(UNet, config.unet).to(dtype), build(VAE, config.vae)
    vae.to(torch.float32 if config.vae.force_upcast and dtype == torch.float16 else dtype)
    texts = [build(TextEncoder, c).to(dtype) for c in (config.text_encoder, config.text_encoder_2) if c is not None]
    resident = weight_bytes(unet) if low_memory else weight_bytes(unet, vae, *texts)
    beside = weight_bytes(unet, vae) if low_memory else resident       # while the VAE runs

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(images, *shape, dtype=dtype, device="meta")

    def latents(size: tuple[int, int]) -> Tensor:
        return empty(config.unet.in_channels, *(side // config.vae.factor for side in size), dtype=torch.float32)

    def call(size: tuple[int, int], number: int) -> None:
        said = Condition(empty(config.text_encoder.length, config.unet.context_dim),
                         empty(config.unet.add_dim) if config.unet.add_dim else None)
        both = guided and not low_memory                               # branches in turn are alike: one is measured
        noise, later = latents(size), {"freescale": freescale} if number else {}
        next(generate(unet, noise, said, said if both else None, plan("ddim", 1), 7.5, noise if number else None,
                      generators=[torch.Generator() for _ in range(images)], **techniques | later))

    def code(size: tuple[int, int], number: int) -> None:
        if number and freescale.upsample == "rgb":
            enlarge(latents(freescale.resolutions[number - 1]), size, "rgb", vae, latents(size), tile(latents(size)))
        if number == len(freescale.resolutions) - 1:
            z = latents(size)
            image = torch.cat([vae.decode(part, tile(z)).float() for part in together(z)])
            (image / 2 + 0.5).clamp(0, 1)

    plans = []
    for number, size in enumerate(freescale.resolutions):
        if stages is None or number in stages:
            step = measure(partial(call, size, number), unet)
            coding = measure(partial(code, size, number), vae, tiled=(vae.encoder, vae.decoder))
            step = Cost(step.peak, step.flops * 2 if guided and low_memory else step.flops)
            plans.append(StagePlan(*size, step, coding, max(resident + step.peak, beside + coding.peak)))
    return plans


def least_memory(config: ModelConfig, height: int, width: int, images: int, guided: bool, dtype: torch.dtype,
                 low_memory: bool) -> int:
    """A quick lower bound, in bytes: the picture twice in float32, or the U-Net's skips of the uppermost level."""
    maps = images * (2 if guided and not low_memory else 1) * (config.unet.layers + 1) * config.unet.channels[0]
    skips = maps * dtype.itemsize * (height // config.vae.factor) * (width // config.vae.factor)
    return max(skips, 2 * images * 3 * height * width * torch.float32.itemsize)


def weight_bytes(*modules: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on the device (main memory: with what can be swapped); None if the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and Path("/proc/meminfo").is_file():
        found = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return sum(1024 * int(found.get(name, "0").split()[0]) for name in ("MemAvailable", "SwapFree")) or None
    return None


# ------------------------------------------------------------------------------------- multiply-adds, unit by unit

def unit_macs(unet: UNet, height: int, width: int, tokens: int = 77) -> list[tuple[int, int, int]]:
    """Multiply-adds of each unit of the flat list for one latent: without attention, and of self- and cross-attention.

    Convolutions, linear layers and the two products of attention, by their shapes: equal to half of torch's FLOP
    count. This is for a single pass, in which each unit projects text and time itself. The last unit includes the
    embeddings and the output layers.
    """
    def weights(*modules: nn.Module) -> int:
        return sum(module.weight.numel() for module in modules)

    def count(unit: Unit, size: tuple[int, int]) -> list[int]:
        n, own, text = size[0] * size[1], 0, 0
        macs = 0 if unit.conv is None else n * weights(unit.conv)
        for r in unit.resnets:
            shortcut = [] if r.conv_shortcut is None else [r.conv_shortcut]
            macs += n * weights(r.conv1, r.conv2, *shortcut) + weights(r.time_emb_proj)
        if unit.attention is not None:
            macs += n * weights(unit.attention.proj_in, unit.attention.proj_out)
            for block in unit.attention.transformer_blocks:
                itself, cross, (gate, _, out) = block.attn1, block.attn2, block.ff.net
                c = itself.to_q.out_features
                macs += n * weights(gate.proj, out)
                own += n * weights(itself.to_q, itself.to_k, itself.to_v, itself.to_out[0]) + 2 * n * n * c
                text += n * weights(cross.to_q, cross.to_out[0]) + tokens * weights(cross.to_k, cross.to_v)
                text += 2 * n * tokens * c
        return [macs, own, text]

    sizes, counts = [], []
    for k, unit in enumerate(unet.units()):
        if k <= unet.middle:
            h, w = sizes[-1] if sizes else (height, width)
            halved = unit.conv is not None and unit.conv.stride != (1, 1)
            sizes.append(((h + 1) // 2, (w + 1) // 2) if halved else (h, w))
            counts.append(count(unit, sizes[-1]))
        else:                                                          # an up unit has the size of its skip
            h, w = sizes[2 * unet.middle - k]
            counts.append(count(unit, (h, w)))
            if unit.up is not None:
                h, w = sizes[2 * unet.middle - k - 1]
                counts[-1][0] += h * w * weights(unit.up)
    embeddings = [unet.time_embedding] + ([unet.add_embedding] if unet.config.add_dim else [])
    counts[-1][0] += height * width * weights(unet.conv_out) + sum(weights(e.linear_1, e.linear_2) for e in embeddings)
    return [(macs, own, text) for macs, own, text in counts]


def shape_run(unet: UNet, height: int, width: int, steps: int, first: int = 0, guided: bool = True,
              sampler: str = "ddim", **techniques: Any) -> Run:
    """A run of one image from step `first`, which only says what each call executes: its latents are shapes."""
    noise = torch.empty(1, unet.config.in_channels, height, width, device="meta")
    said = Condition(torch.empty(1, 1, unet.config.context_dim, device="meta"))
    return begin(unet, noise, said, said if guided else None, plan(sampler, steps), 7.5, noise if first else None,
                 (steps - first + 0.5) / steps if first else 1.0, [torch.Generator()], techniques)


def run_macs(unet: UNet, height: int, width: int, steps: int, first: int = 0, guided: bool = True,
             tokens: int = 77, sampler: str = "ddim", **techniques: Any) -> int:
    """Multiply-adds of all passes of one image's run from step `first`, with a cache and T-GATE; guided: two branches.

    height, width: of the latents.
    """
    units, total = unit_macs(unet, height, width, tokens), 0
    run = shape_run(unet, height, width, steps, first, guided, sampler, **techniques)
    cache, tgate = run.acting.get("cache"), run.acting.get("tgate")
    for i in range(run.first, run.plan.calls):
        runs = range(len(units)) if cache is None else cache.units(i)
        acts = (True, tgate is None or tgate.own(i), tgate is None or tgate.open(i))
        total += len(run.halves(i)) * sum(macs for k in runs for macs, counts in zip(units[k], acts) if counts)
    return total
