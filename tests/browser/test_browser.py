"""What a user does and sees, in the real frontend."""

from __future__ import annotations

import json
import time

import pytest

from runner.hosts import PACK

FOLDER = PACK / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
#: All but the tests that tell within a minute whether the pack works in the frontend at all.
nightly = pytest.mark.nightly


def graph(name: str) -> list[str]:
    return sorted(node["type"] for node in json.loads((FOLDER / f"{name}.json").read_text("utf-8"))["nodes"])


def test_the_template_browser_shows_every_workflow_with_its_picture(app) -> None:
    app.templates()
    app.page.wait_for_timeout(1500)
    app.shot("templates")
    # The pack's pictures are 960 wide, the frontend's own placeholder is not. They are there while they are in view.
    loaded = "[...document.querySelectorAll('[role=dialog] img')].filter(i => i.naturalWidth === 960).map(i => i.alt)"
    seen = set(app.page.evaluate(loaded))
    app.page.mouse.move(1000, 600)
    for _ in range(6):
        app.page.mouse.wheel(0, 300)
        app.page.wait_for_timeout(400)
        seen |= set(app.page.evaluate(loaded))
    assert seen == set(NAMES)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "exvideo_quickstart" else nightly) for name in NAMES]
)
def test_a_template_loads_with_nothing_missing(app, name: str) -> None:
    known = app.page.evaluate("Object.keys(LiteGraph.registered_node_types)")
    if name == "exvideo_cogvideox" and "VOIDSampler" not in known:
        pytest.skip("this ComfyUI has no CogVideoX (0.33 has)")
    app.load_template(name)
    assert sorted(app.nodes()) == graph(name)
    assert app.missing() == []
    assert app.toasts() == []
    assert app.errors == []
    app.shot(f"workflow_{name}")


def test_run_shows_progress_a_moving_preview_and_the_video(app) -> None:
    app.load_template("exvideo_quickstart")
    app.page.evaluate(
        """() => {
            window.seen = {step: 0, pictures: {}}
            window.app.api.addEventListener('progress', event => window.seen.step = event.detail.value)
            window.app.api.addEventListener('b_preview', async event => {
                const {step, pictures} = window.seen
                const digest = await crypto.subtle.digest('SHA-1', await event.detail.arrayBuffer())
                ;(pictures[step] ??= new Set()).add([...new Uint8Array(digest)].join())
            })
        }"""
    )
    app.set("KarrasScheduler", steps=40)
    app.run()
    # The host alone shows one picture a step, the clip's first frame: others are further frames.
    moving = "Object.values(window.seen.pictures).filter(pictures => pictures.size > 1).length"
    app.page.wait_for_function(f"{moving} > 2", timeout=120_000)
    app.shot("preview")
    app.page.wait_for_function("document.querySelector('video')?.readyState >= 2", timeout=240_000)
    size = app.page.evaluate("(v => [v.videoWidth, v.videoHeight, v.duration])(document.querySelector('video'))")
    assert size[:2] == [256, 256] and abs(size[2] - 128 / 30) < 0.1
    app.page.evaluate("document.querySelector('video').play()")
    app.page.wait_for_function("document.querySelector('video').currentTime > 0.5", timeout=20_000)
    app.shot("video")


def test_a_nodes_help_page_opens(app) -> None:
    app.load_template("exvideo_quickstart")
    app.help("ExVideoConditioning")
    app.page.get_by_text("Use it instead of").first.wait_for()
    app.shot("help")


@nightly
def test_pictures_show_in_their_nodes(app) -> None:
    app.load_template("exvideo_compare")
    app.set("ExVideoConditioning", frames=48)
    app.set("KSampler", steps=4)
    app.run()
    find = "window.app.graph._nodes.find(node => node.type === kind)"
    shown = f"kinds => kinds.every(kind => {find}.imgs?.[0].naturalWidth)"
    app.page.wait_for_function(shown, arg=["ExVideoPlot", "ExVideoContactSheet"], timeout=240_000)
    app.page.wait_for_function("document.querySelector('video')?.readyState >= 2", timeout=240_000)
    app.look(1290, -120, 0.64)
    app.shot("pictures")


