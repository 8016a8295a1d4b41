"""The memory that a process takes before any model is loaded."""

from utils.preflight import machine
from utils.preflight.machine import cpu_machine


def test_data_that_are_not_read_yet_add_their_libraries():
    read, not_read = (cpu_machine(1, None, data_is_read=is_read).base for is_read in (True, False))
    assert 0.9 * machine.DATA_LIBRARIES < not_read - read < 1.1 * machine.DATA_LIBRARIES
