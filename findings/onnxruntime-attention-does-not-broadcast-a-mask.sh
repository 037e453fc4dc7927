#!/usr/bin/env bash
# onnxruntime's Attention (ONNX opset 23): a mask of one query row for all is refused, although the operator has it.
#
# Where: onnxruntime 1.32.0 (CPU), onnx 1.23.2, numpy 2.2.6, CPython 3.11, any machine.
#
# What one would guess: the operator's text asks for a mask whose shape can be broadcast to (batch, heads, queries, keys).
# So a bias that belongs to the keys alone, (batch, heads, 1, keys), is one, onnx's full check of the model passes, and
# the evaluator that comes with onnx computes it.
#
# What happens: the session is made, and the first run raises. Without queries x keys numbers of mask it takes one column
# more in Q, ones, and in K, the bias over the scale.
#
# Output seen:
#   evaluator of onnx, mask of 1 row: 0.0 from the formula
#   onnxruntime, mask of 3 rows: 0.0 from the formula
#   onnxruntime, mask of 1 row: Fail, inconsistent q_sequence_length (between attn_mask and Q)
#
# Exits 0 where that is so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy==2.2.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

rng = np.random.default_rng(0)
q, k, v, bias = (rng.standard_normal(s, dtype=np.float32) for s in ((1, 1, 3, 4), (1, 1, 5, 4), (1, 1, 5, 4), (1, 1, 1, 5)))
scores = q @ k.swapaxes(2, 3) / 2 + bias
weights = np.exp(scores - scores.max(-1, keepdims=True))
want = weights / weights.sum(-1, keepdims=True) @ v


def model(rows):
    shapes = {"q": q.shape, "k": k.shape, "v": v.shape, "mask": (1, 1, rows, 5)}
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, (1, 1, 3, 4))
    graph = helper.make_graph([helper.make_node("Attention", list(shapes), ["out"])], "g", given, [out])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


def run(rows):
    session = onnxruntime.InferenceSession(model(rows).SerializeToString(), providers=["CPUExecutionProvider"])
    mask = np.ascontiguousarray(np.broadcast_to(bias, (1, 1, rows, 5)))
    return session.run(None, {"q": q, "k": k, "v": v, "mask": mask})[0]


(evaluated,) = ReferenceEvaluator(model(1)).run(None, {"q": q, "k": k, "v": v, "mask": bias})
print(f"evaluator of onnx, mask of 1 row: {abs(evaluated - want).max():.1f} from the formula")
assert np.allclose(evaluated, want, atol=1e-5)
whole = run(3)
print(f"onnxruntime, mask of 3 rows: {abs(whole - want).max():.1f} from the formula")
assert np.allclose(whole, want, atol=1e-5)
try:
    run(1)
except Exception as error:
    assert "inconsistent q_sequence_length" in str(error), error
    print(f"onnxruntime, mask of 1 row: {type(error).__name__}, {str(error)[str(error).index('inconsistent'):]}")
else:
    raise SystemExit("onnxruntime broadcasts the mask now")
PYTHON
