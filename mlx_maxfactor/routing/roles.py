"""Find the role of each parameter of a model from the module tree.

An array alone does not show whether it is an embedding or a hidden matrix, a convolution or a stack
of experts. The module that holds it, and its place in the model, do.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise, product
from typing import Any
from weakref import ref

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import AllToShardedLinear, ShardedToAllLinear

from ..engine.trees import children

ROLES = ("embedding", "head", "first", "hidden", "conv", "conv_input", "depthwise", "experts")
ROLES += ("lora_a", "lora_b", "router", "norm", "bias", "vector", "unknown")
"""Every role. ``create_optimizer`` says which optimizer each gets."""

EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
LINEAR = (nn.Linear, nn.QuantizedLinear, nn.QQLinear, AllToShardedLinear, ShardedToAllLinear)
PLAIN_CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTION = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTION = PLAIN_CONVOLUTION + TRANSPOSED_CONVOLUTION
RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)
# mlx_lm's stacks of matrices: one matrix per expert, or per head (latent attention).
STACKED = ("SwitchLinear", "QuantizedSwitchLinear", "MultiLinear")

LORA = (("lora_a", "lora_b"), ("lora_A", "lora_B"), ("A", "B"), ("lora_down", "lora_up"))
LORA += (("lora_embedding_A", "lora_embedding_B"),)  # of PEFT

BIASES = ("bias", "b", "bhn")
WEIGHTS = ("weight", "Wx", "Wh", "Wxh", "Whh")
HIDDEN_STATE_WEIGHTS = ("Wh", "Whh")
INPUT_ROLES = {"hidden": "first", "conv": "conv_input"}
"""What a layer that reads the model's input is, instead of its usual role."""

HEAD_NAME = re.compile(
    r"(?!multi_head)(.*_)?head|output|output_(layer|proj|projection)|(.*_)?classifier|logits|unembed(ding)?"
    r"|embed_out|fc_out|proj_out|conv_?out|out_?conv|outc|(.*_)?final_(layer|conv)|score"
)
HEADS_NAME = re.compile(r"(?!(multi|att))(.*_)?(heads|final_layers?)")
INPUT_NAME = re.compile(r"(.*_)?(in|emb|embed(der|ding)?s?)")
TOWER_NAME = re.compile(r"(text|visual|vision|image|audio)_proj(ection)?")
MODULATION_NAME = re.compile(r"ada(_?ln.*|_lin)?|(.*_)?mod|.*modulation", re.IGNORECASE)
NORM_NAME = re.compile(r"(?!.*(Weight|Spectral)).*Norm.*")  # those two hold matrices
GATE_NAME = re.compile(r"(.*_)?gate")
ROUTER_NAME = re.compile(r"(.*_)?router")


@dataclass(frozen=True)
class Parameter:
    """One array of a model: path, shape, role, a note, and its layout (``functional.LAYOUTS``)."""

    path: str
    shape: tuple[int, ...]
    role: str
    note: str = ""
    layout: str = "batched"


