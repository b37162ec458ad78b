"""Fuse the operators around sparse products and attention into fewer, larger nodes."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

DOMAIN = "pst_ds"
ACTIVATIONS = {"Relu": 1, "Gelu": 2, "Tanh": 5}
"""Numbers of activations in SparseLinear for nodes with one input; 3 is the Gelu of a tanh, 4 SiLU."""
_GELU_TANH = 3
_SILU = 4
_MASK = 1
"""Index of the mask among the inputs of SparseLinear: x, mask, values, scales and bias."""
_NUM_INPUTS = 5
_HEADS_FIRST = (0, 2, 1, 3)
"""Axes that turn (batch, tokens, heads, size) into (batch, heads, tokens, size), and back."""


def fuse(graph: ir.Graph) -> None:
    """Rewrite ``graph`` in place. Its results stay the same up to the rounding of sums."""
    for node in _nodes(graph, "Attention"):
        _take_rows(graph, node)
    # nodes that only transposed heads would count as readers of their products
    _remove_unused(graph)
    for node in _nodes(graph, "Attention"):
        _join_projections(graph, node)
    for node in _nodes(graph, "SparseLinear"):
        _take_activation(node)
    for node in list(graph):
        if node.domain == "" and node.op_type == "LayerNormalization":
            _take_sum(graph, node)
    _remove_unused(graph)


def _nodes(graph: ir.Graph, name: str) -> list[ir.Node]:
    """Return the nodes of our operator ``name``; a list, since the caller changes the graph."""
    return [node for node in graph if node.domain == DOMAIN and node.op_type == name]


def _producer(value: ir.Value | None, name: str) -> ir.Node | None:
    """Return the node of ONNX's operator ``name`` that computes a value; None for another one."""
    node = None if value is None else value.producer()
    if node is None or node.domain != "" or node.op_type != name:
        return None
    return node


