"""Takes screenshots for the help pages: each node with its neighbors, in ComfyUI's frontend.

    python run.py help --pictures

Runs in ComfyUI's Python with Playwright. EXVIDEO_CHROMIUM is the path of Chromium.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from .help_pages import PAGES
from .hosts import PACK, Host
from .server import Server

_MAX_EDGE = 900  # pixels of the longer side
#: Workflow in which a node is shown, if not in the first one that contains it.
_WORKFLOWS = {
    "ExVideoCheckpointLoader": "exvideo_low_memory",
    "ExVideoApply": "exvideo_image_to_video",
    "ExVideoNormalizeLatent": "exvideo_image_to_video",
    "ExVideoDecode": "exvideo_image_to_video",
    "ExVideoConditioning": "exvideo_image_to_video",
    "ExVideoKeyframes": "exvideo_first_last_frame",
    "ExVideoExamplePicture": "exvideo_quickstart",
}
#: Nodes that are in no workflow, with their neighbors.
_ROWS = {
    "ExVideoInit": ["ExVideoCheckpointLoader", "ExVideoInit", "ExVideoSave"],
    "ExVideoSave": ["ExVideoInit", "ExVideoSave"],
    "ExVideoTiles": ["ExVideoApply", "ExVideoTiles", "KSampler"],
}
_ROW = """kinds => {
    const graph = window.app.graph
    graph.clear()
    let left = 0, before = null
    for (const kind of kinds) {
        const node = LiteGraph.createNode(kind)
        graph.add(node)
        node.pos = [left, 0]
        left += node.size[0] + 60
        if (before) before.connectByType(0, node, before.outputs[0].type)
        before = node
    }
}"""
#: Removes all nodes but the given one and its neighbors, arranges them in columns and returns a PNG as a data URL.
_DRAW = """kind => {
    const graph = window.app.graph, canvas = window.app.canvas
    const node = graph._nodes.find(node => node.type === kind)
    const sources = new Set(), targets = new Set()
    for (const link of graph.links instanceof Map ? graph.links.values() : Object.values(graph.links)) {
        if (link.origin_id === node.id) targets.add(link.target_id)
        if (link.target_id === node.id) sources.add(link.origin_id)
    }
    for (const id of sources) targets.delete(id)
    const columns = [sources, new Set([node.id]), targets].map(ids => graph._nodes.filter(node => ids.has(node.id)))
    const kept = columns.flat()
    for (const other of graph._nodes.filter(other => !kept.includes(other))) graph.remove(other)
    let left = 0, bottom = 0
    for (const column of columns.filter(column => column.length)) {
        let down = 0
        for (const node of column) {
            node.setSize([Math.min(node.size[0], 330), node.computeSize()[1]])
            node.pos = [left, down]
            down += node.size[1] + 60
        }
        left += Math.max(...column.map(node => node.size[0])) + 80
        bottom = Math.max(bottom, down)
    }
    const [width, height, element] = [left - 40, bottom + 10, canvas.canvas]
    const scale = Math.min(1, element.width / width, element.height / height)
    canvas.ds.scale = scale
    canvas.ds.offset[0] = 20
    canvas.ds.offset[1] = 50
    canvas.deselectAll?.()
    canvas.draw(true, true)
    return [element.toDataURL(), Math.round(width * scale), Math.round(height * scale)]
}"""


def main() -> int:
    sys.path.append(str(PACK / "tests"))
    import other_models
    import workflow_inputs

    graphs = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted((PACK / "workflows").glob("*.json"))}
    with Server(Host(Path(os.environ["EXVIDEO_HOST"]))) as server:
        workflow_inputs.give(server)
        other_models.give_names(server)
        kinds = [kind for kind in server.get("/object_info") if kind.startswith("ExVideo")]
        (PAGES / "pictures").mkdir(exist_ok=True)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=os.environ["EXVIDEO_CHROMIUM"], args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1600, "height": 1000})
            page.goto(server.url)
            page.wait_for_function("window.app?.graph && window.app.extensionManager", timeout=90_000)
            page.wait_for_timeout(3000)
            page.keyboard.press("Escape")
            page.evaluate("window.app.extensionManager.setting.set('Comfy.NodeBadge.NodeSourceBadgeMode', 'None')")
            for kind in kinds:
                _take(page, kind, graphs).save(PAGES / "pictures" / f"{kind}.jpg", quality=82, optimize=True)
            browser.close()
    return 0


def _take(page: Page, kind: str, graphs: dict[str, dict[str, Any]]) -> Image.Image:
    if kind in _ROWS:
        page.evaluate(_ROW, _ROWS[kind])
    else:
        holders = [name for name, graph in graphs.items() if any(node["type"] == kind for node in graph["nodes"])]
        page.evaluate("graph => window.app.loadGraphData(graph)", graphs[_WORKFLOWS.get(kind, holders[0])])
    page.wait_for_timeout(1500)
    address, width, height = page.evaluate(_DRAW, kind)
    content = base64.b64decode(address.partition(",")[2])
    image = Image.open(io.BytesIO(content)).convert("RGB").crop((0, 0, width, height))
    image.thumbnail((_MAX_EDGE, _MAX_EDGE))
    return image


if __name__ == "__main__":
    sys.exit(main())
