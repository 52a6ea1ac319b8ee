import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher import quoting
from launcher.errors import SpecError

TEXT = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=30)


@given(st.lists(TEXT, min_size=1, max_size=4))
def test_an_array_reaches_bash_exactly_as_it_was(values):
    script = quoting.array("A", values) + '\nprintf "%s\\0" "${A[@]}"\n'
    output = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
    assert output.decode().split("\0")[:-1] == values


@given(TEXT)
def test_an_exported_value_reaches_a_child_exactly_as_it_was(value):
    script = (
        quoting.export("X", value)
        + "\nexec python3 -c \"import os; print(ascii(os.environ['X']))\""
    )
    output = subprocess.run(
        ["bash", "-c", 'printf "%s" "$1"', "x", value], capture_output=True, check=True
    ).stdout
    assert output.decode() == value
    again = subprocess.run(
        ["bash", "-c", quoting.export("X", value) + '\nprintf "%s" "$X"'],
        capture_output=True,
        check=True,
    ).stdout
    assert again.decode() == value
    assert script


def test_a_nul_byte_is_refused():
    with pytest.raises(SpecError):
        quoting.word("a\0b")


def test_engine_arguments_are_passed_as_vllm_reads_them():
    assert quoting.engine_arguments(
        {
            "max-model-len": 4096,
            "enforce_eager": True,
            "enable-prefix-caching": False,
            "nothing": None,
            "stop": ["a", "b"],
            "kv-transfer-config": {"b": 1, "a": "x y"},
            "bias": -1,
        }
    ) == [
        *("--max-model-len", "4096", "--enforce-eager", "--no-enable-prefix-caching"),
        *("--stop", "a", "b", "--kv-transfer-config", '{"a":"x y","b":1}', "--bias=-1"),
    ]
