"""The exceptions of moefx: each message is one sentence that says what, where, which two values disagree, what to do."""


class ExchangeError(RuntimeError):
    """Rows did not arrive: another rank stopped or made other calls. The process group cannot be used any more."""


class MoefxError(ValueError):
    """Bad input, found before anything was changed: the model is as it was."""


class CaptureError(MoefxError):
    """A module cannot be captured exactly; the message is the reason shown in the report, ``detail`` what PyTorch said."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.detail = detail


class PassError(MoefxError):
    """A pass broke the graph; the message names the pass and shows the node."""


class VerifyError(MoefxError):
    """The optimized model does not compute what the original computes, within the tolerance stated."""


class RankLostError(RuntimeError):
    """A collective failed because another rank does not live any more; the message says which and since when."""
