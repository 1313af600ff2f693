"""Generates the nodes' help pages and README's table of nodes. Runs in ComfyUI's Python.

    python run.py help

A help page combines the tooltips of a node, from its schema in `nodes/` and their translations in `locales/`, with
further sections from `docs/nodes/<language>/`: when to use the node, memory and time, errors. A test checks that the
generated pages are up to date.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .hosts import PACK

PAGES = PACK / "web" / "docs"
_MARKS = ("<!-- nodes: made by `python run.py help` -->\n", "<!-- /nodes -->")


@dataclass(frozen=True)
class Words:
    """Words of the generated parts of a page, in one language."""

    inputs: str
    outputs: str
    comma: str
    optional: str
    default: str
    to: str
    on: str
    off: str
    picture: str
    file: str
    headings: tuple[str, str]  # required sections: memory and time, errors


WORDS = {
    "en": Words("Inputs", "Outputs", ", ", "optional", "default", "to", "on", "off",
                "The node in a graph", "a file", ("Memory and time", "Errors")),
    "zh": Words("输入", "输出", "，", "可选", "默认", "至", "开", "关", "图中的节点", "文件",
                ("内存与时间", "错误")),
    "ja": Words("入力", "出力", "、", "省略可", "既定値", "から", "オン", "オフ", "グラフの中のノード", "ファイル",
                ("メモリと時間", "エラー")),
}  # fmt: skip


def main() -> int:
    for path, text in expected(load_nodes()).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


def load_nodes(name: str = "exvideo_help") -> list[Any]:
    """The pack's node classes, imported as ComfyUI does, from a folder of any name."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, PACK / "__init__.py", submodule_search_locations=[str(PACK)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
        importlib.import_module(f"{name}.nodes.folders").register_model_folder()
    return importlib.import_module(f"{name}.nodes").NODES


def expected(nodes: list[Any]) -> dict[Path, str]:
    """All generated files with their contents."""
    schemas = [node.define_schema() for node in nodes]
    files = {PAGES / f"{schema.node_id}.md": page(schema) for schema in schemas}
    for language in WORDS.keys() - {"en"}:
        texts = json.loads((PACK / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
        for schema in schemas:
            files[PAGES / schema.node_id / f"{language}.md"] = page(schema, texts[schema.node_id], language)
    readme = PACK / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(_MARKS[0])
    rows = [f"| {schema.display_name} | {schema.description.split('. ')[0].removesuffix('.')} |" for schema in schemas]
    table = "\n".join(["| node | what it does |", "| --- | --- |", *rows])
    files[readme] = f"{before}{_MARKS[0]}{table}\n{_MARKS[1]}{rest.split(_MARKS[1])[1]}"
    return files


def page(schema: Any, translated: dict[str, Any] | None = None, language: str = "en") -> str:  # noqa: ANN401 - ComfyUI's
    """Generate the help page of a node.

    Args:
        schema: the node's `io.Schema`.
        translated: the node's entry in `nodeDefs.json`, unless the language is English.
        language: key of `WORDS`.
    """
    words, texts = WORDS[language], translated or {}
    use, more = _prose(language, schema.node_id)
    lines = [f"# {texts.get('display_name', schema.display_name)}", "", texts.get("description", schema.description)]
    lines += ["", use]
    lines += ["", f"![{words.picture}](pictures/{schema.node_id}.jpg)"]
    if schema.inputs:
        lines += ["", f"## {words.inputs}", ""]
    for item in schema.inputs:
        found = texts.get("inputs", {}).get(item.id, {})
        name = f"`{item.id}`" + (f" {found['name']}" if found else "")
        values = words.comma.join(_values(item, words))
        lines.append(f"- {name} ({values}): {found.get('tooltip', item.tooltip)}")
    lines += ["", f"## {words.outputs}", ""]
    for number, item in enumerate(schema.outputs):
        found = texts.get("outputs", {}).get(str(number), {})
        lines.append(f"- `{item.display_name}`: {found.get('tooltip', item.tooltip)}")
    return "\n".join([*lines, "", more, ""])


def _values(item: Any, words: Words) -> Iterator[str]:  # noqa: ANN401 - one of ComfyUI's inputs
    """Allowed values, default and more of an input."""
    item = getattr(item, "input_override", None) or item  # for several types, the widget's
    kind = item.io_type
    if kind in ("INT", "FLOAT"):
        yield f"{item.min} {words.to} {item.max}"
    elif kind == "BOOLEAN":
        yield f"{words.on} / {words.off}"
    elif kind == "COMBO":
        yield " / ".join(item.options) if item.default is not None else words.file
    elif kind != "STRING":
        yield kind
    if getattr(item, "default", None) not in (None, ""):
        shown = item.default if kind != "BOOLEAN" else words.on if item.default else words.off
        yield f"{words.default} {shown}"
    if item.optional:
        yield words.optional


def _prose(language: str, node_id: str) -> tuple[str, str]:
    """Introduction and further sections of a page."""
    text = (PACK / "docs" / "nodes" / language / f"{node_id}.md").read_text(encoding="utf-8")
    use, heading, more = text.partition("\n## ")
    return use.strip(), (heading + more).strip()


if __name__ == "__main__":
    sys.path.insert(0, os.environ["EXVIDEO_HOST"])
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    sys.exit(main())
