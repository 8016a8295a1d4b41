"""Preflight: memory, tokens and optimiser steps of a run, predicted from its flags before any weights are read."""

from utils.preflight.dry_runs import dry_run, print_report
from utils.preflight.estimate import estimate
from utils.preflight.phases import Estimate, Machine
from utils.preflight.roles import Subject

__all__ = ["Estimate", "Machine", "Subject", "dry_run", "estimate", "print_report"]