@dataclass(eq=False)
class Node:
    """A module at its place in the tree."""

    path: str
    module: nn.Module
    above: "ref[Node] | None" = None
    """The parent, as a weak reference: a cycle would keep a deleted model alive."""
    listed: bool = False
    """Whether it is an item of a list, like the blocks of a transformer."""
    is_part: bool = False
    """Whether it is a named part of the model: an encoder, a tower."""
    children: list["Node"] = field(default_factory=list)
    shapes: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    """Paths and shapes of the module's own arrays."""

    def fill(self, tree: Any, path: str, listed: bool = False) -> None:
        """Add what the module, or a dictionary or list in it, holds."""
        for key, at, value in children(tree, path):
            if tree is self.module and key.startswith("_"):
                continue  # MLX does not count these as parameters
            if isinstance(value, nn.Module):
                self.children.append(Node(at, value, ref(self), listed))
                self.children[-1].fill(value, at)
            elif isinstance(value, (dict, list)):  # MLX sees no parameters in a tuple
                self.fill(value, at, listed or isinstance(value, list))
            elif isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
                self.shapes.append((at, value.shape))

    def walk(self) -> Iterator["Node"]:
        """Yield this node and all below it, in order of definition."""
        yield self
        for child in self.children:
            yield from child.walk()

    def is_a(self, *classes: type) -> bool:
        """Whether the module is an instance of one of the classes."""
        return isinstance(self.module, classes)

    @property
    def parent(self) -> "Node | None":
        """The node above this one."""
        return self.above and self.above()

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def item(self) -> "Node | None":
        """This node or the nearest above it that is a list item. A Sequential's do not count."""
        above = self.parent
        if self.listed and not (above is not None and above.is_a(nn.Sequential)):
            return self
        return above and above.item

    @property
    def in_list(self) -> bool:
        """Whether this node or one above it is a list item."""
        return self.item is not None

    @property
    def is_stacked(self) -> bool:
        """Whether the layer is a stack of matrices."""
        return any(c.__name__ in STACKED for c in type(self.module).__mro__)

    @property
    def is_norm(self) -> bool:
        """Whether the layer is a norm, judged by its class name: models often define their own."""
        return NORM_NAME.fullmatch(type(self.module).__name__) is not None and not self.is_layer

    @property
    def is_layer(self) -> bool:
        """Whether the module is a layer with weights of a known class."""
        return self.is_a(*EMBEDDING, *LINEAR, *CONVOLUTION, *RECURRENT) or self.is_stacked

    @property
    def groups(self) -> int:
        """Groups of a convolution, else 1."""
        return getattr(self.module, "groups", 1) if self.is_a(*CONVOLUTION) else 1

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel of a convolution has its own kernel, so that there is no matrix."""
        if self.groups == 1:
            return False
        weight: mx.array = self.module["weight"]
        return self.groups in (weight.shape[0], weight.shape[-1] * self.groups)

    @property
    def input_width(self) -> int | None:
        """Width of the layer's input features."""
        return self.widths[0]

    @property
    def output_width(self) -> int | None:
        """Width of the layer's output features."""
        return self.widths[1]

    @cached_property
    def widths(self) -> tuple[int | None, int | None]:
        """Widths of the layer's input and output features, where they are known."""
        m: Any = self.module
        if self.is_a(*EMBEDDING):
            return None, getattr(m, "dims", m.weight.shape[-1])
        if self.is_a(nn.QuantizedLinear):
            return m.scales.shape[-1] * m.group_size, m.weight.shape[0]
        if self.is_a(*LINEAR, *CONVOLUTION):
            return m.weight.shape[-1] * self.groups, m.weight.shape[0]
        if self.is_a(*RECURRENT):
            reads, keeps = ("Wxh", "Whh") if "Wxh" in m else ("Wx", "Wh")
            return m[reads].shape[-1], m[keeps].shape[-1]
        if self.is_stacked:
            *_, rows, columns = m.weight.shape
            return getattr(m, "input_dims", columns), getattr(m, "output_dims", rows)
        return (self.shapes[0][1][-1] if self.is_norm and self.shapes else None), None


def build_tree(model: nn.Module) -> Node:
    """Build the module tree, in order of definition, with each module's floating-point arrays."""
    root = Node("", model)
    root.fill(model, "")
    return root