@pytest.fixture
def chinese(app):
    """The frontend in Chinese."""
    app.page.evaluate("window.app.extensionManager.setting.set('Comfy.Locale', 'zh')")
    app.page.reload()
    app.page.wait_for_function("window.app?.graph && window.app.extensionManager", timeout=90_000)
    app.page.wait_for_timeout(3000)
    yield app
    app.page.evaluate("window.app.extensionManager.setting.set('Comfy.Locale', 'en')")


@nightly
def test_help_speaks_chinese_where_the_frontend_does(chinese) -> None:
    chinese.drop("mine.json", (FOLDER / "exvideo_quickstart.json").read_bytes(), "application/json")
    chinese.page.wait_for_function("window.app.graph._nodes.some(node => node.type === 'ExVideoConditioning')")
    chinese.page.wait_for_timeout(1000)
    chinese.help("ExVideoConditioning")
    chinese.page.get_by_text("按 SVD 训练时的尺度添加噪声").first.wait_for()
    chinese.shot("help_chinese")


@nightly
def test_nodes_speak_chinese_where_the_frontend_does(chinese) -> None:
    chinese.drop("mine.json", (FOLDER / "exvideo_long_video.json").read_bytes(), "application/json")
    chinese.page.wait_for_function("window.app.graph._nodes.some(node => node.type === 'ExVideoWindows')")
    labels = chinese.page.evaluate(
        "window.app.graph._nodes.find(node => node.type === 'ExVideoWindows').widgets.map(widget => widget.label)"
    )
    assert labels[:2] == ["窗口帧数", "重叠帧数"]
    chinese.shot("chinese")


def test_a_failed_run_names_its_node_and_says_what_to_do(app) -> None:
    app.load_template("exvideo_quickstart")
    app.set("ExVideoConditioning", frames=130)
    app.run()
    app.page.wait_for_function("window.app.lastExecutionError", timeout=60_000)
    app.page.wait_for_timeout(1500)
    for details in ("View details", "Show Report"):  # newer and older frontends
        if app.page.get_by_text(details).count():
            app.page.get_by_text(details).first.click()
    app.page.get_by_text("Lower the frame count to 128").first.wait_for()
    failed = app.page.evaluate("window.app.graph.getNodeById(window.app.lastExecutionError.node_id).type")
    assert failed == "SamplerCustom"
    app.shot("error")


@nightly
def test_a_workflow_file_is_dropped_on_the_canvas(app) -> None:
    app.drop("mine.json", (FOLDER / "exvideo_long_video.json").read_bytes(), "application/json")
    app.page.wait_for_function("window.app.graph._nodes.some(node => node.type === 'ExVideoWindows')")
    assert sorted(app.nodes()) == graph("exvideo_long_video")
    assert app.missing() == []


@nightly
def test_a_saved_video_is_dropped_on_the_canvas_and_gives_its_graph_back(app, server) -> None:
    app.load_template("exvideo_long_video")
    app.set("ExVideoConditioning", width=64, height=64, frames=24)
    app.set("KSampler", steps=1)
    app.run()
    folder, deadline = server.output / "video", time.monotonic() + 120
    while not (made := list(folder.glob("ExVideo_long_*.mp4"))) and time.monotonic() < deadline:
        app.page.wait_for_timeout(500)
    content = made[0].read_bytes()
    app.page.evaluate("window.app.graph.clear()")
    assert app.nodes() == []
    app.drop("clip.mp4", content, "video/mp4")
    app.page.wait_for_function("window.app.graph._nodes.some(node => node.type === 'ExVideoWindows')")
    assert sorted(app.nodes()) == graph("exvideo_long_video")
    assert app.value("ExVideoConditioning", "frames") == 24
