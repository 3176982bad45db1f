"""Command lines with a spoilt word end with status 2 and one line, whatever it is."""

import command_fuzzing
import pytest

from experiments.__main__ import COMMANDS

NUMBER = 300  # As many as results/reliability/fuzzing.md reports.


def faults(seed, number):
    return [fault for line in command_fuzzing.lines(seed, number)
            if (fault := command_fuzzing.fault_of(line)) is not None]


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_every_command_has_a_line():
    assert set(command_fuzzing.LINES) == set(COMMANDS)
    options = {command: command_fuzzing.options_of(command) for command in command_fuzzing.LINES}
    assert all(options[command] for command in set(options) - {"replay"})
    assert "--epochs" in options["train"] and "--out" in options["export"]


def test_some_spoilt_command_lines_are_one_line():
    assert faults(0, 20) == []


@pytest.mark.slow
def test_spoilt_command_lines_are_one_line():
    assert faults(1, NUMBER) == []