def find_roles(model: nn.Module, declared: Mapping[str, str] | None = None) -> list[Parameter]:
    """Find the role of every floating-point parameter of a model, including frozen ones.

    A module with several paths is listed once, under the last one: MLX gives no gradient for the
    others.

    Args:
        model: The model.
        declared: Roles by path. They replace the roles that would be found.

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
    lora = _find_lora(nodes)
    whole = [node for node in nodes if f"{node.path}.weight" not in lora]
    bare = _bare_heads(nodes)
    known = bare or "head" in declared.values()
    heads = {} if known else _find_heads(tops, whole, gates, readers)

    found = []
    for node in nodes:
        if last[id(node.module)] is not node:
            continue
        for path, shape in node.shapes:
            key = path[len(node.path) + 1 if node.path else 0 :].partition(".")[0]
            role, layout = lora.get(path) or (_role(node, key, len(shape)), "")
            note = ""
            if role == "unknown" and sum(n > 1 for n in shape) < 2:
                role = "vector"  # a class token (1, 1, n), the gains (n, 1, 1) of weight norm
            if path in bare:
                role = "head"
            if path in declared:
                # A kernel declared hidden keeps its convolution layout, `(out, k..., in)`.
                kernel = role in ("conv", "depthwise") and declared[path] == "hidden"
                role = "conv" if kernel else declared[path]
            elif role in ("hidden", "conv") and node in heads:
                role, note = "head", heads[node]
            elif node in gates and role in ("hidden", "unknown"):
                role = "router"
            elif node in readers and role in INPUT_ROLES and key not in HIDDEN_STATE_WEIGHTS:
                role = INPUT_ROLES[role]
            elif role == "unknown":
                note = "unexplained"
            found.append(Parameter(path, shape, role, note, layout or _layout(role, node)))
    return found


def find_aliases(model: nn.Module) -> dict[str, str]:
    """Map each path that :func:`find_roles` leaves out to the path that it lists instead."""
    nodes = list(build_tree(model).walk())
    last = {id(node.module): node for node in nodes}
    return {
        path: listed
        for node in nodes
        for (path, _), (listed, _) in zip(node.shapes, last[id(node.module)].shapes, strict=True)
        if path != listed
    }


def _role(node: Node, key: str, axes: int) -> str:
    """The role of an array, judged only by its own module."""
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
        return "depthwise" if node.is_depthwise else "conv"
    return "experts" if node.is_stacked else "unknown"


def _layout(role: str, node: Node) -> str:
    """How an array of that role holds matrices."""
    roles = ("conv", "conv_input", "depthwise")
    if role in roles or (role in ("head", "lora_a", "lora_b") and node.is_a(*CONVOLUTION)):
        return "conv" if node.groups == 1 or node.is_depthwise else f"conv/{node.groups}"
    return "experts" if role == "experts" else "batched"


def _find_lora(nodes: list[Node]) -> dict[str, tuple[str, str]]:
    """Role and layout of the LoRA matrices, by path. Empty: the layout of the layer.

    They are arrays or layers of a module, or of a dictionary in it by the adapter's name (PEFT).
    """
    at = {node.path: node for node in nodes}
    layers = {f"{n.path}.weight": n for n in nodes if n.is_a(*EMBEDDING, *LINEAR, *CONVOLUTION)}
    shapes: dict[str, tuple[Any, ...]] = {path: x for n in nodes for path, x in n.shapes}
    shapes |= {p: (n.output_width, n.input_width) for p, n in layers.items() if n.input_width}
    found = {}
    for (path_a, shape_a), (a, b) in product(shapes.items(), LORA):
        before, _, after = f".{path_a}.".rpartition(f".{a}.")
        path_b = f"{before}.{b}.{after}".strip(".")
        if path_b not in shapes or path_a.endswith(("scales", "biases")):
            continue
        above, layer, shape_b = at.get(before[1:]), layers.get(path_a), shapes[path_b]
        layout = "" if path_b in layers else _lora_layout(shape_a, shape_b)
        is_named = a != "A" or (
            above is not None
            and after in ("", "weight.")
            and any(n.is_a(*LINEAR, *CONVOLUTION) for n in above.children)
            and _is_low_rank(shape_a, shape_b)
        )
        if (layer or layout) and is_named:
            # An embedding's A is looked up by token, not multiplied.
            of_table = layer.is_a(*EMBEDDING) if layer else above and "embedding" in above.module
            is_table = of_table or "embedding" in a
            found[path_a] = ("embedding", "batched") if is_table else ("lora_a", layout)
            found[path_b] = ("lora_b", layout)
    return found


def _lora_layout(a: tuple[Any, ...], b: tuple[Any, ...]) -> str:
    """The layout of A and B, or "" if their shapes do not form a product.

    They are ``(in, r)`` and ``(r, out)``, as in mlx_lm, or ``(r, in)`` and ``(out, r)``, as in
    Linears. If both fit, the smaller number is taken as the rank.
    """
    if len(a) != len(b) or len(a) < 2:
        return ""
    if len(a) > 2 and a[:-2] == b[:-2]:
        return "experts"
    if len(a) == 2 and a[1] == b[0] and (a[0] != b[1] or a[1] <= a[0]):
        return "transposed"
    return ("batched" if len(a) == 2 else "conv") if a[0] == b[-1] else ""


def _is_low_rank(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether the rank of A and B is below both their input and their output width."""
    return min(a) < max(a) and min(a) == min(b) < max(b)


