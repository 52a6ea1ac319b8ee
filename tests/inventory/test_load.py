import pytest

from inventory.errors import InventoryError
from inventory.load import load


def write(tmp_path, text):
    file = tmp_path / "inventory.yaml"
    file.write_text(text)
    return file


def test_ranges_take_defaults_and_single_hosts_override_them(tmp_path):
    inventory = load(
        write(
            tmp_path,
            "defaults: {user: ml, gpus: 8, nvme: [/nvme0]}\n"
            "pools:\n  default:\n    - a[1-2]\n"
            "    - {name: b1, host: 10.0.0.9, port: 2222, gpus: 4, switch: s1, key_file: k}\n",
        )
    )
    nodes = {node.name: node for node in inventory.pool("default").nodes}
    assert list(nodes) == ["a1", "a2", "b1"]
    assert nodes["a1"].gpus == 8 and nodes["a1"].ssh.host == "a1" and nodes["a1"].ssh.user == "ml"
    assert nodes["b1"].ssh.port == 2222 and nodes["b1"].gpus == 4 and nodes["b1"].switch == "s1"
    assert nodes["b1"].ssh.key_file == str(tmp_path / "k")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("pools: {default: [{name: h1, gpu: 8}]}", "gpu"),
        ("pools: {default: [h1, h1]}", "twice"),
        ("pools: {default: [{host: h1}]}", "no name"),
        ("pools: {default: [{name: 'h[1-2]', host: x}]}", "share one host"),
        ("pools: {default: ['h[1-']}", "brackets"),
        ("pools: [", "YAML"),
        ("version: 2\npools: {}", "version"),
        ("ssh_config: nowhere\npools: {default: [h1]}", "nowhere"),
        ("pools: {}", "no pools"),
    ],
)
def test_a_wrong_inventory_is_refused_with_file_and_reason(tmp_path, text, told):
    with pytest.raises(InventoryError) as caught:
        load(write(tmp_path, text))
    assert told in str(caught.value)
    assert "inventory.yaml" in caught.value.where


def test_a_missing_inventory_says_where_to_name_it(tmp_path):
    with pytest.raises(InventoryError) as caught:
        load(tmp_path / "none.yaml")
    assert "backend.ssh.inventory" in caught.value.hint
