"""Public functions with one argument spoilt: an InputError of one line, or a result."""

import os

import fuzzing
import hypothesis
import pytest

CASES = int(os.environ.get("JAXROBUST_FUZZ_CASES", "0"))
"""Drawn calls of each function; 500 of them for results/reliability/fuzzing.md."""


def test_every_public_function_is_fuzzed():
    assert fuzzing.public_functions() - set(fuzzing.CASES) == set(fuzzing.UNTESTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzzing.CASES)
def test_the_arguments_to_be_spoilt_are_good(name):
    one = fuzzing.CASES[name]
    one.function(**one.arguments)


@pytest.mark.parametrize("name", fuzzing.CASES)
def test_a_spoilt_argument_is_refused_in_one_line(name):
    one = fuzzing.CASES[name]
    refused = [(argument, spoilt) for argument, spoilt in fuzzing.every_spoilt_call(name)
               if spoilt.must is fuzzing.Must.BE_REFUSED]
    assert refused and set(one.arguments) >= {argument for argument, _ in refused}
    assert [fault for argument, spoilt in refused
            if (fault := fuzzing.fault_of(name, argument, spoilt)) is not None] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzzing.CASES)
def test_no_drawn_call_raises_anything_else(name):
    @hypothesis.settings(max_examples=CASES or 20)
    @hypothesis.given(fuzzing.spoilt_calls(name))
    def check(call):
        assert fuzzing.fault_of(name, *call) is None

    check()