def _tops(root: Node) -> list[Node]:
    """The model, the modules inside wrappers of one child, and named parts such as an encoder."""
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
    """Find the layers that read the model's input.

    These are the first layer of the model, and the first layer of a part if no layer outside the
    part makes features of its input width. The first convolution can be one too: a diffusion model
    may define the layers that embed the time before it.
    """
    readers = set()
    for top in tops:
        inside = list(top.walk())
        first = next((node for node in inside if node.is_layer), None)
        if first is not None and first.is_a(*LINEAR, *CONVOLUTION, *RECURRENT):
            outside = [node for node in nodes if node not in inside]
            if top is tops[0] or all(node.output_width != first.input_width for node in outside):
                readers.add(first)
    convolution = next((node for node in nodes if node.is_a(*CONVOLUTION)), None)
    if convolution and convolution.is_a(*PLAIN_CONVOLUTION) and not convolution.in_list:
        before = nodes[: nodes.index(convolution)]
        if all(node.output_width != convolution.input_width for node in before):
            readers.add(convolution)
    return readers


def _find_heads(
    tops: list[Node], nodes: list[Node], gates: set[Node], readers: set[Node]
) -> dict[Node, str]:
    """Find the layers that make the model's output, with a note if that is a guess."""
    linears = [n for n in nodes if n.is_a(*LINEAR) and n not in gates and not _is_modulation(n)]
    # Layers that read other layers' output. A norm in a block may be as wide as an attention head.
    takers = [n for n in nodes if n not in readers and not (n.is_norm and n.in_list)]

    def is_read(node: Node) -> bool:
        return any(n.input_width == node.output_width for n in takers if n is not node)

    heads = _named_heads(tops, [*linears, *(n for n in nodes if n.is_a(*CONVOLUTION))], is_read)
    tables = [n.module["weight"].shape for n in nodes if n.is_a(nn.Embedding)]
    shaped = [n for n in linears if n.module["weight"].shape in tables]
    unread = [n for n in shaped if not n.in_list and not is_read(n)]
    # A layer may have the shape of a table of positions; tokens have the first table.
    of_tokens = [n for n in shaped if n.module["weight"].shape == tables[0]]
    later = [n for n in of_tokens if n.in_list and not is_read(n)]  # heads for later tokens
    later = [n for n in later if n.input_width != n.output_width]
    if not heads and unread:
        heads = {unread[-1]: ""}
    heads |= dict.fromkeys(later, "")
    kernels = [(n, n.module["weight"].shape) for n in nodes if n.is_a(*PLAIN_CONVOLUTION)]
    pointwise = {n for n, shape in kernels if {n.groups, *shape[1:-1]} == {1}}  # as a Linear
    outlets = [n for n in nodes if n in linears or n in pointwise]
    if not heads and outlets and not is_read(outlets[-1]) and not _ties_embedding(nodes):
        heads = dict.fromkeys(_twins(outlets[-1], outlets), "guessed")
    if not heads and (square := [n for n in of_tokens if not n.in_list]):
        heads = {square[-1]: "guessed"}
    for head, note in list(heads.items()):
        heads |= {n: note for n in _beside(head, linears, is_read) if n not in heads}
    return heads


def _bare_heads(nodes: list[Node]) -> set[str]:
    """Paths of arrays without a layer that are named like a head and shaped like an embedding."""
    tables = [n.module["weight"].shape for n in nodes if n.is_a(nn.Embedding)]
    arrays = [array for n in nodes if not n.is_layer for array in n.shapes]
    return {p for p, shape in arrays if shape in tables and HEAD_NAME.fullmatch(p.split(".")[-1])}


def _named_heads(
    tops: list[Node], layers: list[Node], is_read: Callable[[Node], bool]
) -> dict[Node, str]:
    """The last layer of each module named like a head, and the projections of two towers."""
    named = {n: path for top in tops for n in top.children if (path := _named_head(n))}
    inside = [(n, path, [m for m in n.walk() if m in layers]) for n, path in named.items()]
    last = {path: (n, found[-1]) for n, path, found in inside if found}.values()
    # A part may use such a name for an inner projection. Then another layer reads its output.
    at_top = {head: "" for n, head in last if n.parent and not n.parent.is_part}
    in_parts = {
        head: ""
        for n, head in last
        if not is_read(head) and not (n.parent and INPUT_NAME.fullmatch(n.parent.name))
    }
    towers = [n for n in layers if n.parent in tops and TOWER_NAME.fullmatch(n.name)]
    if not at_top and len(towers) > 1 and len({n.output_width for n in towers}) == 1:
        return dict.fromkeys(towers, "")
    return at_top or in_parts


