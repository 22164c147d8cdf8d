"""A shadow GPU: tensors that say they are on `cuda` and hold CPU data, with real numbers and a strict watch.

A program's CUDA branch runs on a machine without a GPU, and is checked for what a GPU would punish: mixed
devices, host synchronisations, bytes over the bus, memory, streams that do not wait for each other, staging
buffers used too early. `Shadow` is the entry; its docstring says what it sees and what it does not.
"""

from shadow.gpu import Shadow
from shadow.log import Launch
from shadow.streams import RaceError

__all__ = ["Launch", "RaceError", "Shadow"]
