"""The interface that saved workflows hold: ids, inputs in order, defaults, outputs."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runner import help_pages

PACK = Path(__file__).resolve().parents[2]
SNAPSHOT = Path(__file__).with_name("node_interface.json")


@pytest.fixture(scope="module")
def nodes():
    """The pack, loaded as the host loads it: from a folder whose name is not ours to choose."""
    return help_pages.load_nodes("a folder-with any name")


def widget(item):
    """An input as its widget has it: one that takes several types keeps range and default inside."""
    return getattr(item, "input_override", None) or item


def describe(node) -> dict:
    schema = node.define_schema()
    return {
        "inputs": [
            [i.id, i.get_io_type(), getattr(widget(i), "default", None), bool(i.optional)] for i in schema.inputs
        ],
        "outputs": [[o.io_type, o.display_name] for o in schema.outputs],
        "category": schema.category,
    }


def test_interface_is_the_promised_one(nodes) -> None:
    found = {node.define_schema().node_id: describe(node) for node in nodes}
    assert found == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_every_input_and_output_has_a_tooltip(nodes) -> None:
    for node in nodes:
        schema = node.define_schema()
        assert schema.description and schema.category.startswith("ExVideo")
        for item in [*schema.inputs, *schema.outputs]:
            assert item.tooltip, (schema.node_id, item.id)


def test_help_pages_and_readme_are_made_from_the_nodes_own_texts(nodes) -> None:
    for path, text in help_pages.expected(nodes).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: python run.py help"
        for picture in re.findall(r"\]\((pictures/.+?)\)", text):
            assert (help_pages.PAGES / picture).read_bytes().startswith(b"\xff\xd8"), (path.name, picture)
    pages = {path.relative_to(help_pages.PAGES).as_posix() for path in help_pages.PAGES.rglob("*.md")}
    ids = {node.define_schema().node_id for node in nodes}
    assert pages == {f"{name}.md" for name in ids} | {
        f"{name}/{language}.md" for name in ids for language in help_pages.WORDS.keys() - {"en"}
    }


@pytest.mark.parametrize("language", help_pages.WORDS)
def test_every_page_tells_of_memory_and_of_errors_that_exist(nodes, language: str) -> None:
    sources = [*(PACK / "nodes").glob("*.py"), *(PACK / "exvideo_core").rglob("*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a message may go over several lines
    quoted = 0
    for node in nodes:
        name = node.define_schema().node_id
        text = (PACK / "docs" / "nodes" / language / f"{name}.md").read_text(encoding="utf-8")
        assert all(f"## {heading}\n" in text for heading in help_pages.WORDS[language].headings), name
        for message in re.findall(r'`"(.+?)"`', text):
            quoted += 1
            for part in message.split("…"):
                assert part.strip() in code, f"{name} quotes an error that there is not: {part}"
    assert quoted > 30


def test_every_text_is_translated(nodes) -> None:
    for folder in (PACK / "locales").iterdir():
        texts = json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))
        assert set(texts) == {node.define_schema().node_id for node in nodes}
        for node in nodes:
            schema = node.define_schema()
            found = texts[schema.node_id]
            assert found["display_name"] and found["description"]
            assert list(found["inputs"]) == [item.id for item in schema.inputs], (folder.name, schema.node_id)
            assert list(found["outputs"]) == [str(number) for number in range(len(schema.outputs))]
            for item in [*found["inputs"].values(), *found["outputs"].values()]:
                assert item["name"] and item["tooltip"]


def test_the_model_folder_takes_safetensors_only(nodes) -> None:
    import folder_paths

    assert folder_paths.folder_names_and_paths["exvideo"][1] == {".safetensors"}


def test_registering_imports_nothing_heavy() -> None:
    """A fresh Python that has only stubs of the host's API: torch and comfy must not be touched."""
    code = (
        "import sys, importlib.util, types, unittest.mock as m\n"
        "api = types.ModuleType('comfy_api.v0_0_2'); api.io = m.MagicMock(); api.ComfyExtension = object\n"
        "api.io.ComfyNode = object; api.ui = api.InputImpl = m.MagicMock()\n"
        "sys.modules['comfy_api'] = types.ModuleType('comfy_api'); sys.modules['comfy_api.v0_0_2'] = api\n"
        "sys.modules['folder_paths'] = m.MagicMock(folder_names_and_paths=m.MagicMock())\n"
        f"spec = importlib.util.spec_from_file_location('pack', {str(PACK / '__init__.py')!r}, "
        f"submodule_search_locations=[{str(PACK)!r}])\n"
        "pack = importlib.util.module_from_spec(spec); sys.modules['pack'] = pack; spec.loader.exec_module(pack)\n"
        "import pack.nodes\n"
        "print(sorted({'torch', 'numpy', 'safetensors', 'comfy', 'einops'} & set(sys.modules)))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def test_the_hosts_api_is_asked_for_by_its_version(nodes) -> None:
    """`comfy_api.latest` may change with any release of the host; a numbered version stays."""
    from comfy_api.version_list import supported_versions

    asked = {
        found
        for path in [PACK / "__init__.py", *(PACK / "nodes").glob("*.py")]
        for found in re.findall(r"comfy_api\.(\w+)", path.read_text(encoding="utf-8"))
    }
    assert asked == {"v0_0_2"} <= {api.__module__.split(".")[1] for api in supported_versions}


def numbers(nodes) -> list[tuple]:
    from comfy_api.v0_0_2 import io

    return [
        (node, item)
        for node in nodes
        for item in map(widget, node.define_schema().inputs)
        if isinstance(item, io.Int.Input | io.Float.Input)
    ]


def test_a_number_that_comes_by_link_is_checked_when_it_is_there(nodes) -> None:
    found = numbers(nodes)
    assert len(found) >= 25
    for node, item in found:
        others = {other.id: getattr(widget(other), "default", None) for other in node.define_schema().inputs}
        for value in (item.min - 1, item.max + 1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=re.escape(f"{item.id} ({value}) must be between {item.min} and")):
                node.execute(**{**others, item.id: value})


def test_a_number_that_comes_by_link_is_not_refused_before(nodes) -> None:
    """The host gives None for it."""
    for node, item in numbers(nodes):
        if "validate_inputs" not in vars(node):
            continue
        names = list(inspect.signature(node.validate_inputs).parameters)
        defaults = {other.id: getattr(widget(other), "default", None) for other in node.define_schema().inputs}
        for linked in ({item.id}, set(names)):
            assert node.validate_inputs(**{name: None if name in linked else defaults[name] for name in names}) is True
        if item.id in names:
            answer = node.validate_inputs(**{name: item.max + 1 if name == item.id else None for name in names})
            assert f"{item.id} ({item.max + 1})" in answer
