import pytest
from hypothesis import given
from hypothesis import strategies as st

from inventory import nodeset
from inventory.errors import InventoryError


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("h1", ["h1"]),
        ("gpu-a[001-003]", ["gpu-a001", "gpu-a002", "gpu-a003"]),
        ("n[1,3-4],login", ["n1", "n3", "n4", "login"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("a[9-11]", ["a9", "a10", "a11"]),
        ("a[1-2]-ib", ["a1-ib", "a2-ib"]),
        ("h1,h1", ["h1"]),
        ("", []),
    ],
)
def test_a_folded_list_expands_as_slurm_does(text, names):
    assert nodeset.expand(text) == names


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["h1", "h2", "h3"], "h[1-3]"),
        (["gpu-a007"], "gpu-a007"),
        (["n9", "n10", "n11"], "n[9-11]"),
        (["a1", "a01"], "a01,a1"),
        (["a099", "a100"], "a[099-100]"),
        (["b1", "a1", "a2"], "a[1-2],b1"),
        (["login"], "login"),
    ],
)
def test_names_fold_as_slurm_prints_them(names, folded):
    assert nodeset.fold(names) == folded


@given(st.sets(st.from_regex(r"\A[a-c]{1,2}-?[0-9]{1,3}(-ib)?\Z"), max_size=40))
def test_fold_then_expand_gives_the_same_set_back(names):
    assert set(nodeset.expand(nodeset.fold(names))) == names


@pytest.mark.parametrize(
    "text", ["h[1-", "h1]", "h[a-b]", "h[3-1]", "h[1-99999999]", "h 1", "h;rm", "h$(x)", "h[[1]]"]
)
def test_a_list_that_cannot_be_read_is_refused_with_its_text(text):
    with pytest.raises(InventoryError) as caught:
        nodeset.expand(text)
    assert caught.value.where
