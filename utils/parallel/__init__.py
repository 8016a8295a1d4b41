"""Several processes: the group, DeepSpeed, optimiser steps, memory, and what happens when one stands still."""
