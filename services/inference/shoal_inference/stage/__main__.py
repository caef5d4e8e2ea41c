"""`python -m shoal_inference.stage --control-fd N`: started by the inference service, not by people."""

import argparse
import asyncio
import os

from shoal_common.host.own_process import set_up_process
from shoal_inference.stage.main_loop import run

parser = argparse.ArgumentParser(prog="shoal_inference.stage", description=__doc__)
parser.add_argument("--control-fd", type=int, required=True, help="inherited end of the parent's socketpair")
set_up_process()
# _exit: a forward pass in the MLX thread would be waited for, and MLX aborts when its streams are torn down there.
os._exit(asyncio.run(run(parser.parse_args().control_fd)))
