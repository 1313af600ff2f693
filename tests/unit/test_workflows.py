"""The saved workflows: each UI file and its API twin are the same graph, with nodes of this pack and the host only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[2]
FOLDER = PACK / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
BLUEPRINTS = sorted((PACK / "subgraphs").glob("*.json"))
HOST_NODES = {
    "AlignYourStepsScheduler", "KSamplerSelect", "KarrasScheduler",
    "BasicScheduler", "CLIPLoader", "CLIPTextEncode", "EmptyHunyuanLatentVideo", "ModelSamplingSD3", "SamplerCustom",
    "UNETLoader", "VAEDecodeTiled", "VAELoader", "VOIDSampler",
    "CreateVideo", "GetVideoComponents", "ImageBatch", "ImageFromBatch", "ImageScale", "KSampler", "LoadImage",
    "LoadVideo", "SaveVideo", "VAEEncode", "VideoLinearCFGGuidance",
}  # fmt: skip
FURTHER_NODES = {"ComfyMathExpression", "GetImageSize", "ImageScaleBy"}  # of hosts that know blueprints


_CONTROLS = ("randomize", "fixed", "increment", "image")


def load(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_there_are_workflows() -> None:
    assert {"exvideo_image_to_video", "exvideo_quickstart"} <= set(NAMES)
    assert {path.stem for path in (FOLDER / "api").glob("*.json")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_ui_and_api_are_one_graph(name: str) -> None:
    ui, api = load(FOLDER / f"{name}.json"), load(FOLDER / "api" / f"{name}.json")
    nodes = {str(node["id"]): node for node in ui["nodes"] if node["type"] != "MarkdownNote"}
    assert {key: node["type"] for key, node in nodes.items()} == {k: n["class_type"] for k, n in api.items()}
    links = {link[0]: [str(link[1]), link[2]] for link in ui["links"]}
    for key, node in nodes.items():
        wired = {i["name"]: links[i["link"]] for i in node["inputs"] if i.get("link") is not None}
        assert wired == {n: v for n, v in api[key]["inputs"].items() if isinstance(v, list)}, key
        # Widgets are stored by position; the frontend adds `control_after_generate` behind a seed.
        stored = [value for value in node.get("widgets_values", []) if value not in _CONTROLS]
        widgets = [entry["name"] for entry in node["inputs"] if "widget" in entry and entry["name"] != "upload"]
        given = {n: v for n, v in api[key]["inputs"].items() if not isinstance(v, list) and "." not in n}
        assert {n: v for n, v in zip(widgets, stored, strict=True) if n not in wired} == given, key


@pytest.mark.parametrize("name", NAMES)
def test_nodes_thumbnail_and_note(name: str) -> None:
    ui = load(FOLDER / f"{name}.json")
    kinds = {node["type"] for node in ui["nodes"]}
    assert {kind for kind in kinds if not kind.startswith("ExVideo")} <= HOST_NODES | {"MarkdownNote"}
    assert "MarkdownNote" in kinds
    assert (FOLDER / f"{name}.jpg").read_bytes().startswith(b"\xff\xd8")


def test_the_published_models_can_be_downloaded_from_the_graph() -> None:
    ui, api = (load(FOLDER / part / "exvideo_image_to_video.json") for part in ("", "api"))
    folders = {"ExVideoCheckpointLoader": "checkpoints", "ExVideoLoader": "exvideo"}
    for node in ui["nodes"]:
        if node["type"] in folders:
            (model,) = node["properties"]["models"]
            assert model["directory"] == folders[node["type"]]
            assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(".safetensors")
            assert model["name"] in api[str(node["id"])]["inputs"].values()


@pytest.mark.parametrize("name", ["exvideo_animatelcm", "exvideo_cogvideox", "exvideo_wan"])
def test_every_model_of_another_family_has_its_address(name: str) -> None:
    ui, api = (load(FOLDER / part / f"{name}.json") for part in ("", "api"))
    (note,) = [node["widgets_values"][0] for node in ui["nodes"] if node["type"] == "MarkdownNote"]
    folders = {"checkpoints", "diffusion_models", "exvideo", "loras", "text_encoders", "vae"}
    for node in ui["nodes"]:
        for model in node["properties"].get("models", []):
            assert model["directory"] in folders
            assert model["url"].startswith("https://huggingface.co/") and model["url"] in note
            assert f"`models/{model['directory']}`" in note
        names = [value for key, value in api.get(str(node["id"]), {"inputs": {}})["inputs"].items() if "_name" in key]
        files = [value for value in names if str(value).endswith(".safetensors")]
        assert all(value in note for value in files), files


def test_there_are_blueprints_for_what_everyone_builds() -> None:
    names = {path.stem for path in BLUEPRINTS}
    assert names == {"Continue a Clip (ExVideo)", "Image to Long Video (ExVideo)", "Upscale Pass (ExVideo)"}


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_a_blueprint_is_one_subgraph_that_hangs_together(path: Path) -> None:
    saved = load(path)
    (outer,), (inner,) = saved["nodes"], saved["definitions"]["subgraphs"]
    assert outer["type"] == inner["id"] and outer["title"] == inner["name"] == path.stem and inner["description"]
    nodes = {node["id"]: node for node in inner["nodes"]}
    kinds = {node["type"] for node in nodes.values()}
    assert {kind for kind in kinds if not kind.startswith("ExVideo")} <= HOST_NODES | FURTHER_NODES
    for part in ("inputs", "outputs"):
        assert [item["name"] for item in outer[part]] == [item["name"] for item in inner[part]]
    for link in inner["links"]:
        source = inner["inputs"] if link["origin_id"] == -10 else nodes[link["origin_id"]]["outputs"]
        target = inner["outputs"] if link["target_id"] == -20 else nodes[link["target_id"]]["inputs"]
        assert source[link["origin_slot"]]["type"] == link["type"]
        end = target[link["target_slot"]]
        assert link["id"] in (end["linkIds"] if link["target_id"] == -20 else [end["link"]])
    ids = [link["id"] for link in inner["links"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_a_blueprints_widgets_are_links_to_widgets_within(path: Path) -> None:
    saved = load(path)
    (outer,), (inner,) = saved["nodes"], saved["definitions"]["subgraphs"]
    nodes, links = ({item["id"]: item for item in inner[part]} for part in ("nodes", "links"))
    shown = [entry["name"] for entry in outer["inputs"] if "widget" in entry]
    linked = []
    for slot, entry in enumerate(inner["inputs"]):
        ends = [links[key] for key in entry["linkIds"]]
        assert ends and all((link["origin_id"], link["origin_slot"]) == (-10, slot) for link in ends)
        targets = [nodes[link["target_id"]]["inputs"][link["target_slot"]] for link in ends]
        if any("widget" in target for target in targets):
            assert [target["widget"]["name"] for target in targets] == [entry["name"]]
            linked.append(entry["name"])
    assert linked == shown and {"seed", "steps", "ckpt_name", "extension_name"} <= set(shown)
    # Frontend 1.35 changes a seed after each run only if it is named by its node's id as well. Newer ones give nodes
    # other ids where ids clash, node by node: a first node's old id is then never another's, which might have a seed.
    (first, *_) = inner["nodes"]
    assert first["type"] == "KSampler"
    assert outer["properties"]["proxyWidgets"] == [[str(first["id"]), n] for n in ("seed", "control_after_generate")]
