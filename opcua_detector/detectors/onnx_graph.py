"""Opens ONNX files: finds them, checks their hash, and checks them against what they say of themselves.

Everything that can be wrong with a file is an error here, at start-up, so that the loop never meets it.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..errors import ModelFileError
from .onnx_format import PREDICTION, RESIDUAL, GraphContract, read_props

BUNDLED = "bundled:"
_BUNDLED_FOLDER = Path("detectors", "mlp", "models")


def read_graph(name: str, sha256: str = "") -> bytes:
    """Return the content of a file, or of one that ships with the product (`bundled:lorenz`).

    sha256 : what it must hash to; empty: not checked

    Raises
    ------
    ModelFileError
        The file is missing or altered.
    """
    if not name:
        raise ModelFileError("no graph is named", where="onnx: model", next_step="set `model` to an ONNX file")
    path = _bundled(name) if name.startswith(BUNDLED) else Path(name)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"the file cannot be read ({error.strerror or error})", where=name,
                             next_step="check `model`; paths count from the configuration file") from error
    check_hash(content, sha256, name)
    return content


def _bundled(name: str) -> Path:
    try:
        spec = find_spec("opcua_detector.plugins")
    except ModuleNotFoundError:
        spec = None
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    known: list[str] = []
    for folder in folders:
        models = Path(folder) / _BUNDLED_FOLDER
        path = models / f"{name.removeprefix(BUNDLED)}.onnx"
        known += sorted(BUNDLED + one.stem for one in models.glob("*.onnx"))
        if path.stem and path.parent == models and path.is_file():
            return path
    raise ModelFileError("no such graph ships with the product", where=name,
                         next_step=f"choose out of {', '.join(known)}" if known else "install opcua-detector again")


def check_hash(content: bytes, expected: str, where: str) -> None:
    """Raise ModelFileError where the content does not hash to `expected` (hexadecimal; empty: not checked)."""
    if expected and (found := hashlib.sha256(content).hexdigest()) != expected.lower():
        raise ModelFileError(f"the graph was altered: sha256 is {found}, expected {expected.lower()}", where=where,
                             next_step="get the file again from where it was made, or correct `sha256`")


def load(content: bytes, where: str) -> tuple[ort.InferenceSession, GraphContract]:
    """Open a graph on one thread and check it against what it says of itself.

    Raises
    ------
    ModelFileError
        Truncated, not ONNX, without metadata, or with other inputs and outputs than the metadata states.
    """
    ort.disable_telemetry_events()  # nothing leaves the plant network
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a type of its own for each way in which a file can be wrong
        raise ModelFileError(f"onnxruntime cannot open the graph: {error}", where=where,
                             next_step="the file is truncated or no ONNX graph; export or copy it again") from error
    contract = read_props(session.get_modelmeta().custom_metadata_map, where)
    _check_shapes(session, contract, where)
    _probe(session, contract, where)
    return session, contract


def _check_shapes(session: ort.InferenceSession, contract: GraphContract, where: str) -> None:
    inputs = {node.name: node for node in session.get_inputs()}
    outputs = {node.name: node for node in session.get_outputs()}
    n, n_out = len(contract.columns), len(contract.judged)

    def require(node: Any, what: str, *shapes: tuple[int, ...]) -> None:
        # A dimension may be open (a name or None); the probe shows what comes out of it.
        shape = list(node.shape)
        fits = any(len(shape) == 1 + len(s) and all(not isinstance(d, int) or d == want
                                                    for d, want in zip(shape, (1, *s), strict=True)) for s in shapes)
        if node.type != "tensor(float)" or not fits:
            wanted = " or ".join(f"float32[1 or batch, {', '.join(map(str, s))}]" for s in shapes)
            raise ModelFileError(f"{what} {node.name} is {node.type} {shape}; the metadata implies {wanted}",
                                 where=where, next_step="export the graph again in float32 with these shapes")

    rows = [name for name in inputs if name not in contract.states]
    missing = [name for name in contract.states if name not in inputs]
    missing += [name for name in (RESIDUAL, *contract.states.values()) if name not in outputs]
    if missing or len(rows) != 1:
        raise ModelFileError(
            f"the graph has inputs {list(inputs)} and outputs {list(outputs)}; it needs one input for rows, an output "
            f"{RESIDUAL} and the states {dict(contract.states)}", where=where,
            next_step="export the graph again with these names")
    if contract.kind == "window":
        if contract.states:
            raise ModelFileError("a window graph has no states", where=where, next_step="export it as a step graph")
        require(inputs[rows[0]], "input", (contract.window, n), (contract.window * n,))
    else:
        require(inputs[rows[0]], "input", (n,))
    for name in (RESIDUAL, PREDICTION):
        if name in outputs:
            require(outputs[name], "output", (n_out,))
    for source, target in contract.states.items():
        shape = inputs[source].shape
        if (inputs[source].type, shape) != (outputs[target].type, outputs[target].shape) \
                or inputs[source].type != "tensor(float)" or not all(isinstance(d, int) and d > 0 for d in shape):
            raise ModelFileError(
                f"state {source} {inputs[source].type} {shape} does not match {target} {outputs[target].type} "
                f"{outputs[target].shape}", where=where, next_step="export states of one fixed float32 shape")


def _probe(session: ort.InferenceSession, contract: GraphContract, where: str) -> None:
    """Run the graph once on zeros, so that what it cannot do is known before the first row."""
    feed = {}
    for node in session.get_inputs():
        shape = node.shape if node.name in contract.states else rows_shape(node, contract)
        feed[node.name] = np.zeros(shape, np.float32)
    names = [node.name for node in session.get_outputs() if node.name in (RESIDUAL, PREDICTION)]
    try:
        got = session.run(names, feed)
    except Exception as error:  # see `load`
        raise ModelFileError(f"the graph does not run on one window of zeros: {error}", where=where,
                             next_step="try the exported graph with onnxruntime where it was made") from error
    for name, array in zip(names, got, strict=True):
        if array.shape != (1, len(contract.judged)):
            raise ModelFileError(f"output {name} has shape {list(array.shape)} for one window; the metadata implies "
                                 f"[1, {len(contract.judged)}]", where=where, next_step="export the graph again")


def rows_shape(node: Any, contract: GraphContract) -> tuple[int, ...]:
    """Return the shape of one window, or of one row, as this input wants it."""
    n = len(contract.columns)
    if contract.kind == "step":
        return (1, n)
    return (1, contract.window * n) if len(node.shape) == 2 else (1, contract.window, n)
