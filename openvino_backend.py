"""`--compile openvino`: OpenVINO runs the graphs that torch.compile makes of the network, techniques included.

    unet.compile(backend=backend("f32"), dynamic=False)

Start at `backend`. A graph is exported to ATen operators, converted, and laid out for this processor; the network's own
code does not change. Optional: requirements-openvino.txt. Checked against OpenVINO 2026.4.1, whose own entry,
`torch.compile(backend="openvino")`, ends with an IndexError in PyTorch 2.13.
"""
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from command import InputError, make_folder, replacing

try:
    import openvino
except ImportError:
    openvino = None

TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64", torch.int64: "i64",
         torch.int32: "i32", torch.bool: "boolean"}
Compiled = Callable[..., tuple[Tensor, ...]]


def backend(precision: str = "f32", cache: Path | None = None) -> Callable[[fx.GraphModule, list[Tensor]], Compiled]:
    """A backend for torch.compile. Parameters become constants: compile again after changing them.

    precision: of the arithmetic, "f32", "bf16" or "f16". Inputs and outputs keep their dtypes.
    cache: a folder for compiled graphs, so that the next process reads them. One file per graph, about as large as the
        weights; its name is a digest of the graph, the weights, the processor and the versions.
    A graph that OpenVINO can't run is run by PyTorch, with a warning. InputError if OpenVINO isn't installed, or if the
    folder can't be made.
    """
    if openvino is None:
        raise InputError("--compile openvino needs OpenVINO: pip install -r requirements-openvino.txt")
    if cache is not None:
        make_folder(cache)
    hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}

    def compile_graph(graph: fx.GraphModule, inputs: list[Tensor]) -> Compiled:
        constant = [isinstance(x, nn.Parameter) for x in inputs]
        try:
            first, rest = split(graph, inputs)
            moving = [x for x, stays in zip(inputs, constant) if not stays]
            model = find_or_make(rest, [*moving, *first(*moving)], hints, cache)
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            warnings.warn(f"OpenVINO can't run a graph of this network, PyTorch does: {reason}", stacklevel=2)
            return graph.forward
        request = model.create_infer_request()

        def run(*values: Tensor) -> tuple[Tensor, ...]:
            moving = [x for x, stays in zip(values, constant) if not stays]
            given = [x.detach().contiguous() for x in (*moving, *first(*moving))]
            for i, x in enumerate(given):
                request.set_input_tensor(i, shared(x))
            request.infer()
            return tuple(copied(request.get_output_tensor(i)) for i in range(len(model.outputs)))
        return run
    return compile_graph


def shared(x: Tensor) -> Any:
    """An OpenVINO tensor in the memory of a contiguous one."""
    kind = getattr(openvino.Type, TYPES[x.dtype])
    return openvino.Tensor(x.reshape(-1).view(torch.uint8).numpy(), list(x.shape), kind)


def copied(x: Any) -> Tensor:
    """An OpenVINO tensor as one of PyTorch, which keeps its values when the graph runs again."""
    dtype = next(dtype for dtype, name in TYPES.items() if getattr(openvino.Type, name) == x.element_type)
    return torch.from_numpy(x.data.reshape(-1).view("uint8").copy()).view(dtype).reshape(tuple(x.shape))


def split(graph: fx.GraphModule, inputs: list[Tensor]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Two graphs: what follows from whole numbers alone, and the rest, which takes the first one's results too.

    PyTorch runs the first: seeds of masks and windows, and the noise that is drawn with them. OpenVINO has no random
    generator, and computes with whole numbers of 32 bits. Both graphs take the inputs that are no parameters;
    parameters are constants of the rest.
    """
    first, rest, weights = fx.Graph(), fx.Graph(), nn.Module()
    early, late, seeded, values = {}, {}, set(), iter(inputs)
    for node in graph.graph.find_nodes(op="placeholder"):
        value = next(values)
        if isinstance(value, nn.Parameter):
            weights.register_parameter(node.name, value)
            late[node] = rest.get_attr(f"weights.{node.name}")
        else:
            copy, late[node] = first.placeholder(node.name), rest.placeholder(node.name)
            if not value.is_floating_point():
                early[node] = copy
                seeded.add(node)
    others = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
    for node in others:
        if all(source in early for source in node.all_input_nodes):
            early[node] = first.node_copy(node, early.get)
            if not seeded.isdisjoint(node.all_input_nodes):
                seeded.add(node)
    results = [node for node in others if node in seeded and any(user not in seeded for user in node.users)]
    first.output(tuple(early[node] for node in results))
    first.eliminate_dead_code()
    late |= {node: rest.placeholder(node.name) for node in results}
    for node in graph.graph.nodes:
        if node not in late and node not in seeded:
            late[node] = rest.node_copy(node, late.get)
    return fx.GraphModule(graph, first), fx.GraphModule(nn.ModuleDict({"weights": weights}), rest)


def find_or_make(graph: fx.GraphModule, inputs: list[Tensor], hints: dict[str, Any], cache: Path | None) -> Any:
    """The graph as a compiled model of OpenVINO, from the cache if it is there."""
    core, file = openvino.Core(), None
    if cache is not None:
        processor = core.get_property("CPU", "FULL_DEVICE_NAME"), core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        file = cache / f"{digest(graph, inputs, hints, processor)}.blob"
        if file.exists():
            try:
                return core.import_model(file.read_bytes(), "CPU", hints)
            except RuntimeError as error:
                warnings.warn(f"{file} can't be read and is made again: {str(error).splitlines()[0]}", stacklevel=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                # the exporter's, about itself
        model = openvino.convert_model(plainer(torch.export.export(graph, tuple(inputs))))
    compiled = core.compile_model(model, "CPU", hints)
    if file is not None:
        with replacing(file) as part:
            part.write_bytes(compiled.export_model().getvalue())
    return compiled


def plainer(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program without three operators of FreeScale that OpenVINO 2026.4.1 can't convert."""
    aten = torch.ops.aten
    return exported.run_decompositions({
        **torch._decomp.get_decompositions([aten.index_add.default]),
        aten.empty_like.default: lambda x, dtype=None, **rest: torch.zeros(x.shape, dtype=dtype or x.dtype),
        aten.__rshift__.Scalar: lambda x, bits: x // 2 ** bits})


def digest(graph: fx.GraphModule, inputs: list[Tensor], *more: Any) -> str:
    """What a compiled graph depends on, as a file name."""
    known = hashlib.sha256()
    for part in (graph.code, [(x.shape, x.dtype) for x in inputs], openvino.__version__, torch.__version__, *more):
        known.update(repr(part).encode())
    for name, weight in graph.named_parameters():
        known.update(name.encode())
        known.update(weight.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return known.hexdigest()[:32]
