"""The only module that imports onnxruntime: load a graph on a checked provider, check its contract, run it.

onnxruntime is imported when the first model is loaded, so that the rest works without it.
"""

import numpy as np

from cxrloop.plate import PLATE_SIDE
from deploy.errors import ProviderUnavailable, RunFailed

OUTPUTS = ("logits", "embedding", "heatmap")
BATCH = 16  # plates per run; bounds the memory of a request of any size
NAMES = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
GPU_HINT = "pip install 'cxrloop[gpu]' in place of onnxruntime, and check the driver with nvidia-smi"


def require(provider: str = "auto") -> None:
    """Raise ProviderUnavailable if this installation can't serve on `provider`. Needs no model."""
    available = _onnxruntime().get_available_providers()
    if provider not in ("auto", *NAMES):
        raise ProviderUnavailable(f'provider = "{provider}": unknown; use "auto", "cuda" or "cpu"')
    if provider == "cuda" and NAMES["cuda"] not in available:
        raise ProviderUnavailable(f'provider = "cuda": this onnxruntime has only {", ".join(available)}; {GPU_HINT}')


def load(model: bytes, provider: str = "auto", threads: int | None = None):
    """Return an onnxruntime InferenceSession that runs on `provider` ("auto": CUDA if it works, else the CPU).

    Raises ValueError for a graph that can't be loaded, ProviderUnavailable.
    """
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the learner shares these cores
    # a graph may name external weight files; those are not sealed, so point the search at no folder
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/nonexistent")
    if threads is not None:
        options.intra_op_num_threads = threads
    wanted: list = [NAMES["cpu"]]
    if provider != "cpu" and NAMES["cuda"] in ort.get_available_providers():
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # finds the CUDA and cuDNN wheels, not only torch's copies
        # TF32 off: the served scores must equal the scores that the gate judged
        wanted.insert(0, (NAMES["cuda"], {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}))
    try:
        session = ort.InferenceSession(model, options, providers=wanted)
    except _runtime_errors() as wrong:
        reason = str(wrong).splitlines()[0]
        if "CUDA" in reason or "CUDNN" in reason or "CUBLAS" in reason:
            raise ProviderUnavailable(f"the GPU can't take the model now ({reason}); see nvidia-smi") from None
        raise ValueError(reason) from None
    session.disable_fallback()  # a GPU error must raise, not fall back to the CPU
    if provider != "auto" and running(session) != provider:
        raise ProviderUnavailable(
            f'provider = "{provider}": onnxruntime runs on {running(session)} instead; {GPU_HINT}'
        )
    return session


def running(session) -> str:
    """Return the provider that a session runs on: "cuda" or "cpu"."""
    return "cuda" if session.get_providers()[0] == NAMES["cuda"] else "cpu"


def run(session, plates: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (logits [N, F], embedding [N, D], heatmap [N, F, g, g]) of plates uint8 [N, 512, 512]; RunFailed."""
    try:
        batches = [session.run(OUTPUTS, {"plates": plates[i : i + BATCH]}) for i in range(0, len(plates), BATCH)]
    except _runtime_errors() as wrong:
        raise RunFailed(f"onnxruntime failed: {str(wrong).splitlines()[0]}") from None
    logits, embedding, heatmap = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return logits, embedding, heatmap


def check_graph(session, findings: int) -> None:
    """Check a loaded graph against the bundle contract; ValueError names the input or output, got and expected."""
    inputs = {i.name: i for i in session.get_inputs()}
    outputs = {o.name: o for o in session.get_outputs()}
    if set(inputs) != {"plates"}:
        raise ValueError(f"has inputs {sorted(inputs)}, expected one, plates")
    for name in OUTPUTS:
        if name not in outputs:
            raise ValueError(f"has outputs {sorted(outputs)}, expected {', '.join(OUTPUTS)}")
    side = PLATE_SIDE
    _check("input plates", inputs["plates"], "tensor(uint8)", ("N", side, side))
    _check("output logits", outputs["logits"], "tensor(float)", ("N", findings))
    _check("output embedding", outputs["embedding"], "tensor(float)", ("N", "D"))
    _check("output heatmap", outputs["heatmap"], "tensor(float)", ("N", findings, "g", "g"))


def _check(what: str, value, kind: str, dims: tuple) -> None:
    """Check type and dimensions: "N" must be dynamic, an int must match, other letters (D, g) may be anything."""
    expected = f"{kind} {list(dims)}".replace("'", "")
    shape = value.shape or []
    wrong = value.type != kind or len(shape) != len(dims)
    for got, want in zip(shape, dims, strict=False):
        dynamic = not isinstance(got, int)
        wrong |= (want == "N" and not dynamic) or (isinstance(want, int) and not dynamic and got != want)
    if wrong:
        raise ValueError(f"{what} is {value.type} {shape}, expected {expected}")


def _onnxruntime():
    try:
        import onnxruntime
    except ImportError:
        raise ProviderUnavailable(
            "onnxruntime is not installed: pip install 'cxrloop[gpu]' (NVIDIA) or 'cxrloop[cpu]', never both"
        ) from None
    return onnxruntime


def _runtime_errors() -> tuple[type[Exception], ...]:
    """Return onnxruntime's exceptions, which share no base class of their own."""
    import onnxruntime.capi.onnxruntime_pybind11_state as e

    return (
        e.Fail,
        e.InvalidArgument,
        e.InvalidGraph,
        e.InvalidProtobuf,
        e.NotImplemented,
        e.RuntimeException,
        e.EPFail,
        e.NoSuchFile,
        e.NoModel,
        e.EngineError,
    )