def _beside(head: Node, linears: list[Node], is_read: Callable[[Node], bool]) -> Iterator[Node]:
    """Find more output layers next to a head.

    These are the last layers of neighbouring modules with the same input width, if no layer reads
    their output. If the head is an item of a list of parallel layers, all items are heads.
    """
    branch = head
    while branch.parent is not None:
        inside = {n: [m for m in n.walk() if m.input_width] for n in branch.parent.children}
        branches = [n for n, layers in inside.items() if layers]
        width = inside[branch][0].input_width
        items = [n for n in branches if n.path.rpartition(".")[0] == branch.path.rpartition(".")[0]]
        if branch.listed and branch is head and _are_parallel(items):
            yield from items
        place = branches.index(branch)
        halved = {2 * (n.input_width or 0) for n in linears}  # by a GLU
        for run in (reversed(branches[:place]), branches[place + 1 :]):
            for neighbour in run:
                if neighbour.listed and not (branch is head and neighbour in items):  # a block
                    break
                outlets = [n for n in inside[neighbour] if n in linears]
                alike = bool(outlets) and inside[neighbour][0].input_width == width
                if any(n.in_list for n in inside[neighbour]):  # the trunk, or another tower
                    alike &= type(neighbour.module) is type(branch.module)
                if not alike or is_read(outlets[-1]) or outlets[-1].output_width in halved:
                    break
                yield outlets[-1]
        branch = branch.parent


def _twins(node: Node, linears: list[Node]) -> list[Node]:
    """The layers at the same place in all items of the node's list, such as several critics.

    There are none in a block: some layer of it makes the width that it reads. Lists in a list are
    called one layer after the other, so that their last layers are outputs.
    """
    if node.listed and (lists := re.fullmatch(r"(.*)\.\d+(\.\d+)", f".{node.path}")):
        items, place = map(re.escape, lists.groups())
        found = [n for n in linears if re.fullmatch(rf"{items}\.\d+{place}", f".{n.path}")]
        return [n for n in found if n.output_width == node.output_width]
    block = node.parent and node.parent.item
    if block is None:
        return [node]
    inside = [n for n in linears if n in block.walk()]
    if any(n.output_width == inside[0].input_width for n in inside):
        return []
    items, place = map(re.escape, (block.path.rpartition(".")[0], node.path[len(block.path) :]))
    found = [n for n in linears if re.fullmatch(rf"{items}\.\d+{place}", n.path)]
    return [n for n in found if n.output_width == node.output_width]


def _ties_embedding(nodes: list[Node]) -> bool:
    """Whether the code of a module makes the output by an embedding table."""
    kinds = {kind for n in nodes for kind in type(n.module).__mro__}
    methods = [value for kind in kinds for key, value in vars(kind).items() if key != "as_linear"]
    codes = [method.__code__ for method in methods if hasattr(method, "__code__")]
    tables = {n.name for n in nodes if n.is_a(nn.Embedding)}
    return any(
        "as_linear" in names or ({"weight", "T"} <= names and names & tables)
        for names in ({*code.co_names} for code in codes)
    )


def _are_parallel(items: list[Node]) -> bool:
    """Whether the items are Linears with the same input width that do not form a chain."""
    chain = all(a.output_width == b.input_width for a, b in pairwise(items))
    return not chain and all(
        n.is_a(*LINEAR) and n.input_width == items[0].input_width for n in items
    )


def _is_modulation(node: Node) -> bool:
    """Whether the layer makes gains and shifts for a norm (adaLN)."""
    return any(MODULATION_NAME.fullmatch(part) for part in node.path.split("."))


def _named_head(node: Node) -> str:
    """The path of the head that the node is, or a layer of. Empty: its name is not a head's."""
    path = re.sub(r"(\.\d+)+$", "", node.path) if node.listed else node.path
    names = path.split(".")
    if path != node.path and HEADS_NAME.fullmatch(names[-1]):  # a list of heads, perhaps of lists
        return ".".join(node.path.split(".")[: len(names) + 1])
    is_head = HEAD_NAME.fullmatch(names[-1]) or HEADS_NAME.fullmatch("".join(names[-2:-1]))
    return path if is_head else ""


def _find_gates(nodes: list[Node]) -> set[Node]:
    """Find modules that choose among experts: named a router, or a gate next to the experts."""
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
