"""A server or the scheduler of MXNet's kvstore, which ends with the process PID.

python -m core.engine_mxnet.server PID
"""

from __future__ import annotations

import sys

from core.run.parent_process import end_with
from operator_cxx.mxnet_ops import load_mxnet

if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    load_mxnet()  # which becomes what DMLC_ROLE says, and serves until it is told to stop
