"""onnxruntime, and no other file knows it: load a graph on an asserted provider, check it, run it.

Imported only when a model is loaded, so that everything else works without it. Refuses to know bundles and signatures.
"""

import numpy as np

from deploy.bundle.contract import PLATE_SIDE

OUTPUTS = ("logits", "embedding", "heatmap")
BATCH = 16  # plates a run: bounds the memory of one request whatever its size
NAMES = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
GPU_HINT = "pip install 'cxrloop[gpu]' in place of onnxruntime, and check the driver with nvidia-smi"


class NoRuntime(RuntimeError):
    """onnxruntime is not installed; names the extra."""


class ProviderRefused(RuntimeError):
    """The provider asked for is not the one that would run; names what to install."""


class NoAnswer(RuntimeError):
    """The model gave NaN or infinity for an image; says for which."""


class RunFailed(NoAnswer):
    """onnxruntime failed while running: the model's fault on a CPU, as likely the machine's on a GPU."""


def require(provider: str = "auto") -> None:
    """NoRuntime or ProviderRefused where this installation can't serve on `provider`, before any model is there."""
    available = _onnxruntime().get_available_providers()
    if provider not in ("auto", *NAMES):
        raise ProviderRefused(f'provider = "{provider}": not one; use "auto", "cuda" or "cpu"')
    if provider == "cuda" and NAMES["cuda"] not in available:
        raise ProviderRefused(f'provider = "cuda": this onnxruntime has only {", ".join(available)}; {GPU_HINT}')


def load(model: bytes, provider: str = "auto", threads: int | None = None):
    """An onnxruntime InferenceSession on the provider really asked for; ValueError when the graph can't be loaded."""
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the learner shares these cores
    # a graph may name files that hold its weights: nobody sealed those, so look for them where nothing is
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/nonexistent")
    if threads is not None:
        options.intra_op_num_threads = threads
    wanted: list = [NAMES["cpu"]]
    if provider != "cpu" and NAMES["cuda"] in ort.get_available_providers():
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # finds the CUDA and cuDNN wheels; without it only torch's copies would be found
        # TF32 off: the scores the gate judged are the scores that serve
        wanted.insert(0, (NAMES["cuda"], {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}))
    try:
        session = ort.InferenceSession(model, options, providers=wanted)
    except _runtime_errors() as wrong:
        reason = str(wrong).splitlines()[0]
        if "CUDA" in reason or "CUDNN" in reason or "CUBLAS" in reason:
            raise ProviderRefused(f"the GPU can't take the model now ({reason}); see nvidia-smi") from None
        raise ValueError(reason) from None
    session.disable_fallback()  # a GPU error must be an error, not a quiet move to the CPU
    if provider != "auto" and running(session) != provider:
        raise ProviderRefused(f'provider = "{provider}": onnxruntime runs on {running(session)} instead; {GPU_HINT}')
    return session


def running(session) -> str:
    """What a session really runs on: "cuda" or "cpu"."""
    return "cuda" if session.get_providers()[0] == NAMES["cuda"] else "cpu"


def run(session, plates: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logits [N, F], embedding [N, D], heatmap [N, F, g, g]) of plates uint8 [N, 512, 512]; NoAnswer."""
    try:
        batches = [session.run(OUTPUTS, {"plates": plates[i : i + BATCH]}) for i in range(0, len(plates), BATCH)]
    except _runtime_errors() as wrong:
        raise RunFailed(f"onnxruntime failed: {str(wrong).splitlines()[0]}") from None
    logits, embedding, heatmap = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return logits, embedding, heatmap


def check_graph(session, findings: int) -> None:
    """The bundle contract on a loaded graph; ValueError saying which input or output, got and expected."""
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
    """Type and dims; "N" must be dynamic, an int must match, other letters (D, g) may be any."""
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
        raise NoRuntime(
            "onnxruntime is not installed: pip install 'cxrloop[gpu]' (NVIDIA) or 'cxrloop[cpu]', never both"
        ) from None
    return onnxruntime


def _runtime_errors() -> tuple[type[Exception], ...]:
    """onnxruntime's exceptions, which share no base of their own."""
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
