"""Layout, files, ports, last words, screens: one or two promises each."""

import os

import pytest

from launcher import ports, render
from launcher.agent import lastwords
from launcher.cli import output
from launcher.documents import Assignment
from launcher.errors import SpecError, StateError
from launcher.files import make_private, read_document, write_document, write_text
from launcher.layout import ModelFacts, choose_layout
from launcher.model_folder import read_model_facts
from launcher.spec import FleetSpec


def spec(**more):
    return FleetSpec.model_validate({"name": "a", "model": "m/n", **more})


def test_auto_keeps_tensor_in_the_node_and_pipeline_across_nodes():
    layout = choose_layout(spec(nodes=2), 8, ModelFacts(attention_heads=64))
    assert (layout.tensor, layout.pipeline, layout.executor) == (8, 2, "ray")
    assert any("fast links" in reason for reason in layout.reasons)


def test_auto_takes_a_tensor_size_that_divides_the_heads():
    layout = choose_layout(spec(nodes=1), 8, ModelFacts(attention_heads=12))
    assert (layout.tensor, layout.pipeline, layout.executor) == (4, 2, "mp")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"nodes": 2, "parallelism": {"tensor": 3}}, "do not divide over 2 nodes"),
        ({"nodes": 1, "parallelism": {"tensor": 16}}, "a node has 8"),
        ({"nodes": 1, "parallelism": {"tensor": 8}}, "does not divide"),
        ({"nodes": 8, "parallelism": {"pipeline": 8}}, "4 layers"),
    ],
)
def test_an_impossible_layout_is_refused_with_the_numbers(more, told):
    with pytest.raises(SpecError, match=told):
        choose_layout(spec(**more), 8, ModelFacts(attention_heads=12, layers=4))


@pytest.mark.parametrize("text", ["[]", "{", "\x00", "[" * 100_000])
def test_a_hostile_config_json_is_an_error_with_its_place(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SpecError) as caught:
        read_model_facts(str(tmp_path))
    assert "config.json" in caught.value.where


def test_a_document_is_replaced_whole_and_private(tmp_path):
    file = tmp_path / "a.json"
    write_document(file, Assignment(revision=1, goal="idle"))
    write_document(file, Assignment(revision=2, goal="stopped"))
    assert read_document(file, Assignment).revision == 2
    assert file.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("raw", [b"", b"{", b'{"revision": "x"}', b"\xff\xfe", b"null"])
def test_a_broken_document_is_an_error_with_its_place(tmp_path, raw):
    file = tmp_path / "a.json"
    file.write_bytes(raw)
    with pytest.raises(StateError) as caught:
        read_document(file, Assignment)
    assert str(file) in str(caught.value)


def test_an_unknown_key_from_a_newer_version_is_ignored(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"version": 2, "revision": 5, "goal": "idle", "later": 1}')
    assert read_document(file, Assignment).revision == 5


def test_a_full_disk_loses_nothing(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small disk")
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], check=True)
    try:
        write_text(disk / "a", "before")
        with pytest.raises(StateError, match="full"):
            write_text(disk / "a", "x" * 200_000)
        assert (disk / "a").read_text() == "before"
        assert [file.name for file in disk.iterdir()] == ["a"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_private_folder_is_private_also_when_it_was_there(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir(mode=0o755)
    assert make_private(folder).stat().st_mode & 0o777 == 0o700


def test_port_blocks_are_disjoint_and_below_the_ephemeral_range():
    seen = set()
    for slot in range(ports.SLOTS):
        block = set(ports.block(slot).values())
        assert not block & seen
        assert max(block) < 32768 and min(block) >= 20000
        seen |= block


def test_the_api_port_is_checked_on_the_leader_only():
    block = ports.block(0)
    assert block["api"] in ports.to_check(block, leader=True)
    assert block["api"] not in ports.to_check(block, leader=False)


LOG = """\
(APIServer pid=1) INFO 11-21 13:54:29 [api.py:1] starting
(APIServer pid=1) WARNING 11-21 13:54:29 [x.py:2] fd limit errors like `OSError: [Errno 24]`
(EngineCore pid=9) ERROR 11-21 13:55:06 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=9) ERROR 11-21 13:55:06 [core.py:1510] ray.exceptions.RayTaskError(RuntimeError): x
(EngineCore pid=9) ERROR 11-21 13:55:06 [core.py:1510] RuntimeError: open shm failed. errno: 2
RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_a_heading_is_no_cause_without_the_line_below_it():
    log = """(APIServer pid=7) pydantic_core.ValidationError: 1 validation error for ModelConfig
(APIServer pid=7)   Value error, User-specified max_model_len (500000) is greater than 512
(APIServer pid=7)     For further information visit a page"""
    assert "max_model_len (500000) is greater" in lastwords.cause(log)


def test_the_cause_is_the_first_error_that_is_not_the_echo_of_another():
    assert lastwords.cause(LOG) == "RuntimeError: open shm failed. errno: 2"
    assert lastwords.cause("vllm: error: unrecognized arguments: --foo\n").endswith("--foo")
    assert lastwords.cause("torch.OutOfMemoryError: CUDA out of memory. Tried\n").startswith(
        "torch"
    )
    assert lastwords.cause("all is well\n") == ""
    guess = "\x1b[33m(raylet)\x1b[0m - The agent is killed by the OS (e.g., out of memory).\n"
    assert lastwords.cause(guess) == ""
    assert lastwords.tail(guess).startswith("(raylet) - The agent")


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5s"), (243, "4m03s"), (22320, "6h12m"), (270000, "3d03h")]
)
def test_spans_are_short(seconds, text):
    assert output.span(seconds) == text


def test_ray_serves_from_a_parked_process_only_when_the_other_nodes_are_there():
    """Else vLLM warns of too few GPUs; and a worker comes when the head's raylet is there."""
    model = spec(nodes=2, executor="ray")
    layout = choose_layout(model, 1, ModelFacts())
    block, scripts = ports.block(7), render.engine_scripts(model, layout)
    others = (("10.0.0.2", block["node_manager"]),)
    head, serve = render.commands_of(0, layout, block, scripts, others)
    (worker,) = render.commands_of(1, layout, block, scripts, others)
    assert (head.after_port, serve.after_port) == (None, block["rendezvous"])
    assert (head.after_others, serve.after_others, worker.after_others) == ((), others, ())
    assert (worker.after_port, worker.after_s > 0) == (block["node_manager"], True)
