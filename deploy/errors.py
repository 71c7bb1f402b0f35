"""The exceptions of this package. Each class exists because somebody handles exactly that failure."""


class DeployError(Exception):
    """Base of all. The message names the object, what happened, and what to do next."""


class BundleRefused(DeployError):
    """A bundle, its parts, or an ONNX file that breaks the bundle contract, its seal or its signature."""


class ProbeMismatch(BundleRefused):
    """The loaded model does not return the probe logits that were sealed with it."""


class KeyRefused(DeployError):
    """A key file that is missing, unreadable, or not 32 bytes long."""


class PointerRefused(DeployError):
    """The pointer file is unreadable, was changed, or carries another key's signature."""


class NoPointer(DeployError):
    """The site has no pointer file yet: no model was ever put in service."""


class ProviderUnavailable(DeployError):
    """onnxruntime is not installed, or does not run on the configured provider. The bundle is not at fault."""


class NoAnswer(DeployError):
    """The model returned NaN or infinity for an image, or the run failed."""


class RunFailed(NoAnswer):
    """onnxruntime failed during a run. On a CPU the model is at fault; on a GPU it may be the machine."""


class BadBody(DeployError):
    """A request body that is no array of plates; `status` is the HTTP status of the answer (400 or 413)."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class ServerDown(DeployError):
    """The model server is stopped, unreachable, too slow, busy, or has no model. Retry later."""


class ServerRefused(DeployError):
    """The model server rejected the request; `status` is the HTTP status, `bundle` the bundle in service."""

    def __init__(self, status: int, error: str, bundle: str | None = None):
        super().__init__(error)
        self.status, self.error, self.bundle = status, error, bundle
