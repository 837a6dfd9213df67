"""What each parameter of a model is, read from the module tree.

An array alone cannot say whether it is an embedding or a hidden matrix, a convolution or a stack of
experts. The module that holds it can, together with where that module stands.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import AllToShardedLinear, ShardedToAllLinear

ROLES = (
    "embedding",
    "head",
    "first",
    "hidden",
    "conv",
    "conv_input",
    "experts",
    "lora_a",
    "lora_b",
    "router",
    "norm",
    "bias",
    "vector",
    "unknown",
)
"""Every role; README.md says where each goes by default."""

EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
LINEAR = (nn.Linear, nn.QuantizedLinear, nn.QQLinear, AllToShardedLinear, ShardedToAllLinear)
CONVOLUTION = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)
# mlx_lm's stacks of matrices: one per expert, and one per head (latent attention).
STACKED = ("SwitchLinear", "QuantizedSwitchLinear", "MultiLinear")

BIASES = ("bias", "b", "bhn")
WEIGHTS = ("weight", "Wx", "Wh", "Wxh", "Whh")

HEAD_NAME = re.compile(
    r"(?!multi_head)(.*_)?head|output|output_(layer|proj|projection)|(.*_)?classifier|logits|unembed(ding)?"
    r"|embed_out|fc_out|proj_out|score"
)
GATE_NAME = re.compile(r"(.*_)?gate")
ROUTER_NAME = re.compile(r"(.*_)?router")


@dataclass(frozen=True)
class Parameter:
    """One array of a model: where it is, its shape, what it is, what is odd about it."""

    path: str
    shape: tuple[int, ...]
    role: str
    note: str = ""

    @property
    def layout(self) -> str:
        """How the array holds matrices, see ``functional.LAYOUTS``."""
        stacked = len(self.shape) > 2
        if self.role in ("conv", "conv_input"):
            return "conv"
        if self.role in ("lora_a", "lora_b"):
            return "experts" if stacked else "transposed"
        return "experts" if self.role == "experts" else "batched"


@dataclass(eq=False)
class Node:
    """A module at its place in the tree."""

    path: str
    module: nn.Module
    above: "ref[Node] | None" = None
    """The node it hangs on, weakly: a cycle would keep its module, and a model that is gone."""
    listed: bool = False
    """Whether it is an item of a list, as the blocks of a transformer are."""
    is_part: bool = False
    """Whether it is a named part of the model: an encoder, a tower."""
    children: list["Node"] = field(default_factory=list)
    shapes: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    """Paths and shapes of its own arrays."""

    def walk(self) -> Iterator["Node"]:
        """This node and all below it, in order of definition."""
        yield self
        for child in self.children:
            yield from child.walk()

    def is_a(self, *classes: type) -> bool:
        """Whether the module is of one of the classes."""
        return isinstance(self.module, classes)

    @property
    def parent(self) -> "Node | None":
        """The node it hangs on."""
        return self.above and self.above()

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def in_list(self) -> bool:
        """Whether the node or one above it is an item of a list."""
        return self.listed or (self.parent is not None and self.parent.in_list)

    @property
    def is_stacked(self) -> bool:
        """Whether the layer is a stack of matrices."""
        return any(c.__name__ in STACKED for c in type(self.module).__mro__)

    @property
    def is_norm(self) -> bool:
        """Whether the layer normalizes; by name, as decoders bring norms of their own."""
        return "Norm" in type(self.module).__name__ and not self.is_layer

    @property
    def has_lora(self) -> bool:
        """Whether the module wraps a layer with low-rank matrices."""
        return "lora_a" in self.module and "lora_b" in self.module

    @property
    def is_layer(self) -> bool:
        """Whether the module is a layer with weights that this page knows."""
        return self.is_a(*EMBEDDING, *LINEAR, *CONVOLUTION, *RECURRENT) or self.is_stacked

    @property
    def reads(self) -> int | None:
        """Width of the features that the layer takes."""
        m: Any = self.module
        if self.is_a(nn.QuantizedLinear):
            return m.scales.shape[-1] * m.group_size
        if self.is_a(*LINEAR):
            return m.weight.shape[-1]
        if self.is_a(*CONVOLUTION):
            return m.weight.shape[-1] * getattr(m, "groups", 1)
        if self.is_a(*RECURRENT):
            return (m["Wxh"] if "Wxh" in m else m["Wx"]).shape[-1]
        if self.is_stacked:
            return getattr(m, "input_dims", m.weight.shape[-1])
        if self.is_norm and self.shapes:
            return self.shapes[0][1][-1]
        return None

    @property
    def makes(self) -> int | None:
        """Width of the features that the layer gives."""
        m: Any = self.module
        if self.is_a(*EMBEDDING):
            return getattr(m, "dims", m.weight.shape[-1])
        if self.is_a(*LINEAR, *CONVOLUTION):
            return m.weight.shape[0]
        if self.is_a(*RECURRENT):
            return (m["Whh"] if "Whh" in m else m["Wh"]).shape[-1]
        if self.is_stacked:
            return getattr(m, "output_dims", m.weight.shape[-2])
        return None


def build_tree(model: nn.Module) -> Node:
    """The module tree, in order of definition, with the floating-point arrays of each module."""

    def visit(node: Node, value: Any, path: str, listed: bool) -> None:
        if isinstance(value, nn.Module):
            child = Node(path, value, ref(node), listed)
            node.children.append(child)
            visit_items(child, value)
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(node, item, f"{path}.{key}", listed)
        elif isinstance(value, list):  # MLX sees no parameters in a tuple
            for i, item in enumerate(value):
                visit(node, item, f"{path}.{i}", True)
        elif isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
            node.shapes.append((path, value.shape))

    def visit_items(node: Node, module: nn.Module) -> None:
        for key, value in module.items():
            if not key.startswith("_"):  # MLX counts such arrays as no parameters
                visit(node, value, f"{node.path}.{key}" if node.path else key, False)

    root = Node("", model)
    visit_items(root, model)
    return root


def find_roles(model: nn.Module, declared: Mapping[str, str] | None = None) -> list[Parameter]:
    """The role of every floating-point parameter of a model, the frozen ones too.

    A module that is reachable under several names is listed once, under the last of them: MLX gives
    the others no gradient.

    Args:
        model: The model.
        declared: Roles by path that stand in place of what would be found.

    Returns:
        The parameters in order of definition.
    """
    declared = declared or {}
    root = build_tree(model)
    nodes = list(root.walk())
    last = {id(node.module): node for node in nodes}
    tops = _tops(root)
    readers = _find_readers(tops, nodes)
    gates = _find_gates(nodes)
    heads = {} if "head" in declared.values() else _find_heads(tops, nodes, gates)

    found = []
    for node in nodes:
        if last[id(node.module)] is not node:
            continue
        for path, shape in node.shapes:
            key = path[len(node.path) + 1 if node.path else 0 :].partition(".")[0]
            role, note = _role(node, key, len(shape)), ""
            if role == "unknown" and sum(n > 1 for n in shape) < 2:
                role = "vector"  # a class token (1, 1, n), the gains (n, 1, 1) of weight norm
            if path in declared:
                # A kernel that goes with the hidden matrices still is one: `(out, k..., in)`.
                kernel = role == "conv" and declared[path] == "hidden"
                role = "conv" if kernel else declared[path]
            elif role == "hidden" and node in heads:
                role, note = "head", heads[node]
            elif node in gates and role in ("hidden", "unknown"):
                role = "router"
            elif node in readers and role in ("hidden", "conv"):
                role = {"hidden": "first", "conv": "conv_input"}[role]
                if key in ("Wh", "Whh"):  # reads the hidden state, not the input
                    role = "hidden"
            elif role == "unknown":
                note = "unexplained"
            found.append(Parameter(path, shape, role, note))
    return found


def find_aliases(model: nn.Module) -> dict[str, str]:
    """Paths under which :func:`find_roles` does not list a parameter, to the one it does."""
    nodes = list(build_tree(model).walk())
    last = {id(node.module): node for node in nodes}
    return {
        path: listed
        for node in nodes
        if last[id(node.module)] is not node
        for (path, _), (listed, _) in zip(node.shapes, last[id(node.module)].shapes, strict=True)
    }


def _role(node: Node, key: str, axes: int) -> str:
    """What a module says about an array of its own, wherever the module stands."""
    if node.has_lora and key in ("lora_a", "lora_b"):
        # An embedding's A is looked up by token, not multiplied.
        return "embedding" if key == "lora_a" and "embedding" in node.module else key
    if node.is_norm:
        return "norm"
    if (key in BIASES and node.is_layer) or (axes < 2 and key.endswith("bias")):
        return "bias"
    if axes < 2:
        return "vector"
    if key not in WEIGHTS:
        return "unknown"
    if node.is_a(*EMBEDDING):
        return "embedding"
    if node.is_a(*LINEAR, *RECURRENT):
        return "hidden"
    if node.is_a(*CONVOLUTION):
        return "conv"
    return "experts" if node.is_stacked else "unknown"


def _tops(root: Node) -> list[Node]:
    """The model, without wrappers of one child, and its named parts: encoder, decoder, tower."""
    tops = [root]
    parts = root.children
    while len(parts) == 1 and parts[0].children:
        tops.append(parts[0])
        parts = parts[0].children
    named = [part for part in parts if part.children and not part.listed]
    for part in named:
        part.is_part = True
    return tops + named


def _find_readers(tops: list[Node], nodes: list[Node]) -> set[Node]:
    """Layers that read the model's input: the first of all, and the first of a part if nothing
    outside the part makes features of the width that it takes.
    """
    readers = set()
    for top in tops:
        inside = list(top.walk())
        first = next((node for node in inside if node.is_layer), None)
        if first is not None and first.is_a(*LINEAR, *CONVOLUTION, *RECURRENT):
            outside = [node for node in nodes if node not in inside]
            if top is tops[0] or all(node.makes != first.reads for node in outside):
                readers.add(first)
    return readers


def _find_heads(tops: list[Node], nodes: list[Node], gates: set[Node]) -> dict[Node, str]:
    """The Linears that make the model's output, with a note on how sure that is."""
    linears = [n for n in nodes if n.is_a(*LINEAR) and n not in gates]

    read = {n.reads for n in nodes}
    named = [n for n in nodes if n.parent in tops and _is_named_head(n)]
    inside = [(n, [m for m in n.walk() if m in linears]) for n in named]
    last = {n: found[-1] for n, found in inside if found}
    # A part may call a projection of its own so: then something reads what it makes.
    at_top = {head: "" for n, head in last.items() if n.parent and not n.parent.is_part}
    in_parts = {head: "" for head in last.values() if head.makes not in read}
    if heads := at_top or in_parts:
        return heads

    tables = {n.module["weight"].shape for n in nodes if n.is_a(nn.Embedding)}
    shaped = [n for n in linears if not n.in_list and n.module["weight"].shape in tables]
    if shaped:
        return {shaped[-1]: ""}

    if linears and all(linears[-1].makes != n.reads for n in nodes if n is not linears[-1]):
        return {linears[-1]: "guessed"}
    return {}


def _is_named_head(node: Node) -> bool:
    container, _, name = f".{node.path}".rpartition(".")
    if node.listed or container.endswith(".heads"):
        return container.endswith(".heads")
    return HEAD_NAME.fullmatch(name) is not None


def _find_gates(nodes: list[Node]) -> set[Node]:
    """Modules that choose among experts: routers by name, and gates beside a stack of experts."""
    gates = set()
    for block in nodes:
        below = [n for child in block.children for n in (child, *child.children)]
        has_experts = any(n.is_stacked for n in below)
        has_experts |= any(c.listed and ".experts." in f".{c.path}" for c in block.children)
        for child in block.children:
            kind = type(child.module).__name__
            router = ROUTER_NAME.fullmatch(child.name) or "Router" in kind
            gate = has_experts and (GATE_NAME.fullmatch(child.name) or "Gate" in kind)
            if (router or gate) and not any(n.is_stacked for n in child.walk()):
                gates.update(child.walk())
    return gates
