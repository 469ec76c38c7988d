"""Decoder blocks of a causal LM and the weight matrices in them.

The blocks are the outermost `nn.ModuleList` whose elements hold the most weights. A layer is a matrix that
multiplies activations: the weight of an `nn.Linear` [out, in], of GPT-2's `Conv1D` [in, out], or one expert's
slice of a 3-D parameter [experts, out, in] ([experts, in, out] where the module says `is_transposed`). A
mixture is the experts of a block that tokens are routed to.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from maskopt.errors import ModelError, near

#: what modules are called that route
_ROUTERS = ("gate", "router")
#: what configurations call the number of experts that a token goes to
_EACH = ("num_experts_per_tok", "moe_topk", "moe_k", "num_selected_experts")


@dataclass(frozen=True)
class Layer:
    """Prunable matrix.

    Attributes:
        block: index of its decoder block.
        kind: the name inside the block, numbers as stars: `self_attn.q_proj`, `mlp.experts.*.w1`.
        parent: the name without its last part: layers of one parent may share their inputs.
        expert: index along the first axis of a 3-D parameter, or None.
        input_axis: the axis of the stored matrix (without the expert axis) that counts inputs.
        rows, n: outputs and inputs.
    """

    name: str
    block: int
    kind: str
    parent: str
    parameter: str
    expert: int | None
    input_axis: int
    rows: int
    n: int


#: layers, or their reports, with `name` and `kind`
Found = TypeVar("Found", bound=Any)


class Blocks:
    """Decoder blocks of a model: the module list `modules`, called `name` in it, e.g. `model.layers`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.name, self.modules = _find(model)

    def __len__(self) -> int:
        return len(self.modules)

    def prefix(self, index: int) -> str:
        return f"{self.name}.{index}."

    def layers(self, index: int) -> list[Layer]:
        """Return the prunable matrices of block `index`, in the order of their names in the model."""
        return list(_layers(self.modules[index], index, self.prefix(index)))

    def all_layers(self) -> list[Layer]:
        return [layer for index in range(len(self)) for layer in self.layers(index)]

    def outside(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and parameters of no block, without an output head of its own."""
        head = {name for name, _ in self.own_head()}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if not name.startswith(self.name + ".") and name not in head:
                yield name, parameter

    def inside(self) -> list[str]:
        """Return the names of the blocks' weights that no other part of the model shares."""
        begins = self.name + "."
        named = self.model.named_parameters(remove_duplicate=False)
        shared = {id(p) for name, p in named if not name.startswith(begins)}
        return [
            name
            for name, parameter in self.model.named_parameters()
            if name.startswith(begins)
            and parameter.is_floating_point()
            and id(parameter) not in shared
        ]

    @property
    def embedding(self) -> nn.Module:
        """Module that looks up the token ids."""
        return _embedding(self.model, "get_input_embeddings")

    def own_head(self) -> list[tuple[str, Tensor]]:
        """Return names and parameters of the output head that the input embedding does not share."""
        head = _embedding(self.model, "get_output_embeddings")
        unshared = {id(p) for p in head.parameters()} - {id(p) for p in self.embedding.parameters()}
        parameters = self.model.named_parameters(remove_duplicate=False)
        return [(name, parameter) for name, parameter in parameters if id(parameter) in unshared]

    def check_unshared(self, layers: Iterable[Layer]) -> None:
        """Raise ModelError where a matrix to be pruned is also used in another place."""
        wanted = {layer.parameter for layer in layers}
        places: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            places.setdefault(id(parameter), []).append(name)
        for names in places.values():
            if len(names) > 1 and wanted & set(names):
                first, second = (name.removesuffix(".weight") for name in names[:2])
                raise ModelError(
                    f"layer {first!r} shares its weight with {second!r}; leave both out with `exclude` "
                    f"{first!r} and {second!r}"
                )


def matrix(model: nn.Module, layer: Layer) -> Float[Tensor, "rows n"]:
    """Return the layer's weight as a view [rows, n] of the parameter: writing to it changes the model."""
    parameter = model.get_parameter(layer.parameter).data
    if layer.expert is not None:
        parameter = parameter[layer.expert]
    return parameter if layer.input_axis == 1 else parameter.T


def merged(
    model: nn.Module, parts: Mapping[str, tuple[Layer, Tensor]], default: bool | float
) -> dict[str, Tensor]:
    """Return matrices of layers [rows, n] as parameters of the model; `default` for experts without one."""
    merged: dict[str, Tensor] = {}
    for layer, part in parts.values():
        oriented = part if layer.input_axis == 1 else part.T
        if layer.expert is None:
            merged[layer.parameter] = oriented.contiguous()
            continue
        if layer.parameter not in merged:
            shape = model.get_parameter(layer.parameter).shape
            merged[layer.parameter] = torch.full(shape, default, dtype=part.dtype)
        merged[layer.parameter][layer.expert] = oriented
    return merged


def choose(
    layers: Sequence[Found], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[Found]:
    """Return the layers that an `include` pattern matches (all without any), and no `exclude` pattern.

    Patterns are of a whole name or any run of its dotted parts: `q_proj`, `mlp.*`. ModelError where one
    matches nothing.
    """
    names = [layer.name for layer in layers]
    for pattern in (*include, *exclude):
        if not _matching(names, [pattern]):
            known = set(names)
            for layer in layers:
                parts = layer.name.split(".")
                known |= {part for part in parts if not part.isdigit()}
                known |= {f"{a}.{b}" for a, b in pairwise(parts) if b.isdigit()}  # layers.0
            hint = near(pattern, known)
            if hint.startswith("; known"):
                hint = "; known: " + ", ".join(sorted({layer.kind for layer in layers}))
            raise ModelError(f"no layer matches {pattern!r}{hint}")
    wanted = _matching(names, include or ["*"]) - _matching(names, exclude)
    chosen = [layer for layer in layers if layer.name in wanted]
    if not chosen:
        raise ModelError("the include and exclude patterns leave no layer to prune")
    return chosen


def _matching(names: Sequence[str], patterns: Iterable[str]) -> set[str]:
    """Return the dotted names that shell patterns match, as a whole or by a run of their parts."""
    matching, known = set[str](), set(names)
    for pattern in patterns:
        if pattern in known:  # of long lists of names, each is looked up
            matching.add(pattern)
        elif any(sign in pattern for sign in "*?["):
            shapes = (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
            matching.update(n for n in names if any(fnmatchcase(n, p) for p in shapes))
        else:
            matching.update(n for n in names if f".{pattern}." in f".{n}.")
    return matching


def short(kind: str) -> str:
    """Return the last part of a kind, as tables show it: `q_proj`."""
    return kind.rpartition(".")[2]


def _embedding(model: nn.Module, getter: str) -> nn.Module:
    """Return what a getter of the model returns, or an empty module where it has none."""
    get = getattr(model, getter, None)
    module = get() if callable(get) else None
    return module if isinstance(module, nn.Module) else nn.Module()


def _find(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists: list[tuple[int, str, nn.ModuleList]] = []
    outer: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(o + ".") for o in outer):
            continue
        outer.append(name)
        sizes = [layer.rows * layer.n for block in module for layer in _layers(block, 0, "")]
        if sizes:
            lists.append((sum(sizes), name, module))
    if not lists:
        raise ModelError(
            f"{type(model).__name__} has no list of decoder blocks with linear layers; "
            "is it a causal language model?"
        )
    _, name, modules = max(lists, key=lambda item: item[0])
    return name, modules


def _layers(block: nn.Module, index: int, prefix: str) -> Iterator[Layer]:
    from transformers.pytorch_utils import Conv1D  # takes seconds, and not every command needs it

    for name, module in block.named_modules(remove_duplicate=True):
        path = f"{name}." if name else ""
        if isinstance(module, nn.Linear | Conv1D):
            axis = 1 if isinstance(module, nn.Linear) else 0
            yield _layer(index, prefix, name, path + "weight", None, axis, module.weight.shape)
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape[1:]) > 1 and is_experts(module):
                axis = 0 if _transposed(module) else 1
                for expert in range(parameter.shape[0]):
                    inner, shape = f"{path}{expert}.{key}", parameter.shape[1:]
                    yield _layer(index, prefix, inner, path + key, expert, axis, shape)


def _layer(
    index: int,
    prefix: str,
    inner: str,
    parameter: str,
    expert: int | None,
    input_axis: int,
    shape: Sequence[int],
) -> Layer:
    """Make the layer called `inner` inside its block; no other place takes a layer's name apart."""
    name = (prefix + inner).rstrip(".")
    return Layer(
        name=name,
        block=index,
        kind=".".join("*" if part.isdigit() else part for part in inner.split(".")) or "*",
        parent=name.rpartition(".")[0],
        parameter=prefix + parameter,
        expert=expert,
        input_axis=input_axis,
        rows=shape[1 - input_axis],
        n=shape[input_axis],
    )


def is_experts(module: nn.Module) -> bool:
    """Return whether the module holds experts as 3-D parameters, which convolutions have, too."""
    counts = [p.shape[0] for _, p in module.named_parameters(recurse=False) if p.ndim == 3]
    return min(counts, default=1) > 1 and not isinstance(module, _ConvNd)


def takes_routing(module: nn.Module) -> bool:
    """Return whether the module is called with hidden states, chosen experts, and their weights."""
    try:
        inspect.signature(module.forward).bind(None, None, None)
    except TypeError:
        return False
    return True


def _transposed(module: nn.Module) -> bool:
    """Return whether experts are stored [experts, in, out]: by the module's attribute, or else by shapes."""
    transposed = getattr(module, "is_transposed", None)
    if transposed is not None:
        return bool(transposed)
    shapes = [p.shape[1:] for _, p in module.named_parameters(recurse=False) if p.ndim == 3]
    return shapes[0][1] != shapes[-1][0] and shapes[0][0] == shapes[-1][1]


def text_config(model: nn.Module) -> Any:
    """Return the part of the model's configuration about its language model; None without one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of rows of the input embedding."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[0])


# --- mixtures of experts


@dataclass(frozen=True)
class Mixture:
    """Experts of a block that tokens are routed to.

    Attributes:
        name: of their module.
        count: number of experts.
        each: number of experts that a token goes to.
        parameters: those with experts on their first axis, the router's among them.
    """

    name: str
    kind: str
    block: int
    count: int
    each: int
    parameters: tuple[str, ...]

    @property
    def parent(self) -> str:
        """Module that routes, and adds up."""
        return self.name.rpartition(".")[0]


def mixtures_of(blocks: Blocks, index: int) -> list[Mixture]:
    """Return the mixtures of a block; ModelError for experts that cannot be removed."""
    block, mixtures = blocks.modules[index], []
    for name, module in block.named_modules():
        if not is_experts(module):
            continue
        full = blocks.prefix(index) + name
        if not takes_routing(module):
            raise ModelError(
                f"{full}: {type(module).__name__} is not given a routing, and its experts cannot be removed; "
                "leave out `experts`"
            )
        each, parent = _each(blocks.model, full), block.get_submodule(name.rpartition(".")[0])
        count = next(p.shape[0] for _, p in module.named_parameters(recurse=False) if p.ndim == 3)
        parameters = [f"{full}.{n}" for n, p in module.named_parameters() if p.shape[0] == count]
        routers = _of_router(parent.named_parameters(), count)
        if buffers := _of_router(parent.named_buffers(), count):
            raise ModelError(
                f"{full}: its router keeps {buffers[0]!r} in addition to its weights; leave out `experts`"
            )
        if not routers:
            raise ModelError(f"{full}: its router is of no known form; leave out `experts`")
        parameters += [f"{full.rpartition('.')[0]}.{n}" for n in routers]
        mixtures.append(Mixture(full, name, index, count, each, tuple(parameters)))
    return mixtures


def _of_router(tensors: Iterable[tuple[str, Tensor]], count: int) -> list[str]:
    """Return the names of a router's tensors with an entry for each of `count` experts."""
    return [n for n, x in tensors if n.split(".")[0] in _ROUTERS and x.shape[:1] == (count,)]


def _each(model: nn.Module, name: str) -> int:
    """Return how many experts a token goes to; ModelError where the configuration does not say."""
    text = text_config(model)
    groups = getattr(text, "n_group", None) or 1
    if groups > 1 and (getattr(text, "topk_group", None) or groups) < groups:
        raise ModelError(
            f"{name}: its router chooses among {groups} groups of experts first; leave out `experts`"
        )
    for key in _EACH:
        if isinstance(value := getattr(text, key, None), int):
            return value
    raise ModelError(
        f"{name}: the configuration does not say how many experts a token goes to; leave out `experts`"
    )