def _only_user(value: ir.Value) -> ir.Node | None:
    """Return the node that reads a value; None if the value has other uses, the graph's result among them."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    return uses[0].node


def _take_rows(graph: ir.Graph, node: ir.Node) -> None:
    """Let attention read heads from rows and write them side by side, without transposing them before."""
    for index, value in enumerate(node.inputs[:3]):
        assert value is not None
        rows = _rows_behind(value)
        # rotary angles, for example, are applied to transposed heads
        if rows is None:
            rows = _as_rows(graph, node, value)
        node.replace_input_with(index, rows)
    y = node.outputs[0]
    # most models put the heads side by side next, which attention does itself
    joined = _only_user(y)
    if joined is not None and joined.op_type == "Reshape" and len(joined.outputs[0].shape or ()) == 3:
        y.shape = joined.outputs[0].shape
        ir.convenience.replace_all_uses_with(joined.outputs[0], y)
        return
    # other readers get the heads; 0 keeps a size
    sizes = np.array([0, 0, node.attributes["heads"].as_int(), node.attributes["head_size"].as_int()], np.int64)
    split = ir.Node("", "Reshape", [y, _new_constant(graph, f"{y.name}_sizes", sizes)])
    heads = split.outputs[0]
    heads.shape = y.shape
    heads.type = y.type
    heads.name = f"{y.name}_heads"
    ir.convenience.replace_all_uses_with(y, heads)
    # the reshape was one of the uses
    split.replace_input_with(0, y)
    graph.insert_after(node, split)


def _rows_behind(value: ir.Value) -> ir.Value | None:
    """Return the (batch, tokens, width) whose columns were split into the heads ``value``, or None."""
    turned = _producer(value, "Transpose")
    if turned is None or tuple(turned.attributes["perm"].as_ints()) != _HEADS_FIRST:
        return None
    split = _producer(turned.inputs[0], "Reshape")
    rows = None if split is None else split.inputs[0]
    if rows is None or len(rows.shape or ()) != 3:
        return None
    return rows


def _as_rows(graph: ir.Graph, node: ir.Node, value: ir.Value) -> ir.Value:
    """Put the heads ``value``, (batch, heads, tokens, size), side by side in rows, before ``node``.

    Layers that share keys and values share the rows.
    """
    for use in value.uses():
        turned_value = use.node.outputs[0]
        if turned_value.name == f"{value.name}_turned":
            # the only reader of a transposed value is the reshape to rows
            reshape = next(iter(turned_value.uses())).node
            return reshape.outputs[0]
    turned = ir.Node("", "Transpose", [value], [ir.AttrInt64s("perm", _HEADS_FIRST)])
    # 0 keeps a size, and -1 is all that remains
    sizes = _new_constant(graph, f"{value.name}_sizes", np.array([0, 0, -1], np.int64))
    joined = ir.Node("", "Reshape", [turned.outputs[0], sizes])
    for made, ending in ((turned, "turned"), (joined, "rows")):
        made.outputs[0].type = value.type
        made.outputs[0].name = f"{value.name}_{ending}"
        graph.insert_before(node, made)
    return joined.outputs[0]


def _join_projections(graph: ir.Graph, node: ir.Node) -> None:
    """Compute q, k and v of one input in one product. Attention reads their columns at offsets."""
    linears = _projections(node)
    if len(linears) < len("qkv") or not _are_stored_alike(linears):
        return
    first = linears[0]
    widths = [_array(linear.inputs[_MASK]).shape[0] for linear in linears]
    inputs = _stacked_inputs(graph, linears)
    joined = ir.Node(DOMAIN, "SparseLinear", inputs, list(first.attributes.values()), num_outputs=1)
    shape = first.outputs[0].shape
    assert shape is not None
    joined.outputs[0].shape = ir.Shape([*shape.dims[:-1], sum(widths)])
    joined.outputs[0].dtype = ir.DataType.FLOAT
    joined.outputs[0].name = f"{first.outputs[0].name}_qkv"
    graph.insert_before(node, joined)
    offset = 0
    for index, (name, width) in enumerate(zip("qkv", widths, strict=True)):
        node.replace_input_with(index, joined.outputs[0])
        node.attributes[f"{name}_offset"] = ir.AttrInt64(f"{name}_offset", offset)
        offset += width


def _projections(node: ir.Node) -> list[ir.Node]:
    """Return the three products that compute q, k and v for an attention only; an empty list if they do not."""
    linears: list[ir.Node] = []
    for value in node.inputs[:3]:
        # layers that share keys and values need the separate products
        if value is None or _only_user(value) is not node:
            return []
        linear = value.producer()
        if linear is None or linear.op_type != "SparseLinear":
            return []
        # one product may be several of the three, which then have their offsets in it already
        if linear in linears:
            return []
        linears.append(linear)
    return linears


def _inputs_of(linear: ir.Node) -> tuple[ir.Value | None, ...]:
    """Return all inputs of a product: x, mask, values, scales and bias."""
    # torch's exporter omits trailing inputs that are None
    missing = _NUM_INPUTS - len(linear.inputs)
    return (*linear.inputs, *[None] * missing)


def _are_stored_alike(linears: Sequence[ir.Node]) -> bool:
    """Return whether products have one input, and parts that can be rows of one product."""
    facts = set()
    for linear in linears:
        x, _, values, scales, bias = _inputs_of(linear)
        groups = None if scales is None else _array(scales).shape[1]
        facts.add((x, linear.attributes["bits"].as_int(), _array(values).dtype, groups, bias is None))
    return len(facts) == 1


def _stacked_inputs(graph: ir.Graph, linears: Sequence[ir.Node]) -> list[ir.Value | None]:
    """Return the inputs of a product that has the rows of all ``linears``, one product's after the other's."""
    first = linears[0]
    inputs_of = [_inputs_of(linear) for linear in linears]
    stacked: list[ir.Value | None] = [first.inputs[0]]
    for index in range(_MASK, _NUM_INPUTS):
        # none of them has scales, or a bias
        if inputs_of[0][index] is None:
            stacked.append(None)
            continue
        parts = [_array(inputs[index]) for inputs in inputs_of]
        # equal constants may share a name, so each gets a new one
        name = f"{first.outputs[0].name}_qkv_{index}"
        stacked.append(_new_constant(graph, name, np.concatenate(parts)))
    return stacked


def _array(value: ir.Value | None) -> np.ndarray:
    """Return the numbers of a constant."""
    tensor = None if value is None else value.const_value
    assert tensor is not None
    return tensor.numpy()


def _new_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Add a constant to the graph. Names of a graph are unique."""
    tensor = ir.tensor(array, name=name)
    constant = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)  # type: ignore[arg-type]
    graph.register_initializer(constant)
    return constant


