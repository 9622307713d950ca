"""The exceptions of moefx. A message is one sentence: what is wrong, where, the two values that disagree, what to do."""

from __future__ import annotations

from typing import Any


class ExchangeError(RuntimeError):
    """Dispatch or combine failed: another rank stopped or made other calls. The process group is unusable afterwards."""


class MoefxError(ValueError):
    """Invalid input, found before anything was changed."""


class CaptureError(MoefxError):
    """A module cannot be captured exactly. The message is the reason in the report, ``detail`` PyTorch's own message."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.detail = detail
        self.reads: Any = None  #: reads.Reads: what the capture had read until then

    def having_read(self, reads: Any) -> CaptureError:
        """This error with ``reads``."""
        self.reads = reads
        return self

    def again(self) -> CaptureError:
        """An equal error without this one's frames, which hold the tensors of a step."""
        made = CaptureError(str(self), self.detail)
        made.reads = self.reads
        return made


class PassError(MoefxError):
    """A pass broke the graph. The message names the pass and the node."""


class VerifyError(MoefxError):
    """The optimized model differs from the original by more than the tolerance."""


class RankLostError(RuntimeError):
    """A collective failed because another rank is no longer alive. The message says which, and since when."""
