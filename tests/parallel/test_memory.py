"""What a machine and the control groups of a process leave to new allocations."""

import pytest

from utils.parallel import memory
from utils.parallel.memory import available_memory, control_groups, free_memory, room_in
from utils.preflight import machine


def make_group(folder, limit: str, used: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text("anon 700\nfile 350\ninactive_file 200\nactive_file 100\nshmem 50\n")


def test_cached_files_do_not_count_as_used(tmp_path):
    make_group(tmp_path / "job", "2000", 1050)
    assert room_in(tmp_path / "job") == 2000 - 1050 + 300
    make_group(tmp_path / "job", "max", 1050)
    assert room_in(tmp_path / "job") == room_in(tmp_path / "none") == float("inf")


def test_the_tightest_group_decides(tmp_path, monkeypatch):
    make_group(tmp_path, "1500", 1050)
    make_group(tmp_path / "job", "2000", 1050)
    monkeypatch.setattr(memory, "control_groups", lambda: [tmp_path / "job", tmp_path])
    assert available_memory() == 1500 - 1050 + 300


def test_own_groups_lie_within_each_other():
    groups = control_groups()
    assert all(outer in inner.parents for inner, outer in zip(groups, groups[1:]))
    assert not groups or groups[-1] == memory.CONTROL_GROUPS
    assert available_memory() > 0


@pytest.mark.parametrize("processes", [1, 4])
def test_generation_and_the_preflight_are_held_to_the_limit_of_the_control_group(tmp_path, monkeypatch, processes):
    """On a CPU: a container's limit, not what its host has free, and shared by the processes of the machine."""
    room = 2000 - 1050 + 300
    make_group(tmp_path / "job", "2000", 1050)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    whole_host = free_memory()
    monkeypatch.setattr(memory, "control_groups", lambda: [tmp_path / "job"])
    assert free_memory() == room / processes < whole_host
    assert machine.available_memory is available_memory
    monkeypatch.setattr(machine, "resident_memory", lambda: 0.0)  # what this process has taken already
    assert machine.this_machine().memory == room / processes
