"""Each blueprint as a user finds it: one node, whose widgets are those of nodes within it."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.nightly

LONG_VIDEO = "Image to Long Video (ExVideo)"
SAMPLER, CONDITIONING = "KSampler", "ExVideoConditioning"
LOADERS = {
    "ckpt_name": ("ExVideoCheckpointLoader", "svd_xt.safetensors"),
    "extension_name": ("ExVideoLoader", "ExVideo-SVD-128f-v1.fp16.safetensors"),
}
CLIP = {
    "width": (CONDITIONING, 512),
    "height": (CONDITIONING, 512),
    "frames": (CONDITIONING, 128),
    "motion_bucket_id": (CONDITIONING, 127),
    "seed": (SAMPLER, 0),
    "steps": (SAMPLER, 50),
    **LOADERS,
}
#: Of each blueprint, its widgets in order: the kind of node whose input each sets, and what it is at first.
WIDGETS: dict[str, dict[str, tuple[str, object]]] = {
    "Continue a Clip (ExVideo)": CLIP,
    LONG_VIDEO: CLIP,
    "Upscale Pass (ExVideo)": {
        "scale_by": ("ImageScaleBy", 2.0),
        "motion_bucket_id": (CONDITIONING, 127),
        "seed": (SAMPLER, 0),
        "steps": (SAMPLER, 25),
        "denoise": (SAMPLER, 0.5),
        **LOADERS,
    },
}
#: Frontend 1.35 shows it below the seed, and both last, under names with the id of their node; newer ones make it a
#: part of the seed.
CONTROL = "control_after_generate"


@pytest.fixture
def app(app, server):
    """Where the host has blueprints."""
    if not (server.host.path / "app" / "subgraph_manager.py").exists():
        pytest.skip(f"ComfyUI {server.host.version} has no blueprints")
    app.page.evaluate("window.app.graph.clear()")
    return app


def widgets(app, node: int) -> dict[str, object]:
    """The widgets that a node shows, in order, and their values."""
    shown = app.page.evaluate(
        "id => window.app.graph.getNodeById(id).widgets.filter(w => !w.hidden).map(w => [w.name, w.value])", node
    )
    named = [(name.split(": ")[-1], value) for name, value in shown]
    assert len(dict(named)) == len(named)
    return {name: value for name, value in named if name != CONTROL}


def change(app, node: int, values: dict[str, object]) -> None:
    app.page.evaluate(
        """([id, values]) => {
            for (const widget of window.app.graph.getNodeById(id).widgets) {
                const name = widget.name.split(': ').at(-1)
                if (!(name in values)) continue
                widget.value = values[name]
                widget.callback?.(values[name])
            }
        }""",
        [node, values],
    )


def inputs(app) -> dict[tuple[str, ...], object]:
    """What the nodes of the prompt that the frontend makes have as inputs; links apart."""
    return {
        (key, made["class_type"], name): value
        for key, made in app.prompt().items()
        for name, value in made["inputs"].items()
        if not isinstance(value, list)
    }


def other(value: object) -> object:
    """Another value that the widget takes."""
    if isinstance(value, str):
        return "other.safetensors"
    return value // 2 if isinstance(value, int) and value else value / 2 or 7


def changed(before: dict, after: dict) -> dict:
    assert before.keys() == after.keys()
    return {key: value for key, value in after.items() if value != before[key]}


def fill(app, name: str) -> None:
    """A graph whose nodes have the ids of those within a blueprint, which is in it once already."""
    app.load_template("exvideo_compare")
    app.look(5000, 5000, 1)
    app.insert(name)
    app.look(-5000, -5000, 1)


@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
@pytest.mark.parametrize("name", WIDGETS)
def test_each_widget_sets_the_input_that_it_names(app, name: str, filled: bool) -> None:
    if filled:
        fill(app, name)
    node, expected = app.insert(name), WIDGETS[name]
    app.shot(f"blueprint {name}{', filled graph' * filled}")
    shown = widgets(app, node)
    assert shown == {widget: value for widget, (_, value) in expected.items()}
    assert [widget for widget in shown if widget != "seed"] == [widget for widget in expected if widget != "seed"]
    before = inputs(app)
    within = {(kind, name): value for (key, kind, name), value in before.items() if key.startswith(f"{node}:")}
    assert {widget: within[kind, widget] for widget, (kind, _) in expected.items()} == shown
    for widget, (kind, value) in expected.items():
        change(app, node, {widget: other(value)})
        after = inputs(app)
        ((key, *place),) = changed(before, after)
        assert key.startswith(f"{node}:") and place == [kind, widget] and after[key, kind, widget] == other(value)
        before = after
    assert app.missing() == [] and app.toasts() == [] and app.errors == []


@pytest.mark.parametrize("name", WIDGETS)
def test_changed_widgets_are_saved(app, name: str) -> None:
    node = app.insert(name)
    others = {widget: other(value) for widget, (_, value) in WIDGETS[name].items()}
    change(app, node, others)
    before = inputs(app)
    app.page.evaluate("window.app.loadGraphData(JSON.parse(JSON.stringify(window.app.graph.serialize())))")
    app.page.wait_for_timeout(2000)
    assert widgets(app, node) == others
    assert list(inputs(app).values()) == list(before.values())


def test_a_blueprint_makes_a_video_and_draws_another_seed(app) -> None:
    node = app.insert(LONG_VIDEO)
    change(app, node, {"width": 64, "height": 64, "frames": 24, "steps": 2})
    left, top = app.page.evaluate(
        """id => {
            const graph = window.app.graph, blueprint = graph.getNodeById(id), [left, top] = blueprint.pos
            const [load, save] = ['LoadImage', 'SaveVideo'].map(kind => LiteGraph.createNode(kind))
            load.pos = [left - 350, top]
            save.pos = [left + 400, top]
            graph.add(load)
            graph.add(save)
            load.widgets.find(widget => widget.name === 'image').value = 'example.png'
            load.connect(0, blueprint, 0)
            blueprint.connect(0, save, 0)
            return [left, top]
        }""",
        node,
    )
    app.look(left - 420, top - 120, 1)
    app.run()
    app.page.wait_for_function("document.querySelector('video')?.readyState >= 2", timeout=120_000)
    size = app.page.evaluate("(v => [v.videoWidth, v.videoHeight, v.duration])(document.querySelector('video'))")
    assert size[:2] == [64, 64] and abs(size[2] - 24 / 30) < 0.1
    assert app.toasts() == [] and app.errors == []
    seed = widgets(app, node)["seed"]
    assert seed != 0
    assert [value for (_, kind, name), value in inputs(app).items() if (kind, name) == (SAMPLER, "seed")] == [seed]
    app.look(left - 420, top - 120, 1)
    app.shot("blueprint")
