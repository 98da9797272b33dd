"""Tests the counts of ``tools.control_flow`` with listings that are written by hand."""

from __future__ import annotations

import pytest

from tools.control_flow import Graph, Through


def listing(text):
    """Formats a listing as nvdisasm does: labels, and an address before each instruction."""
    lines = []
    for number, line in enumerate(text.split("\n")):
        line = line.strip()
        if line:
            is_label = line.endswith(":")
            lines.append(f"        {line}" if is_label else f" /*{number:04x}*/   {line} ;")
    return Graph("\n".join(lines))


# Two loops. The inner one jumps to a rare branch behind the exit, and the outer one may skip the
# inner one.
NESTED = """
    MOV R1, c[0x0]
    .L_x_0:
    LDG.E R2, [R2]
    @P0 BRA `(.L_x_2)
    .L_x_1:
    MUFU.RCP R3, R2
    @!P1 BRA `(.L_x_3)
    .L_x_4:
    FADD R4, R4, R3
    @P2 BRA `(.L_x_1)
    .L_x_2:
    STG.E [R2], R4
    BRA.U UP0, `(.L_x_0)
    EXIT
    .L_x_3:
    MUFU.EX2 R3, R3
    FMUL R3, R3, R3
    BRA `(.L_x_4)
"""


def test_trips_of_nested_loops():
    graph = listing(NESTED)
    hot = Through({"MUFU": 1}, (10, 3))
    assert graph.loop(hot) == {"MUFU.RCP": 1, "BRA": 2, "FADD": 1}
    counted = graph.executed((hot,))
    assert counted == {
        "MOV": 1, "LDG.E": 3, "MUFU.RCP": 30, "FADD": 30, "STG.E": 3, "BRA": 3 + 60, "BRA.U": 3,
        "EXIT": 1,
    }  # fmt: skip


def test_what_must_be_passed():
    """A second ``Through`` applies to every iteration of the loop that contains it."""
    graph = listing(NESTED)
    hot = Through({"MUFU": 1}, (10, 3))
    rare = graph.executed((hot, Through({"MUFU.EX2": 1})))
    assert rare["FMUL"] == rare["MUFU.EX2"] == rare["FADD"] == 30


def test_what_a_share_of_the_iterations_passes():
    graph = listing(NESTED)
    hot = Through({"MUFU": 1}, (10, 3))
    rare = graph.executed((hot, Through({"MUFU.EX2": 1}, share=1 / 5)))
    # The last iteration takes another branch than was counted for it.
    assert rare["MUFU.RCP"] == rare["FADD"] == 30
    assert 6 <= rare["FMUL"] == rare["MUFU.EX2"] <= 9


def test_a_loop_of_which_nothing_is_said():
    graph = listing(NESTED)
    with pytest.raises(AssertionError, match="how often"):
        graph.executed(())
    for holds in ({"HMMA": 1}, {"MUFU": 2}, {"MUFU": 1, "FADD": 0}):
        with pytest.raises(AssertionError, match="no loop"):
            graph.executed((Through(holds, (10, 3)),))
    with pytest.raises(AssertionError, match="no loop, 1 with"):
        graph.executed((Through({"MUFU": 1}, (10,)),))


def test_a_loop_with_its_condition_at_its_head():
    graph = listing("""
        .L_x_0:
        ISETP.GE P0
        @P0 BRA `(.L_x_1)
        MUFU.RCP R1, R1
        BRA `(.L_x_0)
        .L_x_1:
        EXIT
    """)
    counted = graph.executed((Through({"MUFU": 1}, (7,)),))
    assert counted == {"ISETP.GE": 8, "MUFU.RCP": 7, "BRA": 15, "EXIT": 1}


def test_loops_that_wait_are_passed_once():
    graph = listing("""
        MOV R1, R2
        .L_x_0:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R1
        @!P0 BRA `(.L_x_0)
        EXIT
    """)
    assert graph.executed(()).total() == 4


def test_an_exit_on_a_condition():
    graph = listing("""
    MOV R1, R2
    .L_x_0:
    FADD R1, R1, R2
    @P0 EXIT
    BRA `(.L_x_0)
    """)
    counted = graph.executed((Through({"FADD": 1}, (3,)),))
    assert counted == {"MOV": 1, "FADD": 3, "EXIT": 3, "BRA": 2}
