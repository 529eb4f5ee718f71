"""ONNX Runtime's MatMulNBits: accuracy 0 computes in float32, accuracy 4 with int8 activations."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contender import Contender, NotHere, copies_needed

GROUP = 64


def _contender(w: Tensor, nbits: int, accuracy: int) -> Contender:
    try:
        import numpy as np
        import onnx
        import onnxruntime
    except ImportError as error:
        raise NotHere(str(error)) from None
    N, K = w.shape
    half = 2 ** (nbits - 1)
    groups = w.view(N, K // GROUP, GROUP)
    scale = groups.abs().amax(-1, keepdim=True) / (half - 1)
    codes = (groups / scale).round_().clamp_(-half, half - 1).add_(half).to(torch.uint8)
    packed = codes if nbits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)
    # Without a zero point in the graph it is 2**(nbits - 1).
    stored = [
        onnx.numpy_helper.from_array(packed.contiguous().numpy(), "B"),
        onnx.numpy_helper.from_array(scale.reshape(-1).numpy(), "S"),
    ]
    node = onnx.helper.make_node(
        "MatMulNBits", ["A", "B", "S"], ["Y"], domain="com.microsoft", K=K, N=N, bits=nbits, block_size=GROUP,
        accuracy_level=accuracy,
    )  # fmt: skip
    f32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node], "g", [onnx.helper.make_tensor_value_info("A", f32, ["M", K])],
        [onnx.helper.make_tensor_value_info("Y", f32, ["M", N])], stored,
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    nbytes = packed.nbytes + scale.nbytes
    sessions = [
        onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"]) for _ in range(copies_needed(nbytes))
    ]

    def bind(x: Tensor) -> Callable[[], Tensor]:
        out = np.empty((x.shape[0], N), np.float32)
        y = torch.from_numpy(out)
        source = onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy())
        bindings = []
        for session in sessions:
            binding = session.io_binding()
            binding.bind_ortvalue_input("A", source)
            binding.bind_output("Y", "cpu", 0, np.float32, out.shape, out.ctypes.data)
            bindings.append((session, binding))
        turns = itertools.cycle(bindings)

        def run() -> Tensor:
            session, binding = next(turns)
            session.run_with_iobinding(binding)
            return y

        return run

    def as_dense() -> Tensor:
        return ((codes.float() - half) * scale).view(N, K)

    precision = "float32" if accuracy == 0 else "int8"
    name = f"ONNX Runtime {nbits}-bit {'fp32' if accuracy == 0 else 'int8'}"
    return Contender(name, "peer", nbits, precision, nbytes, bind, as_dense)


def contenders(w: Tensor) -> list[Contender]:
    return [_contender(w, 4, 0), _contender(w, 4, 4), _contender(w, 8, 4)]
