"""A server or the scheduler of MXNet's kvstore, which exits with the process PID, its parent.

python -m core.engine_mxnet.server PID
"""

from __future__ import annotations

import sys

from core.run.parent_process import exit_with_parent
from operator_cxx.mxnet_ops import load_mxnet

if __name__ == "__main__":
    exit_with_parent(int(sys.argv[1]))
    load_mxnet()  # its import takes the role that DMLC_ROLE names, and serves until the kvstore stops it