def _take_activation(node: ir.Node) -> None:
    """Apply the activation that follows a product when its result is written."""
    y = node.outputs[0]
    following = _activation_of(y) or _silu_of(y)
    if following is None:
        return
    activation, number = following
    node.attributes["activation"] = ir.AttrInt64("activation", number)
    ir.convenience.replace_all_uses_with(activation.outputs[0], y, replace_graph_outputs=True)


def _activation_of(y: ir.Value) -> tuple[ir.Node, int] | None:
    """Return the node of an activation that is the only reader of ``y``, and its number; None for another reader."""
    user = _only_user(y)
    if user is None or user.domain != "" or user.op_type not in ACTIVATIONS:
        return None
    approximate = user.attributes.get("approximate")
    if approximate is not None and approximate.as_string() == "tanh":
        return user, _GELU_TANH
    return user, ACTIVATIONS[user.op_type]


def _silu_of(y: ir.Value) -> tuple[ir.Node, int] | None:
    """Return the node whose result is SiLU of ``y``, and its number; None if ``y`` has other readers."""
    # SiLU is y * sigmoid(y), for which torch's exporter writes two nodes
    readers = {use.node for use in y.uses()}
    if y.is_graph_output() or len(readers) != 2:
        return None
    by_type = {reader.op_type: reader for reader in readers if reader.domain == ""}
    gate = by_type.get("Sigmoid")
    product = by_type.get("Mul")
    # y may be multiplied by something else
    if gate is None or product is None or gate.outputs[0] not in product.inputs:
        return None
    return product, _SILU


def _take_sum(graph: ir.Graph, node: ir.Node) -> None:
    """Normalise a sum of two tensors of one shape in one pass. The sum stays an output if other nodes use it."""
    axis = node.attributes.get("axis")
    if (axis is not None and axis.as_int() != -1) or node.inputs[1] is None:
        return
    added = _producer(node.inputs[0], "Add")
    # without a sum, the operator still replaces the norm: its second input is optional
    sides: list[ir.Value | None] = [node.inputs[0], None]
    if added is not None and _same_shape(added.inputs[0], added.inputs[1]):
        sides = list(added.inputs)
    epsilon = node.attributes.get("epsilon")
    # 1e-5 is ONNX's default
    attributes = [ir.AttrFloat32("epsilon", 1e-5 if epsilon is None else epsilon.as_float())]
    keeps_sum = added is not None and sides[1] is not None and _only_user(added.outputs[0]) is None
    inputs = [*sides, *node.inputs[1:]]
    fused = ir.Node(DOMAIN, "SkipLayerNorm", inputs, attributes, num_outputs=2 if keeps_sum else 1)
    for output, old in zip(fused.outputs, (node.outputs[0], node.inputs[0]), strict=False):
        assert old is not None
        output.shape = old.shape
        output.dtype = ir.DataType.FLOAT
        output.name = f"{old.name}_fused"
    graph.insert_before(node, fused)
    name = node.outputs[0].name
    ir.convenience.replace_all_uses_with(node.outputs[0], fused.outputs[0], replace_graph_outputs=True)
    # a graph's outputs keep their names, of which two values cannot have the same
    node.outputs[0].name = f"{name}_replaced"
    fused.outputs[0].name = name
    if keeps_sum:
        assert added is not None
        ir.convenience.replace_all_uses_with(added.outputs[0], fused.outputs[1])


def _same_shape(left: ir.Value | None, right: ir.Value | None) -> bool:
    """Return whether both values have one known shape and are computed: a constant bias is not a residual."""
    for side in (left, right):
        if side is None or side.shape is None or side.const_value is not None:
            return False
    assert left is not None
    assert right is not None
    return left.shape == right.shape


def _remove_unused(graph: ir.Graph) -> None:
    """Remove unused nodes and initializers."""
    # from the end, so that a node whose only user is removed is removed too
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
