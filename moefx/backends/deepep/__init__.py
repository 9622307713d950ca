"""DeepEP (https://github.com/deepseek-ai/DeepEP): dispatch and combine over NVLink within a node and RDMA between nodes.

``Buffer`` serves one node (also without host synchronization, where a capacity is given) and several; DeepEP 2's
``ElasticBuffer`` is in :mod:`moefx.backends.experimental.deepep_elastic`. DeepEP's dispatch sends a token once to each rank,
its combine adds up one row of each rank in float32 and rounds to bfloat16: the same arithmetic as that of all-to-all. The
backward of dispatch is a combine, that of combine a dispatch with the same handle.
"""

from moefx.backends.deepep.backend import BACKEND, refuses_tensors
from moefx.backends.deepep.buffers import release
from moefx.backends.deepep.library import CUDA, INSTALL, available, version
from moefx.backends.deepep.topology import refuses_group
from moefx.backends.deepep.transport import TRANSPORT

__all__ = [
    "BACKEND",
    "CUDA",
    "INSTALL",
    "TRANSPORT",
    "available",
    "refuses_group",
    "refuses_tensors",
    "release",
    "version",
]
