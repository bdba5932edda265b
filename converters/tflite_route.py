"""JAX -> TFLite -> ONNX.

jax2tf of JAX 0.10 emits one `XlaCallModule`, which tf2onnx cannot read. TFLite's converter reads it, and tf2onnx reads
TFLite. The weights are arguments of the trace, so that neither converter ever holds them: a graph of any size is a
few hundred kilobytes on its way, and its weights are attached by name at the end.
"""

import contextlib
import functools
import logging
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from converters.graphs import Graph
from converters.packages import need
from nd_jax.errors import UserError, first_line
from nd_jax.weights.table import flatten

if TYPE_CHECKING:
    import onnx
    import onnx_ir

# The newest operator set that tf2onnx writes; the rewriting pass goes on from there.
TF2ONNX_OPSET = 18


def argument_names(graph: Graph) -> list[str]:
    """Names of the traced function's arguments: weight paths, then inputs."""
    return [*flatten(graph.params), *(spec.name for spec in graph.inputs)]


def to_tflite(graph: Graph) -> bytes:
    """Traces the graph in float32 and converts it. Argument i is called `in<i>`.

    Raises:
      UserError: an operator that TFLite does not have.
    """
    need("tensorflow")
    import tensorflow as tf
    from jax.experimental import jax2tf

    weights = flatten(graph.params)
    tree = jax.tree.structure(graph.params)
    # jax.tree orders dictionary keys; the paths carry the correspondence.
    order = [_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(graph.params)[0]]

    def traced(*args):
        by_path = dict(zip(weights, args, strict=False))
        params = jax.tree.unflatten(tree, [by_path[path] for path in order])
        return graph.apply(params, *args[len(weights) :])

    traced.__name__ = graph.name
    shapes = [(np.shape(leaf), np.asarray(leaf).dtype) for leaf in weights.values()]
    shapes += [(spec.shape, np.dtype(spec.dtype)) for spec in graph.inputs]
    signature = [tf.TensorSpec(shape, tf.as_dtype(dtype), name=f"in{i}") for i, (shape, dtype) in enumerate(shapes)]
    converted = jax2tf.convert(traced, with_gradient=False, native_serialization_platforms=("cpu",))
    function = tf.function(converted, autograph=False, input_signature=signature)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()], function)
    try:
        with _no_inlining():
            return converter.convert()
    except Exception as error:  # TFLite raises its own ConverterError and bare Exceptions alike
        raise UserError(f"graph {graph.name}: TFLite cannot convert it: {first_line(error)}") from error


def _path(keys: tuple) -> str:
    return "/".join(str(key.key) for key in keys)


