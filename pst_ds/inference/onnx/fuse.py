"""Fuse the operators around sparse products and attention into fewer, larger nodes."""

import numpy as np
import onnx_ir as ir

DOMAIN = "pst_ds"
ACTIVATIONS = {"Relu": 1, "Gelu": 2, "Tanh": 5}
"""Numbers of activations in SparseLinear for nodes with one input; 3 is the Gelu of a tanh, 4 SiLU."""
_GELU_TANH = 3
_SILU = 4
_HEADS_FIRST = (0, 2, 1, 3)
"""Axes that turn (batch, tokens, heads, size) into (batch, heads, tokens, size), and back."""


def fuse(graph: ir.Graph) -> None:
    """Rewrite ``graph`` in place. Its results stay the same up to the rounding of sums."""
    for node in _nodes(graph, "Attention"):
        _take_rows(graph, node)
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
        node.replace_input_with(index, _rows_behind(value) or _as_rows(graph, node, value))
    y = node.outputs[0]
    joined = _only_user(y)
    if joined is not None and joined.op_type == "Reshape" and len(joined.outputs[0].shape or ()) == 3:
        y.shape = joined.outputs[0].shape
        ir.convenience.replace_all_uses_with(joined.outputs[0], y)
        return
    sizes = [0, 0, node.attributes["heads"].as_int(), node.attributes["head_size"].as_int()]
    split = ir.Node("", "Reshape", [y, _new_constant(graph, f"{y.name}_sizes", np.array(sizes, np.int64))])
    heads = split.outputs[0]
    heads.shape = y.shape
    heads.type = y.type
    heads.name = f"{y.name}_heads"
    ir.convenience.replace_all_uses_with(y, heads)
    split.replace_input_with(0, y)  # it was one of the uses
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
    for user in (use.node for use in value.uses()):
        if user.outputs[0].name == f"{value.name}_turned":
            return next(iter(user.outputs[0].uses())).node.outputs[0]
    turned = ir.Node("", "Transpose", [value], [ir.AttrInt64s("perm", _HEADS_FIRST)])
    sizes = _new_constant(graph, f"{value.name}_sizes", np.array([0, 0, -1], np.int64))
    joined = ir.Node("", "Reshape", [turned.outputs[0], sizes])
    for made, ending in ((turned, "turned"), (joined, "rows")):
        made.outputs[0].type = value.type
        made.outputs[0].name = f"{value.name}_{ending}"
        graph.insert_before(node, made)
    return joined.outputs[0]


def _join_projections(graph: ir.Graph, node: ir.Node) -> None:
    """Compute q, k and v of one input in one product. Attention reads their columns at offsets."""
    linears = []
    for value in node.inputs[:3]:
        made = None if value is None or _only_user(value) is not node else value.producer()
        if made is None or made.op_type != "SparseLinear":
            return
        linears.append(made)
    first = linears[0]
    if len({id(one) for one in linears}) < 3:
        return
    # torch's exporter omits trailing inputs that are None; all have x, mask, values, scales and bias here
    inputs_of = [(*one.inputs, None, None)[:5] for one in linears]
    facts = set()
    for one, (x, _, values, scales, bias) in zip(linears, inputs_of, strict=True):
        groups = None if scales is None else _array(scales).shape[1]
        facts.add((x, one.attributes["bits"].as_int(), _array(values).dtype, groups, bias is None))
    if len(facts) > 1:  # rows of one product are stored alike
        return
    inputs: list[ir.Value | None] = [first.inputs[0]]
    for index, parts in enumerate(list(zip(*inputs_of, strict=True))[1:], 1):
        if parts[0] is None:
            inputs.append(None)
            continue
        name = f"{first.outputs[0].name}_qkv_{index}"  # equal constants may share a name, so each gets a new one
        inputs.append(_new_constant(graph, name, np.concatenate([_array(part) for part in parts])))
    outputs = [_array(one.inputs[1]).shape[0] for one in linears]
    joined = ir.Node(DOMAIN, "SparseLinear", inputs, list(first.attributes.values()), num_outputs=1)
    shape = first.outputs[0].shape
    assert shape is not None
    joined.outputs[0].shape = ir.Shape([*shape.dims[:-1], sum(outputs)])
    joined.outputs[0].dtype = ir.DataType.FLOAT
    joined.outputs[0].name = f"{first.outputs[0].name}_qkv"
    graph.insert_before(node, joined)
    offset = 0
    for index, (name, width) in enumerate(zip("qkv", outputs, strict=True)):
        node.replace_input_with(index, joined.outputs[0])
        node.attributes[f"{name}_offset"] = ir.AttrInt64(f"{name}_offset", offset)
        offset += width


def _array(value: ir.Value | None) -> np.ndarray:
    tensor = None if value is None else value.const_value
    assert tensor is not None
    return tensor.numpy()


def _new_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    made = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)  # type: ignore[arg-type]
    graph.register_initializer(made)
    return made


def _take_activation(node: ir.Node) -> None:
    """Apply the activation that follows a product when its result is written."""
    y = node.outputs[0]
    number = 0
    after = _only_user(y)
    if after is not None and after.domain == "" and after.op_type in ACTIVATIONS:
        number = ACTIVATIONS[after.op_type]
        approximate = after.attributes.get("approximate")
        if approximate is not None and approximate.as_string() == "tanh":
            number = _GELU_TANH
    else:
        # SiLU is y * sigmoid(y), for which torch's exporter writes two nodes
        users = {use.node for use in y.uses()}
        gates = [user for user in users if user.op_type == "Sigmoid" and user.domain == ""]
        products = [user for user in users if user.op_type == "Mul" and user.domain == ""]
        is_pair = len(users) == 2 and len(gates) == len(products) == 1 and not y.is_graph_output()
        if is_pair and gates[0].outputs[0] in products[0].inputs:
            after, number = products[0], _SILU
    if not number or after is None:
        return
    node.attributes["activation"] = ir.AttrInt64("activation", number)
    ir.convenience.replace_all_uses_with(after.outputs[0], y, replace_graph_outputs=True)


def _take_sum(graph: ir.Graph, node: ir.Node) -> None:
    """Normalise a sum of two tensors of one shape in one pass. The sum stays an output if other nodes use it."""
    axis = node.attributes.get("axis")
    if (axis is not None and axis.as_int() != -1) or node.inputs[1] is None:
        return
    added = _producer(node.inputs[0], "Add")
    sides: list[ir.Value | None] = [node.inputs[0], None]
    if added is not None and _same_shape(added.inputs[0], added.inputs[1]):
        sides = list(added.inputs)
    epsilon = node.attributes.get("epsilon")
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


def _same_shape(one: ir.Value | None, other: ir.Value | None) -> bool:
    if one is None or other is None or one.shape is None or other.shape is None:
        return False
    return one.shape == other.shape and one.const_value is None and other.const_value is None


def _remove_unused(graph: ir.Graph) -> None:
    """Remove unused nodes and initializers."""
    # from the end, so that a node whose only user is removed is removed too
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
