"""The choice of tests that `make test-fast` leaves out."""

from __future__ import annotations

from slow_tests import LIST, choose, function_of


def test_the_quickest_stay_up_to_the_limit() -> None:
    assert choose({"a": 3.0, "b": 0.5, "c": 1.0, "d": 9.0}, 4.6) == ["d"]
    assert choose({"a": 3.0, "b": 0.5, "c": 1.0, "d": 9.0}, 4.4) == ["a", "d"]
    assert choose({}, 1.0) == []


def test_parameters_are_one_function() -> None:
    assert function_of("tests/a.py::test_b[x[1]-y]") == "tests/a.py::test_b"


def test_the_list_names_files_that_are_there() -> None:
    names = LIST.read_text().split()
    assert names
    for name in names:
        file, _, function = name.partition("::")
        assert f"def {function.rpartition('::')[2]}(" in (LIST.parents[1] / file).read_text()