def to_onnx(tflite: Path) -> "onnx.ModelProto":
    """tf2onnx on a TFLite file; weights are still inputs.

    Raises:
      UserError: an operator that tf2onnx does not have.
    """
    need("onnx", "tf2onnx")
    import tf2onnx

    _register_gelu()
    _register_clip()
    with _quiet("tf2onnx"), _no_delegate(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TFLite's Python interpreter is deprecated; tf2onnx reads files with it
        try:
            model, _ = tf2onnx.convert.from_tflite(str(tflite), opset=TF2ONNX_OPSET)
        except ValueError as error:
            raise UserError(f"{tflite.name}: tf2onnx cannot convert it: {first_line(error)}") from error
    return model


@contextlib.contextmanager
def _quiet(logger: str):
    level = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(level)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _no_inlining():
    """TFLite's converter without TensorFlow's inlining, for which Grappler fills zeros into arrays of all weights.

    There is one operator and nothing to inline: the file has the same bytes.
    """
    from tensorflow.python.framework import convert_to_constants

    graph_of = lambda function, *options: function.graph.as_graph_def()
    return _replaced(convert_to_constants, "_run_inline_graph_optimization", graph_of)


def _no_delegate():
    """TFLite's interpreter, of which tf2onnx reads the shapes and which runs nothing, without its default delegate.

    XNNPACK allocates a workspace for the activations: some 6 GB of an image decoder of 640 x 1024 pixels.
    """
    import tensorflow as tf

    plain = tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = functools.partial(tf.lite.Interpreter, experimental_op_resolver_type=plain)
    return _replaced(tf.lite, "Interpreter", interpreter)


@functools.cache
def _register_gelu() -> None:
    """tf2onnx has no handler for TFL_GELU, which TFLite makes out of the tanh form.

    Writes 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))): opset 18 has no Gelu, and the rewriting pass finds this.
    """
    from tf2onnx import utils
    from tf2onnx.handler import tfl_op

    @tfl_op(["TFL_GELU"])
    class TflGelu:
        @classmethod
        def version_7(cls, ctx, node, **kwargs):
            if not node.get_attr_value("approximate", True):
                raise ValueError(f"{node.name}: TFL_GELU in its erf form is not supported")
            x, output, name = node.input[0], node.output[0], node.name
            shapes, dtypes = [ctx.get_shape(output)], [ctx.get_dtype(output)]
            ctx.remove_node(name)

            def op(kind, *inputs, **named):
                return ctx.make_node(kind, list(inputs), **named).output[0]

            def scalar(value):
                return ctx.make_const(utils.make_name("gelu"), np.array(value, np.float32)).output[0]

            cubic = op("Mul", op("Mul", op("Mul", x, x), x), scalar(0.044715))
            tanh = op("Tanh", op("Mul", op("Add", x, cubic), scalar(np.sqrt(2 / np.pi))))
            half = op("Mul", x, scalar(0.5))
            op("Mul", half, op("Add", tanh, scalar(1.0)), outputs=[output], name=name, shapes=shapes, dtypes=dtypes)


@functools.cache
def _register_clip() -> None:
    """tf2onnx has no handler for TFL_RELU_0_TO_1, which TFLite makes out of a clip to [0, 1]."""
    from tf2onnx import utils
    from tf2onnx.handler import tfl_op

    @tfl_op(["TFL_RELU_0_TO_1"])
    class TflRelu0To1:
        @classmethod
        def version_11(cls, ctx, node, **kwargs):
            x, output, name = node.input[0], node.output[0], node.name
            shapes, dtypes = [ctx.get_shape(output)], [ctx.get_dtype(output)]
            ctx.remove_node(name)
            ends = [ctx.make_const(utils.make_name("clip"), np.array(end, np.float32)).output[0] for end in (0, 1)]
            ctx.make_node("Clip", [x, *ends], outputs=[output], name=name, shapes=shapes, dtypes=dtypes)


def attach_weights(model: "onnx.ModelProto", graph: Graph) -> "onnx_ir.Model":
    """Names the inputs and outputs as the graph does and turns the weight inputs into initializers.

    The arrays are referenced, not copied.

    Raises:
      UserError: the converters dropped an argument, or made another number of outputs.
    """
    need("onnx_ir")
    import onnx_ir as ir

    ir_model = ir.from_proto(model)
    names, weights = argument_names(graph), flatten(graph.params)
    inputs = {_argument_index(value.name): value for value in ir_model.graph.inputs}
    lost = [names[i] for i in range(len(names)) if i not in inputs]
    if lost:
        raise UserError(f"graph {graph.name}: the traced function does not use {', '.join(lost)}")
    if len(ir_model.graph.outputs) != len(graph.outputs):
        raise UserError(
            f"graph {graph.name} declares {len(graph.outputs)} outputs and gives {len(ir_model.graph.outputs)}"
        )
    ir_model.graph.inputs.clear()
    for i, name in enumerate(names):
        inputs[i].name = name
        if name in weights:
            inputs[i].const_value = ir.tensor(np.ascontiguousarray(weights[name]), name=name)
            ir_model.graph.register_initializer(inputs[i])
        else:
            ir_model.graph.inputs.append(inputs[i])
    for spec, value in zip(graph.outputs, ir_model.graph.outputs, strict=True):
        value.name = spec.name
    return ir_model


def _argument_index(name: str) -> int:
    """`in12`, or a longer name that ends in `_in12:0`, -> 12."""
    return int(re.search(r"in(\d+)(:\d+)?$", name).group(1))


def trace(graph: Graph, tflite: Path) -> Any:
    """The whole route: writes the TFLite file and returns the ONNX model (`onnx_ir.Model`, opset 18) with weights."""
    tflite.write_bytes(to_tflite(graph))
    return attach_weights(to_onnx(tflite), graph)
