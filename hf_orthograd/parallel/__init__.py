"""One result on any number of processes: who takes part, whose samples stand where, how parameters are stored."""

from .parameters import Parameters
from .process_group import ALONE, ProcessGroup, SampleLayout


__all__ = ["ALONE", "Parameters", "ProcessGroup", "SampleLayout"]
