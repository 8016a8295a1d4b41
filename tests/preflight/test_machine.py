"""What a machine and the control groups of a process leave to new allocations."""

from utils.preflight import machine
from utils.preflight.machine import available_memory, control_groups, cpu_machine, room_in


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
    monkeypatch.setattr(machine, "control_groups", lambda: [tmp_path / "job", tmp_path])
    assert available_memory() == 1500 - 1050 + 300


def test_own_groups_lie_within_each_other():
    groups = control_groups()
    assert all(outer in inner.parents for inner, outer in zip(groups, groups[1:]))
    assert not groups or groups[-1] == machine.CONTROL_GROUPS
    assert available_memory() > 0


def test_data_that_are_not_read_yet_add_their_libraries():
    read, not_read = (cpu_machine(1, None, data_is_read=is_read).base for is_read in (True, False))
    assert 0.9 * machine.DATA_LIBRARIES < not_read - read < 1.1 * machine.DATA_LIBRARIES
