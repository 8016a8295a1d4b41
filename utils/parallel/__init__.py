"""Several processes: the process group, DeepSpeed, optimiser steps, memory, and a watchdog for stalled runs."""
