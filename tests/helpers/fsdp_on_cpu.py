"""Run a script with accelerate's FSDP on CPU processes: fsdp_on_cpu.py SCRIPT ARGUMENTS.

torch shards on CPUs too (gloo), but accelerate uses FSDP on GPUs only: on CPUs it falls back to
DDP. Here it takes CPU processes for such of GPUs. At the end the number of sharded modules is
printed, so that a test sees that there are some."""

import gc
import runpy
import sys
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

original = PartialState.__init__


def as_on_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def count() -> None:
    print("sharded modules:", sum(isinstance(each, FSDPModule) for each in gc.get_objects()))


PartialState.__init__ = as_on_gpus  # type: ignore[method-assign]
del sys.argv[0]
sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    count()
